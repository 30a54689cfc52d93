"""`--mode=predict` of images: what is found, what is said of it, and where it is written."""

import csv
import json
import os
import re
import shutil
import signal
import socket
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from command_line import SMALL, compiled_once, contents, run
from PIL import Image

from flaxcls.data.decode import ImageSpec, decode, decode_whole
from flaxcls.data.sources import idx
from flaxcls.deploy import counter, predict
from flaxcls.deploy.inputs import Photo, find_inputs, natural_order
from flaxcls.deploy.predictor import Predictor, is_dark_on_light
from flaxcls.errors import InputError

CLASSES = ("<b>lïght 光", "dark")
QUIET = tuple(flag for flag in SMALL if ".log." in flag)


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(tmp_path_factory):
    with compiled_once(tmp_path_factory.getbasetemp() / "compiled"):
        yield


def photo(seed: int = 0, level: int = 60, shape: tuple[int, int] = (30, 40)) -> Image.Image:
    """A photo of noise, dark or light."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(level - 50, level + 50, (*shape, 3)).astype(np.uint8))


@pytest.fixture(scope="module")
def colour(tmp_path_factory) -> Path:
    """A run on colour photos, cropped in the middle, that tells dark ones from light ones."""
    folder = tmp_path_factory.mktemp("colour")
    for name, level in zip(CLASSES, (190, 60), strict=True):
        (folder / "data" / name).mkdir(parents=True)
        for i in range(20):
            photo(i, level).save(folder / "data" / name / f"{i}.png")
    done = run(
        "--config=lenet",
        "--config.data.source=image_folder",
        f"--config.data.path={folder / 'data'}",
        "--config.data.image_size=28",
        "--config.data.channels=3",
        "--config.data.resize=crop",
        "--config.data.crop_fraction=0.8",
        "--config.data.test_fraction=0.3",
        "--config.train.batch_size=8",
        "--config.train.epochs=6",
        f"--workdir={folder / 'run'}",
        *QUIET,
    )
    assert done.code == 0, done.error
    return folder / "run"


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """A run on grey digits, light on dark, padded."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    done = run(*SMALL, "--config.data.resize=pad", f"--workdir={folder}")
    assert done.code == 0, done.error
    return folder


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def predicted(workdir: Path, *arguments: str, output: str = "out"):
    """The command, the rows of its table, and its JSON."""
    done = run("--mode=predict", f"--workdir={workdir}", f"--output={output}", *arguments)
    assert done.code == 0, done.error
    with open(Path(output, "predictions.csv"), newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return done, rows, json.loads(Path(output, "predictions.json").read_text())


def refused(workdir: Path, *arguments: str) -> str:
    return run("--mode=predict", f"--workdir={workdir}", *arguments).sentence


def test_files_are_predicted_as_evaluation_predicted_them(colour, work):
    """By the run's own preprocessing, from its folder."""
    with open(colour / "predictions" / "test.csv", newline="", encoding="utf-8") as file:
        expected = list(csv.DictReader(file))
    data = colour.parent / "data"
    inputs = [f"--input={data / row['file']}" for row in expected]
    _, rows, _ = predicted(colour, *inputs)
    assert [row["file"] for row in rows] == [str(data / row["file"]) for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row["prediction"] == other["prediction"]
        assert float(row["probability"]) == pytest.approx(float(other["probability"]), abs=2e-6)
    assert {row["prediction"] for row in rows} == set(CLASSES)


def test_one_image_gives_a_table_and_two_files(colour, work):
    photo(1, 60).save("night.jpg")
    done, rows, said = predicted(colour, "--input=night.jpg")
    logits = Predictor.from_run(colour)(["night.jpg"])
    assert rows[0]["prediction"] == "dark" == said["images"][0]["top"][0]["class"]
    assert float(rows[0]["probability"]) == pytest.approx(logits.probabilities.max(), abs=1e-6)
    shares = [one["probability"] for one in said["images"][0]["top"]]
    assert sum(shares) == pytest.approx(1, abs=1e-6)
    assert said["class_names"] == sorted(CLASSES)
    lines = done.output.splitlines()
    assert lines[0] == "night.jpg"
    assert "dark" in lines[1]
    assert "%" in lines[1]
    assert CLASSES[0] in lines[2]
    assert "'out'" in lines[-1]
    assert not Path("out/overlays").exists()


def test_what_is_named_is_found_in_the_order_of_counting(work):
    for name in ("10.png", "2.png", "b/1.jpg", "B10/x.webp", "b/.hidden.png", ".git/1.png"):
        Path("photos", name).parent.mkdir(parents=True, exist_ok=True)
        Path("photos", name).touch()
    Path("photos/notes.txt").touch()
    Path("photos/clip.MP4").touch()
    Path("photos/b/up").symlink_to(work / "photos")
    Path("one[1].png").touch()
    found = find_inputs(["photos", "one[1].png", "photos/2.png", "photos/*.png", "7", "./photos"])
    assert [p.path for p in found.photos] == [
        "photos/2.png",
        "photos/10.png",
        "photos/b/1.jpg",
        "photos/B10/x.webp",
        "one[1].png",
    ]
    assert found.cameras == (7,)
    assert found.videos == ()
    assert any("clip.MP4" in note for note in found.notes)
    assert find_inputs(["photos/**/*.jpg"]).photos == (Photo("photos/b/1.jpg", "1.jpg"),)
    Path("7").touch()
    assert find_inputs(["7"]).photos == (Photo("7", "7"),)
    assert find_inputs(["/dev/video3"]).cameras == (3,)


def test_natural_order_takes_any_name():
    names = ["a10", "a2", "A1", "", "9" * 200, "²", "٣", "10", "9"]
    assert [n for n in sorted(names, key=natural_order) if n[:1] in "aA" and n] == [
        "A1",
        "a2",
        "a10",
    ]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ((), "--input is missing"),
        (("--input=",), "name is empty"),
        (("--input=nothing.png",), "'nothing.png' does not exist"),
        (("--input=*.gif",), "no file matches"),
        (("--input=empty",), "no images in 'empty'"),
        (("--input=https://example.org/a.png",), "download it"),
        (("--input=good.png", "--top_k=0"), "--top_k"),
        (("--input=good.png", "--explain=grad-cam"), "did you mean 'grad_cam'"),
        (("--input=good.png", "--explain=cam"), "choose grad_cam"),
        (("--input=good.png", "--invert=maybe"), "--invert"),
        (("--input=good.png", "--output=full"), "is not empty"),
        (("--input=good.png", "--output=good.png"), "is a file"),
        (("--input=good.png", "--output=good.png/x"), "is a file"),
        (("--input=good.png", "--config.data.image_size=32"), "data.image_size"),
    ],
)
def test_a_mistake_ends_in_one_sentence_and_leaves_nothing(colour, work, given, sentence):
    photo().save("good.png")
    Path("empty").mkdir()
    Path("full").mkdir()
    Path("full/predictions.csv").write_text("another's")
    before, kept = contents(work), contents(colour)
    assert sentence in refused(colour, *given)
    assert contents(work) == before
    assert contents(colour) == kept


