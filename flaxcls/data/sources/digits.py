"""The handwritten digits that scikit-learn ships: 1,797 real 8x8 images, no download."""

import numpy as np
from sklearn.datasets import load_digits

from flaxcls.data.dataset import Dataset, Split


def read() -> Dataset:
    """Return the digits as one split `train`, uint8 (1797, 8, 8, 1); 0..16 become 0..255."""
    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int32)
    names = tuple(str(digit) for digit in range(10))
    return Dataset("digits", names, {"train": Split(images, labels)})
