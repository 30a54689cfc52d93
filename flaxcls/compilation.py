"""How much of its time this process has spent on making programs."""

from typing import Any

import jax.monitoring

_spans: list[tuple[float, float]] = []  # of wall time, ascending, none within another


def compile_seconds() -> float:
    """Seconds in which JAX traced, lowered and compiled since this module was imported.

    To read a program from JAX's cache counts, too.
    """
    return sum(end - began for began, end in _spans)


def _note(event: str, began: float, end: float, **_: Any) -> None:
    if not event.startswith("/jax/core/compile/"):
        return
    # While a function is traced, those that it calls are; it is heard of last.
    while _spans and _spans[-1][0] >= began:
        _spans.pop()
    if _spans:
        began = max(began, _spans[-1][1])
    _spans.append((began, max(began, end)))


jax.monitoring.register_event_time_span_listener(_note)
