"""Every source reads what is on disk, and names what is wrong with it."""

import gzip
import io
import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flaxcls.data.dataset import class_counts, fingerprint, named
from flaxcls.data.decode import ImageSpec, decode, decode_all
from flaxcls.data.load import SOURCES, check_run_folder, load_dataset
from flaxcls.data.sources import digits, idx, image_folder, npy, npz
from flaxcls.errors import InputError

SHARED = Path(__file__).parents[1] / "../shared/data"
TINY_TFDS = Path(__file__).parent / "data" / "tiny_tfds.zip"


def shared(name: str) -> Path:
    if not (SHARED / name).exists():
        pytest.skip(f"no {SHARED / name}")
    return SHARED / name


def sizes(dataset) -> dict[str, int]:
    return {key: len(split) for key, split in dataset.splits.items()}


# Image folders


def write_images(folder: Path, n: int = 2, kind: str = "png", shape=(12, 8)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        pixels = np.random.default_rng(i).integers(0, 256, (*shape, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.{kind}")
    return folder


@pytest.fixture
def pets(tmp_path) -> Path:
    """Class folders dog (3) and cat (2)."""
    root = tmp_path / "pets"
    write_images(root / "dog", 3)
    write_images(root / "cat", 2, "jpg", (8, 16))
    return root


def test_class_folders_are_one_split_in_sorted_order(pets):
    dataset = image_folder.read(pets)
    assert dataset.name == "pets"
    assert dataset.class_names == ("cat", "dog")
    train = dataset.splits["train"]
    assert train.names == ("cat/0.jpg", "cat/1.jpg", "dog/0.png", "dog/1.png", "dog/2.png")
    assert train.labels.tolist() == [0, 0, 1, 1, 1]
    assert train.labels.dtype == np.int32
    assert train.aspect.tolist() == pytest.approx([2, 2, 8 / 12, 8 / 12, 8 / 12])
    assert decode_all(train.images, ImageSpec(4)).shape == (5, 4, 4, 3)


def test_upper_case_class_names_and_extensions_are_as_torchvision_has_them(pets):
    write_images(pets / "Zebra", 1)
    (pets / "Zebra" / "0.png").rename(pets / "Zebra" / "0.PNG")
    assert image_folder.read(pets).class_names == ("Zebra", "cat", "dog")


def test_split_folders_are_splits_and_labels_go_by_name(tmp_path):
    for folder in ("train/ant", "train/bee", "train/cat", "Validation/bee", "test/cat", "test/ant"):
        write_images(tmp_path / folder, 2)
    (tmp_path / "test/bee").mkdir()
    dataset = image_folder.read(tmp_path)
    assert dataset.class_names == ("ant", "bee", "cat")
    assert {k: v.tolist() for k, v in class_counts(dataset).items()} == {
        "train": [2, 2, 2],
        "val": [0, 2, 0],
        "test": [2, 0, 2],
    }
    assert dataset.splits["test"].names[-1] == "test/cat/1.png"


def test_a_class_may_be_called_train(tmp_path):
    for name in ("train", "bus"):
        write_images(tmp_path / name)
    assert image_folder.read(tmp_path).class_names == ("bus", "train")


def test_hidden_files_nested_folders_and_links_are_handled(pets):
    (pets / "cat" / ".DS_Store").write_bytes(b"x")
    (pets / "cat" / "Thumbs.db").write_bytes(b"x")
    (pets / ".git").mkdir()
    write_images(pets / "cat" / "more", 1)
    (pets / "cat" / "loop").symlink_to(pets / "cat")
    (pets / "fox").symlink_to(write_images(pets.parent / "elsewhere", 4))
    (pets / "dog" / "link.png").symlink_to(pets / "dog" / "0.png")
    dataset = image_folder.read(pets)
    assert dataset.class_names == ("cat", "dog", "fox")
    assert class_counts(dataset)["train"].tolist() == [3, 4, 4]


def test_what_is_not_used_is_noted(tmp_path):
    for folder in ("train/a", "train/b", "annotations/x"):
        write_images(tmp_path / folder)
    write_images(tmp_path, 1)
    notes = image_folder.read(tmp_path).notes
    assert len(notes) == 2
    assert any("annotations" in n for n in notes)
    assert any("1 images" in n for n in notes)


def test_unreadable_files_stop_with_their_names(pets):
    (pets / "cat" / "notes.txt").write_text("hello")
    (pets / "cat" / "text.jpg").write_text("no image")
    (pets / "dog" / "empty.png").write_bytes(b"")
    whole = (pets / "cat" / "0.jpg").read_bytes()
    (pets / "dog" / "cut.jpg").write_bytes(whole[:-40])
    (pets / "dog" / "gone.jpg").symlink_to(pets / "nowhere")
    with pytest.raises(InputError) as error:
        image_folder.read(pets)
    message = str(error.value)
    for words in (
        "5 of 10 files",
        "'cat/notes.txt' is not an image file",
        "'cat/text.jpg' is not an image",
        "'dog/empty.png' is empty",
        "'dog/cut.jpg' is truncated",
        "'dog/gone.jpg' is a link that leads nowhere",
        "data.on_bad=skip",
    ):
        assert words in message
    dataset = image_folder.read(pets, on_bad="skip")
    assert class_counts(dataset)["train"].tolist() == [2, 3]
    assert dataset.skipped == (
        "cat/notes.txt",
        "cat/text.jpg",
        "dog/cut.jpg",
        "dog/empty.png",
        "dog/gone.jpg",
    )


def test_a_link_to_itself_is_named_or_left_out(pets):
    for name in ("loop.png", "more"):
        (pets / "cat" / name).symlink_to(name)
    with pytest.raises(InputError, match=r"2 of 7 .*'cat/loop.png' is a link that leads nowhere"):
        image_folder.read(pets)
    dataset = image_folder.read(pets, on_bad="skip")
    assert class_counts(dataset)["train"].tolist() == [2, 3]
    assert dataset.skipped == ("cat/loop.png", "cat/more")


def test_a_class_whose_link_leads_nowhere_is_noted(pets):
    (pets / "fox").symlink_to("fox")
    (pets / "owl").symlink_to("/no/such/folder")
    dataset = image_folder.read(pets)
    assert dataset.class_names == ("cat", "dog")
    assert dataset.notes == (f"Not used: fox, owl in '{pets}', links that lead nowhere.",)


@pytest.mark.parametrize("source", ["image_folder", "npy"])
def test_a_run_folder_may_not_lie_among_the_data(source, tmp_path):
    data = tmp_path / "photos"
    data.mkdir()
    (tmp_path / "link").symlink_to(data)
    for folder in (data, data / "run", data / "a" / "run", tmp_path / "link" / "run"):
        with pytest.raises(
            InputError, match=r"--workdir: .* data\.path .*; give a --workdir outsi"
        ):
            check_run_folder(folder, source, str(data))
    for folder in (tmp_path / "photos2", tmp_path / "run", tmp_path):
        check_run_folder(folder, source, str(data))
    check_run_folder(data / "run", "idx", str(data))
    check_run_folder(data, "digits", None)


def test_skipping_finds_damage_inside_a_file(pets):
    file = pets / "dog" / "0.png"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(data)
    dataset = image_folder.read(pets, on_bad="skip")
    assert dataset.skipped == ("dog/0.png",)


def test_chosen_classes_are_numbered_as_given(pets):
    write_images(pets / "ant")
    (pets / "ant" / "bad.jpg").write_bytes(b"")
    dataset = load_dataset("image_folder", str(pets), classes=("dog", "cat"))
    assert dataset.class_names == ("dog", "cat")
    assert class_counts(dataset)["train"].tolist() == [3, 2]


def test_a_trained_model_is_evaluated_on_some_of_its_classes(pets):
    dataset = load_dataset("image_folder", str(pets), known_classes=("ant", "dog", "cat"))
    assert dataset.class_names == ("ant", "dog", "cat")
    assert class_counts(dataset)["train"].tolist() == [0, 3, 2]
    with pytest.raises(InputError, match=r"'dog' .* not one of the 2 classes the model was"):
        load_dataset("image_folder", str(pets), known_classes=("ant", "cat"))


def test_a_trained_model_needs_no_training_folder(tmp_path):
    write_images(tmp_path / "test" / "dog")
    dataset = load_dataset("image_folder", str(tmp_path), known_classes=("cat", "dog"))
    assert class_counts(dataset)["test"].tolist() == [0, 2]


def make_flat(root: Path) -> None:
    write_images(root, 3)


def make_one_class(root: Path) -> None:
    write_images(root / "cat")


def make_empty_class(root: Path) -> None:
    write_images(root / "cat")
    (root / "dog").mkdir()


def make_class_of_text(root: Path) -> None:
    write_images(root / "cat")
    (root / "dog").mkdir()
    (root / "dog" / "a.txt").write_text("x")


def make_stray_class(root: Path) -> None:
    for folder in ("train/cat", "train/dog", "val/fox"):
        write_images(root / folder)


def make_flat_train(root: Path) -> None:
    for folder in ("train", "test"):
        write_images(root / folder)


def make_flat_test(root: Path) -> None:
    for folder in ("train/cat", "train/dog", "test"):
        write_images(root / folder)


def make_no_train(root: Path) -> None:
    for folder in ("val/cat", "test/cat"):
        write_images(root / folder)


def make_two_vals(root: Path) -> None:
    for folder in ("train/cat", "val/cat", "valid/cat"):
        write_images(root / folder)


def make_empty_test(root: Path) -> None:
    for folder in ("train/cat", "train/dog"):
        write_images(root / folder)
    (root / "test" / "cat").mkdir(parents=True)


def make_nothing(root: Path) -> None:
    root.mkdir(exist_ok=True)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (make_nothing, "is empty; it should hold images, one folder a class"),
        (make_flat, r"no class folders in .* \(found 3 files at its top level\); put each class"),
        (make_one_class, r"at least 2 classes, found 1 \(cat\)"),
        (make_empty_class, r"no images in the class folder .*dog' \(it is empty\)"),
        (make_class_of_text, r"no images in the class folder .*dog' \(it holds 1 other files\)"),
        (make_stray_class, "class 'fox' in .*val' has no folder in train"),
        (make_flat_train, "no class folders in .*train'"),
        (make_flat_test, r"no class folders in .*test' \(found 2 files"),
        (make_no_train, "has val and test but no train folder"),
        (make_two_vals, "has both 'val' and 'valid'; keep one"),
        (make_empty_test, "no images in .*test'"),
    ],
)
def test_folders_that_cannot_be_used_are_refused(make, words, tmp_path):
    make(tmp_path)
    with pytest.raises(InputError, match=words) as error:
        load_dataset("image_folder", str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_class_of_bad_files_cannot_be_skipped(pets):
    for i in range(3):
        (pets / "dog" / f"{i}.png").write_bytes(b"junk")
    with pytest.raises(InputError, match="no file of class 'dog'"):
        image_folder.read(pets, on_bad="skip")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"path": "/no/such/folder"}, "'/no/such/folder' does not exist; set it to the folder"),
        ({"path": ""}, "data.path is not set; set it to the folder of images"),
        ({"path": __file__}, "is a file, not a folder"),
        ({"on_bad": "ignore"}, "data.on_bad must be 'error' or 'skip', not 'ignore'"),
        ({"classes": ("cat", "bird")}, "'bird' is no class of .*; it has cat, dog"),
        ({"classes": ("cat",), "num_classes_drawn": 2}, "both set"),
        ({"name": "pets"}, "data.name: source 'image_folder' takes none"),
        ({"num_classes_drawn": 3}, "num_classes_drawn is 3, but from 2 to 2"),
    ],
)
def test_impossible_arguments_are_refused(options, words, pets):
    with pytest.raises(InputError, match=words):
        load_dataset("image_folder", **{"path": str(pets), **options})


