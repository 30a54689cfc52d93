"""What `--mode=predict` costs: a folder of photos, a video, and the memory of one photo.

    python benchmarks/prediction.py                       # photos of noise
    python benchmarks/prediction.py --path=DIR            # a folder of JPEG photos
    python benchmarks/prediction.py --json=benchmarks/results/prediction.json

**Folder**: JPEG photos of 640 x 480 by `resnet18` at 224. D is bare decoding, by the function and
the number of threads of the prediction, which keeps nothing; F the compiled step on a batch that
stays on the device; D * F / (D + F) is what both give one after the other on the same cores. Turns
of D, F and the prediction follow each other in one process, since the machine's speed drifts; a
ratio is that of one round, and its median over the rounds is told. Last, the whole folder is
predicted once, against the median of D * F / (D + F), its files listed, with the first compilation
behind it. CPU is the process's: other work on the machine lowers images a second, and hardly this.
**Video**: a moving photo, 10 s of 640 x 480 at 30 frames a second, by `fashion_net2` with its heat
maps, side by side; compilation is counted. **Memory**: the peak of a process that
predicts one photo by a run of `vgg13` at 224. Returns 1 where a target is missed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flaxcls import ops

NOTE = ops.prepare_process()  # as main does: before JAX starts its threads

import jax  # noqa: E402
import machine  # noqa: E402
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from flaxcls import config  # noqa: E402
from flaxcls.batch import Preprocess  # noqa: E402
from flaxcls.data.decode import ImageSpec, count_cores, in_threads  # noqa: E402
from flaxcls.deploy import video  # noqa: E402
from flaxcls.deploy.inputs import Photo, find_inputs  # noqa: E402
from flaxcls.deploy.predict import batch_size, create_explainer, predict_photos  # noqa: E402
from flaxcls.deploy.predictor import Predictor, logits_of_pixels  # noqa: E402
from flaxcls.deploy.trained import TrainedModel  # noqa: E402
from flaxcls.models import create_model  # noqa: E402

TARGETS = {"folder": 0.90, "video": 15.0, "memory": 2e9}
SECONDS, RATE, WIDTH, HEIGHT = 10, 30, 640, 480


def trained_model(name: str, classes: int, size: int, channels: int) -> TrainedModel:
    """Returns a model with the weights that it is initialised with, which are as fast as others."""
    c = config.for_dataset("digits")
    c.model.name = name
    c.data.image_size, c.data.channels = size, channels
    resolved, _ = config.resolve(c)
    model = create_model(name, classes)
    image = np.zeros((1, size, size, channels), np.float32)
    variables = jax.jit(lambda key: model.init(key, image, train=False))(jax.random.key(0))
    return TrainedModel(
        Path("."),
        resolved,
        model,
        {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})},
        Preprocess(size, channels, (0.5,), (0.25,)),
        ImageSpec(size, channels),
        tuple(f"class {i}" for i in range(classes)),
        (),
        (),
        {},
        "initial weights",
    )


def noise(rng: np.random.Generator) -> Image.Image:
    """Returns a smooth image that costs to decode what a photo does: about 60 KB as a JPEG."""
    coarse = Image.fromarray(rng.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), np.uint8))
    return coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


def write_photos(folder: Path, count: int, distinct: int = 100) -> None:
    """Writes JPEG files, some of them alike."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"{i}.jpg"
        if i < distinct:
            noise(rng).save(path, quality=85)
        else:
            path.write_bytes((folder / f"{i % distinct}.jpg").read_bytes())


class Folder:
    """Turns of bare decoding, the bare step, and the prediction of a folder."""

    def __init__(self, photos: Sequence[Photo]):
        trained = trained_model("resnet18", 1000, 224, 3)
        self.predictor = Predictor(trained, batch_size=batch_size(trained, len(photos)))
        self.photos = photos
        self._step = jax.jit(
            lambda variables, images: logits_of_pixels(
                trained.model, trained.preprocess, trained.dtype, variables, images
            ),
            compiler_options=ops.compiler_options(),
        )
        self._batch = jax.device_put(np.zeros((self.predictor.batch_size, 224, 224, 3), np.uint8))
        self._variables = self.predictor.trained.variables

    def decode(self, photos: Sequence[Photo]) -> None:
        in_threads(lambda photo: self.predictor.decode(photo.path) is None, photos)

    def step(self, photos: Sequence[Photo]) -> None:
        for _ in range(0, len(photos), self.predictor.batch_size):
            logits = self._step(self._variables, self._batch)
        jax.block_until_ready(logits)

    def predict(self, photos: Sequence[Photo]) -> None:
        seen, failures = predict_photos(self.predictor, photos)
        assert len(seen) == len(photos), failures[:1]

    def measure(self, rounds: int, images: int) -> dict[str, Any]:
        """Returns the rates of each round, and of the whole folder."""
        some = self.photos[:images]
        for turn in (self.decode, self.step, self.predict):
            turn(some[: 2 * self.predictor.batch_size])  # compiles
        rows = []
        for _ in range(rounds):
            (decoding, d), (step, f), (prediction, p) = (
                timed(turn, some) for turn in (self.decode, self.step, self.predict)
            )
            rows.append(
                {
                    "decode": decoding,
                    "step": step,
                    "predict": prediction,
                    "ratio": prediction * (1 / decoding + 1 / step),
                    "cpu_ratio": (d + f) / p,
                }
            )
            print(", ".join(f"{key} {value:.3g}" for key, value in rows[-1].items()), flush=True)
        middle = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        whole, _ = timed(self.predict, self.photos)
        bound = middle["decode"] * middle["step"] / (middle["decode"] + middle["step"])
        return {
            "batch_size": self.predictor.batch_size,
            "threads": count_cores(),
            "rounds": rows,
            **middle,
            "images": len(self.photos),
            "whole": whole,
            "whole_ratio": whole / bound,
        }


