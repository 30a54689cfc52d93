"""The decisions that are taken from a metric history."""

import json
import math

import numpy as np
import pytest

from flaxcls.errors import InputError
from flaxcls.history import (
    best_record,
    check_monitor,
    metric_mode,
    percent,
    should_stop,
    summary,
    verdict,
)


def history_of(split="val", **metrics):
    """Records of one split from lists of values."""
    length = len(next(iter(metrics.values())))
    return [
        {"epoch": i + 1, "split": split, "step": 10 * (i + 1)}
        | {name: values[i] for name, values in metrics.items()}
        for i in range(length)
    ]


def training(train_loss, val_loss=(), accuracy=0.9):
    """A whole history, train and validation in turn."""
    history = []
    for i, loss in enumerate(train_loss):
        history += [{"epoch": i + 1, "split": "train", "step": i, "loss": loss, "accuracy": 0.95}]
        if i < len(val_loss):
            history += [
                {
                    "epoch": i + 1,
                    "split": "val",
                    "step": i,
                    "loss": val_loss[i],
                    "accuracy": accuracy,
                }
            ]
    return history


def test_losses_are_minimised_and_scores_maximised():
    for name in ("val/loss", "train/child_loss", "val/cross_entropy"):
        assert metric_mode(name) == "min"
    for name in ("val/accuracy", "val/top_5", "val/f1_weighted", "train/recall_macro"):
        assert metric_mode(name) == "max"


def test_ties_go_to_the_lower_loss_and_then_to_the_first():
    history = history_of(accuracy=[0.9, 0.9, 0.9, 0.9, 0.8], loss=[1.0, math.nan, 0.5, 0.5, 0.1])
    assert best_record(history, "val/accuracy")["epoch"] == 3
    assert best_record(history[:2], "val/accuracy")["epoch"] == 1
    assert best_record(history_of(loss=[0.5, 0.2, 0.2]), "val/loss")["epoch"] == 2


def test_nan_is_never_the_best():
    history = history_of(
        accuracy=[0.1, math.nan, 0.9, 0.8, 0.8], loss=[3.0, math.nan, 1.0, 0.5, 0.5]
    )
    assert best_record(history, "val/accuracy")["epoch"] == 3
    assert best_record(history, "val/loss")["epoch"] == 4
    assert best_record(history_of(loss=[math.nan, None]), "val/loss") is None
    assert best_record([], "val/loss") is None
    assert best_record(history, "train/loss") is None


def test_an_unknown_metric_is_refused_with_the_nearest_name():
    history = history_of(accuracy=[0.1], loss=[1.0], f1_macro=[0.2], f1=[[0.1, 0.3]])
    for wrong, near in {
        "val/acuracy": "val/accuracy",
        "accuracy": "val/accuracy",
        "val/f1": "val/f1_macro",
        "vall/loss": "val/loss",
        "val/learning_rate": "val/",
    }.items():
        with pytest.raises(InputError, match=near):
            best_record(history, wrong)
    assert check_monitor("val/top_5", ["loss", "top_5"]) == ("val", "top_5")


def test_stops_once_patience_epochs_in_a_row_were_no_better():
    losses = [1.0, 0.8, 0.9, 0.85, 0.79, 0.8, 0.8, 0.8]
    stops = [should_stop(history_of(loss=losses[:n]), "val/loss", 3) for n in range(1, 9)]
    assert stops == [False] * 7 + [True]
    assert should_stop(history_of(loss=losses[:4]), "val/loss", 2)
    # 0.79 is not better than 0.8 by more than 0.02, so that the third in a row is epoch 5.
    assert should_stop(history_of(loss=losses[:5]), "val/loss", 3, min_delta=0.02)
    assert not should_stop(history_of(accuracy=[0.1, 0.2, 0.3]), "val/accuracy", 1)
    assert should_stop(history_of(accuracy=[0.3, math.nan]), "val/accuracy", 1)
    for never in (None, 0):
        assert not should_stop(history_of(loss=losses), "val/loss", never)


def test_a_slow_improvement_below_min_delta_adds_up():
    history = history_of(loss=[1.0, 0.95, 0.9, 0.85])
    assert not should_stop(history, "val/loss", 3, min_delta=0.12)
    assert should_stop(history[:3], "val/loss", 2, min_delta=0.12)