def test_caltech_is_read_and_split_as_published():
    dataset = load_dataset("image_folder", str(shared("caltech101_3")), val_fraction=0.4)
    assert dataset.class_names == ("Motorbikes", "airplanes", "schooner")
    assert {k: v.tolist() for k, v in class_counts(dataset).items()} == {
        "train": [479, 480, 38],
        "val": [319, 320, 25],
    }


# Digits


def test_digits_are_the_default_and_need_no_file():
    dataset = load_dataset("digits", val_fraction=0.1, test_fraction=0.2)
    assert sizes(dataset) == {"train": 1258, "val": 180, "test": 359}
    images = digits.read().splits["train"].images
    assert images.shape == (1797, 8, 8, 1)
    assert (images.dtype, images.min(), images.max()) == (np.uint8, 0, 255)


def test_reading_digits_imports_no_other_sources_library():
    code = (
        "import sys; from flaxcls.data.load import load_dataset; load_dataset('digits');"
        "print([m for m in ('tensorflow_datasets', 'tensorflow', 'grain') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# IDX


def idx_bytes(values: np.ndarray) -> bytes:
    dimensions = b"".join(n.to_bytes(4, "big") for n in values.shape)
    return bytes((0, 0, 8, values.ndim)) + dimensions + values.astype(np.uint8).tobytes()


def write_idx(folder: Path, prefix: str = "train", n: int = 6, suffix: str = "", dot: str = "-"):
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(len(prefix))
    images, labels = rng.integers(0, 256, (n, 5, 4), np.uint8), np.arange(n) % 3
    for kind, values, ndim in (("images", images, 3), ("labels", labels, 1)):
        data = idx_bytes(values)
        file = folder / f"{prefix}-{kind}{dot}idx{ndim}-ubyte{suffix}"
        file.write_bytes(gzip.compress(data) if suffix else data)
    return images, labels


@pytest.mark.parametrize(("suffix", "dot"), [("", "-"), (".gz", "-"), ("", "."), (".gz", ".")])
def test_idx_files_are_read_plain_and_zipped(suffix, dot, tmp_path):
    images, labels = write_idx(tmp_path, "train", 6, suffix, dot)
    write_idx(tmp_path, "t10k", 3, suffix, dot)
    dataset = idx.read(tmp_path)
    assert sizes(dataset) == {"train": 6, "test": 3}
    assert (dataset.splits["train"].images == images[..., None]).all()
    assert (dataset.splits["train"].labels == labels).all()
    assert dataset.class_names == ("0", "1", "2")
    assert idx.read(tmp_path, "fashion_mnist").class_names[0] == "T-shirt/top"


def test_idx_names_it_does_not_know_are_refused(tmp_path):
    write_idx(tmp_path)
    with pytest.raises(InputError, match="no class names are known for 'fashion'; write mnist or"):
        idx.read(tmp_path, "fashion")


def test_idx_without_test_files_is_fine(tmp_path):
    write_idx(tmp_path)
    assert sizes(load_dataset("idx", str(tmp_path), val_fraction=0.5)) == {"train": 3, "val": 3}


def damage_magic(file: Path) -> None:
    file.write_bytes(b"\0\0\x0d\x03" + file.read_bytes()[4:])


def damage_end(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def damage_by_more(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"more")


def damage_dimensions(file: Path) -> None:
    """Dimensions whose product is 0 in 64 bits."""
    file.write_bytes(struct.pack(">4I", 2051, 2**31, 2**31, 2**31))


def damage_width(file: Path) -> None:
    file.write_bytes(struct.pack(">4I", 2051, 6, 5, 0))


def damage_all(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_magic, "is not an IDX file of images .*begins with 00000d03"),
        (damage_end, r"is incomplete: it declares \(6, 5, 4\) values but holds 115"),
        (damage_by_more, r"longer than its header says: it declares \(6, 5, 4\) .* holds 124; "),
        (damage_dimensions, r"is incomplete: it declares \(2147483648, .* values but holds 0"),
        (damage_width, r"hold no images \(they declare \(6, 5, 0\) values\)"),
        (damage_all, "begins with nothing"),
        (Path.unlink, "no 'train-images-idx3-ubyte' or '.gz'"),
    ],
)
def test_damaged_idx_file_is_named(damage, words, tmp_path):
    write_idx(tmp_path)
    damage(tmp_path / "train-images-idx3-ubyte")
    (tmp_path / "other").touch()
    with pytest.raises(InputError, match=words):
        idx.read(tmp_path)


