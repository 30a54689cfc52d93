"""One folder of image files whose names tell their class, as `Abyssinian_12.jpg` does.

`train/ val/ test/` below the folder are not looked for: files in folders of their own are what
`image_folder` reads.
"""

from pathlib import Path

from flaxcls.data.dataset import Dataset, unknown_class
from flaxcls.data.paths import compile_pattern, existing_folder
from flaxcls.data.sources.image_folder import file_splits, is_folder, is_image, listing, visible
from flaxcls.errors import InputError


def read(
    path: str | Path,
    label_pattern: str,
    classes: tuple[str, ...] = (),
    on_bad: str = "error",
    known_classes: tuple[str, ...] = (),
    threads: int = 0,
) -> Dataset:
    """Return all images of a folder as one split, `train`, as file references.

    label_pattern: a regular expression that matches whole file names; its first group is the class.
    classes: only these, numbered in this order; all, sorted, where empty.
    on_bad: what to do with files that are no images: `error`, or `skip` and list them.
    known_classes: the classes of a trained model, where the folder is only evaluated.
    Raises InputError, naming the folder or the files.
    """
    root, class_names, pairs, notes = find(path, label_pattern, classes, known_classes)
    splits, faults = file_splits(root, {"train": pairs}, on_bad, threads)
    if faults and on_bad == "error":
        raise InputError(listing(root, faults, len(pairs)))
    return Dataset(
        root.resolve().name, class_names, splits, skipped=tuple(sorted(faults)), notes=notes
    )


def find(
    path: str | Path,
    label_pattern: str,
    classes: tuple[str, ...] = (),
    known_classes: tuple[str, ...] = (),
) -> tuple[Path, tuple[str, ...], list[tuple[Path, int]], tuple[str, ...]]:
    """Return the folder, its classes, the (file, label) pairs and notes, with no file opened.

    Arguments and errors are those of `read`.
    """
    pattern = compile_pattern("data.label_pattern", label_pattern)
    if pattern.groups < 1:
        raise InputError(
            f"data.label_pattern: {label_pattern!r} has no group that is the class; put one in "
            r"brackets, as in '(.+)_\d+\.jpg'"
        )
    root = existing_folder(path, "images whose names tell their class")
    files = [Path(e.path) for e in visible(root) if not is_folder(e)]
    matches = {file: pattern.fullmatch(file.name) for file in files}
    named = {file: match[1] for file, match in matches.items() if match and match[1]}
    strange = [file for file in files if is_image(file.name) and file not in named]
    if strange:
        raise InputError(
            f"data.label_pattern: {label_pattern!r} does not match '{strange[0].name}' and "
            f"{len(strange) - 1} more of {len(files)} files in '{root}'; correct the pattern or "
            "remove the files"
        )
    if not named:
        raise InputError(
            f"data.path: no file in '{root}' ({len(files)} files) has a name that "
            f"{label_pattern!r} matches; correct the path or the pattern"
        )
    present = tuple(sorted(set(named.values())))
    class_names = known_classes or classes or present
    for name in classes:
        if name not in present:
            raise InputError(unknown_class(name, present, f"'{root}'"))
    for name in present:
        if known_classes and name not in known_classes:
            raise InputError(
                f"data.path: class '{name}' in '{root}' is not one of the {len(known_classes)} "
                "classes the model was trained on; remove or rename its files"
            )
    position = {name: i for i, name in enumerate(class_names)}
    pairs = [(file, position[name]) for file, name in named.items() if name in position]
    ignored = [file.name for file in files if file not in named]
    notes = (f"Not used: {len(ignored)} other files in '{root}'.",) if ignored else ()
    return root, class_names, pairs, notes
