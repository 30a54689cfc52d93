"""How much of its time this process has spent on making programs."""

from typing import Any

import jax.monitoring

_spans: list[tuple[float, float]] = []  # of wall time, ascending, none within another


def compile_seconds() -> float:
    """Seconds in which JAX traced, lowered and compiled since this module was imported.

    To read a program from JAX's cache counts, too.
    """
    return sum(end - began for began, end in _spans)


def _note(event: str, start_time: float, end_time: float, **kwargs: Any) -> None:
    del kwargs
    if not event.startswith("/jax/core/compile/"):
        return
    # While a function is traced, those that it calls are; it is heard of last.
    while _spans and _spans[-1][0] >= start_time:
        _spans.pop()
    if _spans:
        start_time = max(start_time, _spans[-1][1])
    _spans.append((start_time, max(start_time, end_time)))


jax.monitoring.register_event_time_span_listener(_note)
