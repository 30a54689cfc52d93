"""How long it takes, from the command, until Fashion-MNIST is classified as well as asked for.

    python benchmarks/time_to_accuracy.py --path=DIR --json=FILE
    python benchmarks/time_to_accuracy.py --path=DIR --config=fashion/fashion_net2 --levels=90,91
    python benchmarks/time_to_accuracy.py --path=DIR --config.train.epochs=20

DIR holds the IDX files. Each run is the main job, `python -m flaxcls.main`, in a process of its
own; a run a config and seed, one after the other.

The clock starts with the process, so that the interpreter and the imports are in it, and stops at
the end of the first epoch whose test accuracy reaches a level, its validation included. It is
read from the run's own records and falls into five parts that add up to it: imports; data, read
and put in their place; compilation by JAX, of which nothing is kept from one run to the next;
training, with shuffling, logging and checkpoints; validation. The native operators, which are
compiled once a machine, are made before the first run, and their time is stated apart.

The run never sees the test split before its end. It keeps the checkpoint of every epoch, written
in the background as always, and another process evaluates them after the run. What one such pass
over the test split takes is stated, and no part of the clock: the levels are read off a curve, as
is usual for such a benchmark, while no user could have stopped there. What a user gets is stated
beside it: test accuracy of the checkpoint that the run itself chose, on validation, and the time
of the whole command until that number stands there.

FILE is rewritten after each run: `rows` has an object a config, seed and level, `epochs` one a
config, seed and epoch. Beside it come the tables (.md) and a plot (.png).
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import jax
import machine
from ml_collections import ConfigDict

from flaxcls import config as config_module
from flaxcls import ops
from flaxcls.checkpoint import Checkpoints
from flaxcls.errors import InputError
from flaxcls.evaluate import Evaluator
from flaxcls.experiment import for_evaluation
from flaxcls.main import parse
from flaxcls.ops.native.build import has_compiler, is_compiled
from flaxcls.results import read_description, read_summary
from flaxcls.runlog import read_json, read_metrics

CONFIGS = "fashion_net0:fashion_mnist,fashion/fast"
LEVELS = "90,92,93,94"
PARTS = ("import", "data", "compile", "train", "validation")


class RunFailed(Exception):
    """A run did not end well."""


def train(name: str, seed: int, flags: Sequence[str], workdir: Path) -> float:
    """Runs the main job and returns its seconds, from the start of the process to its end."""
    command = [
        *(sys.executable, "-m", "flaxcls.main", f"--config={name}", f"--workdir={workdir}"),
        *(f"--config.seed={seed}", *flags),
    ]
    began = time.monotonic()
    done = subprocess.run(command, env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"})
    if done.returncode:
        raise RunFailed(f"{name}, seed {seed}: the run ended with code {done.returncode}")
    return time.monotonic() - began


def clock(start_up: dict[str, float], history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns for the end of each epoch the seconds since the command, and each part's share.

    Args:
      start_up: of the run's session in `environment.json`.
      history: of `metrics.jsonl`.
    """
    parts = {part: start_up.get(f"{part}_seconds", 0.0) for part in PARTS}
    passed = sum(parts.values())
    ends: dict[int, dict[str, Any]] = {}
    for record in history:
        part = "train" if record["split"] == "train" else "validation"
        parts["compile"] += record["compile_seconds"]
        parts[part] += record["elapsed_seconds"] - passed - record["compile_seconds"]
        passed = record["elapsed_seconds"]
        ends[record["epoch"]] = {
            "epoch": record["epoch"],
            "step": record["step"],
            "seconds": passed,
            **{f"{name}_seconds": seconds for name, seconds in parts.items()},
        }
    return list(ends.values())


def accuracies_on_test(workdir: Path) -> dict[int, tuple[float, float]]:
    """Evaluates every checkpoint on the test split: step to accuracy and seconds.

    To be called in a process of its own.
    """
    ops.prepare_process()
    config, _ = config_module.resolve(config_module.load(workdir / "config.json"))
    config.eval.split = "test"
    jax.config.update("jax_enable_x64", config.precision == "float64")
    ops.set_backend(config.ops.backend)
    ops.set_precision(config.ops.precision)
    experiment = for_evaluation(config, read_description(workdir))
    evaluator = Evaluator(experiment)
    (split,) = experiment.data.feeds
    wanted = experiment.abstract_state(), experiment.abstract_metrics()
    found = {}
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        for step in checkpoints.steps():
            variables = checkpoints.restore(step, *wanted).state.variables()
            began = time.monotonic()
            accuracy = evaluator(variables, split).record["accuracy"]
            found[step] = accuracy, time.monotonic() - began
    return found