def test_cut_gzip_and_unequal_counts_are_named(tmp_path):
    write_idx(tmp_path, suffix=".gz")
    file = tmp_path / "train-labels-idx1-ubyte.gz"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(InputError, match=r"labels-idx1-ubyte.gz' cannot be read .*download it"):
        idx.read(tmp_path)
    file.write_bytes(gzip.compress(idx_bytes(np.zeros(5))))
    with pytest.raises(InputError, match="has 6 train images but 5 labels"):
        idx.read(tmp_path)


def test_idx_label_above_the_named_classes_is_refused(tmp_path):
    write_idx(tmp_path)
    labels = np.array([0, 1, 2, 3, 11, 5])
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    with pytest.raises(InputError, match="label 11 of example 4 is out of range for 10 names"):
        idx.read(tmp_path, "mnist")


def test_fashion_mnist_has_its_published_split_and_names():
    folder = shared("fashion_mnist")
    dataset = load_dataset("idx", str(folder), name="fashion_mnist", val_fraction=0.3)
    assert {k: set(v.tolist()) for k, v in class_counts(dataset).items()} == {
        "train": {4200},
        "val": {1800},
        "test": {1000},
    }
    assert dataset.class_names[9] == "Ankle boot"
    both = [dataset.splits[k].images.astype(np.float32) for k in ("train", "val")]
    assert np.concatenate(both).mean() / 255 == pytest.approx(0.28604, abs=1e-5)


