"""Config files, the `config.json` of a run, and what may differ between the two."""

import json
import re
import sys
import traceback
import types
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from flaxcls.atomic_files import write_atomically
from flaxcls.config.checks import KINDS, check_tree
from flaxcls.config.keys import default, flatten, key_types
from flaxcls.errors import InputError, another_workdir, did_you_mean

# A run may be resumed with other values of these; all else is part of what the run is.
MAY_CHANGE = (
    "mesh",
    "log",
    "checkpoint",
    "eval.batch_size",
    "eval.split",
    "eval.step",
    "data.path",
    "data.workers",
    "data.placement",
)

LENGTH_FREE_SCHEDULES = ("constant", "step", "multi_step", "plateau")


def save(config: ConfigDict, path: Path) -> None:
    """Writes the config as JSON, atomically."""
    write_atomically(path, json.dumps(config.to_dict(), indent=2) + "\n")


def load(path: Path) -> ConfigDict:
    """Returns the config that `save` wrote.

    Raises:
      InputError: the file does not hold a config of this version of flaxcls.
    """
    c = default()
    try:
        stored = json.loads(path.read_text())
        if not isinstance(stored, dict):
            raise InputError("it is no tree of keys")
        _assign(c, stored)
        check_tree(c)
    except (AttributeError, KeyError, TypeError) as error:
        raise _unreadable(path, _explain(error)) from error
    except (OSError, ValueError) as error:
        raise _unreadable(path, _first_line(error)) from error
    return c


def _unreadable(path: Path, reason: str) -> InputError:
    return InputError(
        f"{path}: not a config that this version of flaxcls can read ({reason}); restore the file "
        f"or give {another_workdir(path.parent)}"
    )


def _assign(config: ConfigDict, values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            _assign(config[key], value)
        else:
            setattr(config, key, tuple(value) if isinstance(value, list) else value)


def from_file(path: Path, *dataset: str) -> ConfigDict:
    """Returns what `get_config(*dataset)` of a Python file returns.

    Raises:
      InputError: the file cannot be read or run, or returns no config; with the line at fault.
    """
    # Not through importlib, which would leave compiled files beside the user's.
    module = types.ModuleType("flaxcls_config_file")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    try:
        exec(compile(_read(path), str(path), "exec"), vars(module))
        if hasattr(module, "get_config"):
            config = module.get_config(*dataset)
    except InputError:
        raise
    except SyntaxError as error:
        where = f"{path}, line {error.lineno}" if error.lineno else str(path)
        raise InputError(f"{where}: not Python ({error.msg}); correct the config file") from error
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f", line {frame.lineno}" for frame in frames if frame.filename == str(path)]
        where = str(path) + "".join(lines[-1:])
        if "config_dict" in frames[-1].filename:
            raise InputError(f"{where}: {_explain(error)}") from error
        said = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
        raise InputError(f"{where}: {said}; correct the config file") from error
    if not hasattr(module, "get_config"):
        raise InputError(
            f"{path}: there is no function get_config(dataset) in it; define one that returns the "
            "config, or give another file"
        )
    if not isinstance(config, ConfigDict):
        raise InputError(
            f"{path}: get_config returned {type(config).__name__}, not a config; return what "
            "flaxcls.config.for_dataset gave"
        )
    return config


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"--config: cannot read '{path}' ({error.strerror}); give a config file"
        ) from error


def _explain(error: BaseException) -> str:
    """Says in short what ml_collections says of a key or a value, with the whole tree around it."""
    text = str(error)
    wrong = re.search(r"field '(\w+)'.*?\. (.*) is of original .* to type <class '(.*)'>", text)
    if wrong:
        key, value, name = wrong.groups()
        kinds = {kind.__name__: words for kind, words in KINDS.items()}
        return f"{key}: {value!r} is not {kinds.get(name, 'a group of keys; set one of them')}"
    named = re.search(r"Key \W*(\w+)", text) or re.search(r"(\w+)", text)
    name = named[1] if named else text
    keys = sorted({part for path in key_types() for part in path.split(".")})
    return f"{name!r} is not a key of the config; {did_you_mean(name, keys)}"


def differences(
    stored: ConfigDict, given: ConfigDict, also_free: tuple[str, ...] = ()
) -> list[str]:
    """Returns one line for each key that differs and may not, on resuming or evaluating a run."""
    old, new = flatten(stored), flatten(given)
    may_change = [*MAY_CHANGE, *also_free]
    if given.schedule.name in LENGTH_FREE_SCHEDULES:
        may_change.append("train.epochs")
    reasons = {"train.epochs": f", and schedule {given.schedule.name!r} is laid out over it"}
    return [
        f"{key}: {old[key]!r} there, {new[key]!r} now{reasons.get(key, '')}"
        for key in sorted(old)
        if old[key] != new[key]
        and not any(key == free or key.startswith(free + ".") for free in may_change)
    ]


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
