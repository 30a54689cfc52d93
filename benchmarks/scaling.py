"""What sharing the training step among devices costs, and whether it changes the result.

    python benchmarks/scaling.py --json=FILE                      # 8 simulated devices on CPU
    python benchmarks/scaling.py --device=cuda --model=resnet50 --size=224 --channels=3 \\
        --batch=256 --batch_each=256 --json=FILE
    python benchmarks/scaling.py --model=resnet18 --size=64 --channels=3 --devices=1,2

The real step of the main job runs on 1, 2, 4 and 8 devices, each count in a process of its own,
and once on two devices in two processes, which `jax.distributed` connects. Strong scaling shares
one batch among the devices; weak scaling gives each as many images. The processes take turns,
some steps each, and the median over the turns counts. The batch stays on the devices.

On a GPU the devices are real, and efficiency is the speed that each has kept: 1 is all of it. On
CPU they are simulated: all run on the same cores, so that nothing can become faster. There the
overhead says by how much a step takes longer than the same work does on one device, and with two
processes the cores are shared by both of them.

Everywhere the result must be the same. From the same start each arrangement takes some steps on
the batches of strong scaling; losses are compared with those on one device, and parameters, by
the largest difference over the largest change that training made. Float32, matmuls included, and
XLA's operators on every count, since the native ones serve a single device.

FILE holds `machine`, `command` and `rows`, an object an arrangement and scaling; beside it come a
table (.md) and a plot (.png). Ends with code 1 where a result differs.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import machine
import numpy as np
from sides import Side, SideError

from flaxcls import models

SCALINGS = ("strong", "weak")
# Of float32: other shapes of a product, and another order of sums. In five steps of fashion_net1
# losses differ by 2e-7 and parameters by 8e-6; a deeper network magnifies that from step to step.
LOSS_TOLERANCE = 1e-5
PARAMETER_TOLERANCE = 1e-3
SECONDS_TO_START = 300.0


@dataclasses.dataclass(frozen=True)
class Layout:
    """Devices of a run: so many in each of its processes."""

    processes: int
    devices: int  # of all processes

    def __str__(self) -> str:
        count = f"{self.devices} device" + "s" * (self.devices > 1)
        return count if self.processes == 1 else f"{count} in {self.processes} processes"


ALONE = Layout(1, 1)


class Group:
    """The processes of a layout, which are told the same; use it as a context manager."""

    def __init__(self, layout: Layout, task: dict[str, Any], environment: dict[str, str]):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        each = layout.devices // layout.processes
        self.layout = layout
        self._sides = []
        for process in range(layout.processes):
            ours = environment | _only_devices(task["device"], process, each, layout.processes)
            share = {**dataclasses.asdict(layout), "process": process}
            given = task | share | {"coordinator": f"localhost:{port}"}
            self._sides.append(Side("scaling_side.py", json.dumps(given), ours))

    def wait(self, timeout: float | None = None) -> Any:
        """Returns what the first process answers, once all have."""
        answers = [side.receive(timeout) for side in self._sides]
        return answers[0]

    def call(self, call: str, **arguments: Any) -> Any:
        for side in self._sides:
            side.send(call, **arguments)
        return self.wait(SECONDS_TO_START)

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *_: object) -> None:
        for side in self._sides:
            side.kill()


def _only_devices(device: str, process: int, each: int, processes: int) -> dict[str, str]:
    """The variables that show a process its own devices."""
    if device == "cpu":
        flags = os.environ.get("XLA_FLAGS", "")
        count = f"--xla_force_host_platform_device_count={each}"
        return {"XLA_FLAGS": f"{flags} {count}".strip(), "JAX_PLATFORMS": "cpu"}
    if processes == 1:
        return {}
    own = range(process * each, (process + 1) * each)
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, own))}


def differences(path: Path, alone: Path) -> float:
    """The largest difference of a parameter, over the largest change that training made alone."""
    with np.load(path) as ours, np.load(alone) as theirs:
        names = [name.removeprefix("after/") for name in theirs if name.startswith("after/")]
        apart = max(
            float(np.abs(ours[f"after/{name}"] - theirs[f"after/{name}"]).max()) for name in names
        )
        changed = max(
            float(np.abs(theirs[f"after/{name}"] - theirs[f"before/{name}"]).max())
            for name in names
        )
    return apart / changed


def judge(scaling: str, layout: Layout, step: float, alone: float, simulated: bool) -> dict:
    """What a step's time says: `overhead` of simulated devices, `efficiency` of real ones.

    Args:
      scaling: strong or weak.
      layout: whose step it is.
      step: its time.
      alone: that of a single device.
      simulated: the devices share one machine's cores.
    """
    work = 1 if scaling == "strong" else layout.devices  # of a step, over that of one device's
    if simulated:
        return {"overhead": step / (work * alone) - 1, "efficiency": None}
    return {"overhead": None, "efficiency": work * alone / (layout.devices * step)}


def measure(
    groups: Sequence[Group], arguments: argparse.Namespace, folder: Path
) -> list[dict[str, Any]]:
    """Returns the rows: compares what the groups compute, then times them in turns."""
    simulated = arguments.device == "cpu"
    trained = {}
    for group in groups:
        path = folder / f"{group.layout}.npz"
        losses = group.call(
            "train", batch_size=arguments.batch, steps=arguments.steps, path=str(path)
        )
        trained[group.layout] = np.array(losses), path
    losses_alone, path_alone = trained[ALONE]
    rows = []
    for scaling in SCALINGS:
        sizes = {
            group.layout: arguments.batch
            if scaling == "strong"
            else arguments.batch_each * group.layout.devices
            for group in groups
        }
        compiled = {g.layout: g.call("compile", batch_size=sizes[g.layout]) for g in groups}
        counts = {
            group.layout: max(1, round(arguments.seconds / group.call("steps", count=1)))
            for group in groups
        }
        times: dict[Layout, list[float]] = {group.layout: [] for group in groups}
        for _ in range(arguments.rounds):
            for group in groups:
                count = counts[group.layout]
                times[group.layout].append(group.call("steps", count=count) / count)
        alone = statistics.median(times[ALONE])
        for layout, taken in times.items():
            step = statistics.median(taken)
            row = {
                "scaling": scaling,
                "processes": layout.processes,
                "devices": layout.devices,
                "simulated": simulated,
                "batch": sizes[layout],
                "step_ms": 1000 * step,
                "fastest_ms": 1000 * min(taken),
                "images_per_second": sizes[layout] / step,
                **judge(scaling, layout, step, alone, simulated),
                "first_step_seconds": compiled[layout],
                "loss_error": None,
                "parameter_error": None,
                "equal": None,
            }
            if scaling == "strong":
                losses, path = trained[layout]
                row["loss_error"] = float(np.abs(losses / losses_alone - 1).max())
                row["parameter_error"] = differences(path, path_alone)
                row["equal"] = (
                    row["loss_error"] <= LOSS_TOLERANCE
                    and row["parameter_error"] <= PARAMETER_TOLERANCE
                )
            rows.append(row)
    return rows


COLUMNS = {
    "scaling": lambda r: r["scaling"],
    "devices": lambda r: f"{r['devices']}{' simulated' if r['simulated'] else ''}",
    "processes": lambda r: str(r["processes"]),
    "batch": lambda r: str(r["batch"]),
    "step, ms": lambda r: f"{r['step_ms']:.2f}",
    "images/s": lambda r: f"{r['images_per_second']:.0f}",
    "overhead": lambda r: "" if r["overhead"] is None else f"{100 * r['overhead']:+.0f} %",
    "efficiency": lambda r: "" if r["efficiency"] is None else f"{r['efficiency']:.2f}",
    "losses apart": lambda r: "" if r["loss_error"] is None else f"{r['loss_error']:.0e}",
    "parameters": lambda r: "" if r["parameter_error"] is None else f"{r['parameter_error']:.0e}",
    "equal": lambda r: {None: "", True: "yes", False: "NO"}[r["equal"]],
}


def page(result: dict[str, Any]) -> str:
    """Markdown of the result."""
    rows = result["rows"]
    lines = [f"`{result['command']}`", "", f"{machine.sentence(result['machine'])}.", ""]
    if rows and rows[0]["simulated"]:
        lines += ["Simulated devices share the cores: nothing here can become faster.", ""]
    lines += [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += [f"| {' | '.join(cell(row) for cell in COLUMNS.values())} |" for row in rows]
    return "\n".join([*lines, *(f"\n{note}" for note in result["notes"]), ""])


def draw(rows: Sequence[dict[str, Any]], path: Path) -> bool:
    """Draws images a second over one device's; returns whether matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    simulated = rows[0]["simulated"]
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    counts = sorted({row["devices"] for row in rows})
    ideal = [1 if simulated else count for count in counts]
    axes.plot(counts, ideal, "k--", linewidth=1, label="ideal")
    for i, scaling in enumerate(SCALINGS):
        mine = [row for row in rows if row["scaling"] == scaling]
        alone = next(row["images_per_second"] for row in mine if row["devices"] == 1)
        for several, marker in ((False, "o-"), (True, "x")):
            shown = [row for row in mine if (row["processes"] > 1) == several]
            speeds = [row["images_per_second"] / alone for row in shown]
            label = f"{scaling}, two processes" if several else scaling
            if shown:
                axes.plot([r["devices"] for r in shown], speeds, f"C{i}{marker}", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, map(str, counts))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("simulated devices on the same cores" if simulated else "devices")
    axes.set_ylabel("images a second over those of one device")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    return True


