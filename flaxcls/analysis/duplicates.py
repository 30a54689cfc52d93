"""Images that are the same, and images that look the same, among many.

Two images are exact duplicates where their sizes and all decoded pixels are equal: the same photo
under two names, as PNG and as BMP, or with other metadata.

They are near duplicates where (a) their fingerprints, 64 bits of perceptual hash (pHash: Zauner,
Implementation and Benchmarking of Perceptual Image Hash Functions, 2010, section 3.2.1), differ in
at most 8 bits, and (b) their 16x16 averages, in grey, correlate at 0.98 or more. Of 20,000 images
of Fashion-MNIST the hash alone pairs 244,520, a fifth of them with different labels; 3,615 of these
correlate. Of copies of 207 photographs that were saved as JPEG of quality 30, made a quarter as
large, darkened by 30 %, blurred (1 px) or given noise (8 levels) all are found; brightened by 30 %,
so that white clips, 59 %; without 1 % at each edge, 92 %; without 3 %, 6 %. Mirrored or turned
copies are not looked for.

All pairs within 8 bits are found without comparing all: cut in four, the 64 bits of such a pair
agree up to 2 bits in at least one of the 16-bit quarters (multi-index hashing: Norouzi, Punjani and
Fleet, Fast Search in Hamming Space with Multi-Index Hashing, 2012, section 3).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

FINGERPRINT_SIDE = 32
MOST_BITS = 8
LEAST_CORRELATION = 0.98
# Beyond as many pairs the search stops: frames of one film are all alike.
MOST_PAIRS = 1_000_000

_QUARTERS = 4
# Bits in which one quarter may differ: 8 bits over four quarters leave 2 in one of them.
_MASKS = tuple(
    sum(1 << bit for bit in bits)
    for count in range(MOST_BITS // _QUARTERS + 1)
    for bits in itertools.combinations(range(16), count)
)
# Pairs that are compared at once: 24 MB of positions and bits.
_AT_ONCE = 1 << 20
_PIECE = 1 << 11


def fingerprints(images: np.ndarray) -> np.ndarray:
    """Returns the perceptual hashes uint64 (N,) of grey images uint8 (N, 32, 32).

    The bits say which of the 8x8 lowest frequencies of the cosine transform, row after row from the
    highest bit, lie above their median.
    """
    place = np.arange(FINGERPRINT_SIDE)
    waves = np.cos(np.pi * np.arange(8)[:, None] * (2 * place + 1) / (2 * FINGERPRINT_SIDE))
    frequencies = (waves @ images.astype(np.float64) @ waves.T).reshape(-1, 64)
    bits = frequencies > np.median(frequencies, axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(">u8")[:, 0].astype(np.uint64)


def equal_groups(values: np.ndarray) -> list[np.ndarray]:
    """Returns the positions, ascending, of each value of (N,) that occurs more than once."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    repeated = np.flatnonzero(counts[inverse] > 1)
    order = repeated[np.argsort(inverse[repeated], kind="stable")]
    ends = np.flatnonzero(np.diff(inverse[order])) + 1
    groups = np.split(order, ends) if order.size else []
    return sorted(groups, key=lambda group: int(group[0]))


@dataclass(frozen=True, eq=False)
class NearPairs:
    """Pairs of images that look the same, the most alike first.

    Attributes:
      first: int64 (P,), positions, less than those of `second`.
      second: int64 (P,).
      correlation: float32 (P,).
      complete: whether these are all of them.
    """

    first: np.ndarray
    second: np.ndarray
    correlation: np.ndarray
    complete: bool

    def __len__(self) -> int:
        return len(self.first)


def near_pairs(hashes: np.ndarray, views: np.ndarray, most: int = MOST_PAIRS) -> NearPairs:
    """Returns the pairs within MOST_BITS that correlate at LEAST_CORRELATION or more.

    Args:
      hashes: uint64 (N,), fingerprints.
      views: uint8 (N, M), what is correlated, of the same images.
      most: pairs after which the search stops.
    """
    means = views.mean(axis=1, dtype=np.float32)
    deviations = np.maximum(views.std(axis=1, dtype=np.float32), 1e-6)
    kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    count, complete = 0, True
    for first, second in _pieces(_near_hashes(hashes)):
        products = np.einsum(
            "nm,nm->n", views[first].astype(np.float32), views[second].astype(np.float32)
        )
        covariances = products / views.shape[1] - means[first] * means[second]
        correlations = covariances / (deviations[first] * deviations[second])
        alike = correlations >= LEAST_CORRELATION
        kept.append((first[alike], second[alike], correlations[alike]))
        count += int(alike.sum())
        if count >= most:
            complete = False
            break
    if not kept:
        none = np.zeros(0, np.int64)
        return NearPairs(none, none, np.zeros(0, np.float32), True)
    first, second, correlations = (np.concatenate(part) for part in zip(*kept, strict=True))
    order = np.lexsort((second, first, -correlations))[:most]
    return NearPairs(first[order], second[order], correlations[order], complete)


def _pieces(
    pairs: Iterator[tuple[np.ndarray, np.ndarray]],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the pairs in pieces whose images fit in a cache: a million pairs are 2 GB."""
    for first, second in pairs:
        for start in range(0, len(first), _PIECE):
            yield first[start : start + _PIECE], second[start : start + _PIECE]


def _near_hashes(hashes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the positions (first < second) of all pairs within MOST_BITS, each once."""
    quarters = [
        (hashes >> np.uint64(16 * q)).astype(np.uint16).astype(np.int64) for q in range(_QUARTERS)
    ]
    for q, keys in enumerate(quarters):
        order = np.argsort(keys, kind="stable")
        counts = np.bincount(keys, minlength=1 << 16)
        starts = np.cumsum(counts) - counts
        used = np.flatnonzero(counts)
        for mask in _MASKS:
            partners = used ^ mask
            joined = (counts[partners] > 0) & (used <= partners)
            for left, right in _joins(order, starts, counts, used[joined], partners[joined]):
                apart = np.bitwise_count(hashes[left] ^ hashes[right])
                found = apart <= MOST_BITS
                if not mask:
                    found &= left < right
                left, right = left[found], right[found]
                # The pair was found before where an earlier quarter is as near.
                for earlier in quarters[:q]:
                    new = np.bitwise_count(earlier[left] ^ earlier[right]) > MOST_BITS // _QUARTERS
                    left, right = left[new], right[new]
                if left.size:
                    yield np.minimum(left, right), np.maximum(left, right)


def _joins(
    order: np.ndarray,
    starts: np.ndarray,
    counts: np.ndarray,
    keys: np.ndarray,
    partners: np.ndarray,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields every pair of a position with one of `keys` and one with its partner, in pieces."""
    # One row for each position on the left, as long as its partner's bucket.
    lengths = np.repeat(counts[partners], counts[keys])
    if not lengths.size:
        return
    left = order[_ranges(starts[keys], counts[keys])]
    begins = np.repeat(starts[partners], counts[keys])
    ends = np.cumsum(lengths)
    row = 0
    while row < len(lengths):
        done = ends[row] - lengths[row]
        last = max(row + 1, int(np.searchsorted(ends, done + _AT_ONCE, side="right")))
        rows = slice(row, last)
        yield np.repeat(left[rows], lengths[rows]), order[_ranges(begins[rows], lengths[rows])]
        row = last


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns start, start + 1, ... of each length, one range after the other."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths)
