"""Splits are exact, stratified, the same for ever, and lose no example."""

import numpy as np
import pytest

from flaxcls.data.dataset import Dataset, Split, class_counts, fingerprint, with_parents
from flaxcls.data.splits import (
    draw_classes,
    draw_order,
    per_class_count,
    split_dataset,
    take_per_class,
)
from flaxcls.errors import InputError


def records(counts: list[int], start: int = 0) -> Split:
    """A split whose images hold their own number, so that every example can be followed."""
    labels = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    labels = labels[np.random.default_rng(0).permutation(len(labels))]
    numbers = np.arange(start, start + len(labels), dtype="<u4")
    return Split(numbers.view(np.uint8).reshape(-1, 2, 2, 1), labels)


def collection(counts: list[int], **others: list[int]) -> Dataset:
    splits = {"train": records(counts)}
    for i, (key, sizes) in enumerate(others.items()):
        splits[key] = records(sizes, start=1000 * (i + 1))
    return Dataset("numbers", tuple("abcdefghij"[: len(counts)]), splits)


def numbers(split: Split) -> list[int]:
    return np.ascontiguousarray(split.images).reshape(-1).view("<u4").tolist()


def all_numbers(dataset: Dataset) -> list[int]:
    return [number for split in dataset.splits.values() for number in numbers(split)]


def sizes(dataset: Dataset) -> dict[str, int]:
    return {key: len(split) for key, split in dataset.splits.items()}


def test_order_is_the_same_for_ever():
    assert draw_order(8, 42, "split").tolist() == [6, 0, 2, 4, 3, 1, 5, 7]


@pytest.mark.parametrize("stratify", [True, False])
def test_every_example_lands_in_exactly_one_split(stratify):
    dataset = split_dataset(
        collection([40, 31, 29]), val_fraction=0.1, test_fraction=0.2, stratify=stratify, seed=3
    )
    assert sizes(dataset) == {"train": 70, "val": 10, "test": 20}
    assert sorted(all_numbers(dataset)) == list(range(100))
    for split in dataset.splits.values():
        assert numbers(split) == sorted(numbers(split))
        assert split.names == tuple(f"train/{i}" for i in numbers(split))


@pytest.mark.parametrize(
    ("counts", "val", "test", "expected"),
    [
        ([800, 798, 63], 0.4, 0.0, [[480, 479, 38], [320, 319, 25]]),  # 60/40
        ([500] * 9, 0.1, 0.2, [[350] * 9, [50] * 9, [100] * 9]),  # 70/10/20
        ([200] * 5, 0.33, 0.0, [[134] * 5, [66] * 5]),  # 67/33
        ([6000] * 10, 0.3, 0.0, [[4200] * 10, [1800] * 10]),  # 70/30 of train
    ],
)
def test_published_splits_are_exact(counts, val, test, expected):
    dataset = split_dataset(collection(counts), val_fraction=val, test_fraction=test)
    assert [c.tolist() for c in class_counts(dataset).values()] == expected


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.25, 1 / 3, 0.4, 0.5])
def test_stratified_shares_are_within_one_and_the_total_is_right(fraction):
    counts = np.array([7, 13, 101, 3, 58, 2])
    dataset = split_dataset(collection(counts.tolist()), val_fraction=fraction, seed=1)
    val = class_counts(dataset)["val"]
    assert val.sum() == int(fraction * counts.sum() + 0.5)
    assert (np.abs(val - fraction * counts) < 1).all()
    assert (class_counts(dataset)["train"] >= 1).all()


def test_small_classes_keep_their_last_example_and_large_ones_give_more():
    dataset = split_dataset(collection([7, 13, 101, 3, 58, 2, 1]), val_fraction=0.9)
    assert class_counts(dataset)["val"].tolist() == [6, 12, 92, 2, 54, 1, 0]
    assert class_counts(dataset)["train"].tolist() == [1, 1, 9, 1, 4, 1, 1]