# QuickDraw's .npy


@pytest.fixture
def drawings(tmp_path) -> Path:
    folder = tmp_path / "drawings"
    folder.mkdir()
    for i, name in enumerate(("apple", "bat", "cup", "The Eiffel Tower")):
        rows = 100 + 10 * i
        images = np.full((rows, 784), i, np.uint8)
        images[:, 0] = np.arange(rows)
        np.save(folder / f"{name}.npy", images)
    return folder


def test_npy_reads_all_classes_by_file_name(drawings):
    dataset = npy.read(drawings)
    assert dataset.class_names == ("The Eiffel Tower", "apple", "bat", "cup")
    train = dataset.splits["train"]
    assert train.images.shape == (460, 28, 28, 1)
    assert class_counts(dataset)["train"].tolist() == [130, 100, 110, 120]
    assert (train.images[:, 0, 1, 0] == np.array([3, 0, 1, 2])[train.labels]).all()
    assert train.names[130] == "apple.npy/0"


def test_npy_takes_a_fraction_or_number_a_class_by_seed(drawings):
    tenth = npy.read(drawings, classes=("cup", "bat"), per_class=0.1, seed=1)
    assert tenth.class_names == ("cup", "bat")
    assert class_counts(tenth)["train"].tolist() == [12, 11]
    split = tenth.splits["train"]
    rows = [int(name.split("/")[1]) for name in split.names]
    assert split.images[:, 0, 0, 0].tolist() == rows
    assert rows[:12] == sorted(rows[:12]) != list(range(12))
    other_company = npy.read(drawings, classes=("apple", "cup"), per_class=0.1, seed=1)
    assert other_company.splits["train"].names[10:] == split.names[:12]
    assert npy.read(drawings, per_class=0.1, seed=2).splits["train"].names[-12:] != rows[:12]
    assert class_counts(npy.read(drawings, per_class=105))["train"].tolist() == [105, 100, 105, 105]


