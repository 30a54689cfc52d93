"""What a person sees on the terminal while a run goes on, and at its end."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from flaxcls.history import (
    SPLIT_TITLES,
    SPLITS,
    Record,
    decimal,
    find_record,
    percent,
    scalars,
    verdict,
)
from flaxcls.memory import describe_bytes

WAIT_LIMIT = 0.1


class Progress:
    """A live bar on a terminal, plain lines elsewhere, nothing where `enabled` is false.

    Call `start` for each epoch (and each evaluation), `update` after each step, `end_epoch` with
    the epoch's records, and `close` at the end; or use it as a context manager. `update` is cheap:
    it draws at most a few times a second, prints a plain line at most every `every_seconds`, and
    never touches a device. Output that can no longer be written (a closed pipe, a lost terminal)
    is given up; the run goes on.

    `batch_size` is the number of images of a step over all processes. `placement` is where the
    data lives: device, host or files.
    """

    def __init__(
        self,
        *,
        epochs: int,
        steps_per_epoch: int,
        batch_size: int,
        placement: str = "device",
        every_seconds: float = 10.0,
        enabled: bool = True,
    ):
        self.console = make_console()
        self.enabled = enabled
        self.live = self.enabled and _can_draw(self.console)
        self._epochs = epochs
        self._steps_per_epoch = steps_per_epoch
        self._batch_size = batch_size
        self._placement = placement
        self._every_seconds = every_seconds
        self._advised = False
        self._bar: Bar | None = None
        self._epoch = 0
        self._split = "train"
        self._steps = steps_per_epoch
        self._totals = ""
        self._began = self._drawn = self._printed = time.monotonic()
        self._samples: deque[tuple[float, int]] = deque()
        self._whole_epoch = True
        self._epoch_seconds: deque[float] = deque(maxlen=5)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def note(self, sentence: str) -> None:
        """Prints a line, above the bar where there is one."""
        self._print(sentence)

    def start(
        self, epoch: int, split: str = "train", *, step: int = 0, steps: int | None = None
    ) -> None:
        """Begins a pass of `steps` steps (by default an epoch's) over a split.

        `step` of them are done already, where an epoch is resumed.
        """
        now = time.monotonic()
        if split == "train":
            self._began = now
            self._whole_epoch = step == 0
        self._epoch, self._split, self._totals = epoch, split, ""
        self._steps = self._steps_per_epoch if steps is None else steps
        self._samples.clear()
        self._drawn = self._printed = now
        if not self.live:
            return
        with self._giving_up():
            if self._bar is None:
                self._bar = _new_bar(self.console)
                self._bar.start()
            self._bar.reset(
                _TASK,
                total=self._steps,
                completed=step,
                description=f"epoch {epoch}/{self._epochs} {SPLIT_TITLES.get(split, split)}",
                figures="",
            )

    def update(
        self, step: int, *, loss: float | None = None, accuracy: float | None = None
    ) -> None:
        """Says that `step` steps of the pass are done; loss and accuracy where they are new."""
        if not self.enabled:
            return
        now = time.monotonic()
        if loss is not None or accuracy is not None:
            self._totals = figures({"loss": loss, "accuracy": accuracy})
        # The first step holds the compilation, so that speed is counted from its end.
        if not self._samples or now - self._samples[-1][0] > 0.5:
            self._samples.append((now, step))
            while len(self._samples) > 2 and now - self._samples[0][0] > 30:
                self._samples.popleft()
        if self._bar is not None:
            if now - self._drawn > 0.2:
                self._drawn = now
                self._bar.update(_TASK, completed=step, figures=self._figures(now, step))
        elif now - self._printed >= self._every_seconds:
            self._printed = now
            title = SPLIT_TITLES.get(self._split, self._split)
            width = len(str(self._epochs))
            self._print(
                f"epoch {self._epoch:>{width}}/{self._epochs}  {title} step {step}/{self._steps}  "
                + self._figures(now, step)
            )

    def end_epoch(self, records: Sequence[Record], *, best: bool = False) -> None:
        """Prints an epoch's line from its records, and once what to do if it waits for data."""
        if self._whole_epoch:
            self._epoch_seconds.append(time.monotonic() - self._began)
        self._print(epoch_line(records, epochs=self._epochs, best=best))
        share = max((record.get("wait_share") or 0.0 for record in records), default=0.0)
        if share > WAIT_LIMIT and not self._advised:
            self._advised = True
            self._print(wait_advice(share, self._placement))

    def class_counts(self, class_names: Sequence[str], counts: Mapping[str, Sequence[int]]) -> None:
        """Shows how many images each class has in each split: {"train": (C,) counts, ...}."""
        self._print(class_count_table(class_names, counts))

    def finish(
        self,
        summary: Mapping[str, Any],
        history: Sequence[Record],
        folder: str,
        *,
        can_go_on: bool = True,
    ) -> None:
        """Shows the summary table, the verdict and where the files are."""
        self.close()
        for content in closing(summary, history, folder, can_go_on=can_go_on):
            self._print(content)

    def close(self) -> None:
        """Takes the bar off the screen."""
        if self._bar is not None:
            with self._giving_up():
                self._bar.stop()
            self._bar = None

    def _figures(self, now: float, step: int) -> str:
        began, first = self._samples[0]
        speed = (step - first) / (now - began) if now > began else 0.0
        parts = [self._totals] if self._totals else []
        if speed > 0:
            left = (self._steps - step) / speed
            parts += [f"{speed * self._batch_size:.0f} img/s", f"{duration(left)} left"]
            if self._split == "train" and self._epoch < self._epochs:
                known = self._epoch_seconds
                whole = sum(known) / len(known) if known else self._steps / speed
                # Whole epochs include validation and saving, which the steps left do not.
                rest = max(left, whole - (now - self._began)) if self._whole_epoch else left
                later = (self._epochs - self._epoch) * whole
                parts[-1] += f", {duration(rest + later)} to the end"
        return "  ".join(parts)

    def _print(self, content: RenderableType) -> None:
        if self.enabled:
            with self._giving_up():
                show(self.console, content)

    @contextlib.contextmanager
    def _giving_up(self) -> Iterator[None]:
        """A reader who goes away (`| head`, a closed terminal) must not end a run."""
        try:
            yield
        except OSError:
            self.enabled = self.live = False
            bar, self._bar = self._bar, None
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.console.file.fileno())
            if bar is not None:
                with contextlib.suppress(OSError):
                    bar.stop()


