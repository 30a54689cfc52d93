"""`load_dataset`: from the plain arguments of a config to a Dataset with its splits."""

import importlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from flaxcls.data.dataset import (
    Dataset,
    match_classes,
    name_undivided,
    select_classes,
    with_parents,
)
from flaxcls.data.decode import ImageSpec
from flaxcls.data.paths import compile_pattern
from flaxcls.data.splits import draw_classes, split_dataset, take_per_class
from flaxcls.errors import InputError, did_you_mean

# Source -> the arguments of `read` in sources/SOURCE.py, a module imported when it is asked for.
SOURCES: dict[str, tuple[str, ...]] = {
    "digits": (),
    "idx": ("path", "name"),
    "image_folder": ("path", "classes", "on_bad", "known_classes", "threads"),
    "image_files": ("path", "label_pattern", "classes", "on_bad", "known_classes", "threads"),
    "npy": ("path", "classes", "num_classes_drawn", "per_class", "seed", "known_classes"),
    "npz": ("path",),
    "tfds": ("path", "name", "spec", "threads"),
}
# Those that take for data what they find in `path`, whatever its name.
_WHOLE_FOLDER = ("image_folder", "npy")


def load_dataset(
    source: str,
    path: str = "",
    *,
    name: str = "",
    classes: Sequence[str] = (),
    num_classes_drawn: int = 0,
    per_class: float = 0.0,
    label_pattern: str = "",
    parents: Sequence[str] = (),
    val_fraction: float = 0.0,
    test_fraction: float = 0.0,
    split_mode: str = "auto",
    stratify: bool = True,
    max_per_class: int = 0,
    on_bad: str = "error",
    seed: int = 0,
    spec: ImageSpec | None = None,
    known_classes: Sequence[str] = (),
    threads: int = 0,
) -> Dataset:
    """Read a source and return its data set with the splits of an experiment.

    source: one of SOURCES; path: its folder or file (none for `digits`).
    name: the TFDS name, or which IDX set it is (`mnist`, `fashion_mnist`).
    classes: only these, numbered in this order; num_classes_drawn: so many, drawn with the seed.
    per_class: of each class in `train`, a fraction (below 1) or a number, by lot; 0 for all.
    label_pattern: of `image_files`: a regular expression whose first group is the class.
    parents: for hierarchical models, rules `PATTERN=PARENT`: the parent of a class is that of the
        first pattern, a regular expression, which matches the whole name.
    val_fraction, test_fraction, split_mode, stratify, max_per_class, seed: see `split_dataset`.
    on_bad: `error` or `skip` for files that are no images.
    spec: how images of differing sizes are brought to one (`tfds`).
    known_classes: a trained model's classes, to evaluate it on other data: labels are numbered so,
        classes may be missing, nothing is drawn and no training split is asked for.
    threads: for reading files; 0 is one a CPU.
    Raises InputError, one sentence that names the thing and the remedy.
    """
    dataset = read_source(
        source,
        path,
        name=name,
        classes=classes,
        num_classes_drawn=num_classes_drawn,
        per_class=per_class,
        label_pattern=label_pattern,
        on_bad=on_bad,
        seed=seed,
        spec=spec,
        known_classes=known_classes,
        threads=threads,
    )
    if known_classes:
        return _with_parents(match_classes(dataset, known_classes), parents)
    if len(dataset.class_names) < 2:
        raise InputError(
            f"{dataset.name}: a classifier needs at least 2 classes, found "
            f"{len(dataset.class_names)} ({', '.join(dataset.class_names)}); add another class"
        )
    dataset = split_dataset(
        dataset,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        mode=split_mode,
        stratify=stratify,
        max_per_class=max_per_class,
        seed=seed,
    )
    return _with_parents(dataset, parents)