def test_npy_records_the_classes_it_draws(drawings):
    dataset = load_dataset("npy", str(drawings), num_classes_drawn=2, seed=5, val_fraction=0.2)
    again = load_dataset("npy", str(drawings), num_classes_drawn=2, seed=5, val_fraction=0.2)
    assert dataset.class_names == again.class_names
    assert len(dataset.class_names) == 2
    assert dataset.notes == (
        f"2 of 4 classes drawn with seed 5: {', '.join(dataset.class_names)}.",
    )
    drawn = {npy.read(drawings, num_classes_drawn=2, seed=s).class_names for s in range(8)}
    assert len(drawn) > 2


def test_npy_reads_only_what_is_asked_for(tmp_path):
    """Two sparse files of 0.8 GB are read in no time and no memory."""
    for name in ("big", "other"):
        header = io.BytesIO()
        shape = {"descr": "|u1", "fortran_order": False, "shape": (1_000_000, 784)}
        np.lib.format.write_array_header_1_0(header, shape)
        with open(tmp_path / f"{name}.npy", "wb") as file:
            file.write(header.getvalue())
            file.truncate(len(header.getvalue()) + 1_000_000 * 784)
    dataset = npy.read(tmp_path, per_class=20)
    assert dataset.splits["train"].images.shape == (40, 28, 28, 1)


@pytest.mark.parametrize("shape", [(7, 28, 28), (7, 28, 28, 1), (7, 20, 30, 3), (7, 64)])
def test_npy_shapes(shape, tmp_path):
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", np.zeros(shape, np.uint8))
    images = npy.read(tmp_path).splits["train"].images
    assert images.ndim == 4
    assert images.size == 14 * np.prod(shape[1:])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (np.zeros((3, 784), np.float32), "is float32, not uint8"),
        (np.zeros((3, 783), np.uint8), r"has shape \(3, 783\)"),
        (np.zeros((3, 16, 16), np.uint8), r"of shape \(16, 16, 1\) but .*apple.npy' of"),
        (np.zeros((0, 784), np.uint8), "holds no images"),
        (b"not an array", r"cannot be read as .npy \(it holds no array\); write it anew"),
        (b"", "cannot be read as .npy"),
    ],
)
def test_bad_npy_file_is_named(content, words, drawings):
    file = drawings / "zebra.npy"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        np.save(file, content)
    with pytest.raises(InputError, match=rf"zebra\.npy' .*{words}"):
        npy.read(drawings, classes=("apple", "zebra"))


def test_cut_npy_file_and_object_array_are_named(drawings):
    file = drawings / "bat.npy"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"bat\.npy' cannot be read as .npy .*; write it anew"):
        npy.read(drawings)
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"bat\.npy' holds Python objects; save .*numpy.uint8"):
        npy.read(drawings)


def test_npz_renamed_npy_is_named(drawings):
    file = drawings / "bat.npy"
    with open(file, "wb") as opened:
        np.savez(opened, np.zeros((3, 784), np.uint8))
    with pytest.raises(InputError, match=r"bat\.npy' is a .npz.*; write one .npy a class"):
        npy.read(drawings)


@pytest.mark.parametrize(
    ("whole", "damaged"),
    [
        (b"'|u1'", b"'|,1'"),
        (b"'fortran_order'", b"'for6ran_Yrder'"),
        (b"784)", b"784("),
        (b"{", b"\xff"),
    ],
)
def test_damaged_npy_header_is_named(whole, damaged, drawings):
    file = drawings / "bat.npy"
    content = file.read_bytes()
    assert whole in content
    file.write_bytes(content.replace(whole, damaged, 1))
    with pytest.raises(InputError, match=r"bat\.npy' cannot be read as .npy .*; write it") as error:
        npy.read(drawings)
    assert "\n" not in str(error.value)
    np.savez(drawings / "bat.npz", labels=LABELS)
    with zipfile.ZipFile(drawings / "bat.npz", "a") as archive:
        archive.writestr("images.npy", file.read_bytes())
    with pytest.raises(
        InputError, match=r"'images' in .*bat\.npz' cannot be read as .npz .*; write"
    ):
        npz.read(drawings / "bat.npz")


def test_misspelt_npy_class_gets_its_neighbour(drawings, tmp_path):
    with pytest.raises(InputError, match=r"no 'aple.npy' in .*; did you mean 'apple'\?"):
        npy.read(drawings, classes=("aple", "bat"))
    with pytest.raises(InputError, match=r"no \.npy files in"):
        npy.read(tmp_path)


# .npz


