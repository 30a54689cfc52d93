"""Checks of where the data lie and of how their names are read."""

import re
from pathlib import Path

from flaxcls.errors import InputError


def existing_folder(path: str | Path, holds: str) -> Path:
    """Return `path` as a folder that exists and is not empty.

    `holds` says in the error what the folder should hold. Raises InputError otherwise.
    """
    if not str(path):
        raise InputError(f"data.path is not set; set it to the folder of {holds}")
    folder = Path(path).expanduser()
    if not folder.exists():
        raise InputError(f"data.path: '{path}' does not exist; set it to the folder of {holds}")
    if not folder.is_dir():
        raise InputError(
            f"data.path: '{path}' is a file, not a folder; set it to the folder of {holds}"
        )
    try:
        if not any(folder.iterdir()):
            raise InputError(f"data.path: '{path}' is empty; it should hold {holds}")
    except PermissionError as error:
        raise InputError(f"data.path: '{path}' may not be listed; get leave to read it") from error
    return folder


def compile_pattern(key: str, pattern: str) -> re.Pattern[str]:
    """Return a regular expression; raises InputError, naming the config's `key`, if it is none."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise InputError(
            f"{key}: {pattern!r} is no regular expression ({error}); correct it"
        ) from error
