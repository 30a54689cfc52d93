"""Where the time of a step goes: its costliest operations, by layer, as XLA's profiler saw them.

    python benchmarks/profile_step.py vgg13 --size=32 --batch=64
    python benchmarks/profile_step.py resnet50 --preset=gpu --dtype=bfloat16 --json=FILE

The step is that of throughput.py. An operation of the compiled program has the name of the layer
and of the primitive that it was made from, of a fusion those of its last operation; operations of
one layer, primitive and direction (`backward` for gradients) are added up. The profile holds what
XLA waits for: on CPU, one operation at a time, with what lies between two of them under `between`;
on a GPU its kernels, and with several streams more than the time of the step.
"""

import argparse
import dataclasses
import json
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flaxcls_side import FlaxclsSide  # first: it prepares the process before JAX starts

import jax  # isort: skip
import machine  # isort: skip
import throughput  # isort: skip
from comparison import Case  # isort: skip
from jax.profiler import ProfileData  # isort: skip

from flaxcls import models, ops  # isort: skip

STEPS = 10


def operation_names(hlo: str) -> dict[str, str]:
    """Returns what each operation of a compiled program was made from, by its name."""
    return dict(re.findall(r'^\s*(?:ROOT )?%?([\w.-]+) = .*?op_name="([^"]*)"', hlo, re.MULTILINE))


def label(op_name: str) -> str:
    """Returns layer, direction and primitive of `jit(f)/jvp(VGG)/trunk/conv1/conv_general_dilated`.

    Names of transformations fall away, but that a transposed operation is of the backward pass.
    """
    backward = "transpose(" in op_name
    parts = [part for part in op_name.split("/") if "(" not in part and part]
    layer, primitive = "/".join(parts[:-1]) or "(no layer)", parts[-1] if parts else op_name
    return f"{layer} backward {primitive}" if backward else f"{layer} {primitive}"


def operation_times(profile: ProfileData, module: str) -> dict[str, float]:
    """Returns nanoseconds by the operation's name, of all events of one compiled program."""
    times: dict[str, float] = defaultdict(float)
    for plane in profile.planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" in stats and stats.get("hlo_module") == module:
                    times[str(stats["hlo_op"])] += event.duration_ns
    return times


def profile(side: FlaxclsSide) -> list[dict[str, Any]]:
    """Returns the costs of a compiled step, the largest first, with their milliseconds a step."""
    hlo = side.compiled.as_text()
    module = re.search(r"HloModule ([^\s,]+)", hlo)
    assert module is not None
    side.steps(3)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            seconds = side.steps(STEPS)
        (path,) = Path(folder).rglob("*.xplane.pb")
        times = operation_times(ProfileData.from_file(str(path)), module[1])
    names = operation_names(hlo)
    costs: dict[str, float] = defaultdict(float)
    for operation, nanoseconds in times.items():
        costs[label(names.get(operation, operation))] += nanoseconds / 1e6 / STEPS
    between = 1000 * seconds / STEPS - sum(costs.values())
    if between > 0:
        costs["between"] = between
    total = sum(costs.values())
    return [
        {"cost": cost, "milliseconds": ms, "share": ms / total}
        for cost, ms in sorted(costs.items(), key=lambda item: -item[1])
    ]


def case_of(arguments: argparse.Namespace) -> Case:
    """The preset's case of the model, with the size and batch that were given."""
    cases = {case.model: case for case in throughput.PRESETS[arguments.preset].cases}
    case = cases.get(arguments.model, Case(arguments.model, 64, 32, 10))
    given = {key: value for key in ("size", "batch") if (value := getattr(arguments, key))}
    return dataclasses.replace(case, **given)


def main(command: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog=Path(__file__).name,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", choices=models.list_models(), metavar="MODEL")
    parser.add_argument("--preset", choices=throughput.PRESETS, default="cpu")
    parser.add_argument("--size", type=int, help="of the images, instead of the preset's")
    parser.add_argument("--batch", type=int, help="instead of the preset's")
    parser.add_argument("--mode", choices=throughput.MODES, default="train")
    parser.add_argument("--dtype", choices=throughput.DTYPES, default="float32")
    parser.add_argument("--ops", choices=ops.BACKENDS, default="auto")
    parser.add_argument("--top", type=int, default=12, help="rows of the table")
    parser.add_argument("--json", type=Path, help="file for all costs and the machine")
    arguments = parser.parse_args(command)
    case = case_of(arguments)
    side = FlaxclsSide(
        {
            **dataclasses.asdict(case),
            "options": dict(case.options),
            "mode": arguments.mode,
            "dtype": arguments.dtype,
            "ops": arguments.ops,
            "loss": "cross_entropy",
        }
    )
    side.lower()
    side.compile()
    costs = profile(side)
    print(f"{case.model}@{case.size}, batch {case.batch}, {arguments.mode}, {arguments.dtype}")
    for row in costs[: arguments.top]:
        print(f"{row['milliseconds']:9.3f} ms {100 * row['share']:5.1f} %  {row['cost']}")
    if arguments.json:
        found = {
            "command": machine.command(parser, arguments),
            "machine": machine.describe(machine.own_devices()),
            "costs": costs,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
