"""The one exception for mistakes in what the user gave, and remedies that many of them share."""

import contextlib
import difflib
import itertools
import os
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path


class InputError(ValueError):
    """Bad input: its message is one sentence that names the thing and the remedy.

    `main` prints the sentence without a traceback and exits with code 2.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns the remedy for an unknown `name`: the nearest of the `known`, else 30 at most."""
    names = [str(one) for one in known]
    near = nearest(str(name), names)
    if near is not None:
        return f"did you mean {near!r}?"
    more = f", ... ({len(names)} in all)" if len(names) > 30 else ""
    return f"choose one of {', '.join(names[:30])}{more}" if names else "there are none"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Returns the one of the `known` that `name` is a misspelling of, or None."""
    by_lower = {one.lower(): one for one in known}
    # Long names share many letters by chance: mobilenet is no misspelt lenet (0.71).
    alike = 0.6 if len(name) <= 6 else 0.75
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=alike)
    return by_lower[near[0]] if near else None


def another_workdir(folder: Path) -> str:
    """Returns `another --workdir (such as --workdir=runs/a-2)`, a name beside `folder` not in use.

    The part of the remedy that follows "give".
    """
    names = (f"{folder}-{n}" for n in itertools.count(2))
    free = next(name for name in names if not os.path.lexists(name))
    return f"another --workdir (such as --workdir={shlex.quote(free)})"


@contextlib.contextmanager
def out_of_memory(remedy: str) -> Iterator[None]:
    """Turns "out of memory", of a device or of this machine, into an InputError with the remedy."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(f"there is too little memory; {remedy}") from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python or JAX, whose error is one of many in a RuntimeError, found no more memory."""
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("RESOURCE_EXHAUSTED", "Out of memory")
    )