def arrays(n: int = 6, shape=(5, 4, 3)) -> tuple[np.ndarray, np.ndarray]:
    images = np.random.default_rng(n).integers(0, 256, (n, *shape), np.uint8)
    return images, np.arange(n) % 3


def test_npz_leaves_what_it_does_not_use_unread(tmp_path):
    images, labels = arrays()
    meta = np.array([{"author": "me"}], object)
    np.savez(tmp_path / "mine.npz", images=images, labels=labels, meta=meta)
    assert sizes(npz.read(tmp_path / "mine.npz")) == {"train": 6}


def test_npz_with_one_pair(tmp_path):
    images, labels = arrays()
    np.savez(tmp_path / "mine.npz", images=images, labels=labels, class_names=["x", "y", "z"])
    dataset = npz.read(tmp_path / "mine.npz")
    assert dataset.name == "mine"
    assert dataset.class_names == ("x", "y", "z")
    assert (dataset.splits["train"].images == images).all()
    assert (dataset.splits["train"].labels == labels).all()


@pytest.mark.parametrize(
    "keys",
    [("{0}_images", "{0}_labels"), ("x_{0}", "y_{0}")],
)
def test_npz_with_splits(keys, tmp_path):
    content = {}
    for split, n in (("train", 9), ("val", 4), ("test", 5)):
        images, labels = arrays(n, (5, 4))
        content |= {keys[0].format(split): images, keys[1].format(split): labels[:, None]}
    np.savez_compressed(tmp_path / "mine.npz", **content)
    dataset = load_dataset("npz", str(tmp_path / "mine.npz"), val_fraction=0.5)
    assert sizes(dataset) == {"train": 9, "val": 4, "test": 5}
    assert dataset.class_names == ("0", "1", "2")
    assert dataset.splits["val"].images.shape == (4, 5, 4, 1)
    assert dataset.splits["val"].labels.dtype == np.int32


IMAGES, LABELS = arrays()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"images": IMAGES, "labels": LABELS[:-1]}, "has 6 'images' but 5 'labels'"),
        ({"images": IMAGES / 255.0, "labels": LABELS}, r"is float64, not uint8; save .*\* 255"),
        ({"images": IMAGES.astype(int), "labels": LABELS}, "is int64, not uint8"),
        ({"images": IMAGES[0, 0, 0], "labels": LABELS[:3]}, r"has shape \(3,\)"),
        ({"images": IMAGES.transpose(0, 3, 1, 2), "labels": LABELS}, "channels first"),
        ({"images": np.zeros((6, 5, 4, 4), np.uint8), "labels": LABELS}, "1 or 3"),
        ({"images": IMAGES, "labels": LABELS - 1}, "label -1 of example 0 is out of range"),
        ({"images": IMAGES, "labels": LABELS.astype(float)}, "is float64; labels should be int"),
        ({"images": IMAGES, "labels": np.eye(6, dtype=int)}, r"'labels' .*has shape \(6, 6\)"),
        (
            {"images": IMAGES, "labels": LABELS, "class_names": ["a", "b"]},
            "label 2 of example 2 is out of range for 2 names",
        ),
        ({"images": IMAGES, "labels": LABELS, "class_names": ["a", "a", "b"]}, "'a' occurs twice"),
        ({"images": IMAGES, "labels": LABELS, "class_names": [1, 2, 3]}, "a list of strings"),
        (
            {"images": IMAGES, "labels": LABELS, "class_names": ["café".encode("latin1"), b"b"]},
            r"'class_names' in .* not UTF-8 \(b'caf\\xe9'\); save .*dtype=str",
        ),
        (
            {"images": IMAGES, "labels": LABELS, "class_names": np.array(["a", "b"], object)},
            r"'class_names' in .* holds Python objects; save numpy.array\(..., dtype=str\)",
        ),
        (
            {"images": IMAGES, "labels": LABELS.astype(object)},
            r"'labels' in .*mine.npz' holds Python objects; save numpy.array\(..., dtype=int\)",
        ),
        ({"images": IMAGES, "labels": LABELS * 2}, "class '1' has no training examples"),
        ({"images": IMAGES, "labels": LABELS * 9}, "has the label 18, more than it has images"),
        ({"images": IMAGES, "labels": LABELS * 0}, "at least 2 classes"),
        ({"images": IMAGES}, "has 'images' but no 'labels'"),
        ({"test_labels": LABELS}, "has 'test_labels' but no 'test_images'"),
        ({"pictures": IMAGES, "labels_": LABELS}, "has the arrays labels_, pictures; name them"),
        (
            {"images": IMAGES[:0], "labels": LABELS[:0]},
            r"'images' in .*; it should|holds no images",
        ),
        (
            {"images": IMAGES, "labels": LABELS, "x_train": IMAGES, "y_train": LABELS},
            "holds the split 'train' twice",
        ),
        ({"test_images": IMAGES, "test_labels": LABELS}, "has no split 'train', only test"),
    ],
)
def test_bad_npz_is_refused(content, words, tmp_path):
    np.savez(tmp_path / "mine.npz", **content)
    with pytest.raises(InputError, match=words) as error:
        load_dataset("npz", str(tmp_path / "mine.npz"))
    assert "\n" not in str(error.value)


