"""Trains the networks published for Caltech-101's three classes at 256 pixels, into one table.

    python benchmarks/caltech_grid.py --path=DIR
    python benchmarks/caltech_grid.py --path=DIR --only=expanding         # a part
    python benchmarks/caltech_grid.py --path=DIR --only 4-triple vgg13    # models
    python benchmarks/caltech_grid.py --path=DIR --only=vgg --epochs=1    # a trial
    python benchmarks/caltech_grid.py --path=DIR --name=caltech_grid_bfloat16 \\
        -- --config.precision=bfloat16

Twelve expanding CNNs, five VGGs and GoogLeNet, each with its published recipe, as the main job in a
process of its own: made for one GPU. The table is written to benchmarks/results/NAME.json and .md
after every run, so that the command may be stopped at any moment. Given again it goes on: a
finished run is not repeated, one cut short is resumed, and rows of models not asked for stay.

On a machine that has JAX, Flax, Optax, Orbax, Matplotlib, Pillow, Rich, safetensors, scikit-learn
and huggingface_hub but no network, the rest comes as wheels (6 MB; here for its Python 3.12):

    pip download --no-deps --only-binary=:all: --python-version=3.12 \\
        --platform=manylinux_2_28_x86_64 --platform=manylinux2014_x86_64 --dest=build/wheels \\
        grain array_record portpicker clu ml_collections tensorboardX setuptools
    pip install --no-index --find-links=build/wheels --no-deps \\
        grain array_record portpicker clu ml_collections tensorboardX --editable .

tensorflow-datasets is not needed for images in folders.
"""

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
import numpy as np
import reproductions
from published import CALTECH

from flaxcls import runlog

CONFIGS = {
    "expanding": "caltech/expanding_cnn:{}",
    "vgg": "caltech/vgg:{}",
    "googlenet": "caltech/googlenet",
}
EXPERIMENTS = {
    name: reproductions.Experiment(
        CONFIGS[part].format(name),
        split="val",
        rule="last epoch",
        last_epoch=True,
        target=None,
        published=published,
    )
    for part, models in CALTECH.items()
    for name, published in models.items()
}

DEFAULT_NAME = "caltech_grid"
# Exit codes of the main job after which the next model is not tried: signals that ask to stop, and
# wrong input, which would be so for all of them.
STOPS = (-signal.SIGINT, -signal.SIGTERM, 128 + signal.SIGINT, 128 + signal.SIGTERM, 2)

Row = dict[str, Any]


def train(name: str, path: str | None, workdir: Path, flags: Sequence[str]) -> Row:
    """Runs the main job of one model and returns its row of the table."""
    experiment = EXPERIMENTS[name]
    found = reproductions.run(experiment, path, seed=0, workdir=workdir, flags=flags)
    with np.load(workdir / "predictions" / "val.npz") as file:
        images = len(file["label"])
    return {
        "config": experiment.config,
        "params": json.loads((workdir / "summary.json").read_text())["params"],
        "published": experiment.published,
        "val_images": images,
        **found,
        "machine": machine.describe(machine.devices_of(workdir)),
    }


def latest(row: Row, before: Row | None) -> Row:
    """Returns `before` where both are of one finished run: it knows the whole command's time."""
    if before is None or row["wall_seconds"] is not None:
        return row
    own = row.keys() - {"wall_seconds", "machine"}
    return before if all(before[key] == row[key] for key in own) else row


def table(result: dict[str, Any]) -> str:
    """Returns the result as a page of Markdown."""
    rows = result["rows"]
    images = sorted({row["val_images"] for row in rows.values()})
    missing = [name for name in EXPERIMENTS if name not in rows]
    lines = [
        f"# {result['name']}",
        "",
        f"`{result['command']}`",
        "",
        *machines(rows),
        "Accuracy on the validation split at the last epoch, and its difference from the published "
        "one in points, of which one image is "
        + " or ".join(f"{100 / n:.2f} ({n} images)" for n in images)
        + ". Images a second are those of training; its seconds are those of all epochs with "
        "validation, without compilation.",
        "",
        "| config | parameters | published | ours | difference | images/s | training "
        "| whole command |",
        "|---|---|---|---|---|---|---|---|",
        *(line(rows[name]) for name in EXPERIMENTS if name in rows),
        "",
        *([f"Not trained yet: {', '.join(missing)}.", ""] if missing else []),
    ]
    return "\n".join(lines)