def test_seed_decides_and_nothing_else():
    source = collection([30, 20])

    def drawn(seed):
        return numbers(split_dataset(source, val_fraction=0.2, seed=seed).splits["val"])

    assert drawn(seed=1) == drawn(seed=1)
    assert drawn(seed=1) != drawn(seed=2)


def test_own_splits_are_kept_and_missing_ones_drawn_from_train():
    source = collection([30, 30], test=[5, 5])
    dataset = split_dataset(source, val_fraction=0.3, test_fraction=0.5)
    assert sizes(dataset) == {"train": 42, "val": 18, "test": 10}
    assert dataset.splits["test"] is source.splits["test"]
    assert list(dataset.splits) == ["train", "val", "test"]


def test_own_mode_draws_nothing():
    source = collection([30, 30], test=[5, 5])
    dataset = split_dataset(source, val_fraction=0.3, mode="own")
    assert sizes(dataset) == {"train": 60, "test": 10}


def test_drawn_mode_puts_all_together():
    source = collection([30, 30], val=[5, 5], test=[10, 20])
    dataset = split_dataset(source, val_fraction=0.25, mode="drawn")
    assert sizes(dataset) == {"train": 75, "val": 25}
    assert sorted(all_numbers(dataset)) == sorted(all_numbers(source))
    names = dict(zip(dataset.splits["val"].names, numbers(dataset.splits["val"]), strict=True))
    for name, number in names.items():
        split, index = name.split("/")
        assert numbers(source.splits[split])[int(index)] == number


def test_maximum_is_taken_before_anything_is_drawn():
    dataset = split_dataset(
        collection([900, 510, 100], test=[50, 60, 70]), val_fraction=0.1, max_per_class=500
    )
    assert class_counts(dataset)["train"].tolist() == [450, 450, 90]
    assert class_counts(dataset)["val"].tolist() == [50, 50, 10]
    assert class_counts(dataset)["test"].tolist() == [50, 60, 70]


def test_parents_names_and_aspect_follow_their_examples():
    split = records([20, 20, 20])
    names = tuple(f"{i}.jpg" for i in range(60))
    split = Split(
        tuple(f"/data/{n}" for n in names), split.labels, None, names, np.arange(60, dtype="f4")
    )
    dataset = Dataset("files", ("ant", "bee", "cat"), {"train": split})
    dataset = with_parents(dataset, {"ant": "insect", "bee": "insect", "cat": "mammal"})
    dataset = split_dataset(dataset, val_fraction=0.3)
    assert dataset.parent_names == ("insect", "mammal")
    for part in dataset.splits.values():
        assert part.images == tuple(f"/data/{n}" for n in part.names)
        assert part.aspect.tolist() == [int(n.split(".")[0]) for n in part.names]
        assert (part.parents == (part.labels == 2)).all()


def test_drawing_fewer_gives_a_part_of_drawing_more():
    split = records([50, 80])
    few = numbers(take_per_class(split, 0.1, 0, "train", "x"))
    more = numbers(take_per_class(split, 0.5, 0, "train", "x"))
    assert len(few) == 13
    assert set(few) < set(more)


@pytest.mark.parametrize(
    ("asked", "available", "expected"),
    [(0, 7, 7), (0.01, 275_312, 2753), (0.01, 20, 1), (0.5, 3, 2), (500, 700, 500), (500, 63, 63)],
)
def test_count_a_class(asked, available, expected):
    assert per_class_count(asked, available) == expected


def test_classes_are_drawn_by_seed_whatever_their_order():
    names = [f"c{i}" for i in range(30)]
    drawn = draw_classes(names, 5, 0)
    assert len(set(drawn)) == 5
    assert drawn == draw_classes(names[::-1], 5, 0) == tuple(sorted(drawn))
    assert drawn != draw_classes(names, 5, 1)


