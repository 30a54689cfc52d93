"""Evaluation gives scikit-learn's metrics on the saved predictions, for any batch size."""

import csv

import jax
import numpy as np
import pytest
from sklearn import metrics as reference
from small_experiments import lenet

from flaxcls import sharding
from flaxcls.evaluate import Evaluator, softmax, write_predictions
from flaxcls.experiment import for_training

SPLIT = "val"


@pytest.fixture(scope="module")
def variables():
    """Variables of an untrained network that predicts several classes, most of them wrongly."""
    experiment = for_training(lenet())
    state = jax.jit(experiment.create_state)()
    # At first all logits are nearly equal: this spreads them.
    params = jax.tree.map(lambda x: 2.5 * x, state.params)
    return jax.device_get({"params": params, "batch_stats": state.batch_stats})


def evaluate(variables, batch_size, placement="device"):
    """The evaluation, and the experiment."""
    keys = {"eval__batch_size": batch_size, "data__placement": placement}
    experiment = for_training(lenet(data__max_per_class=0, **keys))
    placed = sharding.put_replicated(variables, experiment.mesh)
    return Evaluator(experiment)(placed, SPLIT, keep_logits=True), experiment


def read_predictions(folder):
    """Truth and prediction of each row of the table, as class names, and the arrays."""
    with open(folder / f"{SPLIT}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    with np.load(folder / f"{SPLIT}.npz") as file:
        return rows, dict(file)


# 180 examples: batches that fit, that leave a rest, of one example, and one that holds them all.
@pytest.mark.parametrize("batch_size", [1, 36, 77, 200])
def test_any_batch_size_gives_the_metrics_of_scikit_learn(batch_size, variables, tmp_path):
    placement = "host" if batch_size == 77 else "device"
    result, experiment = evaluate(variables, batch_size, placement)
    dataset = experiment.data.dataset
    split, names = dataset.splits[SPLIT], dataset.class_names
    write_predictions(tmp_path, SPLIT, split, result.logits, dataset)
    rows, arrays = read_predictions(tmp_path)

    assert [int(row["index"]) for row in rows] == list(range(len(split))) == list(arrays["index"])
    truth = np.array([names.index(row["truth"]) for row in rows])
    guess = np.array([names.index(row["prediction"]) for row in rows])
    np.testing.assert_array_equal(truth, split.labels)
    np.testing.assert_array_equal(truth, arrays["label"])
    np.testing.assert_array_equal(guess, arrays["probabilities"].argmax(axis=1))
    assert len(set(guess)) > 3, "too easy"

    classes = np.arange(len(names))
    confusion = reference.confusion_matrix(truth, guess, labels=classes)
    np.testing.assert_array_equal(result.confusion, confusion)
    record = result.record
    assert record["support"] == confusion.sum(axis=1).tolist()
    assert record["accuracy"] == reference.accuracy_score(truth, guess)
    top = reference.top_k_accuracy_score(truth, arrays["logits"], k=5, labels=classes)
    assert record["top_5"] == top
    for average in (None, "macro", "weighted"):
        scores = reference.precision_recall_fscore_support(
            truth, guess, labels=None if average else classes, average=average, zero_division=0
        )
        for name, expected in zip(("precision", "recall", "f1"), scores[:3], strict=True):
            key = name if average is None else f"{name}_{average}"
            np.testing.assert_allclose(record[key], expected, rtol=1e-12, atol=0)
    loss = reference.log_loss(truth, softmax(arrays["logits"]), labels=classes)
    np.testing.assert_allclose(record["loss"], loss, rtol=1e-6)
    assert result.first_bad_step == -1


def test_a_loss_that_is_not_finite_is_told(variables):
    broken = jax.tree.map(lambda x: x * np.float32(1e30), variables)
    assert evaluate(broken, 36)[0].first_bad_step == 0


def test_logits_are_brought_only_where_they_are_asked_for(variables, monkeypatch):
    experiment = for_training(lenet(eval__batch_size=36, data__max_per_class=0))
    evaluator = Evaluator(experiment)
    placed = sharding.put_replicated(variables, experiment.mesh)
    fetched, steps = [], []
    monkeypatch.setattr(
        "flaxcls.evaluate.fetch", lambda tree: fetched.append(tree) or jax.device_get(tree)
    )
    plain = evaluator(placed, SPLIT, on_step=steps.append)
    assert plain.logits is None
    assert len(fetched) == 1
    assert steps == [1, 2, 3, 4, 5]
    assert evaluator(placed, SPLIT, keep_logits=True).record == plain.record
    assert len(fetched) == 3


def test_softmax_is_exact_for_large_logits():
    logits = np.array([[1000.0, 999.0, -1000.0], [0.0, 0.0, 0.0]], np.float32)
    expected = [[1 / (1 + np.exp(-1)), np.exp(-1) / (1 + np.exp(-1)), 0], [1 / 3] * 3]
    np.testing.assert_allclose(softmax(logits), expected, rtol=1e-14)