def line(row: Row) -> str:
    """Returns one line of the table."""
    published, ours = row["published"], 100 * row["accuracy"]
    cells = [
        f"`{row['config']}`",
        f"{row['params']:,}",
        "-" if published is None else f"{100 * published:.3f} %",
        f"{ours:.3f} %",
        "-" if published is None else f"{ours - 100 * published:+.3f}",
        f"{row['images_per_second']:.0f}",
        f"{row['train_seconds']:.0f} s",
        f"{row['wall_seconds']:.0f} s" if row["wall_seconds"] else "resumed",
    ]
    return f"| {' | '.join(cells)} |"


def machines(rows: dict[str, Row]) -> list[str]:
    """Returns what the runs ran on, with their names where that differs."""
    groups: dict[str, list[str]] = {}
    for row in rows.values():
        groups.setdefault(machine.sentence(row["machine"]), []).append(f"`{row['config']}`")
    if len(groups) == 1:
        return [f"{sentence}." for sentence in groups]
    return [f"{sentence}: {', '.join(names)}." for sentence, names in groups.items()]


def stored_rows(file: Path, flags: Sequence[str]) -> dict[str, Row]:
    """Returns the rows that are there already; ends the program if they had other flags."""
    if not file.exists():
        return {}
    stored = json.loads(file.read_text())
    if stored["flags"] != list(flags):
        sys.exit(
            f"{file} holds runs with {' '.join(stored['flags']) or 'no flags'}; "
            "give this one another --name"
        )
    return stored["rows"]


def chosen(only: Sequence[str]) -> list[str]:
    """Returns the models of the parts and models named."""
    return [name for part, models in CALTECH.items() for name in models if {part, name} & set(only)]


def parse() -> argparse.Namespace:
    description, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--path", help="folder of the data set")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[*CALTECH, *(name for name in EXPERIMENTS if name not in CALTECH)],
        default=list(CALTECH),
        metavar="NAME",
        help=f"parts ({', '.join(CALTECH)}) or models, such as 4-triple and vgg13",
    )
    parser.add_argument("--name", default=DEFAULT_NAME, help="of the result")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="holds NAME/MODEL")
    parser.add_argument("--epochs", type=int, help="a trial, whose table is only printed")
    parser.add_argument("flags", nargs="*", help="--config.KEY=VALUE of every run, after --")
    arguments = parser.parse_args()
    wrong = [flag for flag in arguments.flags if not flag.startswith("--config.")]
    if wrong:
        parser.error(f"{wrong[0]!r} is not --config.KEY=VALUE")
    return arguments


def command(arguments: argparse.Namespace) -> str:
    """Returns what to type for the whole table."""
    name = arguments.name
    return " ".join(
        [
            "python benchmarks/caltech_grid.py --path=DIR",
            *([f"--name={name}"] if name != DEFAULT_NAME else []),
            *([f"--epochs={arguments.epochs}"] if arguments.epochs is not None else []),
            *(["--", *arguments.flags] if arguments.flags else []),
        ]
    )


def main() -> None:
    arguments = parse()
    flags, runs = arguments.flags, arguments.runs / arguments.name
    file = reproductions.RESULTS / f"{arguments.name}.json"
    result = {"name": arguments.name, "command": command(arguments), "flags": flags}
    trial = arguments.epochs is not None
    if trial:
        runs = runs.with_name(f"{runs.name}-trial")
        result["name"] = f"A trial, cut to epoch {arguments.epochs}, and no result"
    rows = {} if trial else stored_rows(file, flags)
    more = [f"--config.train.epochs={arguments.epochs}"] if trial else []
    failed = []
    for name in chosen(arguments.only):
        print(f"\n{name}", flush=True)
        try:
            row = train(name, arguments.path, runs / name, [*flags, *more])
        except subprocess.CalledProcessError as error:
            if error.returncode in STOPS:
                sys.exit(f"{name} was not finished; the same command goes on with it")
            failed.append(name)
            continue
        rows[name] = latest(row, rows.get(name))
        page = table(result | {"rows": rows})
        if not trial:
            runlog.write_json(file, result | {"rows": rows})
            file.with_suffix(".md").write_text(page)
        print(f"\n{page}", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