def test_a_file_in_the_place_of_the_results_is_named(colour, work):
    photo().save("boat.png")
    run_folder = shutil.copytree(colour, "run", ignore=shutil.ignore_patterns("predict"))
    Path(run_folder, "predict").touch()
    assert "'run/predict' is a file" in refused(run_folder, "--input=boat.png")


def test_no_result_takes_anothers_place(colour, work):
    photo().save("boat.png")
    photo(1).save("car.png")
    places = []
    for arguments in ([], [], ["--input=car.png"]):
        done = run("--mode=predict", f"--workdir={colour}", "--input=boat.png", *arguments)
        assert done.code == 0, done.error
        places.append(done.output.rpartition("are in '")[2].rstrip().removesuffix("'"))
    names = ["boat", "boat-2", "boat-and-1-more"]
    assert places == [str(colour / "predict" / name) for name in names]
    for place in places:
        assert {p.name for p in Path(place).iterdir()} == {"predictions.csv", "predictions.json"}


def test_thousands_are_told_in_a_summary(colour, work):
    Path("many").mkdir()
    for i in range(60):
        photo(i, 60 if i % 3 else 190).save(f"many/{i}.png")
    done, rows, _ = predicted(colour, "--input=many")
    assert [row["file"] for row in rows] == [f"many/{i}.png" for i in range(60)]
    assert len(done.output.splitlines()) < 20
    assert "mean probability" in done.output
    assert "least sure of" in done.output
    done, _, _ = predicted(colour, "--input=many/1?.png", "--input=many/2.png", output="few")
    assert "many/11.png" in done.output