def _counts(text: str) -> tuple[int, ...]:
    words = text.split(",")
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} are no numbers of devices; write 1,2,4,8")
    return tuple(sorted({1, *map(int, words)}))


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1")
    return int(text)


def _seconds(text: str) -> float:
    try:
        if float(text) > 0:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no time in seconds")


def _model(text: str) -> str:
    if text not in models.list_models():
        known = ", ".join(models.list_models())
        raise argparse.ArgumentTypeError(f"{text!r} is none of {known}")
    if "num_parents" in models.model_options(text):
        raise argparse.ArgumentTypeError(f"{text!r} takes two labels; give a model that takes one")
    return text


def arguments_of(command: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="cpu: simulated devices; cpu")
    add("--devices", type=_counts, default="1,2,4,8", help="counts, by commas; 1,2,4,8")
    add("--model", type=_model, default="fashion_net1", help="a registered one; fashion_net1")
    add("--size", type=_count, default=28, help="of the images; 28")
    add("--channels", type=_count, default=1, help="of the images; 1")
    add("--classes", type=_count, default=10, help="10")
    add("--batch", type=_count, default=64, help="of all devices together, strong scaling; 64")
    add("--batch_each", type=_count, default=16, help="of each device, weak scaling; 16")
    add("--ops", choices=("auto", "xla", "flax"), default="xla", help="operators; xla")
    add("--steps", type=_count, default=5, help="whose results are compared; 5")
    add("--rounds", type=_count, default=7, help="turns of each arrangement; 7")
    add("--seconds", type=_seconds, default=0.5, help="of one turn, about; 0.5")
    add("--alone", action="store_true", help="leave two processes out")
    add("--json", type=Path, help="file for the result; table and plot come beside it")
    arguments = parser.parse_args(command)
    for count in (*arguments.devices, 1 if arguments.alone else 2):
        if arguments.batch % count:
            parser.error(f"--batch: {arguments.batch} images cannot be shared by {count} devices")
    return arguments


