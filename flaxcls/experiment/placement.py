"""Where the images of a run live, and how their pixels are normalised."""

import dataclasses
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from flaxcls.augment import Augmentation
from flaxcls.batch import dataset_statistics
from flaxcls.data import loader
from flaxcls.data.dataset import Dataset, Split, fingerprint
from flaxcls.data.decode import RESAMPLER, ImageSpec, decode_all, resize_array
from flaxcls.memory import describe_bytes, free_memory
from flaxcls.models import model_options
from flaxcls.pretrained import IMAGENET, Normalization

# Random resized crops cut from images stored a little larger than training needs (256 for 224).
STORED_MARGIN = 8 / 7


@dataclasses.dataclass(frozen=True)
class Data:
    """A data set, ready to be read.

    Attributes:
      dataset: its splits as the source has them (files stay files).
      feeds: by split.
      placement: device, host or files.
      notes: sentences for the log.
      fingerprint: of the content, so that a resumed run notices other data.
    """

    dataset: Dataset
    feeds: dict[str, loader.Feed]
    placement: str
    notes: tuple[str, ...]
    fingerprint: str


def image_spec(config: ConfigDict) -> ImageSpec:
    """Returns how images come to their size, in training, evaluation and prediction alike."""
    d = config.data
    return ImageSpec(d.image_size, d.channels, d.resize, d.crop_fraction, d.crop_order)


def place(
    config: ConfigDict,
    dataset: Dataset,
    mesh: Mesh,
    augmentation: Augmentation,
    earlier: str | None = None,
) -> Data:
    """Chooses where the images live, and puts them there.

    `earlier` is the placement that the run had before, which an automatic choice keeps.
    """
    d, spec = config.data, image_spec(config)
    stored = dataclasses.replace(
        spec, size=round(spec.size * STORED_MARGIN), resize="squash", crop_fraction=1.0
    )
    crops = augmentation.random_resized_crop
    specs = {key: stored if key == "train" and crops else spec for key in dataset.splits}
    in_files = any(not isinstance(s.images, np.ndarray) for s in dataset.splits.values())
    device_bytes, host_bytes = free_memory()
    placement, note = loader.choose_placement(
        earlier or "auto" if d.placement == "auto" else d.placement,
        bytes_needed=sum(_stored_bytes(s, specs[k]) for k, s in dataset.splits.items()),
        device_bytes=device_bytes,
        host_bytes=host_bytes,
        in_files=in_files,
        crops_files=crops and in_files,
        describe=describe_bytes,
    )
    notes = [*dataset.notes, note]
    if crops and in_files and placement != "files":
        notes.append(
            f"data: random crops are cut from copies of {stored.size} pixels; data.placement=files "
            "cuts them from the images as they are"
        )
    feeds = {}
    for key, split in dataset.splits.items():
        if isinstance(split.images, np.ndarray):
            _, height, width, _ = split.images.shape
            aspect = np.full(len(split), width / height, np.float32)
            split = dataclasses.replace(split, aspect=aspect)
        if placement != "files":
            split = dataclasses.replace(split, images=stored_images(split, specs[key]))
        if "num_parents" in model_options(config.model.name) and split.parents is not None:
            labels = np.stack([split.labels, split.parents], axis=1)
            split = dataclasses.replace(split, labels=labels)
        feeds[key] = loader.create_feed(
            split, mesh, spec, placement=placement, workers=d.workers, prefetch=d.prefetch
        )
    return Data(dataset, feeds, placement, tuple(notes), fingerprint(dataset))


def with_resampler(data: Data, spec: ImageSpec, before: str) -> Data:
    """Adds a note to data that another resampler made from the same files `before`."""
    images = [split.images for split in data.dataset.splits.values()]
    if before == RESAMPLER or all(
        isinstance(one, np.ndarray) and one.shape[1] == one.shape[2] <= spec.size for one in images
    ):
        return data
    note = (
        f"data: {RESAMPLER} resizes the images here, and {before} did when the run began: up to a "
        "fourth of the pixels' values are one level beside what they were"
    )
    return dataclasses.replace(data, notes=(*data.notes, note))


def stored_images(split: Split, spec: ImageSpec) -> np.ndarray:
    """Returns the split's images, uint8 (N, S, S, C), S = spec.size or smaller."""
    if isinstance(split.images, np.ndarray):
        return resize_array(split.images, spec)
    return decode_all(split.images, spec)


def _stored_bytes(split: Split, spec: ImageSpec) -> int:
    if isinstance(split.images, np.ndarray) and split.images.shape[1] <= spec.size:
        return split.images.nbytes
    return len(split) * spec.size * spec.size * spec.channels


def normalization(
    config: ConfigDict, train: loader.Feed, published: Normalization | None = None
) -> Normalization:
    """Returns mean and standard deviation of pixels in [0, 1], never from validation or test.

    `published` is what imported weights expect, which an explicit `normalize` overrules.
    """
    name, channels = config.normalize.name, config.data.channels
    if name == "auto" and published is not None:
        return _for_channels(published, channels)
    if name == "values":
        return tuple(config.normalize.mean), tuple(config.normalize.std)
    if name == "imagenet":
        return _for_channels(IMAGENET, channels)
    if name == "none":
        return (0.0,), (1.0,)
    return dataset_statistics(_image_chunks(train))


def _for_channels(normalization: Normalization, channels: int) -> Normalization:
    """One number a channel; of grey images, the mean of three."""
    mean, std = normalization
    if channels == 1:
        return (float(np.mean(mean)),), (float(np.mean(std)),)
    return mean, std


def _image_chunks(feed: loader.Feed) -> Any:
    """Yields the split's images, uint8 (n, S, S, C), a few hundred at a time."""
    images = feed.split.images
    for start in range(0, len(images), 256):
        chunk = images[start : start + 256]
        yield chunk if isinstance(chunk, np.ndarray) else decode_all(chunk, feed.spec)