def test_npz_that_is_none_is_named(tmp_path):
    file = tmp_path / "mine.npz"
    for content, words in ((b"", "cannot be read"), (b"PK\3\4 no archive", "cannot be read")):
        file.write_bytes(content)
        with pytest.raises(InputError, match=rf"mine\.npz' {words}"):
            npz.read(file)
    np.savez(file, images=IMAGES, labels=LABELS)
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(InputError, match=r"mine\.npz' cannot be read"):
        npz.read(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("images", "a text")
    with pytest.raises(InputError, match=r"'images' in .*mine\.npz' cannot be read .*no array"):
        npz.read(file)
    np.save(tmp_path / "one.npy", IMAGES)
    with pytest.raises(InputError, match=r"holds one array, not a \.npz"):
        npz.read(tmp_path / "one.npy")
    for path, words in (("", "not set"), (tmp_path, "is a folder"), ("none.npz", "does not exist")):
        with pytest.raises(InputError, match=words):
            npz.read(path)


# TFDS


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tfds")
    with zipfile.ZipFile(TINY_TFDS) as archive:
        archive.extractall(folder)
    return folder


def test_tfds_reads_images_of_any_size_with_the_spec(prepared):
    spec = ImageSpec(16, resize="pad")
    dataset = load_dataset("tfds", str(prepared), name="tiny_shapes", spec=spec)
    assert dataset.class_names == ("disc", "square")
    assert sizes(dataset) == {"train": 8, "val": 4}
    train = dataset.splits["train"]
    assert train.images.shape == (8, 16, 16, 3)
    assert np.bincount(train.labels).tolist() == [4, 4]
    # The corner of a shape's box is ground in a disc and yellow in a square.
    corner = train.images[:, 5, 3, 0].astype(int)
    assert (corner[train.labels == 1] > 200).all()
    assert (corner[train.labels == 0] < 200).all()
    assert dataset.notes == ("Not used: the splits extra, test of 'tiny_shapes:1.0.0'.",)


def test_tfds_decodes_as_files_are_decoded(prepared):
    spec = ImageSpec(10, 1, "crop", 0.8)
    dataset = load_dataset("tfds", str(prepared), name="tiny_shapes", spec=spec)
    sys.path.insert(0, str(TINY_TFDS.parent))
    try:
        from make_tiny_tfds import encoded, shape
    finally:
        sys.path.pop(0)
    images = {decode(encoded(shape(i), "png"), spec).tobytes() for i in range(8) if i % 3}
    assert images <= {image.tobytes() for image in dataset.splits["train"].images}


def test_tfds_keeps_small_square_images_small(prepared):
    dataset = load_dataset("tfds", str(prepared), name="tiny_marks/bars", spec=ImageSpec(32))
    assert dataset.name == "tiny_marks/bars:1.10.0"
    assert dataset.class_names == ("lying", "sloping", "standing")
    assert dataset.splits["test"].images.shape == (3, 8, 8, 1)
    larger = load_dataset("tfds", str(prepared), name="tiny_marks/bars", spec=ImageSpec(6))
    assert larger.splits["test"].images.shape == (3, 6, 6, 1)


def test_tfds_version_can_be_chosen(prepared):
    old, new = (
        load_dataset("tfds", str(prepared), name=f"tiny_marks/bars{version}", spec=ImageSpec(8))
        for version in (":1.0.0", "")
    )
    assert old.name == "tiny_marks/bars:1.0.0"
    assert old.splits["train"].images[:, 0].any()
    assert (old.splits["train"].images != new.splits["train"].images).any()


def test_reading_tfds_needs_no_tensorflow(prepared):
    code = (
        "import sys; from flaxcls.data.load import load_dataset\n"
        f"dataset = load_dataset('tfds', {str(prepared)!r}, name='tiny_marks/bars')\n"
        "print(len(dataset.splits), 'tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2 False"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "cifar10"}, r"'cifar10' is not prepared in .*flaxcls\[tfds\].*array_record"),
        ({"name": "tiny_shapes:3.0.0"}, "'tiny_shapes:3.0.0' is not prepared in"),
        ({"name": "tiny_marks"}, "is prepared with a config; write tiny_marks/bars"),
        ({"name": "tiny shapes"}, "is no TFDS name; write NAME"),
        ({"name": ""}, "is no TFDS name; write NAME"),
        ({"path": "/no/such/folder"}, "'/no/such/folder' is not a folder"),
        ({"spec": None}, "data.image_size is not set but the images of 'tiny_shapes"),
        ({"spec": ImageSpec(10_000_000)}, "needs .* GB at 10000000 px"),
    ],
)
def test_tfds_that_cannot_be_read_is_refused(options, words, prepared):
    arguments = {"path": str(prepared), "name": "tiny_shapes", "spec": ImageSpec(16), **options}
    with pytest.raises(InputError, match=words) as error:
        load_dataset("tfds", **arguments)
    assert "\n" not in str(error.value)