@pytest.mark.parametrize(
    ("counts", "options", "words"),
    [
        ([5, 5], {"mode": "mine"}, "split_mode must be one of auto, own, drawn"),
        ([5, 5], {"val_fraction": 1.0}, "val_fraction must be at least 0 and below 1"),
        ([5, 5], {"test_fraction": -0.1}, "test_fraction"),
        ([5, 5], {"val_fraction": 0.5, "test_fraction": 0.5}, "leaves nothing to train on"),
        ([5, 5], {"max_per_class": -1}, "max_per_class"),
        ([2, 2], {"val_fraction": 0.1}, "val_fraction=0.1 of 4 examples is none"),
        ([2, 1, 1], {"val_fraction": 0.5}, "class 'b' has 1"),
        ([9, 0, 5], {}, "class 'b' has no training examples"),
        ([500, 1], {"val_fraction": 0.9, "stratify": False, "seed": 1}, "set data.stratify=True"),
    ],
)
def test_impossible_splits_are_refused(counts, options, words):
    with pytest.raises(InputError, match=words):
        split_dataset(collection(counts), **options)


def test_source_without_train_needs_drawn():
    source = Dataset("only", ("a", "b"), {"test": records([5, 5])})
    with pytest.raises(InputError, match="no split 'train', only test; set data"):
        split_dataset(source)
    assert sizes(split_dataset(source, mode="drawn", val_fraction=0.2)) == {"train": 8, "val": 2}


@pytest.mark.parametrize("asked", [1, 1.5, -3])
def test_unclear_count_a_class_is_refused(asked):
    with pytest.raises(InputError, match="per_class"):
        per_class_count(asked, 10)


@pytest.mark.parametrize("count", [1, 4])
def test_impossible_number_of_classes_is_refused(count):
    with pytest.raises(InputError, match="from 2 to 3 classes"):
        draw_classes(["a", "b", "c"], count, 0)


@pytest.mark.parametrize(
    ("parents", "words"),
    [
        ({"a": "x"}, "class 'b' has no parent"),
        ({"a": "x", "b": "x", "c": "y"}, "'c' is no class of numbers"),
    ],
)
def test_parents_must_fit_the_classes(parents, words):
    with pytest.raises(InputError, match=words):
        with_parents(collection([3, 3]), parents)


@pytest.mark.parametrize("label", [-1, 2])
def test_label_out_of_range_is_named(label):
    split = Split(np.zeros((3, 2, 2, 1), np.uint8), np.array([0, 1, label], np.int32))
    with pytest.raises(InputError, match=f"label {label} of example 2 is out of range for 2 names"):
        Dataset("numbers", ("a", "b"), {"train": split})


def test_fingerprint_notices_what_matters(tmp_path):
    source = collection([30, 20])
    same = fingerprint(split_dataset(source, val_fraction=0.2, seed=1))
    assert same == fingerprint(split_dataset(collection([30, 20]), val_fraction=0.2, seed=1))
    images = source.splits["train"].images.copy()
    images[7] += 1
    changed = Dataset(
        "numbers", source.class_names, {"train": Split(images, source.splits["train"].labels)}
    )
    others = [
        split_dataset(source, val_fraction=0.2, seed=2),
        source,
        split_dataset(changed, val_fraction=0.2, seed=1),
        Dataset("numbers", ("a", "c"), source.splits),
    ]
    assert len({same, *map(fingerprint, others)}) == 5


def test_fingerprint_of_files_goes_by_name_and_size_not_by_place(tmp_path):
    prints = []
    for folder, content in (("one", b"abc"), ("two", b"xyz"), ("three", b"more")):
        (tmp_path / folder).mkdir()
        file = tmp_path / folder / "a.jpg"
        file.write_bytes(content)
        split = Split((str(file),), np.zeros(1, np.int32), names=("a.jpg",))
        prints.append(fingerprint(Dataset("files", ("a",), {"train": split})))
    assert prints[0] == prints[1] != prints[2]
    file.unlink()
    with pytest.raises(InputError, match=r"a\.jpg' is gone"):
        fingerprint(Dataset("files", ("a",), {"train": split}))
