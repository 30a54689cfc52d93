"""`--mode=predict` of videos and cameras: every frame is seen, and the copy keeps their rate."""

import csv
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from command_line import SMALL, compiled_once, run
from full_disk import files_no_larger_than
from PIL import Image

from flaxcls.deploy import counter, video
from flaxcls.deploy.inputs import has_video_signature, is_video
from flaxcls.deploy.predict import create_explainer
from flaxcls.deploy.predictor import Predictor

cv2 = pytest.importorskip("cv2", reason="the extra 'video' is not installed")
video._opencv()  # before a video is written here: FFmpeg is as quiet as it first was

QUIET = tuple(flag for flag in SMALL if ".log." in flag)
FFMPEG = pytest.mark.skipif(not shutil.which("ffmpeg"), reason="there is no ffmpeg")


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(tmp_path_factory):
    with compiled_once(tmp_path_factory.getbasetemp() / "compiled"):
        yield


@pytest.fixture(scope="module")
def colour(tmp_path_factory) -> Path:
    """A run that tells dark photos from light ones."""
    folder = tmp_path_factory.mktemp("colour")
    rng = np.random.default_rng(0)
    for name, level in (("dark", 60), ("light", 190)):
        (folder / "data" / name).mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(level - 50, level + 50, (30, 40, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "data" / name / f"{i}.png")
    done = run(
        "--config=lenet",
        "--config.data.source=image_folder",
        f"--config.data.path={folder / 'data'}",
        "--config.data.image_size=28",
        "--config.data.channels=3",
        "--config.train.batch_size=8",
        "--config.train.epochs=6",
        f"--workdir={folder / 'run'}",
        *QUIET,
    )
    assert done.code == 0, done.error
    return folder / "run"


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """A run on grey digits, light on dark."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    done = run(*SMALL, f"--workdir={folder}")
    assert done.code == 0, done.error
    return folder


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def frame(i: int, width: int, height: int, level: int) -> np.ndarray:
    """A smooth ground of a brightness, with a square that moves."""
    image = np.full((height, width, 3), level, np.uint8)
    image[:, :, 0] += np.linspace(0, 40, width).astype(np.uint8)
    x = (3 * i) % max(1, width - 8)
    image[height // 4 : height // 4 + 8, x : x + 8] = (200, 30, 90)
    return image


def clip(
    path: str,
    count: int = 30,
    *,
    rate: float = 25,
    width: int = 96,
    height: int = 64,
    code: str = "mp4v",
) -> str:
    """Writes a video whose first half is dark and whose second is light."""
    writer = cv2.VideoWriter(
        path, cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*code), rate, (width, height)
    )
    assert writer.isOpened()
    for i in range(count):
        writer.write(frame(i, width, height, 40 if 2 * i < count else 170)[:, :, ::-1])
    writer.release()
    return path


def read(path: str | Path) -> tuple[list[np.ndarray], float]:
    """All frames in RGB, and the rate."""
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    rate = capture.get(cv2.CAP_PROP_FPS)
    frames = []
    while (read := capture.read())[0]:
        frames.append(read[1][:, :, ::-1])
    capture.release()
    return frames, rate


def predicted(workdir: Path, *arguments: str, output: str = "out"):
    """The command, the rows of its table, and its JSON."""
    done = run("--mode=predict", f"--workdir={workdir}", f"--output={output}", *arguments)
    assert done.code == 0, done.error
    with open(Path(output, "predictions.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    return done, rows, json.loads(Path(output, "predictions.json").read_text())


def refused(workdir: Path, *arguments: str) -> str:
    """The sentence, with nothing of OpenCV or FFmpeg beside it."""
    return run("--mode=predict", f"--workdir={workdir}", *arguments).sentence


def probed(path: str | Path) -> tuple[int, float]:
    """How many frames FFmpeg counts, and their rate."""
    asked = ("-count_frames", "-show_entries", "stream=nb_read_frames,r_frame_rate")
    command = ["ffprobe", "-v", "error", "-select_streams", "v", *asked, "-of", "json", str(path)]
    stream = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    over, under = map(int, stream["streams"][0]["r_frame_rate"].split("/"))
    return int(stream["streams"][0]["nb_read_frames"]), over / under


@pytest.mark.parametrize(
    ("name", "code", "rate"),
    [
        ("a.mp4", "mp4v", 30),
        ("a.mov", "mp4v", 30000 / 1001),
        ("a.avi", "MJPG", 12.5),
        ("a.mkv", "mp4v", 24),
        ("no-extension.mp4", "mp4v", 60),
    ],
)
def test_the_copy_has_the_frames_and_the_rate_of_the_original(colour, work, name, code, rate):
    clip(name, 41, rate=rate, code=code)
    if name.startswith("no-"):
        Path(name).rename(name := "no-extension")
    _, rows, said = predicted(colour, f"--input={name}", "--explain")
    copy = Path("out", said["videos"][0]["annotated"])
    frames, copied_rate = read(copy)
    assert len(frames) == len(rows) == 41
    assert copied_rate == pytest.approx(rate, rel=1e-5)
    assert said["videos"][0]["frames_per_second"] == pytest.approx(rate, rel=1e-5)
    if shutil.which("ffprobe"):
        assert probed(copy) == (41, pytest.approx(rate, rel=1e-5))
    assert [int(row["frame"]) for row in rows] == list(range(41))
    assert float(rows[-1]["seconds"]) == pytest.approx(40 / rate, abs=1e-3)


def test_each_frame_is_predicted_as_an_image_of_it(colour, work):
    clip("a.mp4", 36)
    done, rows, said = predicted(colour, "--input=a.mp4")
    frames, _ = read("a.mp4")
    expected = Predictor.from_run(colour)([_png(image) for image in frames])
    names = said["class_names"]
    assert [row["prediction"] for row in rows] == [names[k] for k in expected.top_k(1)[0][:, 0]]
    found = [float(row["probability"]) for row in rows]
    np.testing.assert_allclose(found, expected.probabilities.max(axis=1), atol=1e-5)
    assert [row["prediction"] for row in rows] == ["dark"] * 18 + ["light"] * 18
    assert "36 frames, 96 x 64, 25 frames a second" in done.output


def _png(image: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(content, "PNG")
    return content.getvalue()


def test_the_copy_shows_image_and_map_side_by_side(colour, work):
    clip("a.mp4", 20, width=320, height=240)
    _, plain, _ = predicted(colour, "--input=a.mp4", output="plain")
    _, rows, said = predicted(colour, "--input=a.mp4", "--explain", output="explained")
    originals, _ = read("a.mp4")
    shown, _ = read("explained/a.mp4")
    without, _ = read("plain/a.mp4")
    bar = shown[0].shape[0] - 240
    assert shown[0].shape == (240 + bar, 320 + 4 + 320, 3)
    assert without[0].shape[1] == 320
    for i, original in enumerate(originals):
        left = shown[i][bar:, :320].astype(int)
        assert np.median(np.abs(left - original)) < 6
        assert np.abs(shown[i][bar:, 324:].astype(int) - original).mean() > 8
    # The caption is that of each frame's own prediction.
    captions = [image[:bar].astype(int) for image in shown]
    assert np.abs(captions[0] - captions[-1]).mean() > 2
    assert all(row["left"] == "" for row in plain)
    assert said["explained_by"] == "grad_cam"
    for row in rows:
        if row["left"]:
            assert 0 <= float(row["left"]) < float(row["right"]) <= 1


@pytest.mark.parametrize(("width", "height"), [(162, 122), (16, 16), (64, 240), (1920, 1080)])
def test_frames_of_any_size_are_shown(colour, work, width, height):
    clip("a.mp4", 3, width=width, height=height)
    predicted(colour, "--input=a.mp4", "--explain")
    frames, _ = read("out/a.mp4")
    assert len(frames) == 3
    rows, columns, _ = frames[0].shape
    assert rows % 2 == columns % 2 == 0
    assert 240 <= max(rows, columns) <= 2 * 1280 + 4


def test_videos_of_one_name_have_copies_of_their_own(colour, work):
    for place in ("a", "b"):
        Path(place).mkdir()
        clip(f"{place}/same.mp4", 4)
    clip("same.avi", 4, code="MJPG")
    inputs = ("a/same.mp4", "b/same.mp4", "same.avi")
    _, rows, said = predicted(colour, *(f"--input={name}" for name in inputs))
    assert [one["annotated"] for one in said["videos"]] == ["same.mp4", "same-2.mp4", "same-3.mp4"]
    assert [row["file"] for row in rows[::4]] == list(inputs)
    assert {p.name for p in Path("out").glob("*.mp4")} == {"same.mp4", "same-2.mp4", "same-3.mp4"}


def test_light_and_dark_are_swapped_for_a_whole_video_or_not_at_all(digits, work):
    """A white page on which something dark appears, and the same the other way round."""
    for name, page in (("paper", 255), ("board", 0)):
        writer = cv2.VideoWriter(
            f"{name}.avi", cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*"MJPG"), 25, (64, 64)
        )
        for i in range(40):
            image = np.full((64, 64, 3), page, np.uint8)
            size = 4 + i if i < 30 else 64
            image[:size, 20 : 20 + size // 2] = 255 - page
            writer.write(image)
        writer.release()
    done, rows, _ = predicted(digits, "--input=paper.avi", "--input=board.avi")
    assert {row["inverted"] for row in rows[:40]} == {"yes"}
    assert {row["inverted"] for row in rows[40:]} == {"no"}
    assert [row["prediction"] for row in rows[:40]] == [row["prediction"] for row in rows[40:]]
    assert "40 of 80 images are dark on light" in done.output


# --- what is no video, and no camera


def _cut(share: float) -> bytes:
    data = Path(clip("whole.mp4", 60)).read_bytes()
    return data[: int(len(data) * share)]


HOSTILE = {
    "empty.mp4": (lambda: b"", "is empty"),
    "text.mp4": (lambda: b"not a video", "is none"),
    "image.mp4": (lambda: _png(frame(0, 8, 8, 9)), "is none"),
    "playlist.mp4": (lambda: b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n", "is none"),
    "concat.avi": (lambda: b"ffconcat version 1.0\nfile /etc/passwd\n", "is none"),
    "cut.mp4": (lambda: _cut(0.5), "cannot be opened"),
    "header.mp4": (lambda: b"\0\0\0\x18ftypmp42" + bytes(60), "cannot be opened"),
    "header.mkv": (lambda: b"\x1a\x45\xdf\xa3" + bytes(200), "cannot be opened"),
    "header.avi": (lambda: b"RIFF\xff\xff\xff\xffAVI LIST" + b"\xff" * 300, "cannot be opened"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_video_is_answered_in_words(colour, work, name):
    make, sentence = HOSTILE[name]
    Path(name).write_bytes(make())
    said = refused(colour, f"--input={name}", "--output=out")
    assert sentence in said
    assert name in said
    assert not Path("out").exists()


def test_pipes_devices_and_links_are_not_opened(colour, work):
    os.mkfifo("pipe.mp4")
    assert "pipe, socket or device" in refused(colour, "--input=pipe.mp4")
    Path("zero.mp4").symlink_to("/dev/zero")
    assert "pipe, socket or device" in refused(colour, "--input=zero.mp4")
    Path("loop.mp4").symlink_to("loop.mp4")
    assert "leads nowhere" in refused(colour, "--input=loop.mp4")
    Path("folder.mp4").mkdir()
    assert "no images in 'folder.mp4'" in refused(colour, "--input=folder.mp4")


@FFMPEG
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sound.mp4", ("-f", "lavfi", "-i", "sine=duration=1", "-c:a", "aac")),
        ("none.avi", ("-f", "lavfi", "-i", "testsrc=duration=1", "-frames:v", "0")),
    ],
)
def test_a_video_without_pictures_is_named(colour, work, name, options):
    subprocess.run(["ffmpeg", "-v", "error", *options, name], check=True)
    assert f"'{name}'" in refused(colour, f"--input={name}")


@FFMPEG
def test_a_video_whose_end_is_missing_is_predicted_as_far_as_it_goes(colour, work):
    clip("whole.mp4", 100)
    fast = ("-c", "copy", "-movflags", "+faststart", "fast.mp4")
    subprocess.run(["ffmpeg", "-v", "error", "-i", "whole.mp4", *fast], check=True)
    data = Path("fast.mp4").read_bytes()
    Path("cut.mp4").write_bytes(data[: len(data) // 2])
    done, rows, said = predicted(colour, "--input=cut.mp4")
    assert 5 < len(rows) < 95
    assert f"ended after {len(rows)} of 100 frames" in said["videos"][0]["note"]
    assert "ended after" in done.output
    assert len(read("out/cut.mp4")[0]) == len(rows)


def test_the_rest_is_predicted_where_a_video_cannot_be_read(colour, work):
    clip("good.mp4", 5)
    Path("bad.mp4").write_bytes(b"")
    inputs = ("--input=bad.mp4", "--input=good.mp4", "--input=9999")
    done, rows, said = predicted(colour, *inputs)
    assert [one["file"] for one in said["unreadable"]] == ["bad.mp4", "camera 9999"]
    assert len(rows) == 5 + 2
    assert "bad.mp4 is empty" in done.output


def test_a_camera_that_is_not_there_is_named(colour, work):
    assert "camera 9999" in (said := refused(colour, "--input=9999"))
    assert "connect it" in said


def test_without_opencv_the_remedy_is_told(colour, work, monkeypatch):
    clip("a.mp4", 3)
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "cv2" else real(name)
    )
    video._opencv.cache_clear()
    for given in ("a.mp4", "0"):
        assert "pip install 'flaxcls[video]'" in refused(colour, f"--input={given}")
    video._opencv.cache_clear()


def test_videos_are_known_by_name_or_by_their_first_bytes(work):
    clip("a.mp4", 3)
    assert is_video("a.mp4")
    assert is_video("missing.webm")
    Path("a.mp4").rename("a")
    assert is_video("a")
    Path("a").rename("a.png")  # the decoder of images says what is wrong with it
    assert not is_video("a.png")
    assert has_video_signature("a.png")
    Path("text").write_text("plain")
    assert not is_video("text")
    os.mkfifo("pipe")
    assert not is_video("pipe")


def test_a_full_disk_is_told_and_leaves_no_half_video(colour, work):
    rng = np.random.default_rng(0)
    writer = cv2.VideoWriter(
        "a.avi", cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*"MJPG"), 25, (320, 240)
    )
    for _ in range(40):
        writer.write(rng.integers(0, 256, (240, 320, 3), np.uint8))
    writer.release()
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with files_no_larger_than(200_000):
            done = run("--mode=predict", f"--workdir={colour}", "--input=a.avi", "--output=out")
    finally:
        signal.signal(signal.SIGXFSZ, ignored)
    assert done.code == 2
    assert "cannot write 'out/a.mp4'" in done.error
    assert not Path("out").exists()


# --- to the end, and before it


def test_ctrl_c_keeps_the_frames_until_then(colour, work, monkeypatch):
    clip("a.mp4", 200)
    real = counter.Counter.add

    def press(self, count, note=""):
        real(self, count, note)
        if self._done == 20:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(counter.Counter, "add", press)
    with pytest.raises(SystemExit) as ended:
        run("--mode=predict", f"--workdir={colour}", "--input=a.mp4", "--output=out")
    assert ended.value.code == 130
    with open("out/predictions.csv", newline="") as file:
        count = len(list(csv.DictReader(file)))
    assert 20 <= count < 100
    assert len(read("out/a.mp4")[0]) == count


class Camera:
    """A camera of 20 frames a second whose pictures come from nowhere."""

    def get(self, key: int) -> float:
        return 20.0 if key == cv2.CAP_PROP_FPS else -1.0

    def read(self) -> tuple[bool, np.ndarray]:
        return True, np.full((48, 64, 3), 200, np.uint8)

    def release(self) -> None:
        self.released = True


def test_what_a_camera_sees_is_written_in_its_own_time(colour, work):
    """Frames are repeated or left out, so that the copy lasts as long as it was looked at."""
    predictor = Predictor.from_run(colour, batch_size=1)
    explainer = create_explainer(predictor, "auto")
    explainer(np.zeros((1, 28, 28, 3), np.uint8))  # compiles
    camera = Camera()
    stop = video.Stop()

    class Frames(video.Frames):
        seen = 0

        def read(self):
            self.seen += 1
            stop._pressed = self.seen > 60
            return super().read()

    with Frames(camera, camera.read()[1], "camera 0", live=True) as frames:
        assert frames.count is None
        made = video.annotate(
            predictor, explainer, frames, work / "c.mp4", top_k=2, invert="no", stop=stop
        )
    assert camera.released
    assert made.seconds == sorted(made.seconds)
    written, rate = read("c.mp4")
    assert rate == 20
    assert len(written) == round(made.seconds[-1] * 20) + 1
    assert len(made.frames) >= 60