_TASK = TaskID(0)


def _new_bar(console: Console) -> Bar:
    bar = Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[figures]}", markup=False),
        console=console,
        transient=True,
        refresh_per_second=2,
        expand=True,
    )
    bar.add_task("", total=None, figures="")
    return bar


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leaves a closed pipe to the caller, where rich would end the process."""
        raise


def make_console() -> Console:
    """A console on standard output that no class name and no narrow window can break."""
    # A name that the output's encoding lacks is shown with ?, and is no exception.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    plain: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
    console = _Console(**plain, force_jupyter=False)
    if _can_draw(console):
        return console
    return _Console(**plain, force_jupyter=False, force_terminal=False, width=100)


def _can_draw(console: Console) -> bool:
    return console.is_terminal and not console.is_dumb_terminal and console.width >= 40


def show(console: Console, content: RenderableType) -> None:
    """Prints text without breaking its lines, or a table."""
    console.print(content, soft_wrap=isinstance(content, str | Text))


def epoch_line(records: Sequence[Record], *, epochs: int, best: bool = False) -> str:
    """`epoch  3/15  train loss 0.1234 acc 96.21 %  val loss ...  1234 img/s  waited 1 % ...`."""
    width = len(str(epochs))
    parts = [f"epoch {records[0]['epoch']:>{width}}/{epochs}"]
    parts += [f"{record['split']} {figures(record)}" for record in records]
    train = next((record for record in records if record["split"] == "train"), records[0])
    if train.get("images_per_second") is not None:
        parts.append(f"{train['images_per_second']:.0f} img/s")
    if train.get("wait_share") is not None:
        parts.append(f"waited {100 * train['wait_share']:.0f} % for data")
    if train.get("peak_memory_bytes") is not None:
        parts.append(f"peak memory {describe_bytes(train['peak_memory_bytes'])}")
    parts.append(duration(sum(record.get("seconds") or 0.0 for record in records)))
    return "  ".join([*parts, "best"] if best else parts)


def figures(record: Mapping[str, Any]) -> str:
    """`loss 0.1234 acc 96.21 %`, of what the record has."""
    parts = []
    if record.get("loss") is not None:
        parts.append(f"loss {decimal(record['loss'])}")
    if record.get("accuracy") is not None:
        parts.append(f"acc {percent(record['accuracy'])}")
    return " ".join(parts)


def wait_advice(share: float, placement: str) -> str:
    """One sentence on what to change where the training step waits for data."""
    remedy = {
        "device": "the data is on the device already, so look for other programs on this machine",
        "host": "set data.placement=device if the data fits there, or raise train.batch_size",
    }.get(
        placement,
        "raise data.workers, set data.placement=host or device if the decoded images fit in "
        "memory, or store them smaller",
    )
    return f"{100 * share:.0f} % of the time went into waiting for data: {remedy}."


def class_count_table(
    class_names: Sequence[str], counts: Mapping[str, Sequence[int]], most: int = 30
) -> Table:
    """Classes by splits. Beyond `most` classes: the five largest and smallest, median and total."""
    splits = [split for split in SPLITS if split in counts]
    splits += [split for split in counts if split not in SPLITS]
    table = _table("class", *(SPLIT_TITLES.get(split, split) for split in splits))

    def add(name: str, values: Sequence[float]) -> None:
        table.add_row(Text(name), *(f"{value:,.0f}" for value in values))

    order = list(range(len(class_names)))
    if len(order) > most:
        order.sort(key=lambda i: -counts[splits[0]][i])
        for i in order[:5]:
            add(class_names[i], [counts[split][i] for split in splits])
        table.add_row(Text(f"... {len(order) - 10} classes between ..."), *("" for _ in splits))
        order = order[-5:]
    for i in order:
        add(class_names[i], [counts[split][i] for split in splits])
    table.add_section()
    if len(class_names) > most:
        middle = len(class_names) // 2
        add("median of a class", [sorted(counts[split])[middle] for split in splits])
    add(f"{len(class_names)} classes", [sum(counts[split]) for split in splits])
    return table


def summary_table(summary: Mapping[str, Any], history: Sequence[Record]) -> Table:
    """Splits by metrics at the best epoch."""
    train = find_record(history, summary["best_epoch"], "train")
    rows = {
        "train": scalars(train) if train else None,
        "val": summary["val"],
        "test": summary["test"],
    }
    titles = SPLIT_TITLES | {"train": "train (running)"}  # the mean of its batches, others after it
    return metrics_table({titles[split]: m for split, m in rows.items() if m})


def metrics_table(measured: Mapping[str, Mapping[str, float]]) -> Table:
    """One row of metrics for each title."""
    names = [name for metrics in measured.values() for name in metrics]
    shown = [name for name in dict.fromkeys(names) if name in _TITLES or name.startswith("top_")]
    table = _table("split", *(_TITLES.get(name, name.replace("_", "-")) for name in shown))
    for title, metrics in measured.items():
        table.add_row(
            title,
            *(
                ""
                if (value := metrics.get(name)) is None
                else f"{value:.4f}"
                if name == "loss"
                else percent(value)
                for name in shown
            ),
        )
    return table


_TITLES = {
    "loss": "loss",
    "accuracy": "accuracy",
    "precision_macro": "precision",
    "recall_macro": "recall",
    "f1_macro": "F1",
    "f1_weighted": "F1 weighted",
}


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return decimal(value) if name == "loss" else percent(value)


def closing(
    summary: Mapping[str, Any], history: Sequence[Record], folder: str, *, can_go_on: bool = True
) -> tuple[RenderableType, ...]:
    """The summary table, the verdict and where the files are."""
    return (
        summary_table(summary, history),
        verdict(history, can_go_on=can_go_on),
        closing_line(summary, folder),
    )


def closing_line(summary: Mapping[str, Any], folder: str | os.PathLike[str]) -> str:
    """Model, best epoch, time and where the files are."""
    speed = summary.get("images_per_second")
    return (
        f"{summary['model']} ({summary['params']:,} parameters), best epoch "
        f"{summary['best_epoch']} of {summary['epochs']}, {duration(summary['seconds'])}"
        + (f" at {speed:.0f} img/s" if speed else "")
        + f"; everything is in {folder}"
    )


def duration(seconds: float) -> str:
    """`8.4 s`, `12 s`, `3 min 20 s` or `2 h 5 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60} s"
    return f"{int(seconds) // 3600} h {int(seconds) % 3600 // 60} min"


def _table(first: str, *others: str) -> Table:
    table = Table(show_edge=False, pad_edge=False)
    table.add_column(first, overflow="fold")
    for title in others:
        table.add_column(title, justify="right")
    return table
