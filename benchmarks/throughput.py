"""How fast flaxcls trains and predicts, against the same networks in PyTorch on the same machine.

    python benchmarks/throughput.py --preset=cpu --json=FILE      # 20 minutes on two cores
    python benchmarks/throughput.py --preset=gpu --json=FILE
    python benchmarks/throughput.py --models=vgg13 --size=64 --batch=16 --modes=train --ops=auto

Each side of a comparison is a process of its own. The sides of a question take turns, some steps
each, so that the machine's drift meets all of them; the median over the turns counts. FILE is one
array of flat objects, rewritten after each question, so that what is stopped keeps what it has;
beside it come a table (.md) and a plot (.png). A ratio is PyTorch's time divided by flaxcls's:
above 1, flaxcls is faster.

flaxcls takes its real training step: it normalises bytes and counts metrics. PyTorch is given
floats that are normalised already, and counts nothing. SGD with momentum and cross-entropy on both
sides, and one batch that stays on the device. Inference is the network's logits.

`torch_installed_ms` is PyTorch as one writes it first: eager, contiguous, its own allocator.
`torch_ms` is the best of what was tried, where each change is kept if it is faster: the fused
optimizer and glibc keeping freed memory (on a GPU cuDNN's search instead); channels_last;
torch.compile (on a GPU with CUDA graphs, too). bfloat16 is autocast there; parameters are float32
on both sides. On a GPU the factors of float32 products are rounded to TF32 on both sides.

`utilisation` is the arithmetic of the network's convolutions and matmuls, in training three times
the forward pass's, over that of the machine's fastest square matmul; an algorithm that needs less
of it may be above 1. `peak_mb` is the memory that steps take at their peak above the process's
level after its imports; in `process_peak_mb` compilation is included.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
from comparison import Case, Comparison, Question, Runner, Settings, ceiling, compare
from sides import SideError

from flaxcls import models, ops

MODES = ("train", "infer")
DTYPES = ("float32", "bfloat16")
TRIPLE = (("depth", 4), ("expansion", "triple"))
POOLED = (("pool_size", 7), ("dropout", 0.5))

CPU_CASES = (
    Case("like_vgg", 28, 64, 200, 1),
    Case("fashion_net0", 28, 64, 10, 1),
    Case("fashion_net1", 28, 64, 10, 1),
    Case("fashion_net2", 28, 64, 10, 1),
    Case("ts_cnn", 28, 64, 200, 1),
    Case("ai_inno_cnn", 28, 64, 200, 1),
    Case("baseline_cnn", 112, 32, 9),
    Case("expanding_cnn", 128, 32, 3, options=TRIPLE),
    Case("vgg13", 32, 64, 3),
    Case("resnet18", 64, 32, 10),
    Case("googlenet", 64, 32, 3),
)
# At the published sizes.
GPU_CASES = (
    Case("resnet50", 224, 256, 1000),
    Case("vgg13", 256, 64, 3),
    Case("googlenet", 256, 64, 3),
    Case("expanding_cnn", 256, 128, 3, options=TRIPLE),
    Case("resnet18", 224, 256, 37),
    Case("vgg16", 224, 64, 10, options=POOLED),
    Case("vgg16_residual_cam", 224, 64, 10),
    Case("baseline_cnn", 224, 32, 9),
    Case("like_vgg", 28, 256, 200, 1),
    Case("fashion_net0", 28, 256, 10, 1),
    Case("fashion_net1", 28, 256, 10, 1),
    Case("fashion_net2", 28, 256, 10, 1),
    Case("ts_cnn", 28, 256, 200, 1),
    Case("ai_inno_cnn", 28, 256, 200, 1),
)


@dataclasses.dataclass(frozen=True)
class Preset:
    """What is measured where nothing else is said.

    Attributes:
      cases: networks and batches.
      device: `cpu` or `cuda`.
      dtypes: precisions.
      ops: backends of flaxcls's operators.
      minutes: in which it ends.
    """

    cases: tuple[Case, ...]
    device: str
    dtypes: tuple[str, ...]
    ops: tuple[str, ...]
    minutes: float


PRESETS = {
    "cpu": Preset(CPU_CASES, "cpu", ("float32",), ("auto", "xla", "flax"), 18.5),
    "gpu": Preset(GPU_CASES, "cuda", ("bfloat16", "float32"), ("auto",), 60),
}


def row_of(
    question: Question,
    backend: str,
    found: Comparison,
    ceilings: dict[str, float],
    about: dict[str, Any],
) -> dict[str, Any]:
    """The flat object of one question and backend."""
    case, ours = question.case, found.flaxcls[backend]
    best, installed = found.best, found.installed
    passes = 3 if question.mode == "train" else 1
    gflop = passes * case.batch * ours.about["forward_gflop"]
    rate = gflop / ours.milliseconds * 1000
    return {
        "model": case.model,
        "size": case.size,
        "batch": case.batch,
        "mode": question.mode,
        "dtype": question.dtype,
        "ops": backend,
        "flaxcls_ms": ours.milliseconds,
        "torch_ms": best.milliseconds if best else None,
        "ratio": best.milliseconds / ours.milliseconds if best else None,
        "torch_installed_ms": installed.milliseconds if installed else None,
        "ratio_installed": installed.milliseconds / ours.milliseconds if installed else None,
        "torch_best": best.said if best else None,
        "options": " ".join(f"{name}={value}" for name, value in case.options),
        "classes": case.classes,
        "channels": case.channels,
        "parameters": ours.about["parameters"],
        "torch_parameters": best.about["parameters"] if best else None,
        "images_per_second": 1000 * case.batch / ours.milliseconds,
        "torch_images_per_second": 1000 * case.batch / best.milliseconds if best else None,
        "step_gflop": gflop,
        "gflop_per_second": rate,
        "utilisation": rate / ceilings["matmul_gflops"] if ceilings else None,
        "matmul_gflops": ceilings.get("matmul_gflops"),
        "copy_gbs": ceilings.get("copy_gbs"),
        **_memory("", ours),
        **_memory("torch_", best),
        **_memory("torch_installed_", installed),
        "compile_seconds": ours.compile_seconds,
        "torch_compile_seconds": best.compile_seconds if best else None,
        "rounds": len(ours.times),
        "flaxcls_fastest_ms": 1000 * min(ours.times),
        "torch_fastest_ms": 1000 * min(best.times) if best else None,
        "note": found.notes.get(backend),
        "torch_note": "; ".join(found.torch_notes) or None,
        "torch_tried": "; ".join(found.torch_tried) or None,
        "device": ours.about["device"],
        "tf32": ours.about["platform"] != "cpu" and question.dtype == "float32",
        **about,
    }


def _memory(prefix: str, runner: Runner | None) -> dict[str, float | None]:
    return {
        f"{prefix}peak_mb": runner.peak / 1e6 if runner else None,
        f"{prefix}process_peak_mb": runner.process_peak / 1e6 if runner else None,
    }


COLUMNS = {
    "network": lambda r: f"{r['model']}@{r['size']}",
    "batch": lambda r: str(r["batch"]),
    "mode": lambda r: r["mode"],
    "dtype": lambda r: r["dtype"],
    "ops": lambda r: r["ops"],
    "ratio": lambda r: _number(r["ratio"], 2),
    "to installed": lambda r: _number(r["ratio_installed"], 2),
    "flaxcls, ms": lambda r: _number(r["flaxcls_ms"], 2),
    "PyTorch, ms": lambda r: _number(r["torch_ms"], 2),
    "installed, ms": lambda r: _number(r["torch_installed_ms"], 2),
    "PyTorch's best": lambda r: r["torch_best"] or "",
    "images/s": lambda r: _number(r["images_per_second"], 0),
    "GFLOP/s": lambda r: _number(r["gflop_per_second"], 0),
    "utilisation": lambda r: _number(r["utilisation"], 2),
    "peak, MB": lambda r: _number(r["peak_mb"], 0),
    "PyTorch's": lambda r: _number(r["torch_peak_mb"], 0),
    "compiled, s": lambda r: _number(r["compile_seconds"], 1),
}


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def table(rows: Sequence[dict[str, Any]], command: str) -> str:
    """Markdown: the rows, and the geometric mean of their ratios."""
    lines = [f"`{command}`", ""]
    if rows:
        first = rows[0]
        versions = f"JAX {first['jax']}, PyTorch {first['torch'] or 'not installed'}"
        lines += [f"{first['cpu']}, {first['device']}, {first['cores_used']} cores, {versions}", ""]
    lines += [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += [f"| {' | '.join(cell(row) for cell in COLUMNS.values())} |" for row in rows]
    means = [
        f"- {mode}, {dtype}, {backend}: {mean[0]:.2f}, to PyTorch as installed {mean[1]:.2f}"
        for mode, dtype, backend, mean in _means(rows)
    ]
    lines += ["", "Geometric means of the ratios:", "", *means] if means else []
    said = [f"{r['model']}@{r['size']} {r['mode']} {r['dtype']} {r['ops']}: " for r in rows]
    notes = [
        f"- {name}{note}"
        for name, row in zip(said, rows, strict=True)
        for note in (row["note"], row["torch_note"])
        if note
    ]
    lines += ["", "Notes:", "", *notes] if notes else []
    return "\n".join(lines) + "\n"


def _means(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str, str, tuple[float, float]]]:
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["ratio"] is not None:
            groups.setdefault((row["mode"], row["dtype"], row["ops"]), []).append(row)
    return [
        (
            *group,
            (
                statistics.geometric_mean(row["ratio"] for row in members),
                statistics.geometric_mean(row["ratio_installed"] for row in members),
            ),
        )
        for group, members in groups.items()
    ]


def draw(rows: Sequence[dict[str, Any]], path: Path) -> bool:
    """Draws the ratios as bars; returns whether there were any and matplotlib is installed."""
    rows = [row for row in rows if row["ratio"] is not None]
    if not rows or importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    backends = list(dict.fromkeys(row["ops"] for row in rows))
    labels = list(dict.fromkeys(_label(row) for row in rows))
    height = 0.8 / len(backends)
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.18 * len(labels) * (1 + len(backends))))
    for i, backend in enumerate(backends):
        mine = [row for row in rows if row["ops"] == backend]
        places = [labels.index(_label(row)) + i * height for row in mine]
        bars = axes.barh(places, [row["ratio"] for row in mine], height, label=f"ops: {backend}")
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(labels))], labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("PyTorch's time / flaxcls's (right of the line flaxcls is faster)")
    axes.margins(x=0.1)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=len(backends))
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    return True


def _label(row: dict[str, Any]) -> str:
    return f"{row['model']}@{row['size']}, {row['batch']}, {row['mode']}, {row['dtype']}"


def write(rows: list[dict[str, Any]], path: Path | None, command: str) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(rows, indent=1) + "\n")
    unfinished.replace(path)
    path.with_suffix(".md").write_text(table(rows, command))


def arguments_of(command: Sequence[str]) -> argparse.Namespace:
    def listed(choices: Sequence[str]) -> Any:
        def parse(text: str) -> tuple[str, ...]:
            names = tuple(text.split(","))
            for name in names:
                if name not in choices:
                    raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(choices)}")
            return names

        return parse

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="cpu", help="cases, and what is not given below")
    add("--models", type=listed(models.list_models()), help="comma-separated; of the preset's form")
    add("--size", type=int, help="of the images, instead of the preset's")
    add("--batch", type=int, help="instead of the preset's")
    add("--modes", type=listed(MODES), default=MODES, help="comma-separated")
    add("--dtype", type=listed(DTYPES), help="comma-separated")
    add("--ops", type=listed(ops.BACKENDS), help=f"comma-separated, of {', '.join(ops.BACKENDS)}")
    add("--device", choices=("cpu", "cuda"), help="instead of the preset's")
    add("--threads", type=int, default=2, help="cores that each side may use on CPU")
    add("--rounds", type=int, default=5, help="turns of each side")
    add("--seconds", type=float, default=0.3, help="of one turn, about")
    add("--minutes", type=float, help="in which to end")
    add("--without_torch", action="store_true", help="time flaxcls alone")
    add("--without_torch_compile", action="store_true", help="leave PyTorch eager")
    add("--json", type=Path, help="file for the rows; table and plot come beside it")
    return parser.parse_args(command)


def questions_of(arguments: argparse.Namespace) -> list[Question]:
    preset = PRESETS[arguments.preset]
    cases = list(preset.cases)
    if arguments.models:
        known = {case.model: case for case in cases}
        cases = [known.get(name, Case(name, 64, 32, 10)) for name in arguments.models]
    given = {k: v for k in ("size", "batch") if (v := getattr(arguments, k)) is not None}
    return [
        Question(dataclasses.replace(case, **given), mode, dtype)
        for case in cases
        for dtype in arguments.dtype or preset.dtypes
        for mode in arguments.modes
    ]


def main(command: Sequence[str]) -> None:
    arguments = arguments_of(command)
    preset = PRESETS[arguments.preset]
    end = time.monotonic() + 60 * (arguments.minutes or preset.minutes)
    has_torch = importlib.util.find_spec("torch") is not None and not arguments.without_torch
    settings = Settings(
        device=arguments.device or preset.device,
        ops=arguments.ops or preset.ops,
        threads=arguments.threads,
        with_torch=has_torch,
        torch_compile=not arguments.without_torch_compile,
        rounds=arguments.rounds,
        seconds=arguments.seconds,
    )
    if settings.device == "cpu":
        # The processes that this one starts inherit it.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: settings.threads])
    questions = questions_of(arguments)
    said = f"python benchmarks/throughput.py {' '.join(command)}".strip()
    about = machine.describe([], "torch") | {"threads": settings.threads, "command": said}
    del about["devices"]  # each row names its own
    if not has_torch:
        about["torch"] = None
        print("no PyTorch here, or it is not wanted: its columns stay empty")
    ceilings = {q.dtype: dict[str, float]() for q in questions}
    for dtype in ceilings:
        ceilings[dtype] = ceiling(settings, dtype)
        print(f"{dtype}: " + ", ".join(f"{k} {v:.0f}" for k, v in ceilings[dtype].items()))

    rows: list[dict[str, Any]] = []
    for i, question in enumerate(questions):
        if time.monotonic() > end:
            print(f"out of time: {len(questions) - i} questions are left, from {question} on")
            break
        # What one question leaves of its share goes to those after it.
        share = (end - time.monotonic()) * _weight(question) / sum(map(_weight, questions[i:]))
        try:
            found = compare(question, settings, time.monotonic() + share)
        except SideError as error:  # out of memory, say
            print(f"{question}: {error}", flush=True)
            continue
        for backend in settings.ops:
            if backend in found.flaxcls:
                row = row_of(question, backend, found, ceilings[question.dtype], about)
                if not has_torch:
                    row["torch_note"] = "no PyTorch"
                rows.append(row)
                print(_line(row), flush=True)
            else:
                print(f"{question}, {backend}: {found.notes[backend]}", flush=True)
        write(rows, arguments.json, said)
    if arguments.json is not None and not draw(rows, arguments.json.with_suffix(".png")):
        print("nothing is drawn: there are no ratios, or no matplotlib")
    if not rows:
        sys.exit("nothing could be measured")


def _weight(question: Question) -> int:
    """What a question takes, about: training compiles more."""
    return 2 if question.mode == "train" else 1


def _line(row: dict[str, Any]) -> str:
    line = f"{_label(row)}, {row['ops']}: {row['flaxcls_ms']:.2f} ms"
    if row["ratio"] is not None:
        line += (
            f"; PyTorch {row['torch_ms']:.2f} ({row['torch_best']}), ratio {row['ratio']:.2f}; "
            f"as installed {row['torch_installed_ms']:.2f}, {row['ratio_installed']:.2f}"
        )
    notes = [row[key] for key in ("note", "torch_note") if row[key]]
    return f"{line} ({'; '.join(notes)})" if notes else line


if __name__ == "__main__":
    main(sys.argv[1:])
