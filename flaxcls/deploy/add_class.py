"""`--mode=add_class`: photos of a new class, and a run that knows it."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from rich.console import Console, RenderableType
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table

from flaxcls.deploy.inputs import find_inputs
from flaxcls.deploy.predictor import Predictor
from flaxcls.deploy.teach import (
    Accuracy,
    Taught,
    check_count,
    check_new,
    check_request,
    default_folder,
    save_taught,
    teach,
    validation,
)
from flaxcls.deploy.trained import TrainedModel, load_run
from flaxcls.errors import InputError
from flaxcls.history import percent
from flaxcls.progress import duration, make_console, show


def add_class_to_run(
    config: ConfigDict,
    workdir: Path,
    inputs: list[str],
    *,
    name: str | None,
    parent: str | None = None,
    method: str = "imprint",
    output: str | None = None,
    invert: str = "auto",
) -> Taught:
    """Teaches a run one class more, saves what it is then as a new run, and says what it cost.

    Args:
      config: of the run, perhaps with another `data.path`, where validation images are looked for.
      workdir: of the run, which stays as it is.
      inputs: photos of the class, folders of them or patterns, 3 to 20 photos in all.
      name: of the class.
      parent: of the class, where the run's classes have parents.
      method: `imprint` or `finetune`, see `teach`.
      output: folder of the new run; None: RUN-plus-NAME.
      invert: whether light and dark of the photos are swapped; see `Predictor.inverts`.

    Raises:
      InputError: something of it does not fit, or a photo cannot be read.
    """
    if name is None:
        raise InputError("--class_name is missing; give the name of the new class")
    console = make_console()
    trained = load_run(workdir, config)
    name, parent = check_request(trained, name, method=method, parent=parent)
    folder = Path(output).expanduser() if output else default_folder(workdir, name)
    check_new(folder)
    examples = read_photos(trained, inputs, invert, console)
    with _bar(console) as shown:
        taught = teach(
            trained, examples, name, method=method, parent=parent, progress=shown.part(0, 0.8)
        )
        held_out = validation(trained, taught, progress=shown.part(0.8, 1))
    save_taught(trained, taught, folder, examples)
    for line in report(taught, held_out):
        show(console, line)
    show(console, f"{folder} knows {len(taught.class_names)} classes now; {workdir} is as it was")
    return taught


def read_photos(
    trained: TrainedModel, inputs: list[str], invert: str, console: Console
) -> np.ndarray:
    """Returns the photos that `--input` names as the model sees them, uint8 (M, S, S, C).

    Raises:
      InputError: they are too few or too many, no photos, or one cannot be read.
    """
    found = find_inputs(inputs)
    for note in found.notes:
        show(console, note)
    if found.videos or found.cameras:
        what = found.videos[0] if found.videos else f"camera {found.cameras[0]}"
        raise InputError(f"--input: {what!r} is no photo; give photos of the new class")
    check_count(len(found.photos))
    predictor = Predictor(trained)
    decoded = [predictor.decode_noting(photo.path, invert=invert) for photo in found.photos]
    swapped = sum(swap for _, swap in decoded)
    if swapped:
        show(
            console,
            f"light and dark are swapped in {swapped} of {len(decoded)} photos, as the model was "
            "trained on light objects on dark ground; --invert=no leaves them",
        )
    return np.stack([image for image, _ in decoded])


def report(taught: Taught, held_out: Accuracy | None) -> list[RenderableType]:
    """Returns what a person is told: the old classes before and after, and the new one."""
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("old classes", overflow="fold")
    for title in ("images", "before", "after", "points lost"):
        table.add_column(title, justify="right")
    measured = {"exemplars (training images)": taught.exemplars}
    if held_out is not None:
        measured["validation images"] = held_out
    for title, accuracy in measured.items():
        table.add_row(
            title,
            f"{accuracy.images:,}",
            percent(accuracy.before),
            percent(accuracy.after),
            f"{accuracy.cost:.2f}",
        )
    lines: list[RenderableType] = [table]
    if held_out is None:
        lines.append("no validation images of the run are to be had, which would say more")
    best = held_out or taught.exemplars
    lost = [
        (before - after, name, before, after)
        for name, before, after in zip(
            taught.class_names, best.class_before, best.class_after, strict=False
        )
        if before - after >= 0.01
    ]
    if lost:
        worst = sorted(lost, reverse=True)[:3]
        lines.append(
            "most was lost by "
            + ", ".join(f"{name} ({percent(a)} -> {percent(b)})" for _, name, a, b in worst)
        )
    lines.append(
        f"{taught.name} was learned by {taught.method} in {duration(taught.seconds)}; of its "
        f"{taught.examples} photos, which it learned from, {percent(taught.recall)} are recognised"
    )
    return lines


class _Shown:
    """A bar, a part of which each job fills."""

    def __init__(self, bar: Bar):
        self._bar = bar
        self._task = bar.add_task("", total=1.0)

    def part(self, start: float, end: float) -> Callable[[float, str], None]:
        def progress(fraction: float, doing: str) -> None:
            done = start + (end - start) * fraction
            self._bar.update(self._task, completed=done, description=doing)

        return progress


@contextlib.contextmanager
def _bar(console: Console) -> Iterator[_Shown]:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield _Shown(bar)