def timed(turn: Callable[[Sequence[Photo]], None], photos: Sequence[Photo]) -> tuple[float, float]:
    """Returns images a second, and seconds of CPU an image."""
    cpu, began = time.process_time(), time.perf_counter()
    turn(photos)
    seconds = time.perf_counter() - began
    return len(photos) / seconds, (time.process_time() - cpu) / len(photos)


def write_clip(path: Path) -> None:
    """Writes a photo that moves before another, as a video."""
    cv2 = video._opencv()
    rng = np.random.default_rng(0)
    ground, thing = (np.asarray(noise(rng)) for _ in range(2))
    code = cv2.VideoWriter_fourcc(*"mp4v")
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, code, RATE, (WIDTH, HEIGHT))
    for i in range(SECONDS * RATE):
        frame = ground.copy()
        x, y = 40 + i, 100 + round(60 * np.sin(i / 20))
        frame[y : y + 200, x : x + 200] = 255 - thing[:200, :200]
        writer.write(frame)
    writer.release()


def measure_video(folder: Path, rounds: int) -> dict[str, Any]:
    """Annotates the clip some times, each time with a newly compiled model."""
    cv2 = video._opencv()
    clip, rows = folder / "clip.mp4", []
    write_clip(clip)
    for number in range(rounds):
        predictor = Predictor(trained_model("fashion_net2", 10, 28, 1), batch_size=16)
        cpu, began = time.process_time(), time.perf_counter()
        explainer = create_explainer(predictor, "auto")
        target = folder / f"annotated-{number}.mp4"
        with video.open_file(str(clip)) as frames:
            made = video.annotate(
                predictor, explainer, frames, target, top_k=5, invert="auto", stop=video.Stop()
            )
        seconds = time.perf_counter() - began
        written = cv2.VideoCapture(str(target))
        count, rate = (written.get(key) for key in (cv2.CAP_PROP_FRAME_COUNT, cv2.CAP_PROP_FPS))
        assert (count, rate) == (SECONDS * RATE, RATE), (count, rate)
        rows.append(
            {
                "frames_per_second": len(made.frames) / seconds,
                "cpu_ms_a_frame": 1e3 * (time.process_time() - cpu) / len(made.frames),
            }
        )
        print(f"video: {rows[-1]}", flush=True)
    middle = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    return {"method": explainer.method, "rounds": rows, "frames": int(count), **middle}


def measure_memory(folder: Path) -> dict[str, Any]:
    """Trains vgg13 at 224 on a few digits, predicts one photo, and returns the peak of that."""
    run, photo = folder / "run", folder / "photo.jpg"
    noise(np.random.default_rng(0)).save(photo)
    _command(
        "--config=vgg13",
        f"--workdir={run}",
        "--config.data.image_size=224",
        "--config.data.max_per_class=4",
        "--config.train.batch_size=4",
        "--config.train.epochs=1",
        "--config.log.plots=False",
    )
    seconds, peak = _command("--mode=predict", f"--workdir={run}", f"--input={photo}")
    size = (run / "weights.safetensors").stat().st_size
    print(f"memory: {peak / 1e9:.2f} GB, weights {size / 1e9:.2f} GB", flush=True)
    return {"peak": peak, "weights": size, "seconds": seconds}


def _command(*arguments: str) -> tuple[float, int]:
    """Runs a command of flaxcls; returns its seconds and its most bytes of memory."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "flaxcls.main", *arguments])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"flaxcls.main {' '.join(arguments)} ended with {status}")
    return time.perf_counter() - began, usage.ru_maxrss * 1024


def misses(result: dict[str, Any]) -> list[str]:
    """Returns what falls short of its target."""
    measured = {
        "folder": (result.get("folder", {}).get("ratio"), 1),
        "video": (result.get("video", {}).get("frames_per_second"), 1),
        "memory": (result.get("memory", {}).get("peak"), -1),
    }
    return [
        f"{name}: {value:.3g}, the target is {TARGETS[name]:.3g}"
        for name, (value, sign) in measured.items()
        if value is not None and sign * value < sign * TARGETS[name]
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--path", help="folder of JPEG photos; else photos of noise")
    parser.add_argument("--images", type=int, default=5000, help="photos of noise in the folder")
    parser.add_argument("--turn", type=int, default=320, help="images of a turn")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--parts", nargs="+", default=[*TARGETS], choices=TARGETS)
    parser.add_argument("--json", type=Path, help="file to write the result to")
    arguments = parser.parse_args()
    print(NOTE)
    result: dict[str, Any] = {
        "command": machine.command(parser, arguments),
        "machine": machine.describe(machine.own_devices()),
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if "folder" in arguments.parts:
            if arguments.path is None:
                (folder / "photos").mkdir()
                write_photos(folder / "photos", arguments.images)
            photos = find_inputs([arguments.path or str(folder / "photos")]).photos
            result["folder"] = Folder(photos).measure(arguments.rounds, arguments.turn)
        if "video" in arguments.parts:
            result["video"] = measure_video(folder, 3)
        if "memory" in arguments.parts:
            result["memory"] = measure_memory(folder)
    result["load_after"] = os.getloadavg()[0]
    print(json.dumps({k: v for k, v in result.items() if k != "machine"}, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    missed = misses(result)
    print("\n".join(missed) or "all targets are met")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
