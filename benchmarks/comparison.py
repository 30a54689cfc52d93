"""flaxcls and PyTorch side by side: one network, one mode, one precision, in processes in turns."""

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any, TypeVar

from sides import Side, SideError

from flaxcls import models


@dataclasses.dataclass(frozen=True)
class Case:
    """A network and a batch.

    Attributes:
      model: its registered name.
      size: height and width of the images.
      batch: images a step.
      classes: of the network.
      channels: of the images.
      options: of the model, (name, value).
    """

    model: str
    size: int
    batch: int
    classes: int
    channels: int = 3
    options: tuple[tuple[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class Question:
    """A case in a mode, `train` or `infer`, and a precision, `float32` or `bfloat16`."""

    case: Case
    mode: str
    dtype: str

    def __str__(self) -> str:
        c = self.case
        return f"{c.model}@{c.size}, batch {c.batch}, {self.mode}, {self.dtype}"


@dataclasses.dataclass(frozen=True)
class Settings:
    """How every question is answered.

    Attributes:
      device: `cpu` or `cuda`.
      ops: backends of flaxcls's operators, each a row.
      threads: cores that each side may use.
      with_torch: whether there is a PyTorch side.
      torch_compile: whether torch.compile is tried.
      rounds: turns that each side has.
      seconds: of one turn, about; a step that takes longer is a turn by itself.
    """

    device: str
    ops: tuple[str, ...]
    threads: int
    with_torch: bool
    torch_compile: bool
    rounds: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Variant:
    """A form of PyTorch's side.

    Attributes:
      tuned: the fused optimizer; on CPU glibc keeps freed memory, on a GPU cuDNN searches for its
        fastest convolutions.
      layout: of images and weights.
      compile: mode of torch.compile, or None for eager.
    """

    tuned: bool = False
    layout: str = "contiguous"
    compile: str | None = None

    def said(self, device: str) -> str:
        """The variant in words."""
        words = ["eager" if self.compile is None else "compile", self.layout]
        if self.compile not in (None, "default"):
            words[0] = f"compile ({self.compile})"
        if self.tuned:
            words.append("mallopt" if device == "cpu" else "cudnn.benchmark")
        return ", ".join(words)


INSTALLED = Variant()
EAGER = (INSTALLED, Variant(tuned=True), Variant(tuned=True, layout="channels_last"))

# What flaxcls's `ops.prepare_process` sets with mallopt, as glibc reads it at the start.
KEPT_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(64 * 2**20),
}


class Runner:
    """A side whose steps are timed.

    Attributes:
      said: what it is, in words.
      about: facts of its network and device.
      compile_seconds: of the step.
      step_seconds: found by `try_out`.
      process_peak: bytes above the level after imports, compilation included.
      peak: of steps alone.
      times: seconds a step, one for each turn.
    """

    def __init__(self, side: Side, said: str):
        self._side, self.said = side, said
        self.about: dict[str, Any] = {}
        self.compile_seconds = self.step_seconds = math.nan
        self.process_peak = self.peak = 0
        self.times: list[float] = []

    def wait_until_made(self, timeout: float | None = None) -> None:
        self._side.receive(timeout)
        self.about = self._side.call("about")

    def lower(self) -> str:
        return self._side.call("lower")

    def compile(self, timeout: float | None = None) -> None:
        compiled = self._side.call("compile", timeout)
        self.compile_seconds, self.process_peak = compiled["seconds"], compiled["peak"]

    def try_out(self, seconds: float) -> None:
        """Finds how long a step takes, about, and what memory."""
        self.step_seconds = self._side.call("steps", count=2) / 2
        count = max(1, round(seconds / 2 / self.step_seconds))
        self.step_seconds = min(self._side.call("steps", count=count) / count for _ in range(3))
        self.peak = self._side.call("peak")

    def turn(self, seconds: float) -> None:
        """Takes steps for about so long, after some that are not timed."""
        if self.step_seconds < 2 * seconds:  # a long step has no memory of the turn before
            self._side.call("steps", count=math.ceil(0.05 * seconds / self.step_seconds))
        count = max(1, round(seconds / self.step_seconds))
        self.times.append(self._side.call("steps", count=count) / count)

    def ceiling(self, size: int) -> dict[str, float]:
        return self._side.call("ceiling", size=size)

    @property
    def milliseconds(self) -> float:
        """Of a step, the median over the turns."""
        return 1000 * statistics.median(self.times)

    def end(self) -> None:
        self._side.kill()


@dataclasses.dataclass
class Comparison:
    """What a question was answered with.

    Attributes:
      flaxcls: by backend; two backends with the same program have the same runner.
      installed: PyTorch as one writes it first, or None.
      best: the fastest PyTorch, perhaps the same, or None.
      notes: by backend, what is to be said of its row.
      torch_notes: what is to be said of PyTorch's side.
      torch_tried: its variants with the times of their short trials.
    """

    flaxcls: dict[str, Runner] = dataclasses.field(default_factory=dict)
    installed: Runner | None = None
    best: Runner | None = None
    notes: dict[str, str] = dataclasses.field(default_factory=dict)
    torch_notes: list[str] = dataclasses.field(default_factory=list)
    torch_tried: list[str] = dataclasses.field(default_factory=list)


def compare(question: Question, settings: Settings, end: float) -> Comparison:
    """Answers a question.

    Args:
      question: what to measure.
      settings: how.
      end: time.monotonic() by which it should be answered; torch.compile is given up and the
        backend `flax` left out where they do not fit.
    """
    result = Comparison()
    # What trials, turns and processes that start are going to take.
    spare = end - 8 * settings.rounds * settings.seconds - 5
    with ExitStack() as stack:
        starts = Starts(question, settings, stack)
        ours = {name: starts.flaxcls(name) for name in settings.ops}
        theirs = {v: starts.torch(v) for v in EAGER if settings.with_torch}
        result.notes = _made(ours)
        result.torch_notes = [*dict.fromkeys(_made(theirs).values())]
        best = INSTALLED
        for variant in list(theirs):
            best = _try_variant(variant, theirs, best, settings, result)
        with ThreadPoolExecutor(1) as beside:
            compiling = beside.submit(_compile_flaxcls, ours, result, spare)
            if settings.device != "cpu":  # on CPU one core compiles for each side
                compiling.result()  # while it tries kernels, nothing else may run
            if best in theirs and settings.torch_compile:
                _compile_torch(starts, best, theirs, result, spare)
            compiling.result()
        for runner in _each(result.flaxcls):
            runner.try_out(settings.seconds)
        for variant in [v for v in theirs if v.compile is not None]:
            best = _try_variant(variant, theirs, best, settings, result)
        result.installed, result.best = theirs.get(INSTALLED), theirs.get(best)
        runners = [*_each(result.flaxcls), *_each(theirs)]
        for _ in range(settings.rounds):
            for runner in runners:
                runner.turn(settings.seconds)
        if theirs:  # the trial may have been wrong
            result.best = min(theirs.values(), key=lambda runner: runner.milliseconds)
    return result


def ceiling(settings: Settings, dtype: str) -> dict[str, float]:
    """The faster of both sides' square matmuls and copies: `matmul_gflops` and `copy_gbs`."""
    question = Question(Case("lenet", 28, 2, 10, 1), "infer", dtype)
    size = 1536 if settings.device == "cpu" else 8192
    found: list[dict[str, float]] = []
    with ExitStack() as stack:
        starts = Starts(question, settings, stack)
        runners = {"flaxcls": starts.flaxcls("auto")}
        if settings.with_torch:
            runners["torch"] = starts.torch(Variant(tuned=True))
        _made(runners)
        for runner in runners.values():
            with suppress(SideError):
                found.append(runner.ceiling(size))
    return {key: max(one[key] for one in found) for key in found[0]} if found else {}


class Starts:
    """Starts the sides of a question."""

    def __init__(self, question: Question, settings: Settings, stack: ExitStack):
        self.device, self._settings, self._stack = settings.device, settings, stack
        hierarchical = "num_parents" in models.model_options(question.case.model)
        self._task = {
            **dataclasses.asdict(question.case),
            "options": dict(question.case.options),
            "mode": question.mode,
            "dtype": question.dtype,
            "device": settings.device,
            "threads": settings.threads,
            "loss": "hierarchical" if hierarchical else "cross_entropy",
        }

    def flaxcls(self, backend: str) -> Runner:
        environment = {
            "JAX_PLATFORMS": self._settings.device,
            "JAX_ENABLE_COMPILATION_CACHE": "false",  # compilation is timed
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # several processes share a GPU
        }
        return self._start("flaxcls_side.py", environment, backend, ops=backend)

    def torch(self, variant: Variant) -> Runner:
        environment = {"OMP_NUM_THREADS": str(self._settings.threads)}
        if variant.tuned and self._settings.device == "cpu":
            environment |= KEPT_MEMORY
        said = variant.said(self._settings.device)
        return self._start("torch_side.py", environment, said, variant=dataclasses.asdict(variant))

    def _start(self, script: str, environment: dict[str, str], said: str, **task: Any) -> Runner:
        side = Side(script, json.dumps(self._task | task), environment)
        return Runner(self._stack.enter_context(side), said)


Key = TypeVar("Key", bound=Hashable)


def _made(runners: dict[Key, Runner]) -> dict[Key, str]:
    """Waits for processes to be ready; those that fail are taken out and their errors returned."""
    errors = {}
    for key, runner in list(runners.items()):
        try:
            runner.wait_until_made()
        except SideError as error:
            errors[key] = str(error)
            runners.pop(key).end()
    return errors


def _each(runners: dict[Any, Runner]) -> list[Runner]:
    """Every runner once."""
    return list(dict.fromkeys(runners.values()))


def _try_variant(
    variant: Variant,
    theirs: dict[Variant, Runner],
    best: Variant,
    settings: Settings,
    result: Comparison,
) -> Variant:
    """Times a variant, ends it if it is slower than the best so far, and returns the best."""
    runner = theirs[variant]
    try:
        if variant.compile is None:
            runner.compile()
        runner.try_out(settings.seconds)
    except SideError as error:
        result.torch_notes.append(f"{runner.said}: {error}")
        theirs.pop(variant).end()
        return best
    result.torch_tried.append(f"{runner.said}: {1000 * runner.step_seconds:.2f} ms")
    if variant == best or best not in theirs:
        return variant
    slower = variant if runner.step_seconds > theirs[best].step_seconds else best
    best = best if slower == variant else variant
    if slower != INSTALLED:
        theirs.pop(slower).end()
    return best


def _compile_flaxcls(ours: dict[str, Runner], result: Comparison, spare: float) -> None:
    """Compiles one backend after the other, and what is the same program once."""
    programs: dict[str, str] = {}
    for backend, runner in ours.items():
        try:
            program = runner.lower()
            if program in programs:
                twin = programs[program]
                result.flaxcls[backend] = result.flaxcls[twin]
                result.notes[backend] = f"the same program as {twin}"
                runner.end()
            elif backend == "flax" and programs and time.monotonic() > spare:
                result.notes[backend] = "left out for want of time"
                runner.end()
            else:
                runner.compile()
                result.flaxcls[backend] = runner
                programs[program] = backend
        except SideError as error:
            result.notes[backend] = str(error)
            runner.end()


def _compile_torch(
    starts: Starts,
    best: Variant,
    theirs: dict[Variant, Runner],
    result: Comparison,
    spare: float,
) -> None:
    """Compiles the best eager variant with torch.compile, if that ends in time.

    On a GPU with CUDA graphs, and without them where there is time for both.
    """
    on_cpu = starts.device == "cpu"
    for mode in ("default",) if on_cpu else ("reduce-overhead", "default"):
        left = spare - time.monotonic()
        if left < 0 and any(v.compile for v in theirs):
            return
        variant = dataclasses.replace(best, compile=mode)
        runner = starts.torch(variant)
        limit = max(10.0 if on_cpu else 60.0, left)
        try:
            runner.wait_until_made(limit)
            runner.compile(limit)
        except SideError as error:
            result.torch_notes.append(f"{runner.said}: {error}")
            runner.end()
        else:
            theirs[variant] = runner
