"""What `--mode=predict` shows on the terminal."""

from collections import Counter
from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from flaxcls.deploy.inputs import shown
from flaxcls.deploy.records import Clip, Failure, Seen
from flaxcls.deploy.trained import TrainedModel
from flaxcls.history import percent

# Images up to which each is shown with its k classes, and up to which with its likeliest two.
_FEW, _SOME = 10, 40
_BAR = 24  # characters
_CLASSES, _UNSURE, _FAILURES = 20, 5, 10  # rows of each kind


def of_photos(trained: TrainedModel, photos: Sequence[tuple[str, Seen]]) -> list[RenderableType]:
    """Returns the table of some images, or a summary of many."""
    if len(photos) > _SOME:
        return [_summary(trained, [seen for _, seen in photos]), *_least_sure(trained, photos)]
    if len(photos) <= _FEW:
        return [part for file, seen in photos for part in (_label(file), _classes(trained, seen))]
    table = Table(show_edge=False, pad_edge=False)
    titles = ["image", *(["parent"] if trained.parent_names else []), "class", "", "or", ""]
    for title in titles:
        table.add_column(title, justify="left" if title else "right", overflow="fold")
    for file, seen in photos:
        cells = [_name(file)]
        if seen.parent is not None:
            cells.append(Text(trained.parent_names[seen.parent]))
        for label, probability in zip(seen.classes[:2], seen.probabilities[:2], strict=True):
            cells += [Text(trained.class_names[label]), Text(percent(probability))]
        table.add_row(*cells)
    return [table]


def of_clip(trained: TrainedModel, clip: Clip) -> list[RenderableType]:
    """Returns a sentence on a video, and how often each class was seen in it."""
    size = f"{clip.width} x {clip.height}, {clip.rate:.4g} frames a second"
    note = f"; {clip.note}" if clip.note else ""
    title = f"{_label(clip.file)}: {len(clip.frames)} frames, {size}{note}"
    return [title, _summary(trained, clip.frames, "frames")]


def of_failures(failures: Sequence[Failure]) -> list[RenderableType]:
    """Returns a sentence on each of the first that could not be read, and one on the others."""
    if not failures:
        return []
    count = "one input" if len(failures) == 1 else f"{len(failures)} inputs"
    lines = [f"{count} could not be read:"]
    lines += [f"  {_label(failure.file)} {failure.reason}" for failure in failures[:_FAILURES]]
    if len(failures) > _FAILURES:
        lines.append(f"  ... and {len(failures) - _FAILURES} more, listed in predictions.csv")
    return ["\n".join(lines)]


def _classes(trained: TrainedModel, seen: Seen) -> Table:
    """Returns an image's parent, if there are any, and its k classes, with bars."""
    table = Table(box=None, show_header=False, pad_edge=True)
    table.add_column(overflow="fold")
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    if seen.parent is not None and seen.parent_probability is not None:
        name = Text(f"{trained.parent_names[seen.parent]} (parent)")
        table.add_row(name, percent(seen.parent_probability), _bar(seen.parent_probability))
    for label, probability in zip(seen.classes, seen.probabilities, strict=True):
        table.add_row(Text(trained.class_names[label]), percent(probability), _bar(probability))
    return table


def _bar(probability: float) -> Text:
    return Text("\N{FULL BLOCK}" * round(_BAR * probability))


def _summary(trained: TrainedModel, seen: Sequence[Seen], what: str = "images") -> Table:
    counts = Counter(one.classes[0] for one in seen)
    total: Counter[int] = Counter()
    for one in seen:
        total[one.classes[0]] += one.probabilities[0]  # type: ignore[assignment]
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("predicted class", overflow="fold")
    for title in (what, "share", "mean probability"):
        table.add_column(title, justify="right")
    for label, count in counts.most_common(_CLASSES):
        mean = percent(total[label] / count)
        table.add_row(
            Text(trained.class_names[label]), f"{count:,}", percent(count / len(seen)), mean
        )
    rest = counts.most_common()[_CLASSES:]
    if rest:
        number = sum(count for _, count in rest)
        table.add_row(
            f"... {len(rest)} more classes", f"{number:,}", percent(number / len(seen)), ""
        )
    return table


def _least_sure(
    trained: TrainedModel, photos: Sequence[tuple[str, Seen]]
) -> tuple[RenderableType, ...]:
    unsure = sorted(photos, key=lambda photo: photo[1].probabilities[0])[:_UNSURE]
    lines = ["least sure of:"]
    for file, seen in unsure:
        name = trained.class_names[seen.classes[0]]
        lines.append(f"  {_label(file)}  {name} {percent(seen.probabilities[0])}")
    return ("\n".join(lines),)


def _label(file: str) -> str:
    return shown(file)[1:-1]


def _name(file: str) -> Text:
    return Text(_label(file))
