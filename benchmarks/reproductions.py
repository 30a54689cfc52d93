"""Trains published recipes over several seeds and tabulates what they reach.

    python benchmarks/reproductions.py fashion_net0 --path=DIR --seeds=3
    python benchmarks/reproductions.py vgg13_caltech --path=DIR --seeds=1
    python benchmarks/reproductions.py vgg13_digits --seeds=1
    python benchmarks/reproductions.py expanding_cnn_triple --path=DIR --seeds=2

Each run is the main job in a process of its own, as a user would start it. The epoch that counts
is picked by a fixed rule that never looks at the test split. Writes NAME.json, NAME.md and the
curves of the first seed to benchmarks/results/, and all results as one table to its README.md.
"""

import argparse
import dataclasses
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
import numpy as np
from published import CALTECH

from flaxcls.configs.fashion.hierarchical import PARENTS
from flaxcls.data.load import class_parents
from flaxcls.metrics import errors_within_parent

RESULTS = Path(__file__).parent / "results"

# With the four parents of Fashion-MNIST: how far below the model without them the accuracy may be,
# and the accuracy of the parents' own head.
MOST_BELOW_FLAT = 0.003
PARENT_TARGET = 0.99


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One published recipe.

    Attributes:
      config: as `--config` takes it.
      split: whose accuracy counts.
      rule: how the epoch is picked, in words.
      last_epoch: whether that is the last epoch, else the run's best checkpoint.
      target: mean accuracy that it should reach, or None.
      published: accuracy that the authors report, or None.
    """

    config: str
    split: str
    rule: str
    last_epoch: bool
    target: float | None
    published: float | None


EXPERIMENTS = {
    "fashion_net0": Experiment(
        "fashion_net0:fashion_mnist",
        "test",
        "best support-weighted F1 on validation",
        last_epoch=False,
        target=0.91,
        published=0.9137,
    ),
    "vgg13_caltech": Experiment(
        "vgg13:caltech101_3", "val", "last epoch", last_epoch=True, target=0.985, published=None
    ),
    **{
        f"expanding_cnn_{expansion}": Experiment(
            f"caltech/expanding_cnn:4-{expansion}",
            "val",
            "last epoch",
            last_epoch=True,
            target=0.989 if expansion == "triple" else None,
            published=CALTECH["expanding"][f"4-{expansion}"],
        )
        for expansion in ("add13", "double", "triple")
    },
    "fashion_net2": Experiment(
        "fashion/fashion_net2",
        "test",
        "best support-weighted F1 on validation",
        last_epoch=False,
        target=0.913,
        published=0.9150,
    ),
    **{
        f"like_vgg_{name}": Experiment(
            f"fashion/like_vgg:{name}",
            "test",
            "best support-weighted F1 on validation",
            last_epoch=False,
            target=None,
            published=None,
        )
        for name in ("adam", "focal", "rmsprop", "adamw")
    },
    **{
        f"fashion_{name}": Experiment(
            f"fashion/hierarchical:{name}",
            "test",
            "best accuracy on validation",
            last_epoch=False,
            target=None,
            published=None,
        )
        for name in ("flat", "hierarchical")
    },
    "vgg13_digits": Experiment(
        "vgg13:digits",
        "test",
        "lowest loss on validation",
        last_epoch=False,
        target=0.98,
        published=None,
    ),
}


def run(
    experiment: Experiment, path: str | None, seed: int, workdir: Path, flags: Sequence[str] = ()
) -> dict[str, Any]:
    """Runs the main job once, with more flags; returns accuracy, epochs and times in seconds."""
    command = [
        *(sys.executable, "-m", "flaxcls.main", f"--config={experiment.config}"),
        *(f"--workdir={workdir}", f"--config.seed={seed}"),
        *([f"--config.data.path={path}"] if path else []),
        *flags,
    ]
    resumed = workdir.exists()
    began = time.monotonic()
    subprocess.run(command, check=True)
    wall = None if resumed else time.monotonic() - began
    summary = json.loads((workdir / "summary.json").read_text())
    history = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    if experiment.last_epoch:
        records = [record for record in history if record["split"] == experiment.split]
        epoch, accuracy = records[-1]["epoch"], records[-1]["accuracy"]
    else:
        epoch, accuracy = summary["best_epoch"], summary[experiment.split]["accuracy"]
    return {
        "seed": seed,
        "accuracy": accuracy,
        "epoch": epoch,
        "epochs": summary["epochs"],
        "images_per_second": summary["images_per_second"],
        "train_seconds": summary["seconds"],
        "wall_seconds": wall,
        **parents(experiment, summary, workdir),
    }


def parents(experiment: Experiment, summary: dict[str, Any], workdir: Path) -> dict[str, float]:
    """Returns how the parents of Fashion-MNIST fared, where that is what an experiment asks."""
    if not experiment.config.startswith("fashion/hierarchical"):
        return {}
    with np.load(workdir / "predictions" / f"{experiment.split}.npz") as file:
        labels, logits, names = (file[key] for key in ("label", "logits", "class_names"))
    parent_of = class_parents(names.tolist(), PARENTS, "Fashion-MNIST")
    order = sorted(set(parent_of.values()))
    of_class = [order.index(parent_of[name]) for name in names.tolist()]
    matrix = np.zeros((len(names), len(names)), int)
    np.add.at(matrix, (labels, logits.argmax(1)), 1)
    found = {"errors_within_parent": errors_within_parent(matrix, of_class)}
    # The parent of the predicted class, or what the parent's own head says.
    of_child = np.take(of_class, logits.argmax(1)) == np.take(of_class, labels)
    found["parent_accuracy_of_child"] = float(of_child.mean())
    if "parent_accuracy" in summary[experiment.split]:
        found["parent_accuracy"] = summary[experiment.split]["parent_accuracy"]
    return found


def criteria(name: str, result: dict[str, Any]) -> dict[str, bool]:
    """Returns what the means should reach, in words, and whether they do."""
    target, mean = EXPERIMENTS[name].target, result["mean"]
    wanted = {}
    if target is not None:
        wanted[f"accuracy at least {100 * target:.1f} %"] = mean >= target
    if name == "fashion_hierarchical":
        parent = statistics.mean(run["parent_accuracy"] for run in result["runs"])
        wanted[f"parents' head at least {100 * PARENT_TARGET:.1f} %"] = parent >= PARENT_TARGET
        flat = RESULTS / "fashion_flat.json"
        of_flat = json.loads(flat.read_text())["mean"] if flat.exists() else None
        shown = "not measured yet" if of_flat is None else f"{100 * of_flat:.2f} %"
        wanted[f"at most {100 * MOST_BELOW_FLAT:.1f} points below fashion_flat ({shown})"] = (
            of_flat is not None and mean >= of_flat - MOST_BELOW_FLAT
        )
    return wanted


def table(name: str, result: dict[str, Any]) -> str:
    """Returns the result as a page of Markdown."""
    experiment, runs = result["experiment"], result["runs"]
    published = experiment["published"]
    extra = [key for key in runs[0] if "parent" in key]
    lines = [
        f"# {name}",
        "",
        f"`{result['command']}`",
        "",
        f"{machine.sentence(result['machine'])}. Epoch picked by: {experiment['rule']}. "
        f"Accuracy on: {experiment['split']}.",
        "",
        "| seed | accuracy | epoch | images/s | training | whole command |"
        + "".join(f" {key.replace('_', ' ')} |" for key in extra),
        "|---|---|---|---|---|---|" + "---|" * len(extra),
        *(
            f"| {r['seed']} | {100 * r['accuracy']:.2f} % | {r['epoch']} of {r['epochs']} "
            f"| {r['images_per_second']:.0f} | {r['train_seconds']:.0f} s | "
            + (f"{r['wall_seconds']:.0f} s |" if r["wall_seconds"] else "resumed |")
            + "".join(f" {100 * r[key]:.2f} % |" for key in extra)
            for r in runs
        ),
        "",
        f"Mean {100 * result['mean']:.2f} %"
        + (f", standard deviation {100 * result['std']:.2f} points" if len(runs) > 1 else "")
        + (f" (published: {100 * published:.2f} %)." if published else "."),
        "",
        f"![curves]({name}.png)",
        "",
    ]
    return "\n".join(lines)


def overview() -> str:
    """Returns all results that there are as one table of Markdown."""
    lines = [
        "# Published recipes, trained again",
        "",
        "Written by `benchmarks/reproductions.py NAME`; a page has every seed, and curves.",
        "",
        "| | config | accuracy | of | epoch picked by | seeds | published | training |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, experiment in EXPERIMENTS.items():
        file = RESULTS / f"{name}.json"
        if not file.exists():
            continue
        result = json.loads(file.read_text())
        seconds = statistics.mean(run["train_seconds"] for run in result["runs"])
        spread = f" ± {100 * result['std']:.2f}" if len(result["runs"]) > 1 else ""
        published = "" if experiment.published is None else f"{100 * experiment.published:.2f} %"
        lines.append(
            f"| [{name}]({name}.md) | `{experiment.config}` | {100 * result['mean']:.2f}{spread} % "
            f"| {experiment.split} | {experiment.rule} | {len(result['runs'])} | {published} "
            f"| {seconds / 60:.1f} min |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--path", help="folder of the data set")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/reproductions"))
    arguments = parser.parse_args()
    experiment = EXPERIMENTS[arguments.name]
    folders = [arguments.runs / f"{arguments.name}-{seed}" for seed in range(arguments.seeds)]
    runs = [run(experiment, arguments.path, seed, f) for seed, f in enumerate(folders)]
    accuracies = [r["accuracy"] for r in runs]
    shown_path = " --path=DIR" if arguments.path else ""
    result = {
        "command": f"python benchmarks/reproductions.py {arguments.name}{shown_path} "
        f"--seeds={arguments.seeds}",
        "machine": machine.describe(machine.devices_of(folders[0])),
        "experiment": dataclasses.asdict(experiment),
        "runs": runs,
        "mean": statistics.mean(accuracies),
        "std": statistics.stdev(accuracies) if len(runs) > 1 else 0.0,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{arguments.name}.json").write_text(json.dumps(result, indent=2) + "\n")
    (RESULTS / f"{arguments.name}.md").write_text(table(arguments.name, result))
    shutil.copy(folders[0] / "plots" / "curves.png", RESULTS / f"{arguments.name}.png")
    (RESULTS / "README.md").write_text(overview())
    print(table(arguments.name, result))
    wanted = criteria(arguments.name, result)
    for words, reached in wanted.items():
        print(f"{words}: {'reached' if reached else 'MISSED'}")
    sys.exit(0 if all(wanted.values()) else 1)


if __name__ == "__main__":
    main()