def test_unreadable_files_are_listed_and_the_others_predicted(colour, work):
    Path("photos").mkdir()
    for i in range(5):
        photo(i).save(f"photos/{i}.png")
    Path("photos/1.png").write_bytes(b"")
    Path("photos/3.png").write_text("hello")
    done, rows, said = predicted(colour, "--input=photos")
    assert [row["file"] for row in rows if row["prediction"]] == [
        f"photos/{i}.png" for i in (0, 2, 4)
    ]
    assert {row["file"]: row["reason"] for row in rows if row["reason"]} == {
        "photos/1.png": "is empty (0 bytes)",
        "photos/3.png": "is not an image (JPEG, PNG, BMP, WebP, GIF, TIFF or PPM)",
    }
    assert [one["file"] for one in said["unreadable"]] == ["photos/1.png", "photos/3.png"]
    assert "2 inputs could not be read" in done.output


def test_overlays_show_photo_and_map_side_by_side(colour, work):
    for place in ("a", "b"):
        Path(place, "deep").mkdir(parents=True)
        photo(level=190, shape=(300, 400)).save(f"{place}/deep/same.png")
        photo(level=60, shape=(2100, 700)).save(f"{place}/deep/same.jpg")
    before = contents(work)
    _, rows, said = predicted(colour, "--input=a", "--input=b", "--explain")
    assert {name: text for name, text in contents(work).items() if name[:4] != "out/"} == before
    overlays = [row["overlay"] for row in rows]
    assert len(set(overlays)) == 4
    assert {Path(o).parent.as_posix() for o in overlays} == {"overlays/deep"}
    assert said["explained_by"] == "grad_cam"
    for row, one in zip(rows, said["images"], strict=True):
        shown = np.asarray(Image.open(Path("out", row["overlay"])).convert("RGB")).astype(float)
        image = np.asarray(Image.open(row["file"]).resize((400, 300), 2)).astype(float)
        if row["file"].endswith(".png"):
            left = shown[-300:, :400]
            assert np.abs(left - image).mean() < 25  # but for the box and JPEG
            assert np.abs(shown[-300:, 404:804] - image).mean() > 10
        else:
            assert max(shown.shape) < 1200
        left, top, right, bottom = one["box"]
        # The model sees 80 % of the middle square, and decides by nothing else.
        assert 0 <= left < right <= 1
        assert 0 <= top < bottom <= 1
        wide = 0.3 if row["file"].endswith(".png") else 0.4
        assert left >= 0.5 - wide - 0.02
        assert right <= 0.5 + wide + 0.02


def test_a_hierarchical_model_says_the_parent_too(tmp_path_factory, work):
    rules = "('[0-4]=low', '[5-9]=high')"
    done = run(
        *SMALL,
        "--config.model.name=hierarchical",
        "--config.model.trunk=lenet",
        f"--config.data.parents={rules}",
        "--config.loss.name=hierarchical",
        "--workdir=run",
    )
    assert done.code == 0, done.error
    photo().save("a.png")
    done, rows, said = predicted(work / "run", "--input=a.png", "--explain", "--top_k=3")
    expected = Predictor.from_run("run")(["a.png"])
    parent = expected.parent_probabilities[0]
    name = ("high", "low")[parent.argmax()]
    assert rows[0]["parent"] == name == said["images"][0]["parent"]["class"]
    assert float(rows[0]["parent_probability"]) == pytest.approx(parent.max(), abs=1e-6)
    assert f"{name} (parent)" in done.output
    assert "prediction_3" in rows[0]
    assert "prediction_4" not in rows[0]


# --- light and dark


def drawn(path: str, digit: np.ndarray, *, inverted: bool) -> None:
    """Saves a digit of 8 x 8 as a drawing of 80 x 80."""
    large = np.kron(digit, np.ones((10, 10), np.uint8))
    Image.fromarray(255 - large if inverted else large).save(path)


@pytest.fixture
def drawings(digits, work):
    """Twelve digits, light on dark in `light/`, as a person draws them in `paper/`."""
    with np.load(digits / "exemplars.npz") as file:
        images = file["image"][::9, :, :, 0][:12]
    for place in ("light", "paper"):
        Path(place).mkdir()
        for i, image in enumerate(images):
            drawn(f"{place}/{i}.png", image, inverted=place == "paper")
    return work


def probabilities(rows) -> list[float]:
    return [float(row["probability"]) for row in rows]


