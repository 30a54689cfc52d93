"""The config of a run: one tree of keys with defaults, presets of data sets, checks and files.

A config file builds on `for_dataset(name)` and sets only what differs; `resolve` checks it, fills
in what depends on its choices, and reports keys that were set but have no effect.
"""

from flaxcls.config.checks import (
    CHOICES,
    ELEMENTS,
    KINDS,
    RANGES,
    check_key,
    check_monitor,
    resolve,
)
from flaxcls.config.files import (
    LENGTH_FREE_SCHEDULES,
    MAY_CHANGE,
    differences,
    from_file,
    load,
    save,
)
from flaxcls.config.keys import (
    BRANCHES,
    PRESETS,
    choose,
    default,
    flatten,
    for_dataset,
    key_types,
)

__all__ = [
    "BRANCHES",
    "CHOICES",
    "ELEMENTS",
    "KINDS",
    "LENGTH_FREE_SCHEDULES",
    "MAY_CHANGE",
    "PRESETS",
    "RANGES",
    "check_key",
    "check_monitor",
    "choose",
    "default",
    "differences",
    "flatten",
    "for_dataset",
    "from_file",
    "key_types",
    "load",
    "resolve",
    "save",
]