def test_summary_has_the_numbers_of_the_best_epoch_in_full_precision():
    history = [
        {"epoch": 1, "split": "train", "step": 5, "loss": 2.0, "accuracy": 0.5, "seconds": 2.0}
        | {"images_per_second": 100.0, "wait_share": 0.0, "learning_rate": 0.1},
        {"epoch": 1, "split": "val", "step": 5, "loss": 1 / 3, "accuracy": 2 / 3, "f1": [0.1, 0.2]}
        | {"f1_weighted": np.float64(0.7), "seconds": 1.0, "images_per_second": 300.0},
        {"epoch": 2, "split": "train", "step": 10, "loss": 1.0, "accuracy": 0.6, "seconds": 1.0}
        | {"images_per_second": 400.0, "wait_share": 0.0, "learning_rate": 0.1},
        {"epoch": 2, "split": "val", "step": 10, "loss": 0.4, "accuracy": 0.5, "f1": [0.1, 0.2]}
        | {"f1_weighted": 0.6, "seconds": 1.0, "images_per_second": 300.0},
    ]
    result = summary(history, model="lenet", params=44426, monitor="val/accuracy")
    assert result == {
        "model": "lenet",
        "params": 44426,
        "best_epoch": 1,
        "epochs": 2,
        "seconds": 5.0,
        "images_per_second": 200.0,
        "val": {"loss": 1 / 3, "accuracy": 2 / 3, "f1_weighted": 0.7},
        "test": None,
    }
    assert json.loads(json.dumps(result)) == result
    test = {"loss": 0.1, "accuracy": 0.9, "f1": [1.0], "epoch": 1, "split": "test", "step": 5}
    result = summary(history[:1], model="m", params=1, monitor="train/loss", test=test, seconds=9.0)
    assert result["val"] is None
    assert result["test"] == {"loss": 0.1, "accuracy": 0.9}
    assert result["seconds"] == 9.0


def test_verdict_tells_improving_from_flat_overfitting_and_worse():
    random = np.random.default_rng(0)
    epochs = np.arange(1, 31)

    def noisy(values):
        return (values * (1 + random.normal(0, 0.02, len(values)))).tolist()

    falling = 1.5 / epochs
    sentence = verdict(training(noisy(falling), noisy(2 * np.exp(-epochs / 15) + 0.1)))
    assert sentence.startswith("Improving still: validation loss falls by ")
    sentence = verdict(training(noisy(falling), noisy(2 * np.exp(-epochs / 2) + 0.4)))
    assert sentence.startswith("Flat since epoch ")
    rising = 2 * np.exp(-epochs / 2) + 0.4 + 0.03 * np.maximum(0, epochs - 8)
    sentence = verdict(training(noisy(falling), noisy(rising)))
    assert sentence.startswith("Overfitting since epoch ")
    assert abs(int(sentence.split()[3].rstrip(":")) - 8) <= 2
    assert "train loss fell from" in sentence
    assert "validation loss rose from" in sentence
    assert "train 95.00 %, validation 90.00 %" in sentence
    assert verdict(training(noisy(rising), noisy(rising))).startswith("Getting worse since epoch ")
    assert verdict(training(noisy(rising))).startswith("Getting worse since epoch ")
    assert verdict(training(noisy(2 * np.exp(-epochs / 15)))).startswith("Improving still: train")


def test_noise_around_a_level_is_seldom_taken_for_a_trend():
    random = np.random.default_rng(1)
    wrong = 0
    for _ in range(100):
        val = 0.4 + 2 * np.exp(-np.arange(30) / 2) + random.normal(0, 0.05, 30)
        wrong += not verdict(training(1.5 / np.arange(1, 31), val)).startswith("Flat")
    assert wrong <= 10


def test_verdict_of_short_broken_and_perfect_runs_is_one_sentence():
    cases = {
        "No epoch": [],
        "Too early to see a trend after one epoch": training([1.0], [1.0]),
        "Too early to see a trend after 2 epochs": training([1.0, 0.9], [1.0, 1.1]),
        "Improving still": training([1.0, 0.5], [1.0, 0.8]),
        "Diverged: the train loss is not finite since epoch 2": training([1.0, math.nan, None]),
        "Diverged: the validation loss is not finite since epoch 1": training([1.0], [math.inf]),
        "Flat since epoch 1: ": training([0.5] * 6, [0.5] * 6),
        "Nothing left to learn, every validation image is classified correctly": training(
            [1.0, 0.8, 0.6, 0.5, 0.4, 0.3], [1.0, 0.8, 0.6, 0.5, 0.4, 0.3], accuracy=1.0
        ),
    }
    for start, history in cases.items():
        sentence = verdict(history)
        assert sentence.startswith(start)
        assert sentence.endswith(".")
        assert ". " not in sentence


def test_more_epochs_are_advised_where_the_loss_falls_by_more_than_a_few_percent():
    # What a cosine schedule changed in its last epochs.
    settled = [0.5, 0.2, 0.1, 0.06, 0.04, 0.035, 0.031, 0.03, 0.0294, 0.029, 0.0288, 0.0287, 0.0286]
    assert verdict(training(settled, settled)).startswith("Flat")
    falling = [2.0, 1.6, 1.3, 1.1, 0.9]
    assert verdict(training(falling, falling)).endswith("; more epochs may help.")
    advice = verdict(training(falling, falling), can_go_on=False)
    assert advice.endswith("; a new run with more epochs may help.")


def test_hundred_percent_means_all_of_them():
    assert percent(1.0) == "100.00 %"
    assert percent(0.999999) == "99.99 %"
    assert percent(0.96214) == "96.21 %"
    assert percent(None) == percent(math.nan) == "n/a"