def test_drawings_on_paper_are_inverted_for_a_run_of_light_on_dark(digits, drawings):
    done, paper, _ = predicted(digits, "--input=paper", output="paper-out")
    assert "light and dark were swapped" in done.output
    assert {row["inverted"] for row in paper} == {"yes"}
    done, light, _ = predicted(digits, "--input=light", output="light-out")
    assert "swapped" not in done.output
    assert {row["inverted"] for row in light} == {"no"}
    assert [row["prediction"] for row in paper] == [row["prediction"] for row in light]
    np.testing.assert_allclose(probabilities(paper), probabilities(light), atol=1e-4)


def test_yes_and_no_are_obeyed(digits, drawings):
    _, plain, _ = predicted(digits, "--input=paper", "--invert=no", output="no")
    _, light, _ = predicted(digits, "--input=light", "--invert", output="yes")
    _, auto, _ = predicted(digits, "--input=light", output="auto")
    assert {row["inverted"] for row in plain} == {"no"}
    assert {row["inverted"] for row in light} == {"yes"}
    np.testing.assert_allclose(probabilities(plain), probabilities(light), atol=1e-4)
    assert not np.allclose(probabilities(plain), probabilities(auto), atol=1e-3)


def test_photos_are_not_inverted_for_a_run_on_photos(colour, work):
    Image.new("RGB", (40, 30), "white").save("white.png")
    photo(1, 200).save("light.png")
    _, rows, _ = predicted(colour, "--input=white.png", "--input=light.png")
    assert {row["inverted"] for row in rows} == {"no"}