def read_source(
    source: str,
    path: str = "",
    *,
    name: str = "",
    classes: Sequence[str] = (),
    num_classes_drawn: int = 0,
    per_class: float = 0.0,
    label_pattern: str = "",
    on_bad: str = "error",
    seed: int = 0,
    spec: ImageSpec | None = None,
    known_classes: Sequence[str] = (),
    threads: int = 0,
) -> Dataset:
    """Return the data set of `load_dataset` before it is split: the classes and examples chosen."""
    if source not in SOURCES:
        raise InputError(f"data.source: unknown source {source!r}; {did_you_mean(source, SOURCES)}")
    if classes and num_classes_drawn:
        raise InputError(
            "data.classes and data.num_classes_drawn are both set; set one of them, as the first "
            "names the classes and the second draws them"
        )
    if known_classes:  # all of the data is evaluated, whatever training took of its own
        classes, num_classes_drawn, per_class = (), 0, 0.0
    arguments = {
        "path": path,
        "name": name,
        "classes": tuple(classes),
        "num_classes_drawn": num_classes_drawn,
        "per_class": per_class,
        "on_bad": on_bad,
        "seed": seed,
        "spec": spec,
        "known_classes": tuple(known_classes),
        "threads": threads,
        "label_pattern": label_pattern,
    }
    for key in ("path", "name"):
        if arguments[key] and key not in SOURCES[source]:
            raise InputError(
                f"data.{key}: source '{source}' takes none; leave data.{key} empty "
                "or choose another data.source"
            )
    reader = importlib.import_module(f"flaxcls.data.sources.{source}")
    dataset = name_undivided(reader.read(**{key: arguments[key] for key in SOURCES[source]}))
    return select(dataset, source, tuple(classes), num_classes_drawn, per_class, seed)


def _with_parents(dataset: Dataset, rules: Sequence[str]) -> Dataset:
    """Gives every class the parent that the rules `PATTERN=PARENT` say."""
    if not rules:
        return dataset
    return with_parents(dataset, class_parents(dataset.class_names, rules, dataset.name))


def class_parents(class_names: Sequence[str], rules: Sequence[str], dataset: str) -> dict[str, str]:
    """Returns the parent of each class, by its name, that the rules `PATTERN=PARENT` say.

    The first rule whose pattern matches the whole name counts; a class that none matches is left
    out. `dataset` is named in the error.

    Raises:
      InputError: a rule is none, or matches no class.
    """
    parents: dict[str, str] = {}
    for rule in rules:
        pattern, _, parent = rule.rpartition("=")
        if not pattern or not parent:
            raise InputError(
                f"data.parents: {rule!r} is no rule; write PATTERN=PARENT, as in '[A-Z].*=cat'"
            )
        matches = compile_pattern("data.parents", pattern).fullmatch
        members = [name for name in class_names if matches(name)]
        if not members:
            raise InputError(
                f"data.parents: no class of {dataset} matches {pattern!r}; correct or remove "
                "the rule"
            )
        parents = dict.fromkeys(members, parent) | parents
    return parents


def check_run_folder(folder: Path, source: str, path: str | None) -> None:
    """Raise InputError where the files of a run in `folder` would be taken for data of `source`."""
    if source not in _WHOLE_FOLDER or not path:
        return
    run, data = Path(os.path.realpath(folder)), Path(os.path.realpath(os.path.expanduser(path)))
    if run.is_relative_to(data):
        place = "is" if run == data else "lies inside"
        raise InputError(
            f"--workdir: the run folder '{folder}' {place} data.path '{path}', where its files "
            "would be taken for data; give a --workdir outside of it"
        )


def select(
    dataset: Dataset,
    source: str,
    classes: tuple[str, ...],
    num_classes_drawn: int,
    per_class: float,
    seed: int,
) -> Dataset:
    """Return the classes and examples asked for, where the source did not choose while reading."""
    takes = SOURCES[source]
    if num_classes_drawn and "num_classes_drawn" not in takes:
        drawn = draw_classes(dataset.class_names, num_classes_drawn, seed)
        dataset = select_classes(dataset, drawn)
        note = f"{num_classes_drawn} classes drawn with seed {seed}: {', '.join(drawn)}."
        dataset = replace(dataset, notes=(*dataset.notes, note))
    elif classes and "classes" not in takes:
        dataset = select_classes(dataset, classes)
    if per_class and "per_class" not in takes and "train" in dataset.splits:
        train = take_per_class(dataset.splits["train"], per_class, seed, "train", "per_class")
        dataset = replace(dataset, splits={**dataset.splits, "train": train})
    return dataset