def measure(name: str, seed: int, flags: Sequence[str], workdir: Path) -> dict[str, Any]:
    """Trains once and evaluates each epoch.

    Returns:
      `epochs`, as `clock` returns them with the `test_accuracy` of each, and of the whole run
      `chosen_epoch`, `chosen_test_accuracy`, `command_seconds` and `test_pass_seconds`.
    """
    command_seconds = train(name, seed, flags, workdir)
    (session,) = read_json(workdir / "environment.json")["sessions"]
    epochs = clock(session["start_up"], read_metrics(workdir / "metrics.jsonl"))
    # One that has not touched a device: a GPU would be the run's before it.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        tested = process.submit(accuracies_on_test, workdir).result()
    summary = read_summary(workdir)
    said = {"config": name, "seed": seed}
    return {
        "epochs": [{**said, **end, "test_accuracy": tested[end["step"]][0]} for end in epochs],
        "chosen_epoch": summary["best_epoch"],
        "chosen_test_accuracy": summary["test"]["accuracy"],
        "command_seconds": command_seconds,
        "test_pass_seconds": statistics.median(seconds for _, seconds in tested.values()),
    }


def rows_of(run: dict[str, Any], levels: Sequence[float]) -> list[dict[str, Any]]:
    """The flat object of each level: when a run reached it, or nulls."""
    of_run = {key: value for key, value in run.items() if key != "epochs"}
    first = run["epochs"][0]
    times = [key for key in first if key not in ("config", "seed")]
    rows = []
    for level in levels:
        reached = (end for end in run["epochs"] if end["test_accuracy"] >= level)
        end = next(reached, dict.fromkeys(times))
        rows.append(
            {
                **{key: first[key] for key in ("config", "seed")},
                "level": level,
                "reached": end["epoch"] is not None,
                **{key: end[key] for key in times},
                "epochs": len(run["epochs"]),
                **of_run,
            }
        )
    return rows


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: time to each level, and what the commands gave, over the seeds."""
    lines = [
        "| config | test accuracy | seeds | seconds | epoch | " + " | ".join(PARTS) + " |",
        "|---" * (5 + len(PARTS)) + "|",
    ]
    for (name, level), members in _groups(rows, "config", "level"):
        reached = [row for row in members if row["reached"]]
        cells = [name, f"{100 * level:g} %", f"{len(reached)} of {len(members)}"]
        keys = ("seconds", "epoch", *(f"{part}_seconds" for part in PARTS))
        cells += [_mean([row[key] for row in reached], spread=key == "seconds") for key in keys]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Where not all seeds reach a level, the times are of those that do. What the whole command "
        "gives, at the epoch that validation chooses:",
        "",
        "| config | seeds | test accuracy | whole command, s | epoch | a pass over test, s |",
        "|---|---|---|---|---|---|",
    ]
    for (name,), members in _groups(rows, "config"):
        runs = list({row["seed"]: row for row in members}.values())
        accuracies = [100 * row["chosen_test_accuracy"] for row in runs]
        cells = [name, str(len(runs)), f"{_mean(accuracies, digits=2, spread=True)} %"]
        cells.append(_mean([row["command_seconds"] for row in runs], spread=True))
        epochs = _mean([row["chosen_epoch"] for row in runs])
        cells.append(f"{epochs} of {_mean([row['epochs'] for row in runs], digits=0)}")
        cells.append(_mean([row["test_pass_seconds"] for row in runs]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _groups(rows: Sequence[dict[str, Any]], *keys: str) -> list[tuple[tuple[Any, ...], list[Any]]]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return list(groups.items())


def _mean(values: Sequence[float], *, digits: int = 1, spread: bool = False) -> str:
    """The mean, with the standard deviation where it is asked for; empty without values."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    if not spread or len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):.{digits}f}"


def page(result: dict[str, Any]) -> str:
    """Markdown of the whole result."""
    native = result["native_seconds"]
    made = f", compiled in {native:.0f} s before" if native else ""
    about = [f"`{result['command']}`", "", f"{machine.sentence(result['machine'])}{made}.", ""]
    return "\n".join([*about, tables(result["rows"]), ""])