def test_bars_stay_black_where_an_image_is_inverted(digits, work):
    wide = np.full((40, 80, 3), 255, np.uint8)
    wide[15:25, 20:60] = 0
    Image.fromarray(wide).save("wide.png")
    predictor = Predictor.from_run(digits)
    image, inverted = predictor.decode_noting("wide.png")
    size = image.shape[0]
    assert inverted
    assert not image[: size // 4 - 1].any()
    assert not image[-(size // 4 - 1) :].any()
    assert image.max() == 255
    assert image[size // 2, 0, 0] == 0
    np.testing.assert_array_equal(image, predictor.fit(wide, invert="auto"))


@pytest.mark.parametrize("shade", [1.0, 0.5, 0.3])
@pytest.mark.parametrize("noise", [0, 10])
def test_paper_in_the_shade_is_paper(shade, noise):
    rng = np.random.default_rng(0)
    image = np.full((60, 90, 1), 240.0)
    image[20:40, 30:50] = 20
    image = np.clip(image * shade + rng.normal(0, noise * shade, image.shape), 0, 255)
    assert is_dark_on_light(image.astype(np.uint8))
    assert not is_dark_on_light(255 - image.astype(np.uint8))


@pytest.mark.parametrize("level", [0, 128, 255])
def test_an_empty_page_is_nothing_on_nothing(level):
    assert not is_dark_on_light(np.full((8, 8, 3), level, np.uint8))


FASHION = Path(__file__).parents[2] / "shared" / "data" / "fashion_mnist"


@pytest.mark.skipif(not FASHION.is_dir(), reason="Fashion-MNIST is not on this machine")
def test_the_ground_of_fashion_mnist_is_told_from_the_things():

    images = idx.read(FASHION).splits["test"].images[:2000]
    assert not any(is_dark_on_light(image) for image in images)
    assert sum(is_dark_on_light(255 - image) for image in images) >= 1999


# --- the pipeline


def test_memory_holds_few_decoded_images():
    """The threads stop where the model is behind."""
    begun, done = [], 0
    with predict._pool() as pool:
        for _ in predict._ahead(pool, lambda item: begun.append(item), range(200), 8):
            done += 1
            time.sleep(0.001)
            assert len(begun) - done <= 9
    assert sorted(begun) == list(range(200))


def test_steps_are_compiled_for_few_sizes(colour):
    trained = Predictor.from_run(colour).trained
    sizes = [predict.batch_size(trained, n) for n in (0, 1, 2, 3, 5, 30, 33, 5000)]
    assert sizes == [32, 1, 2, 4, 8, 32, 32, 32]


def test_ctrl_c_keeps_what_was_predicted(colour, work, monkeypatch):
    Path("many").mkdir()
    for i in range(100):
        photo(i).save(f"many/{i}.png")
    monkeypatch.setattr(
        counter.Counter, "add", lambda self, n, note="": os.kill(os.getpid(), signal.SIGINT)
    )
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as ended:
        run("--mode=predict", f"--workdir={colour}", "--input=many", "--output=out")
    assert ended.value.code == 130
    assert signal.getsignal(signal.SIGINT) is before
    with open("out/predictions.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 32


def test_whole_images_keep_their_shape(work):
    picture = photo(shape=(300, 100))
    picture.save("tall.png")
    np.testing.assert_array_equal(decode_whole("tall.png", longest=300), np.asarray(picture))
    small = decode_whole("tall.png", longest=150)
    assert small.shape == (150, 50, 3)
    reference = np.asarray(picture.resize((50, 150), Image.Resampling.BILINEAR))
    assert np.abs(small.astype(int) - reference).max() <= 1
    picture.save("turned.jpg", exif=_turned(6))
    assert decode_whole("turned.jpg", longest=1000).shape == (100, 300, 3)


def _turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


# --- hostile inputs


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, data: bytes, *more: bytes) -> bytes:
    """A grey PNG of one bit, whatever the data hold."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    parts = [header, *more, chunk(b"IDAT", data), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def bomb() -> bytes:
    """30,000 x 30,000 black pixels in 110 KB."""
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(3751 * 1000)) for _ in range(30))
    return png(30_000, 30_000, rows + packer.flush())


def saved(image: Image.Image, kind: str, **options) -> bytes:
    path = Path(f".made.{kind}")
    image.save(path, **options)
    content = path.read_bytes()
    path.unlink()
    return content


def sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(3 * 2**30)


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def float_tiff() -> bytes:
    return saved(Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)), "tif")


def huge_jpeg() -> bytes:
    """A JPEG whose header says 65,500 x 65,500."""
    data = bytearray(saved(photo(), "jpg"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", 65500, 65500)
    return bytes(data)


def huge_gif() -> bytes:
    """A GIF whose screen is 65,535 x 65,535."""
    data = bytearray(saved(photo(), "gif"))
    data[6:10] = b"\xff" * 4
    return bytes(data)


def corrupt_png() -> bytes:
    data = bytearray(saved(photo(), "png"))
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(40)
    return bytes(data)


UNREADABLE = {
    "bomb.png": (bomb, "too many pixels"),
    "dimensions.png": (lambda: png(2**31 - 1, 2**31 - 1, b""), "too many pixels"),
    "huge.jpg": (huge_jpeg, "too many pixels"),
    "screen.gif": (huge_gif, "too many pixels"),
    "nothing.jpg": (lambda: b"", "is empty"),
    "text.png": (lambda: b"not an image", "is not an image"),
    "page.png": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not an image"),
    "program.png": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n(/etc/passwd) run\n", "is not an image"),
    "archive.jpg": (lambda: b"PK\x03\x04" + bytes(60), "is not an image"),
    "pickled.jpg": (lambda: b"\x80\x04cposix\nsystem\n.", "is not an image"),
    "cut.jpg": (lambda: saved(photo(shape=(300, 300)), "jpg")[:9000], "is truncated"),
    "cut.png": (lambda: saved(photo(shape=(300, 300)), "png")[:9000], "is truncated"),
    "cut.webp": (lambda: saved(photo(shape=(300, 300)), "webp")[:900], "cannot be|truncated|not"),
    "corrupt.png": (corrupt_png, "cannot be decoded"),
    "floats.tif": (float_tiff, "floating-point"),
    "sparse.jpg": (sparse, "3.0 GiB"),
    "pipe.png": (os.mkfifo, "pipe, socket or device"),
    "socket.png": (listening, "pipe, socket or device"),
    "zeros.jpg": (lambda path: path.symlink_to("/dev/zero"), "pipe, socket or device"),
    "itself.jpg": (lambda path: path.symlink_to(path.name), "leads nowhere"),
    "gone.jpg": (lambda path: path.symlink_to("nothing-at-all"), "leads nowhere"),
}


def animated(kind: str) -> bytes:
    frames = [photo(level=60), photo(level=190)]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=40)


READABLE = {
    "animated.gif": lambda: animated("gif"),
    "animated.webp": lambda: animated("webp"),
    "animated.png": lambda: animated("png"),
    "print.jpg": lambda: saved(photo().convert("CMYK"), "jpg"),
    "deep.png": lambda: saved(
        Image.fromarray(np.asarray(photo().convert("L")).astype(np.uint16) * 257), "png"
    ),
    "palette.png": lambda: saved(photo().convert("P"), "png", transparency=0),
    "bits.png": lambda: saved(photo().convert("1"), "png"),
    "turned.jpg": lambda: saved(photo(), "jpg", exif=_turned(8)),
    "pixel.bmp": lambda: saved(photo(shape=(1, 1)), "bmp"),
    "line.png": lambda: saved(photo(shape=(1, 6000)), "png"),
    "text-bomb.png": lambda: png(
        8, 8, zlib.compress(bytes(16)), chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**6)))
    ),
    "日本 <script>alert(1)<.png": lambda: saved(photo(), "png"),
    "two\nlines \x1b[2J\x1b]0;title\x07.png": lambda: saved(photo(), "png"),
    "=cmd|'x'!A1,\".png": lambda: saved(photo(), "png"),
    "x\\..\\..\\up.png": lambda: saved(photo(), "png"),
    "caf\udce9.png": lambda: saved(photo(), "png"),
    f"{'long' * 62}.png": lambda: saved(photo(), "png"),
    "-rf.png": lambda: saved(photo(), "png"),
    "folder.jpg/inside.png": lambda: saved(photo(), "png"),
    "CON.png": lambda: saved(photo(), "png"),
}


def put(folder: Path, name: str, make) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        content = make()
    except TypeError:  # it makes the file itself
        make(path)
    else:
        path.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def hostile(colour, tmp_path_factory):
    """All of them in one folder, and one named by a way out of it; predicted and explained."""
    work = tmp_path_factory.mktemp("hostile")
    before = os.getcwd()
    os.chdir(work)
    try:
        for name, (make, _) in UNREADABLE.items():
            put(Path("given"), name, make)
        for name, make in READABLE.items():
            put(Path("given"), name, make)
        put(Path("outside"), "kept.png", READABLE["-rf.png"])
        ordinary = [p for p in work.rglob("*") if p.is_file() and p.stat().st_size < 2**30]
        kept = {p: p.read_bytes() for p in ordinary if not p.is_symlink()}
        inputs = ["--input=given", "--input=given/../outside/./kept.png"]
        done, rows, said = predicted(colour, *inputs, "--explain")
        new = {p for p in work.rglob("*") if p.is_file() and p not in kept}
        written = {p for p in new if (work / "out") in p.parents}
        strangers = {p.name for p in new - written} - set(UNREADABLE)
        assert kept == {p: p.read_bytes() for p in kept}
    finally:
        os.chdir(before)
    return done, {row["file"]: row for row in rows}, said, work, strangers


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_hostile_file_is_answered_in_words(hostile, name):
    _, rows, _, _, _ = hostile
    row = rows[f"given/{name}"]
    assert row["prediction"] == ""

    assert re.search(UNREADABLE[name][1], row["reason"]), row["reason"]
    assert len(row["reason"]) < 200
    assert "\n" not in row["reason"]


@pytest.mark.parametrize("name", READABLE, ids=ascii)
def test_an_odd_file_is_predicted_like_any_other(hostile, name):
    _, rows, _, work, _ = hostile
    row = rows[f"given/{name}".encode(errors="backslashreplace").decode()]
    assert row["prediction"] in CLASSES
    assert row["reason"] == ""
    overlay = (work / "out" / row["overlay"]).resolve()
    assert (work / "out" / "overlays") in overlay.parents
    with Image.open(overlay) as image:
        image.load()


def test_nothing_outside_the_folder_of_results_is_touched(hostile):
    done, rows, said, work, strangers = hostile
    assert not strangers
    assert {p.name for p in work.iterdir()} == {"given", "outside", "out"}
    names = {p.name for p in (work / "out").iterdir()}
    assert names == {"predictions.csv", "predictions.json", "overlays"}
    assert (
        len({row["overlay"].casefold() for row in rows.values() if row["overlay"]})
        == len(READABLE) + 1
    )
    assert not {c for c in done.output if ord(c) < 32} - {"\n"}
    assert [one["file"] for one in said["images"]][-1] == "given/../outside/./kept.png"


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_hostile_file_alone_ends_in_one_sentence(colour, work, name):
    path = put(work / "given", name, UNREADABLE[name][0])
    sentence = refused(colour, f"--input={path}", "--output=out")
    assert name in sentence
    assert "nothing could be read" in sentence
    assert not Path("out").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(colour, work):
    photo().save("locked.png")
    os.chmod("locked.png", 0)
    assert "may not be read" in refused(colour, "--input=locked.png")


def test_the_decoder_does_not_wait_for_a_pipe(work):
    os.mkfifo("pipe.png")
    with pytest.raises(InputError, match="pipe, socket or device"):
        decode("pipe.png", ImageSpec(8))
