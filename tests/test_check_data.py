"""`--mode=check_data`: every fault of a data set is named at once, before anything is trained."""

import hashlib
import html as escaping
import json
import os
import shutil
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import scipy.fft
from command_line import contents, run
from PIL import Image, ImageEnhance, ImageFilter

from flaxcls.analysis import duplicates, image_facts
from flaxcls.analysis.check_data import check_outside
from flaxcls.data.load import load_dataset
from flaxcls.errors import InputError

CHROMIUM = next(
    (p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None
)
SHARED = Path(__file__).parents[2] / "shared" / "data"
EVIL = "<b onclick=x>Äpfel & \u202e<i>"  # a class name


def photo(seed, size=(96, 72), mode="RGB"):
    """A smooth picture that no other seed resembles."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC).convert(mode)


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def fill(folder, seed, count, suffix=".png", **options):
    for i in range(count):
        save(folder / f"{i:02d}{suffix}", photo(seed + i), **options)


def check(output, *arguments, path=None, source="image_folder"):
    """Runs the check; returns its exit code, the terminal's output, the JSON and the page."""
    places = [f"--config.data.path={path}"] if path is not None else []
    done = run(
        "--mode=check_data",
        "--config=lenet",
        f"--output={output}",
        f"--config.data.source={source}",
        *places,
        *arguments,
    )
    if done.code == 2:
        return done, None, None
    record = json.loads((output / "check_data.json").read_text())
    assert record["exit_code"] == done.code
    return done, record, (output / "check_data.html").read_text()


def level(record, key):
    return next(f["level"] for f in record["findings"] if f["key"] == key)


def counted(record, key):
    return next(f["count"] for f in record["findings"] if f["key"] == key)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """A folder with train, val and test that has every fault."""
    root = tmp_path_factory.mktemp("data") / "data"
    train, val, test = root / "train", root / "val", root / "test"
    fill(train / "cat", 100, 30)
    fill(train / "dog", 200, 12)
    fill(train / EVIL, 300, 4)
    fill(val / "cat", 400, 3)
    fill(test / "cat", 500, 3)
    fill(test / "dog", 600, 3)
    fill(val / "stray", 700, 2)
    (train / "hollow").mkdir()
    # What cannot be read, each for another reason.
    whole = save(root / "whole.jpg", photo(800, (200, 200)), quality=95)
    data = whole.read_bytes()
    whole.unlink()
    (train / "cat" / "truncated.jpg").write_bytes(data[: len(data) // 2])
    (train / "cat" / "empty.png").write_bytes(b"")
    (train / "dog" / "text.jpg").write_text("no image")
    (train / "dog" / "notes.txt").write_text("no image at all")
    (test / "dog" / "gone.png").symlink_to(root / "nowhere.png")
    (train / "broken").mkdir()
    (train / "broken" / "only.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    # A photo of which a part in the middle is lost keeps its last bytes.
    middle = bytearray(save(root / "x.png", photo(801, (200, 200))).read_bytes())
    (root / "x.png").unlink()
    middle[len(middle) // 2 : len(middle) // 2 + 200] = bytes(200)
    (train / "dog" / "damaged.png").write_bytes(bytes(middle))
    # Copies: the same bytes, the same pixels, a link; in one split, in two, with two labels.
    shutil.copy(train / "cat" / "00.png", train / "cat" / "copy.png")
    save(train / "dog" / "as-bitmap.bmp", Image.open(train / "dog" / "00.png"))
    save(test / "cat" / "leak.tif", Image.open(train / "cat" / "01.png"))
    shutil.copy(train / "cat" / "02.png", train / "dog" / "conflict.png")
    (val / "cat" / "link.png").symlink_to(train / "cat" / "03.png")
    # Nearly the same.
    save(test / "cat" / "near.jpg", photo(104), quality=60)
    # Out of the ordinary, all of which is read.
    save(train / "cat" / "cmyk.jpg", photo(901, mode="CMYK"))
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    save(train / "cat" / "deep.png", Image.fromarray(ramp))
    frames = [photo(902), photo(903), photo(904)]
    save(train / "cat" / "moving.gif", frames[0], save_all=True, append_images=frames[1:])
    save(train / "cat" / "größer" / "grey.png", photo(905, mode="L"))
    save(train / "cat" / "ghost.png", photo(906, mode="RGBA").rotate(10))
    save(train / "cat" / "long.png", photo(907, (300, 20)))
    save(train / "cat" / "tiny.png", photo(908, (5, 5)))
    save(train / "cat" / "white.png", Image.new("RGB", (80, 60), "white"))
    save(train / "cat" / "mislabelled.png", photo(909), format="JPEG")
    turned = Image.Exif()
    turned[0x0112] = 6
    save(train / "cat" / "turned.jpg", photo(910), exif=turned)
    return root


@pytest.fixture(scope="module")
def checked(faulty, tmp_path_factory):
    before = contents(faulty)
    output = tmp_path_factory.mktemp("out") / "check"
    result = check(output, path=faulty)
    assert contents(faulty) == before
    return result


def test_every_unreadable_file_is_named_with_its_fault(checked):
    done, record, page = checked
    assert done.code == 1
    wanted = {
        "train/cat/truncated.jpg": "is truncated",
        "train/cat/empty.png": "is empty (0 bytes)",
        "train/dog/text.jpg": "is not an image (",
        "train/dog/notes.txt": "is not an image file",
        "test/dog/gone.png": "is a link that leads nowhere",
        "train/broken/only.png": "",
        "train/dog/damaged.png": "",
    }
    assert record["unreadable"].keys() == wanted.keys()
    for name, fault in wanted.items():
        assert record["unreadable"][name].startswith(fault), name
        assert f"'{name}' {record['unreadable'][name]}" in done.output
        assert escaping.escape(name) in page
    assert level(record, "unreadable") == "fail"


def test_missing_classes_are_named_with_what_is_the_matter(checked):
    done, record, _ = checked
    missing = record["missing_classes"]
    assert missing == {
        "hollow": "the folder 'train/hollow' is empty",
        "broken": "its only file cannot be read",
        "stray": "there are no training images, but 2 validation images",
    }
    assert "'stray': there are no training images" in done.output
    assert level(record, "missing_classes") == "fail"


def test_exact_duplicates_are_those_that_hashlib_finds(faulty, checked):
    _, record, page = checked
    by_pixels = defaultdict(set)
    for path in faulty.rglob("*"):
        name = path.relative_to(faulty).as_posix()
        if path.is_file() and name not in record["unreadable"]:
            with Image.open(path) as image:
                if image.mode in ("RGB", "P"):
                    pixels = image.convert("RGB")
                    key = (pixels.size, hashlib.sha256(pixels.tobytes()).hexdigest())
                    by_pixels[key].add(name)
    wanted = sorted(sorted(names) for names in by_pixels.values() if len(names) > 1)
    groups = record["exact_duplicates"]
    assert sorted(sorted(i["name"] for i in group["images"]) for group in groups) == wanted
    assert len(wanted) == 5
    across = {i["name"] for g in groups if g["across_splits"] for i in g["images"]}
    assert across == {
        "train/cat/01.png",
        "test/cat/leak.tif",
        "train/cat/03.png",
        "val/cat/link.png",
    }
    conflicts = {i["name"] for g in groups if g["conflicting_labels"] for i in g["images"]}
    assert conflicts == {"train/cat/02.png", "train/dog/conflict.png"}
    assert level(record, "duplicates_across_splits") == "fail"
    assert (
        level(record, "conflicting_labels") == level(record, "duplicates_within_splits") == "warn"
    )
    assert counted(record, "duplicates_within_splits") == 3
    assert "different labels" in page


def test_near_duplicates_only_warn(checked):
    _, record, _ = checked
    near = record["near_duplicates"]
    pairs = [{i["name"] for i in pair["images"]} for pair in near["most_alike"]]
    assert {"train/cat/04.png", "test/cat/near.jpg"} in pairs
    assert near["pairs"] == len(pairs) == 1
    assert level(record, "near_duplicates_across_splits") == "warn"


def test_what_is_out_of_the_ordinary_is_told(checked):
    done, record, page = checked
    notes = {f["key"]: f["sentence"] for f in record["findings"] if f["level"] == "note"}
    for key in ("cmyk", "deep", "frames", "misnamed", "turned"):
        assert notes[key].startswith("1 file that"), key
    grey = ["train/cat/deep.png", "train/cat/white.png", "train/cat/größer/grey.png"]
    assert record["grey"] == grey
    assert all(name in page for name in grey)
    assert "'train/cat/white.png' (train, cat)" in done.output  # of one colour
    assert "'train/cat/long.png': 300 x 20 pixels" in done.output
    assert "'train/cat/tiny.png': 5 x 5 pixels" in done.output
    assert record["sizes"]["aspect"]["of"][1] == "train/cat/long.png"
    assert record["sizes"]["width"]["of"][0] == "train/cat/tiny.png"
    assert level(record, "tiny_classes") == "warn"
    assert record["unmeasured_classes"] == {"val": [EVIL, "dog"], "test": [EVIL]}


def test_counts_are_those_on_disk_less_what_cannot_be_read(faulty, checked):
    _, record, page = checked
    for row in record["classes"]:
        for split in ("train", "val", "test"):
            folder = faulty / split / row["name"]
            files = [f for f in folder.rglob("*") if not f.is_dir()] if folder.exists() else []
            names = {f.relative_to(faulty).as_posix() for f in files}
            assert row[split] == len(names - record["unreadable"].keys()), row
    assert EVIL not in page
    assert "&lt;b onclick=x&gt;Äpfel &amp; \\u202e&lt;i&gt;" in page
    largest = next(row["train"] for row in record["classes"] if row["name"] == "cat")
    assert record["imbalance"] == largest / 4


def test_page_asks_no_other_host_and_shows_each_class(checked):
    _, record, page = checked
    assert page.count("<h3>") == len(record["classes"])
    assert "http://" not in page
    assert "https://" not in page
    assert page.count("data:image/") > 40


@pytest.mark.parametrize("width", [1280, 375])
def test_a_browser_shows_the_page_without_errors_and_requests(checked, width, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    file = tmp_path / "page.html"
    file.write_text(checked[2])
    said, asked = [], []
    with playwright.sync_playwright() as library:
        browser = library.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        assert said == []
        assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate("[...document.images].filter(i => !i.naturalWidth).length") == 0
        assert page.locator("#sheets h3").count() == 6
        assert page.locator("h2").first.inner_text() == "3 checks fail"
        browser.close()


def test_splits_are_those_that_training_draws(tmp_path):
    root = tmp_path / "data"
    fill(root / "a", 0, 20)
    fill(root / "b", 50, 20)
    shutil.copy(root / "a" / "00.png", root / "a" / "other.png")
    done, record, _ = check(tmp_path / "out", path=root)
    drawn = load_dataset("image_folder", str(root), val_fraction=0.1, test_fraction=0.2)
    rows = {row["name"]: row for row in record["classes"]}
    split_of = {n: key for key, split in drawn.splits.items() for n in split.names}
    for key, split in drawn.splits.items():
        for label, name in enumerate("ab"):
            assert rows[name][key] == int((split.labels == label).sum())
    (group,) = record["exact_duplicates"]
    assert {i["name"]: i["split"] for i in group["images"]} == {
        name: split_of[name] for name in ("a/00.png", "a/other.png")
    }
    assert done.code == int(split_of["a/00.png"] != split_of["a/other.png"])


def test_good_folder_ends_with_success_and_says_what_is_left_out(tmp_path):
    root = tmp_path / "data"
    fill(root / "a", 0, 20)
    fill(root / "b", 50, 20)
    done, record, _ = check(tmp_path / "out", "--config.data.max_per_class=15", path=root)
    assert done.code == 0
    assert "nothing that fails" in done.output
    assert record["images"] == 30
    assert record["unused"] == 10
    assert not {f["level"] for f in record["findings"]} & {"fail", "warn"}


def test_digits_only_warn(tmp_path):
    done, record, _ = check(tmp_path / "out", source="digits")
    assert done.code == 0
    assert record["images"] == 1797
    assert level(record, "near_duplicates_across_splits") == "warn"
    assert record["exact_duplicates"] == []


def test_arrays_are_checked_too(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 12, 12, 3), dtype=np.uint8)
    images[41] = images[3]
    images[50] = images[4]
    file = tmp_path / "data.npz"
    labels = np.arange(40) % 2
    np.savez(
        file,
        train_images=images[:40],
        train_labels=labels,
        test_images=images[40:],
        test_labels=np.array([0, labels[3], 3] + 17 * [1]),
        class_names=np.array(["a", "b", "c", "d"]),
    )
    done, record, _ = check(
        tmp_path / "out", "--config.data.val_fraction=0", path=file, source="npz"
    )
    assert done.code == 1
    assert record["missing_classes"].keys() == {"c", "d"}
    assert record["missing_classes"]["d"] == "there are no training images, but 1 test image"
    names = [sorted(i["name"] for i in g["images"]) for g in record["exact_duplicates"]]
    assert names == [["test/1", "train/3"], ["test/10", "train/4"]]
    assert [g["conflicting_labels"] for g in record["exact_duplicates"]] == [False, True]


def test_npy_files_that_are_damaged_or_hold_nothing_are_all_named(tmp_path):
    root = tmp_path / "drawings"
    root.mkdir()
    rng = np.random.default_rng(0)
    for name in ("apple", "bus"):
        np.save(root / f"{name}.npy", rng.integers(0, 256, (30, 784), dtype=np.uint8))
    np.save(root / "cow.npy", np.zeros((0, 784), np.uint8))
    (root / "dog.npy").write_bytes(b"\x93NUMPY\x01\x00")
    (root / "eel.npy").write_bytes((root / "bus.npy").read_bytes()[:5000])
    done, record, _ = check(tmp_path / "out", path=root, source="npy")
    assert done.code == 1
    assert record["unreadable"].keys() == {"dog.npy", "eel.npy"}
    assert record["missing_classes"].keys() == {"cow", "dog", "eel"}
    assert record["missing_classes"]["cow"] == "the file 'cow.npy' holds no images"
    assert "'dog.npy'" in done.output
    assert record["images"] == 60


def test_files_named_after_their_class(tmp_path):
    root = tmp_path / "pets"
    for i in range(12):
        save(root / f"cat_{i}.png", photo(i))
        save(root / f"dog_{i}.png", photo(100 + i))
    (root / "cat_99.png").write_bytes(b"")
    pattern = r"--config.data.label_pattern=(.+)_\d+\.png"
    done, record, _ = check(tmp_path / "out", pattern, path=root, source="image_files")
    assert done.code == 1
    assert record["unreadable"] == {"cat_99.png": "is empty (0 bytes)"}
    assert [row["name"] for row in record["classes"]] == ["cat", "dog"]


@pytest.mark.parametrize("readable", [0, 1])
def test_folder_of_which_hardly_anything_can_be_read_is_still_told(tmp_path, readable):
    root = tmp_path / "data"
    for name in ("a", "b"):
        for i in range(12):
            (root / name).mkdir(parents=True, exist_ok=True)
            (root / name / f"{i:02d}.png").write_bytes(b"x")
        fill(root / name, 0, readable)
    done, record, _ = check(tmp_path / "out", path=root)
    assert done.code == 1
    assert len(record["unreadable"]) == 24 - 2 * readable
    assert record["missing_classes"].keys() == ({"a", "b"} if not readable else set())
    if readable:
        assert level(record, "splits") == "fail"
        sentences = [f["sentence"] for f in record["findings"] if f["key"] == "splits"]
        assert sentences[0].endswith("0.2 of 2 examples is none; make it larger or 0")


def test_names_that_are_not_utf8(tmp_path):
    root = tmp_path / "data"
    fill(root / "a", 0, 12)
    fill(root / "b", 50, 12)
    odd = os.fsencode(root / "a") + b"/caf\xe9\n\x1b[31m.png"
    shutil.copy(os.fsencode(root / "b" / "00.png"), odd)
    done, record, page = check(tmp_path / "out", path=root)
    (group,) = record["exact_duplicates"]
    assert "a/caf\udce9\n\x1b[31m.png" in {i["name"] for i in group["images"]}
    assert "\x1b[31m" not in done.output
    assert r"caf\udce9\n\x1b[31m.png" in done.output
    assert r"caf\udce9\n\x1b[31m.png" in page


@pytest.mark.parametrize("inside", ["", "a", "a/new/folder"])
def test_nothing_is_written_among_the_data(tmp_path, inside):
    root = tmp_path / "data"
    fill(root / "a", 0, 3)
    fill(root / "b", 50, 3)
    before = contents(root)
    done, _, _ = check(root / inside, path=root)
    assert done.sentence.startswith("--output: the folder ")
    assert contents(root) == before
    (tmp_path / "link").symlink_to(root)
    with pytest.raises(InputError, match="lies inside"):
        check_outside(tmp_path / "link" / "x", str(root))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--config.data.path=missing"], "data.path: 'missing' does not exist"),
        (["--config.data.classes=('a', 'nope')"], "data.classes: 'nope' is no class of"),
        (["--config.data.classes=('a',)"], "needs at least 2 classes"),
        (["--config.data.val_fraction=0.001"], "data.val_fraction=0.001 of 24 examples is none"),
    ],
)
def test_wrong_input_is_one_sentence(tmp_path, arguments, sentence):
    root = tmp_path / "data"
    fill(root / "a", 0, 12)
    fill(root / "b", 50, 12)
    done, _, _ = check(tmp_path / "out", f"--config.data.path={root}", *arguments)
    assert sentence in done.sentence
    assert not (tmp_path / "out").exists()


def test_all_near_hashes_are_found_and_each_once():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 2000, dtype=np.uint64)
    for i in range(400):  # copies from 0 to 11 bits away, and hashes that are alike in places
        flips = np.bitwise_or.reduce(
            np.uint64(1) << rng.choice(64, i % 12, replace=False).astype(np.uint64),
            initial=np.uint64(0),
        )
        hashes[1000 + i] = hashes[i] ^ flips
    hashes[1500:1600] &= np.uint64(0xFFFF_0000_0000_0003)
    views = rng.integers(0, 256, (1, 256), dtype=np.uint8).repeat(2000, axis=0)
    apart = np.bitwise_count(hashes[:, None] ^ hashes[None])
    first, second = np.nonzero(np.triu(apart <= duplicates.MOST_BITS, 1))
    found = duplicates.near_pairs(hashes, views)
    assert found.complete
    pairs = sorted(zip(found.first.tolist(), found.second.tolist(), strict=True))
    assert pairs == sorted(zip(first.tolist(), second.tolist(), strict=True))
    assert len(pairs) > 300


def test_sixty_thousand_images_are_compared_in_seconds():
    hashes = np.random.default_rng(0).integers(0, 2**64, 60_000, dtype=np.uint64)
    hashes[::2] &= np.uint64(0xFFFF_FFFF_FFFF_0000)  # half of them alike, as on a black ground
    began = time.process_time()
    found = duplicates.near_pairs(hashes, np.zeros((60_000, 256), np.uint8))
    assert time.process_time() - began < 30
    assert len(found) == 0


def test_correlation_is_numpys_and_the_search_ends():
    rng = np.random.default_rng(1)
    views = rng.integers(0, 256, (40, 256), dtype=np.uint8)
    views[20:] = np.clip(views[:20] * 0.8 + rng.normal(0, 12, (20, 256)), 0, 255).astype(np.uint8)
    found = duplicates.near_pairs(np.zeros(40, np.uint64), views)
    wanted = np.corrcoef(views)
    first, second = np.nonzero(np.triu(wanted >= duplicates.LEAST_CORRELATION, 1))
    assert 0 < len(first) < 20
    assert set(zip(found.first.tolist(), found.second.tolist(), strict=True)) == set(
        zip(first.tolist(), second.tolist(), strict=True)
    )
    np.testing.assert_allclose(found.correlation, wanted[found.first, found.second], atol=1e-4)
    assert (np.diff(found.correlation) <= 0).all()
    cut = duplicates.near_pairs(np.zeros(3000, np.uint64), views[:1].repeat(3000, 0), most=500)
    assert not cut.complete
    assert len(cut.first) == 500


def test_fingerprint_is_the_sign_of_scipys_cosine_transform():
    images = np.stack([np.asarray(photo(i, (32, 32), "L")) for i in range(50)])
    found = duplicates.fingerprints(images)
    for image, number in zip(images, found, strict=True):
        low = scipy.fft.dctn(image.astype(float), type=2)[:8, :8].ravel()
        bits = low > np.median(low)
        assert f"{int(number):064b}" == "".join("01"[int(bit)] for bit in bits)


@pytest.mark.parametrize(
    "change",
    [
        lambda i: i.resize((i.width // 2, i.height // 2), Image.Resampling.BICUBIC),
        lambda i: i.filter(ImageFilter.GaussianBlur(1)),
        lambda i: ImageEnhance.Brightness(i).enhance(0.7),
        lambda i: ImageEnhance.Contrast(i).enhance(0.6),
        lambda i: i.convert("L").convert("RGB"),
    ],
    ids=["smaller", "blurred", "darker", "flatter", "grey"],
)
def test_changed_copies_of_photographs_are_near_duplicates(change):
    if not (SHARED / "caltech101_3").is_dir():
        pytest.skip("needs caltech101_3 in shared/data")
    files = sorted((SHARED / "caltech101_3").glob("*/*.jpg"))[::40]
    originals = [Image.open(file).convert("RGB") for file in files]
    images = [*originals, *map(change, originals)]
    facts = image_facts.concatenate([image_facts.of_array(np.asarray(i)[None]) for i in images])
    n = len(originals)
    found = duplicates.near_pairs(facts.fingerprint, facts.view)
    pairs = set(zip(found.first.tolist(), found.second.tolist(), strict=True))
    assert sum((i, i + n) in pairs for i in range(n)) >= 0.97 * n
    assert len(pairs) <= 1.3 * n  # and few others


def test_equal_groups_are_those_of_a_dictionary():
    rng = np.random.default_rng(2)
    values = np.array([hashlib.md5(bytes([v])).digest() for v in rng.integers(0, 200, 300)], "V16")
    places = defaultdict(list)
    for i, value in enumerate(values):
        places[value.tobytes()].append(i)
    wanted = sorted(group for group in places.values() if len(group) > 1)
    assert [group.tolist() for group in duplicates.equal_groups(values)] == wanted


def test_arrays_and_files_of_the_same_pixels_have_the_same_facts(tmp_path):
    images = np.stack([np.asarray(photo(i)) for i in range(5)])
    paths = [str(save(tmp_path / f"{i}.png", Image.fromarray(x))) for i, x in enumerate(images)]
    told = []
    files, faults = image_facts.of_files(paths, told.append)
    arrays = image_facts.of_array(images)
    assert faults == {}
    assert told == [5]
    for name in ("width", "height", "grey", "digest", "fingerprint", "view"):
        assert (getattr(files, name) == getattr(arrays, name)).all(), name
