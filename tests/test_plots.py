"""The pictures of a run, on synthetic histories of few and many classes."""

import gc
import io

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from flaxcls.analysis import plots
from flaxcls.errors import InputError

NAMES = {
    "accuracy",
    "class_accuracy",
    "class_counts",
    "confusion",
    "curves",
    "loss",
    "precision_recall_f1",
}


def synthetic(classes, epochs, splits=("train", "val")):
    """A history, a confusion matrix and class counts that look like those of a run."""
    random = np.random.default_rng(classes)
    level = random.uniform(0.6, 1.0, classes)
    history = []
    for epoch in range(1, epochs + 1):
        for split in splits:
            recall = (level * (1 - np.exp(-epoch / 3))).clip(0, 1)
            record = {"epoch": epoch, "split": split, "step": epoch, "loss": 2 / epoch}
            record |= {"accuracy": float(recall.mean()), "class_accuracy": recall.tolist()}
            for name in ("precision", "recall", "f1"):
                record |= {f"{name}_macro": float(recall.mean()), f"{name}_weighted": 0.5}
            history.append(record)
    confusion = random.multinomial(30, np.full(classes, 1 / classes), size=classes)
    confusion += 200 * np.eye(classes, dtype=int)
    counts = {split: random.integers(1, 900, classes).tolist() for split in (*splits, "test")}
    return history, confusion, counts


def pixels(figure):
    """The drawn figure as uint8 (H, W, 3)."""
    buffer = io.BytesIO()
    figure.savefig(buffer)
    return np.asarray(Image.open(buffer).convert("RGB"))


@pytest.mark.parametrize("classes", [3, 200])
def test_every_picture_is_written_and_nothing_stays_in_memory(tmp_path, classes):
    history, confusion, counts = synthetic(classes, 12)
    names = [f"class {i}" for i in range(classes)]
    gc.collect()
    before = sum(type(thing) is Figure for thing in gc.get_objects())
    paths = plots.plot_run(history, confusion, names, counts, tmp_path / "plots")
    assert {path.stem for path in paths} == NAMES
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {f"{n}.png" for n in NAMES}
    for path in paths:
        with Image.open(path) as image:
            assert 500 < image.width < 3000
            assert 300 < image.height < 2000
            assert np.asarray(image.convert("L")).std() > 5
    gc.collect()
    assert sum(type(thing) is Figure for thing in gc.get_objects()) == before


def test_legends_hide_no_curve():
    history, _, _ = synthetic(3, 12)
    drawn = (
        plots.plot_loss,
        plots.plot_accuracy,
        plots.plot_precision_recall_f1,
        plots.plot_curves,
    )
    for figure in (plot(history, 9) for plot in drawn):
        pixels(figure)  # lays it out
        for axes in figure.axes:
            legend = axes.get_legend().get_window_extent()
            assert legend.y1 < axes.xaxis.label.get_window_extent().y0
            assert legend.y0 >= 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("splits", [("train",), ("val",)])
def test_one_epoch_and_missing_splits_and_metrics_are_drawn(tmp_path, splits):
    history, confusion, counts = synthetic(2, 1, splits)
    names = ["_cost: $5 or $6", "猫 \n line \udce9"]
    assert len(plots.plot_run(history, confusion * 0, names, counts, tmp_path)) == len(NAMES)
    for record in history:
        del record["class_accuracy"], record["f1_macro"], record["precision_macro"]
        record["loss"] = None
    written = plots.plot_run(history, None, names, {}, tmp_path, monitor="train/accuracy")
    assert {path.stem for path in written} == NAMES - {"confusion", "class_counts"}
    assert plots.plot_run([], None, names, {}, tmp_path) == []


def test_curves_mark_the_best_epoch_on_whole_epochs():
    history, _, _ = synthetic(3, 12)
    axes = plots.plot_accuracy(history, 7).axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[0].startswith("train, last")
    assert labels[1].startswith("validation, last")
    assert labels[2].startswith("best epoch 7,")
    assert all(tick == int(tick) for tick in axes.get_xticks())
    assert axes.get_ylim()[1] <= 1.02
    one = plots.plot_loss(synthetic(3, 1)[0], 1).axes[0]
    assert [t for t in one.get_xticks() if one.get_xlim()[0] <= t <= one.get_xlim()[1]] == [1]


def test_a_loss_that_falls_far_gets_a_logarithmic_axis():
    far = [{"epoch": e, "split": "train", "step": e, "loss": 3.0 / e**3} for e in range(1, 9)]
    near = [{"epoch": e, "split": "train", "step": e, "loss": 3.0 / e} for e in range(1, 9)]
    assert plots.plot_loss(far, None).axes[0].get_yscale() == "log"
    assert plots.plot_loss(near, None).axes[0].get_yscale() == "linear"


def test_many_classes_show_the_spread_and_the_extremes():
    history, _, _ = synthetic(200, 5)
    axes = plots.plot_class_accuracy(history, [f"c{i}" for i in range(200)], None).axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    final = np.array(history[-1]["class_accuracy"])
    assert len(labels) == 3 + 8
    assert labels[3].endswith(f"  c{final.argmax()}")
    assert labels[-1].endswith(f"  c{final.argmin()}")
    few = plots.plot_class_accuracy(synthetic(10, 5)[0], list("abcdefghij"), None).axes[0]
    assert len(few.get_lines()) == 10


def test_confusion_has_numbers_only_where_they_fit():
    for classes, numbers in ((3, 9), (10, 100), (20, 400), (21, 0), (200, 0)):
        _, confusion, _ = synthetic(classes, 1)
        figure = plots.plot_confusion(confusion, [f"class {i}" for i in range(classes)], "val")
        assert [len(axes.texts) for axes in figure.axes[:2]] == [numbers, numbers]
        assert len(figure.axes[0].get_yticks()) <= 30
        assert "(validation)" in figure.get_suptitle()
    listed = figure.axes[2].texts[0].get_text()
    wrong = confusion - np.diag(np.diag(confusion))
    assert f"\n{wrong.max():,}  (" in listed
    assert listed.index("Most frequent mistakes") < listed.index("Classes recognised least")


def test_confusion_shows_mistakes_in_a_colour_of_their_own():
    def reddish(figure):
        red, _, blue = np.moveaxis(pixels(figure).astype(int), -1, 0)
        return int((red - blue > 30).sum())

    perfect = np.eye(200, dtype=int) * 50
    names = [f"class {i}" for i in range(200)]
    assert reddish(plots.plot_confusion(perfect, names)) == 0
    perfect[150, 20] = 1
    assert reddish(plots.plot_confusion(perfect, names)) > 8


def test_a_picture_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "plots").write_text("a file")
    history, confusion, counts = synthetic(2, 2)
    with pytest.raises(InputError, match=r"cannot write '.*plots/loss\.png'"):
        plots.plot_run(history, confusion, ["a", "b"], counts, tmp_path / "plots")
