"""TensorFlow Datasets that were prepared before, read without TensorFlow (array_record files)."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from flaxcls.data.dataset import Dataset, Split
from flaxcls.data.decode import ImageSpec, UnreadableImage, decode, in_threads
from flaxcls.errors import InputError

_SPLITS = {"train": "train", "validation": "val", "val": "val", "valid": "val", "test": "test"}
_CHUNK = 1024


def read(path: str | Path, name: str, spec: ImageSpec | None = None, threads: int = 0) -> Dataset:
    """Return the splits train, validation and test as arrays in memory, uint8 (N, S, S, C).

    path: the folder given as `data_dir` when preparing; empty for TFDS's own (`TFDS_DATA_DIR` or
        `~/tensorflow_datasets`).
    name: `NAME`, `NAME/CONFIG`, `NAME:VERSION` or `NAME/CONFIG:VERSION`; the newest version on disk
        where none is given.
    spec: square images of one declared size that are not larger than its size and not cropped keep
        their size; others are decoded with it.
    Raises InputError: not prepared, prepared in another format, no image or label, too large.
    """
    root = _root(path)
    full_name = _prepared(root, name)
    try:
        sources = tfds.data_source(full_name, data_dir=str(root), download=False)
    except NotImplementedError as error:
        raise InputError(
            f"data.name: '{full_name}' in '{root}' is not prepared as array_record; prepare it in "
            f"another folder: {_how(name, 'OTHER')}"
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"data.name: '{full_name}' in '{root}' cannot be opened ({first}); prepare it again: "
            f"{_how(name, root)}"
        ) from error
    info = next(iter(sources.values())).dataset_info
    image_key, label_key = _keys(info, full_name)
    spec = _stored(info.features[image_key], spec, full_name)
    used = {key: str(split) for split in sources if (key := _SPLITS.get(str(split)))}
    if not used:
        raise InputError(
            f"data.name: '{full_name}' has the splits {', '.join(map(str, sources))}, none of "
            "which is train, validation or test; choose another data set"
        )
    _check_memory(sum(len(sources[split]) for split in used.values()), spec, full_name)
    decoders = {
        key: tfds.decode.SkipDecoding()
        for key, feature in info.features.items()
        if isinstance(feature, tfds.features.Image)
    }
    encoded = tfds.data_source(
        full_name, data_dir=str(root), download=False, decoders=decoders, split=used
    )
    splits = {
        key: _split(source, image_key, label_key, spec, f"{full_name} {used[key]}", threads)
        for key, source in encoded.items()
    }
    # TFDS marks the examples of a test split whose labels were never published with -1.
    splits = {k: s for k, s in splits.items() if not (s.labels == -1).all()}
    others = sorted(str(s) for s in sources if str(s) not in {used[key] for key in splits})
    notes = (f"Not used: the splits {', '.join(others)} of '{full_name}'.",) if others else ()
    names = tuple(info.features[label_key].names)
    return Dataset(full_name, names, splits, notes=notes)


def _root(path: str | Path) -> Path:
    root = Path(path or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()
    if path and not root.is_dir():
        raise InputError(
            f"data.path: '{path}' is not a folder; set it to the data_dir of TensorFlow Datasets"
        )
    return root


def _prepared(root: Path, name: str) -> str:
    """Return NAME[/CONFIG]:VERSION of what lies on disk, so that TFDS needs no builder's code."""
    match = re.fullmatch(r"(\w+)(?:/([\w.+-]+))?(?::(\d+\.\d+\.\d+))?", name)
    if not match:
        raise InputError(
            f"data.name: '{name}' is no TFDS name; write NAME, NAME/CONFIG or NAME/CONFIG:VERSION"
        )
    base, config, version = match.groups()
    folder = root / base / (config or "")
    found = [p.parent for p in folder.glob(f"{version or '*.*.*'}/dataset_info.json")]
    if found:
        newest = max(found, key=lambda p: [int(n) for n in p.name.split(".") if n.isdigit()])
        return f"{base}/{config}:{newest.name}" if config else f"{base}:{newest.name}"
    configs = sorted({p.parent.parent.name for p in folder.glob("*/*.*.*/dataset_info.json")})
    if configs and not config:
        raise InputError(
            f"data.name: '{name}' is prepared with a config; write {base}/{configs[0]}"
            + (f" or another of {', '.join(configs)}" if len(configs) > 1 else "")
        )
    raise InputError(
        f"data.name: the TFDS data set '{name}' is not prepared in '{root}'; prepare it once: "
        f"{_how(name, root)}"
    )


def _how(name: str, root: Path | str) -> str:
    code = (
        f"import tensorflow_datasets as tfds; tfds.builder({json.dumps(name)}, "
        f"data_dir={json.dumps(str(root))}, file_format={json.dumps('array_record')})"
        ".download_and_prepare()"
    )
    return f"pip install 'flaxcls[tfds]' && python -c '{code}'"


def _keys(info: Any, name: str) -> tuple[str, str]:
    """Return the keys of the one image and the one class label, by supervised_keys if need be."""
    kinds = {"image": tfds.features.Image, "class label": tfds.features.ClassLabel}
    supervised = [key for key in info.supervised_keys or () if isinstance(key, str)]
    chosen = []
    for kind, feature_type in kinds.items():
        every = [key for key, feature in info.features.items() if type(feature) is feature_type]
        keys = [key for key in every if key in supervised] or every
        if len(keys) != 1:
            raise InputError(
                f"data.name: '{name}' has {len(keys)} features that are a {kind} "
                f"({', '.join(keys) or 'none'}), where one is needed; choose another data set"
            )
        chosen.append(keys[0])
    return chosen[0], chosen[1]


def _stored(feature: Any, spec: ImageSpec | None, name: str) -> ImageSpec:
    """Return how images are decoded: at their own size where the compiled step can enlarge them."""
    if np.dtype(feature.np_dtype).kind == "f":
        raise InputError(
            f"data.name: the images of '{name}' are floating-point; choose another data set"
        )
    height, width, depth = feature.shape
    channels = 1 if depth == 1 or (spec and spec.channels == 1) else 3
    cropped = spec is not None and spec.crop_fraction < 1
    if height and height == width and not cropped and (spec is None or height <= spec.size):
        return ImageSpec(height, channels)
    if spec is None:
        raise InputError(
            f"data.image_size is not set but the images of '{name}' are not of one size"
        )
    return ImageSpec(spec.size, channels, spec.resize, spec.crop_fraction, spec.crop_order)


def _check_memory(n: int, spec: ImageSpec, name: str) -> None:
    needed = n * spec.size**2 * spec.channels
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > available:
        raise InputError(
            f"data.name: '{name}' needs {needed / 1e9:.0f} GB at {spec.size} px, more than the "
            f"{available / 1e9:.0f} GB of this machine; lower data.image_size, or write its "
            "images to class folders and use the source image_folder"
        )


def _split(
    source: Any, image_key: str, label_key: str, spec: ImageSpec, where: str, threads: int
) -> Split:
    images = np.empty((len(source), spec.size, spec.size, spec.channels), np.uint8)
    labels = np.empty(len(source), np.int32)

    def put(item: tuple[int, dict[str, Any]]) -> None:
        index, example = item
        labels[index] = example[label_key]
        try:
            images[index] = decode(example[image_key], spec)
        except UnreadableImage as error:
            raise UnreadableImage(f"{where}, example {index}: {error}") from error

    for start in range(0, len(source), _CHUNK):
        rows = list(range(start, min(start + _CHUNK, len(source))))
        in_threads(put, zip(rows, source.__getitems__(rows), strict=True), threads)
    return Split(images, labels)
