"""What feeding costs: JPEG files against torch's DataLoader, arrays in memory against NumPy.

    python benchmarks/input_pipeline.py                      # files of noise
    python benchmarks/input_pipeline.py --path=DIR           # a folder of JPEG photos a class
    python benchmarks/input_pipeline.py --json=benchmarks/results/input_pipeline.json

**Files**: random resized crop to 224, horizontal flip, shuffled, up to normalised floats in batches
of 64. flaxcls decodes in `data.workers` processes, or with 0 in a thread a core; torch's DataLoader
reads an ImageFolder in as many processes, with torchvision or, where it is not installed, with
the same steps in Pillow. Bare threads decode, crop and resize with flaxcls's decoder and keep
nothing. **Decoders**: one thread, from bytes in memory, decoding alone and with crop and resize.
**Arrays**: 28 x 28 uint8 in batches of 256, shuffled, of placement `host`: NumPy's own gather of
the same batches, flaxcls up to NumPy arrays and up to the device, torch on a TensorDataset.

Every peer is a process of its own. They take turns of a few seconds and are stopped (SIGSTOP, with
their workers) between them. A ratio is that of two turns of one round; its median over the rounds
is told. CPU is what all processes of a peer take for an image: other work on the machine lowers
images a second, and this hardly. Exits with 1 where a ratio that is asked for is missed.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import machine
import numpy as np
import turns
from input_task import FILE_BATCH
from PIL import Image

from flaxcls.data.load import load_dataset
from flaxcls.errors import InputError

DECODERS = ("flaxcls", "Pillow", "OpenCV")
LOADER, BARE, GATHER = "DataLoader", "bare threads", "NumPy's gather"
# What is asked of flaxcls: so many times the rate of another peer, and images a second.
TARGETS = {LOADER: 4.0, BARE: 0.6, GATHER: 0.3}
LEAST_FROM_ARRAYS = 1_500_000
PACKAGES = (
    "simplejpeg",
    "cykooz-resizer",
    "pillow",
    "torch",
    "torchvision",
    "opencv-python-headless",
)
HERE = Path(__file__).parent
OURS, TORCHS = str(HERE / "flaxcls_input.py"), str(HERE / "torch_input.py")

Row = dict[str, Any]


def measure(
    what: str,
    workers: int,
    peers: Mapping[str, Sequence[str]],
    against: Sequence[str],
    rounds: int,
    seconds: float,
) -> list[Row]:
    """Returns a row for each peer that is not in `against`, with its ratios to those that are."""
    taken: dict[str, list[turns.Turn]] = {name: [] for name in peers}
    with contextlib.ExitStack() as stack:
        running = {
            name: stack.enter_context(turns.Peer(command)) for name, command in peers.items()
        }
        for _ in range(rounds):
            for name, peer in running.items():
                turn = peer.turn(seconds)
                if turn is not None:
                    taken[name].append(turn)
    rows = []
    for name, own in taken.items():
        row: Row = {"what": what, "workers": workers, "peer": name}
        for other in against:
            pairs = [(a.rate, b.rate) for a, b in zip(own, taken[other], strict=False)]
            if name not in against and pairs:
                row[f"over {other}"] = statistics.median(a / b for a, b in pairs)
        if own:
            row["images_per_second"] = statistics.median(turn.rate for turn in own)
            row["cpu_us"] = statistics.median(1e6 * turn.cpu / turn.images for turn in own)
        row["turns"] = [turn.rate for turn in own]
        rows.append(row)
    return rows


def measure_files(folder: str, workers: int, rounds: int, seconds: float) -> list[Row]:
    """Loaders of `workers` processes, and flaxcls's threads where there are as many cores."""
    peers = {
        "flaxcls": [OURS, "files", str(workers), folder],
        LOADER: [TORCHS, "files", str(workers), folder],
        BARE: [OURS, "bare", str(workers), folder],
    }
    if workers == len(os.sched_getaffinity(0)):
        peers["flaxcls, threads"] = [OURS, "files", "0", folder]
    return measure("files", workers, peers, (LOADER, BARE), rounds, seconds)


def measure_decoders(folder: str, rounds: int, seconds: float) -> list[Row]:
    rows = []
    for part, what in (("decode", "decoding"), ("all", "decoding, crop, resize")):
        peers = {name: [OURS, "decoder", name, part, folder] for name in DECODERS}
        rows += measure(what, 1, peers, ("Pillow",), rounds, seconds)
    return rows


def measure_arrays(rounds: int, seconds: float) -> list[Row]:
    peers = {
        "flaxcls": [OURS, "arrays"],
        "flaxcls, to the device": [OURS, "device"],
        LOADER: [TORCHS, "arrays"],
        GATHER: [OURS, "gather"],
    }
    return measure("arrays", 1, peers, (LOADER, GATHER), rounds, seconds)


def write_noise(folder: Path) -> None:
    """Writes 3 classes of 200 JPEG files of 300 x 200: smooth noise of about 10 KB a file."""
    rng = np.random.default_rng(0)
    for i in range(600):
        coarse = Image.fromarray(rng.integers(0, 256, (25, 38, 3), np.uint8))
        image = coarse.resize((300, 200), Image.Resampling.BICUBIC)
        path = folder / f"class{i % 3}" / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        image.save(path, quality=85)