def test_tfds_in_another_format_or_damaged_is_refused(prepared, tmp_path):
    with zipfile.ZipFile(TINY_TFDS) as archive:
        archive.extractall(tmp_path)
    folder = tmp_path / "tiny_shapes" / "1.0.0"
    info = folder / "dataset_info.json"
    content = json.loads(info.read_text())
    info.write_text(json.dumps({**content, "fileFormat": "tfrecord"}))
    with pytest.raises(InputError, match="is not prepared as array_record; prepare it in another"):
        load_dataset("tfds", str(tmp_path), name="tiny_shapes", spec=ImageSpec(16))
    info.write_text(json.dumps(content))
    (folder / "features.json").write_text("{")
    with pytest.raises(InputError, match=r"cannot be opened .*; prepare it again"):
        load_dataset("tfds", str(tmp_path), name="tiny_shapes", spec=ImageSpec(16))


# What holds for all


def test_unknown_source_gets_its_neighbour():
    with pytest.raises(InputError, match=r"unknown source 'imagefolder'; did you mean 'image_fold"):
        load_dataset("imagefolder", "x")
    with pytest.raises(InputError, match="choose one of digits, idx"):
        load_dataset("???", "x")


def test_every_source_has_its_module():
    for source in SOURCES:
        assert (Path(image_folder.__file__).parent / f"{source}.py").exists()


def test_classes_can_be_chosen_drawn_and_thinned_in_any_source():
    chosen = load_dataset("digits", classes=("7", "1"))
    assert chosen.class_names == ("7", "1")
    assert class_counts(chosen)["train"].tolist() == [179, 182]
    whole = digits.read().splits["train"]
    numbers = [int(name.split("/")[1]) for name in chosen.splits["train"].names]
    assert (whole.labels[numbers] == np.array([7, 1])[chosen.splits["train"].labels]).all()
    drawn = load_dataset("digits", num_classes_drawn=4, per_class=20, seed=2, val_fraction=0.5)
    assert class_counts(drawn)["val"].tolist() == [10] * 4
    assert "4 classes drawn with seed 2" in drawn.notes[0]
    with pytest.raises(InputError, match="'ten' is no class of digits"):
        load_dataset("digits", classes=("1", "ten"))
    with pytest.raises(InputError, match=r"data\.path: source 'digits' takes none"):
        load_dataset("digits", "somewhere")


def test_records_are_named_by_where_they_lie_in_the_source(tmp_path):
    drawn = load_dataset("digits", val_fraction=0.1, test_fraction=0.2)
    assert drawn.splits["test"].names[0].startswith("digits/")
    images, labels = np.zeros((20, 4, 4), np.uint8), np.arange(20) % 2
    parts = {"train_images": images, "train_labels": labels, "test_images": images}
    np.savez(tmp_path / "own.npz", **parts, test_labels=labels)
    own = load_dataset("npz", str(tmp_path / "own.npz"), val_fraction=0.1)
    assert own.splits["val"].names[0].startswith("train/")
    assert named(own.splits["test"], "test").names[3] == "test/3"


def test_a_renamed_file_has_the_same_fingerprint(tmp_path):
    arrays = {"images": np.zeros((20, 4, 4), np.uint8), "labels": np.arange(20) % 2}
    prints = set()
    for name in ("a", "b"):
        np.savez(tmp_path / f"{name}.npz", **arrays)
        path = str(tmp_path / f"{name}.npz")
        prints |= {fingerprint(load_dataset("npz", path, val_fraction=share)) for share in (0, 0.1)}
    assert len(prints) == 2


def test_known_classes_number_any_source():
    names = tuple("9876543210")
    dataset = load_dataset("digits", known_classes=names)
    assert (dataset.splits["train"].labels == 9 - digits.read().splits["train"].labels).all()
    with pytest.raises(InputError, match="'9' is not one of the 9 classes the model was trained"):
        load_dataset("digits", known_classes=names[1:])


def test_parents_are_given_by_name():
    rules = ("[02468]=even", "[13579]=odd")
    dataset = load_dataset("digits", parents=rules, val_fraction=0.2)
    assert dataset.parent_names == ("even", "odd")
    for split in dataset.splits.values():
        assert (split.parents == split.labels % 2).all()
        assert split.parents.dtype == np.int32


def test_unlistable_folder_is_named(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("permissions do not bind the superuser")
    (tmp_path / "locked").mkdir(mode=0)
    with pytest.raises(InputError, match="may not be listed"):
        load_dataset("image_folder", str(tmp_path / "locked"))
