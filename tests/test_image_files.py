"""Images whose names tell their class, and parents that rules over class names tell."""

import numpy as np
import pytest
from PIL import Image

from flaxcls.data.load import load_dataset
from flaxcls.errors import InputError

PATTERN = r"(.+)_\d+\.jpg"
RULES = ("[A-Z].*=cat", "[a-z].*=dog")


@pytest.fixture
def breeds(tmp_path):
    """Two breeds of cats and one of dogs, as Oxford-IIIT Pet names them."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("Maine_Coon", "Abyssinian", "great_pyrenees"):
        for i in range(8):
            pixels = np.random.default_rng(i).integers(0, 256, (8, 9, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}_{i}.jpg")
    (folder / "list.txt").write_text("not an image")
    return folder


def read(path, **options):
    return load_dataset("image_files", str(path), **{"label_pattern": PATTERN, **options})


def test_names_tell_classes_and_rules_tell_parents(breeds):
    dataset = read(breeds, parents=RULES, val_fraction=0.25)
    assert dataset.class_names == ("Abyssinian", "Maine_Coon", "great_pyrenees")
    assert dataset.parent_names == ("cat", "dog")
    assert dataset.class_parents == (0, 0, 1)
    assert dataset.notes == (f"Not used: 1 other files in '{breeds}'.",)
    assert {key: len(split) for key, split in dataset.splits.items()} == {"train": 18, "val": 6}
    for split in dataset.splits.values():
        truth = [name.rpartition("_")[0] for name in split.names]
        assert [dataset.class_names[label] for label in split.labels] == truth
        kinds = ["cat" if name[0].isupper() else "dog" for name in truth]
        assert [dataset.parent_names[parent] for parent in split.parents] == kinds


def test_the_first_rule_that_matches_counts(breeds):
    dataset = read(breeds, parents=("Maine.*=large", "great.*=large", ".*=small"))
    assert dataset.parent_names == ("large", "small")
    assert dataset.class_parents == (1, 0, 0)


def test_parents_keep_their_numbers_on_data_that_lack_classes(breeds):
    known = read(breeds, parents=RULES).class_names
    for file in breeds.glob("[A-Z]*.jpg"):
        file.unlink()
    dataset = read(breeds, parents=RULES, known_classes=known)
    assert set(dataset.splits["train"].labels) == {2}
    assert set(dataset.splits["train"].parents) == {1}


def test_some_classes_only(breeds):
    dataset = read(breeds, classes=("great_pyrenees", "Abyssinian"))
    assert dataset.class_names == ("great_pyrenees", "Abyssinian")
    assert np.bincount(dataset.splits["train"].labels).tolist() == [8, 8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_pattern": ""}, "has no group that is the class; put one in brackets"),
        ({"label_pattern": "(["}, r"data.label_pattern: '\(\[' is no regular expression"),
        ({"label_pattern": r"(\d+)\.txt"}, "does not match 'Abyssinian_0.jpg' and 23 more"),
        ({"classes": ("beagle",)}, "data.classes: 'beagle' is no class"),
        ({"known_classes": ("Abyssinian",)}, "class 'Maine_Coon' .* is not one of the 1 classes"),
        ({"parents": ("cat",)}, "data.parents: 'cat' is no rule; write PATTERN=PARENT"),
        ({"parents": ("x.*=cat",)}, r"no class of images matches 'x\.\*'; correct or remove"),
        ({"parents": ("[A-Z].*=cat",)}, "class 'great_pyrenees' has no parent; add a rule"),
        ({"parents": ("[=cat",)}, r"data.parents: '\[' is no regular expression"),
    ],
)
def test_rules_that_do_not_fit_are_named(breeds, options, message):
    with pytest.raises(InputError, match=message) as caught:
        read(breeds, **options)
    assert "\n" not in str(caught.value)


def test_unreadable_files_are_named_or_skipped(breeds):
    (breeds / "Abyssinian_0.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=r"1 of 24 files .* 'Abyssinian_0.jpg' is empty"):
        read(breeds)
    dataset = read(breeds, on_bad="skip")
    assert dataset.skipped == ("Abyssinian_0.jpg",)
    assert len(dataset.splits["train"]) == 23