def table(rows: list[Row]) -> str:
    """Returns the rows as a Markdown table, ratios first."""
    others = (LOADER, BARE, GATHER, "Pillow")
    lines = [
        f"| what | workers | peer | over {' | over '.join(others)} | images/s | CPU, us |",
        "|" + "---|" * (len(others) + 5),
    ]
    for row in rows:
        ratios = [row.get(f"over {other}") for other in others]
        numbers = ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        if row["turns"]:
            numbers += [f"{row['images_per_second']:,.0f}", f"{row['cpu_us']:.2f}"]
        else:
            numbers += ["not installed", ""]
        lines.append(f"| {' | '.join([row['what'], str(row['workers']), row['peer'], *numbers])} |")
    return "\n".join(lines)


def draw(rows: list[Row], path: Path) -> bool:
    """Draws images a second as bars; returns whether matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if "images_per_second" in row]
    kinds = list(dict.fromkeys((row["what"], row["workers"]) for row in rows))
    groups = [[row for row in rows if (row["what"], row["workers"]) == kind] for kind in kinds]
    figure, all_axes = pyplot.subplots(
        len(groups),
        figsize=(8, 0.7 * len(groups) + 0.3 * len(rows)),
        height_ratios=[len(group) + 1 for group in groups],
        squeeze=False,
        layout="constrained",
    )
    for axes, (what, workers), group in zip(all_axes[:, 0], kinds, groups, strict=True):
        colours = ["C0" if row["peer"].startswith("flaxcls") else "C7" for row in group]
        bars = axes.barh(
            [row["peer"] for row in group],
            [row["images_per_second"] for row in group],
            color=colours,
        )
        axes.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
        axes.set_title(f"{what}, {workers} worker{'s' * (workers > 1)}", fontsize=9, loc="left")
        axes.invert_yaxis()
        axes.tick_params(labelsize=8)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.margins(x=0.12)
    all_axes[-1, 0].set_xlabel("images a second")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def missed(rows: list[Row]) -> list[str]:
    """Returns a sentence for each target that flaxcls misses."""
    sentences = []
    for row in rows:
        if row["peer"] != "flaxcls" or row["what"] not in ("files", "arrays"):
            continue
        name = f"{row['what']}, {row['workers']} workers"
        targets = TARGETS if row["what"] == "files" else {GATHER: TARGETS[GATHER]}
        for other, least in targets.items():
            if (ratio := row.get(f"over {other}", least)) < least:
                sentences.append(f"{name}: {ratio:.2f} times {other}, not {least}")
        if row["what"] == "arrays" and row["images_per_second"] < LEAST_FROM_ARRAYS:
            sentences.append(f"{name}: fewer than {LEAST_FROM_ARRAYS:,} images a second")
    return sentences


def versions() -> dict[str, str]:
    """Returns the versions of what decodes and of torch, and what torch reads files with."""
    about = subprocess.run([sys.executable, TORCHS, "about"], capture_output=True, text=True)
    found = {"torch_reads_with": about.stdout.strip() or "nothing, as it is not installed"}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def wrong(arguments: argparse.Namespace) -> str | None:
    """Returns what is wrong with the arguments in one sentence, or None."""
    if min(arguments.workers) < 1 or arguments.rounds < 1 or not 0 < arguments.seconds < 3600:
        return "--workers and --rounds are at least 1, and --seconds are more than 0"
    if arguments.path is None:
        return None
    try:
        count = len(load_dataset("image_folder", arguments.path).splits["train"])
    except InputError as error:
        return f"--path: {error}"
    if count < FILE_BATCH:
        return f"--path: {count} images are less than a batch of {FILE_BATCH}; give a larger folder"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--path", help="folder of photos, one a class; else files of noise")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, nargs="+", default=sorted({1, cores}))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.5, help="of a turn")
    parser.add_argument("--json", type=Path, help="file for the result; a plot comes beside it")
    arguments = parser.parse_args()
    problem = wrong(arguments)
    if problem:
        sys.exit(f"input_pipeline.py: {problem}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # peers are ended
    about = {**machine.describe(machine.own_devices()), **versions()}
    rounds, seconds = arguments.rounds, arguments.seconds
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.path
        if folder is None:
            folder = temporary
            write_noise(Path(folder))
        rows = [
            row
            for workers in arguments.workers
            for row in measure_files(folder, workers, rounds, seconds)
        ]
        rows += measure_decoders(folder, rounds, seconds / 2)
        rows += measure_arrays(rounds, seconds / 2)
    print(f"{machine.sentence(about)}; torch reads files with {about['torch_reads_with']}")
    print(table(rows))
    if arguments.json is not None:
        options = " --path=DIR" if arguments.path else ""
        command = f"python benchmarks/input_pipeline.py{options}"
        result = {"command": command, "machine": about, "rows": rows}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
        if not draw(rows, arguments.json.with_suffix(".png")):
            print("nothing is drawn: there is no matplotlib")
    sentences = missed(rows)
    print("\n".join(sentences))
    sys.exit(1 if sentences else 0)


if __name__ == "__main__":
    main()