def layouts_of(
    arguments: argparse.Namespace, present: int | None
) -> tuple[list[Layout], list[str]]:
    """Returns what is measured, and notes on what is left out for want of devices.

    `present` is how many devices there are; None where any number can be simulated.
    """
    wanted = [Layout(1, count) for count in arguments.devices]
    wanted += [] if arguments.alone else [Layout(2, 2)]
    if present is None:
        return wanted, []
    missing = [layout for layout in wanted if layout.devices > present]
    notes = [f"Left out: {layout}; there are {present}." for layout in missing]
    return [layout for layout in wanted if layout not in missing], notes


def count_gpus() -> int:
    """How many there are, asked of a process that ends and leaves them to others."""
    program = "import jax; print(jax.device_count())"
    environment = os.environ | {"JAX_PLATFORMS": "cuda"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return int(done.stdout) if not done.returncode else 0


def main(command: Sequence[str]) -> None:
    arguments = arguments_of(command)
    present = None if arguments.device == "cpu" else count_gpus()
    if present == 0:
        sys.exit("scaling: --device=cuda: JAX finds no GPU here; --device=cpu simulates devices")
    layouts, notes = layouts_of(arguments, present)
    keys = ("device", "model", "size", "channels", "classes", "ops")
    task = {key: getattr(arguments, key) for key in keys}
    environment = {
        "JAX_PLATFORMS": arguments.device,
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",  # a GPU would round factors to TF32
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # several processes share the GPUs
    }
    try:
        with ExitStack() as stack, tempfile.TemporaryDirectory() as temporary:
            groups = [stack.enter_context(Group(one, task, environment)) for one in layouts]
            for group in groups:
                group.wait(SECONDS_TO_START)
            kind = groups[0].call("about")["device"]
            rows = measure(groups, arguments, Path(temporary))
    except SideError as error:
        sys.exit(f"scaling: {error}")
    said = [word for word in command if not word.startswith("--json")]
    about = machine.describe([kind] * (present or 1))
    result = {
        "command": " ".join(["python benchmarks/scaling.py", *said]),
        "machine": about,
        "notes": notes,
        "rows": [{**{key: getattr(arguments, key) for key in keys}, **row} for row in rows],
    }
    print(page(result))
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
        arguments.json.with_suffix(".md").write_text(page(result))
        if not draw(rows, arguments.json.with_suffix(".png")):
            print("nothing is drawn: there is no matplotlib")
    if not all(row["equal"] in (None, True) for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
