"""Which examples train, validate and test: drawn by seed, stratified, the same for ever.

Order comes from the raw bits of PCG64, whose stream NumPy promises to keep, unlike the stream of
`Generator.permutation`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from flaxcls.data.dataset import SPLITS, Dataset, Split, named
from flaxcls.errors import InputError

MODES = ("auto", "own", "drawn")


def draw_order(n: int, seed: int, *purpose: str) -> np.ndarray:
    """Return a permutation of n, int64 (n,), that depends on nothing but the arguments."""
    digest = hashlib.blake2b(repr((int(seed), *purpose)).encode(), digest_size=16).digest()
    bits = np.random.PCG64(int.from_bytes(digest, "little")).random_raw(n)
    return np.argsort(bits, kind="stable")


def per_class_count(per_class: float, available: int) -> int:
    """Return how many of a class's examples `per_class` asks for.

    0 is all; below 1 a fraction, rounded, at least one; from 2 a number, at most what there is.
    Raises InputError for other values (1 might mean one or all).
    """
    if per_class < 0 or (per_class >= 1 and (per_class == 1 or per_class != int(per_class))):
        raise InputError(
            f"data.per_class must be 0 (all), a fraction below 1 or a whole number from 2, "
            f"not {per_class}"
        )
    if per_class == 0:
        return available
    if per_class < 1:
        return min(available, max(1, int(per_class * available + 0.5 + 1e-9)))
    return min(available, int(per_class))


def draw_classes(names: Sequence[str], count: int, seed: int) -> tuple[str, ...]:
    """Return `count` of the names, drawn with the seed, in sorted order.

    Raises InputError where there are fewer than count.
    """
    if not 2 <= count <= len(names):
        raise InputError(
            f"data.num_classes_drawn is {count}, but from 2 to {len(names)} classes can be drawn"
        )
    ordered = sorted(names)
    return tuple(sorted(ordered[i] for i in draw_order(len(ordered), seed, "classes")[:count]))


def take_per_class(split: Split, per_class: float, seed: int, key: str, purpose: str) -> Split:
    """Return the split with each class reduced to `per_class` (see `per_class_count`) by lot.

    Drawing fewer gives a part of what drawing more gives. `key` names the records of an array.
    """
    classes = int(split.labels.max(initial=0)) + 1
    members = _by_class(draw_order(len(split), seed, purpose), split.labels, classes)
    indices = np.sort(np.concatenate([m[: per_class_count(per_class, len(m))] for m in members]))
    return split if len(indices) == len(split) else named(split, key).take(indices)


def split_dataset(
    dataset: Dataset,
    *,
    val_fraction: float = 0.0,
    test_fraction: float = 0.0,
    mode: str = "auto",
    stratify: bool = True,
    max_per_class: int = 0,
    seed: int = 0,
) -> Dataset:
    """Return the data set with the splits that an experiment uses.

    mode: `auto` keeps the source's own splits and draws a missing `val` or `test` from `train`;
        `own` draws nothing; `drawn` puts all examples together and draws anew.
    val_fraction, test_fraction: of all the examples drawn from (70/10/20 is 0.1 and 0.2), rounded
        to whole examples; ignored for a split that is not drawn.
    stratify: every class gives its share, rounded by largest remainder so that the total is right.
    max_per_class: examples a class in the pool (`train`, or everything when `drawn`), by lot,
        before anything is drawn from it; 0 for no limit.
    Raises InputError for impossible fractions and where a class would have no training example.
    """
    _check(dataset, val_fraction, test_fraction, mode, max_per_class)
    splits = {"train": merged(dataset)} if mode == "drawn" else dict(dataset.splits)
    pool = splits["train"]
    if max_per_class:
        pool = take_per_class(pool, max_per_class, seed, "train", "maximum")
    fractions = {"test": test_fraction, "val": val_fraction}
    drawn = {k: f for k, f in fractions.items() if f and mode != "own" and k not in splits}
    parts = _draw(dataset, pool, drawn, stratify, seed) if drawn else {"train": pool}
    _check_all_train(dataset, parts["train"], pool)
    splits |= parts
    return replace(dataset, splits={key: splits[key] for key in SPLITS if key in splits})


def _check(
    dataset: Dataset, val_fraction: float, test_fraction: float, mode: str, max_per_class: int
) -> None:
    if mode not in MODES:
        raise InputError(f"data.split_mode must be one of {', '.join(MODES)}, not '{mode}'")
    for name, value in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0 <= value < 1:
            raise InputError(f"data.{name} must be at least 0 and below 1, not {value}")
    if val_fraction + test_fraction >= 1:
        raise InputError(
            f"data.val_fraction and data.test_fraction are {val_fraction} and {test_fraction}, "
            "which leaves nothing to train on; make them smaller"
        )
    if max_per_class < 0 or max_per_class == 1:
        raise InputError(
            f"data.max_per_class must be 0 (no limit) or at least 2, not {max_per_class}"
        )
    if mode != "drawn" and "train" not in dataset.splits:
        raise InputError(
            f"{dataset.name} has no split 'train', only {', '.join(dataset.splits)}; "
            "set data.split_mode=drawn to draw one"
        )


def _draw(
    dataset: Dataset, pool: Split, fractions: dict[str, float], stratify: bool, seed: int
) -> dict[str, Split]:
    """Draw the named splits from the pool; what is left is `train`."""
    n = len(pool)
    totals = {key: int(fraction * n + 0.5 + 1e-9) for key, fraction in fractions.items()}
    for key, total in totals.items():
        if total == 0:
            raise InputError(
                f"data.{key}_fraction={fractions[key]} of {n} examples is none; make it larger or 0"
            )
    order = draw_order(n, seed, "split")
    counts = np.bincount(pool.labels, minlength=len(dataset.class_names))
    taken = np.zeros(n, bool)
    drawn: dict[str, np.ndarray] = {}
    left = counts.copy()
    for key, total in totals.items():
        free = order[~taken[order]]
        if stratify:
            quotas = _quotas(counts, fractions[key], total, left - 1)
            if quotas is None:
                smallest = int(np.argmin(np.where(counts > 0, counts, n + 1)))
                raise InputError(
                    f"data.{key}_fraction={fractions[key]}: {total} examples cannot be taken while "
                    f"every class keeps one for training (class '{dataset.class_names[smallest]}' "
                    f"has {counts[smallest]}); lower the fractions or add images"
                )
            left -= quotas
            members = _by_class(free, pool.labels, len(counts))
            chosen = np.concatenate([m[:q] for m, q in zip(members, quotas, strict=True)])
        else:
            chosen = free[:total]
        taken[chosen] = True
        drawn[key] = np.sort(chosen)
    pool = named(pool, "train")
    return {"train": pool.take(np.flatnonzero(~taken))} | {
        key: pool.take(chosen) for key, chosen in drawn.items()
    }


def _by_class(order: np.ndarray, labels: np.ndarray, classes: int) -> list[np.ndarray]:
    """Return, for each class, its positions in the sequence they have in `order`."""
    grouped = order[np.argsort(labels[order], kind="stable")]
    ends = np.cumsum(np.bincount(labels[order], minlength=classes))
    return np.split(grouped, ends[:-1])


def _quotas(
    counts: np.ndarray, fraction: float, total: int, limits: np.ndarray
) -> np.ndarray | None:
    """Share `total` by largest remainder, ties to the first class; None if limits forbid."""
    limits = np.maximum(limits, 0)
    exact = counts * fraction
    # The small term keeps 0.1 * 30 at 3 although 0.1 is not a binary fraction.
    quotas = np.minimum(np.floor(exact + 1e-9).astype(np.int64), limits)
    if limits.sum() < total:
        return None
    missing = total - int(quotas.sum())
    while missing > 0:  # More than one round only where limits hold classes back.
        free = np.flatnonzero(quotas < limits)
        first = free[np.argsort((quotas - exact)[free], kind="stable")][:missing]
        quotas[first] += 1
        missing -= len(first)
    return quotas


def _check_all_train(dataset: Dataset, train: Split, pool: Split) -> None:
    counts = np.bincount(train.labels, minlength=len(dataset.class_names))
    missing = np.flatnonzero(counts == 0)
    if missing.size:
        remedy = (
            "set data.stratify=True or add images"
            if (pool.labels == missing[0]).any()
            else "add some, remove the class, or number labels from 0 without gaps"
        )
        raise InputError(
            f"{dataset.name}: class '{dataset.class_names[missing[0]]}' has no training examples; "
            f"{remedy}"
        )


def merged(dataset: Dataset) -> Split:
    """Return all examples as one split, in the order train, val, test."""
    parts = [named(dataset.splits[key], key) for key in SPLITS if key in dataset.splits]
    if len(parts) == 1:
        return parts[0]
    arrays = [p.images for p in parts if isinstance(p.images, np.ndarray)]
    images: np.ndarray | tuple[str, ...] = (
        np.concatenate(arrays) if arrays else tuple(path for p in parts for path in p.images)
    )
    parents = [p.parents for p in parts if p.parents is not None]
    aspects = [p.aspect for p in parts if p.aspect is not None]
    return Split(
        images,
        np.concatenate([p.labels for p in parts]),
        np.concatenate(parents) if parents else None,
        tuple(name for p in parts for name in p.names or ()),
        np.concatenate(aspects) if aspects else None,
    )