def draw(epochs: Sequence[dict[str, Any]], levels: Sequence[float], path: Path) -> bool:
    """Draws a line a config and seed; returns whether matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for i, ((name,), members) in enumerate(_groups(epochs, "config")):
        for j, (_, ends) in enumerate(_groups(members, "seed")):
            seconds = [end["seconds"] for end in ends]
            accuracies = [100 * end["test_accuracy"] for end in ends]
            label = name if j == 0 else None
            axes.plot(seconds, accuracies, f"C{i}", marker=".", alpha=0.7, label=label)
    for level in levels:
        axes.axhline(100 * level, color="black", linewidth=0.5, linestyle="--")
    # Where the levels are; the first epochs would take most of the height.
    lowest, highest = 100 * min(levels), 100 * max(*levels, *(e["test_accuracy"] for e in epochs))
    axes.set_ylim(max(0, lowest - 5), min(100, highest + 0.5))
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds since the command")
    axes.set_ylabel("test accuracy, %")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    return True


def make_native_operators() -> float | None:
    """Compiles them where they are due and not there yet; returns the seconds, or None."""
    if not has_compiler() or is_compiled():
        return None
    began = time.monotonic()
    program = "from flaxcls import ops; print(ops.native_status())"
    subprocess.run([sys.executable, "-c", program], check=True)  # where there is a GPU, it does not
    return time.monotonic() - began if is_compiled() else None


def _levels(text: str) -> tuple[float, ...]:
    try:
        levels = tuple(float(level) / 100 for level in text.split(","))
    except ValueError:
        levels = ()
    if not levels or not all(0 < level <= 1 for level in levels):
        raise argparse.ArgumentTypeError(f"{text!r} are no percentages; write them as in {LEVELS}")
    return tuple(sorted(levels))


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1")
    return int(text)


def arguments_of(command: Sequence[str]) -> argparse.Namespace:
    """Reads the command line; its `flags` are the `--config.KEY=VALUE`, for the main job."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--path", required=True, help="folder of Fashion-MNIST's IDX files")
    add("--config", default=CONFIGS, help=f"as the main job takes them, by commas; {CONFIGS}")
    add("--levels", type=_levels, default=LEVELS, help=f"test accuracies in percent; {LEVELS}")
    add("--seeds", type=_count, default=3, help="runs of each config; 3")
    add("--runs", type=Path, help="folder to keep the run folders in, checkpoints included")
    add("--json", type=Path, help="file for the result; tables and plot come beside it")
    arguments, flags = parser.parse_known_args(command)
    for flag in flags:
        if not flag.startswith("--config."):
            parser.error(f"unrecognised argument {flag!r}; --help lists them")
    arguments.config = arguments.config.split(",")
    arguments.flags = [f"--config.data.path={arguments.path}", *flags]
    return arguments


def check(name: str, flags: Sequence[str]) -> ConfigDict:
    """Returns the config that the main job would run.

    Raises:
      InputError: it is not there, or not one of Fashion-MNIST.
    """
    config = parse(["flaxcls", f"--config={name}", *flags]).config
    if config.data.name != "fashion_mnist":
        raise InputError(f"--config: {name!r} does not train on Fashion-MNIST; give one that does")
    return config


def main(command: Sequence[str]) -> None:
    arguments = arguments_of(command)
    try:
        configs = {name: check(name, arguments.flags) for name in arguments.config}
    except InputError as error:
        sys.exit(f"time_to_accuracy: {error}")
    levels = ",".join(f"{100 * level:g}" for level in arguments.levels)
    wanted = [f"--config={','.join(configs)}", f"--levels={levels}", f"--seeds={arguments.seeds}"]
    backends = {config.ops.backend for config in configs.values()}
    result: dict[str, Any] = {
        "command": " ".join(
            ["python benchmarks/time_to_accuracy.py --path=DIR", *wanted, *arguments.flags[1:]]
        ),
        "machine": None,
        "native_seconds": make_native_operators() if backends & {"auto", "native"} else None,
        "rows": [],
        "epochs": [],
    }
    try:
        for name, config in configs.items():
            for seed in range(arguments.seeds):
                with tempfile.TemporaryDirectory() as temporary:
                    place = f"{name.replace('/', '-').replace(':', '-')}-{seed}"
                    workdir = Path(arguments.runs or temporary, place)
                    if workdir.exists():
                        raise RunFailed(f"{workdir} is there already; give another --runs")
                    keep = f"--config.checkpoint.keep={config.train.epochs}"
                    run = measure(name, seed, [*arguments.flags, keep], workdir)
                    result["machine"] = machine.describe(machine.devices_of(workdir))
                result["rows"] += rows_of(run, arguments.levels)
                result["epochs"] += run["epochs"]
                write(result, arguments.json)
    except (RunFailed, InputError) as error:
        sys.exit(f"time_to_accuracy: {error}")
    print(page(result))
    if arguments.json is not None:
        plot = arguments.json.with_suffix(".png")
        if not draw(result["epochs"], arguments.levels, plot):
            print("nothing is drawn: there is no matplotlib")


def write(result: dict[str, Any], path: Path | None) -> None:
    """Writes the result as JSON, and its tables beside it."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    unfinished.replace(path)
    path.with_suffix(".md").write_text(page(result))


if __name__ == "__main__":
    main(sys.argv[1:])
