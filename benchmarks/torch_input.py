"""The peers of input_pipeline.py that need torch: its DataLoader over files and over arrays.

python torch_input.py files WORKERS DIR
python torch_input.py arrays
python torch_input.py about              # prints what it reads files with
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import turns
from input_task import ARRAY_BATCH, ARRAYS, FILE_BATCH, MEAN, SIZE, STD
from PIL import Image

try:
    import torch
except ImportError:  # the others take their turns without it
    sys.exit()
try:
    from torchvision import datasets, transforms
except (ImportError, RuntimeError):  # RuntimeError: built for another torch
    datasets = None


class PillowFolder:
    """An ImageFolder with torchvision's augmentation, for where it is missing.

    Its transforms do exactly this to a PIL image, with these draws of torch's generator.
    """

    def __init__(self, folder: str):
        classes = sorted(path for path in Path(folder).iterdir() if path.is_dir())
        self.files = [(str(f), i) for i, c in enumerate(classes) for f in sorted(c.iterdir())]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, position: int) -> tuple[Any, int]:
        path, label = self.files[position]
        with open(path, "rb") as file:
            image = Image.open(file).convert("RGB")
        left, top, width, height = _box(*image.size)
        image = image.crop((left, top, left + width, top + height))
        image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        if torch.rand(1) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image, np.uint8, copy=True)).permute((2, 0, 1))
        pixels = pixels.contiguous().to(torch.float32).div(255)
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (MEAN, STD))
        return pixels.sub_(mean).div_(std), label


def _box(width: int, height: int) -> tuple[int, int, int, int]:
    """RandomResizedCrop's, which falls back to the centre after ten tries."""
    log_ratio = torch.log(torch.tensor((3 / 4, 4 / 3))).tolist()
    for _ in range(10):
        area = width * height * torch.empty(1).uniform_(0.08, 1.0).item()
        ratio = torch.exp(torch.empty(1).uniform_(*log_ratio)).item()
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(0, height - h + 1, (1,)).item())
            return int(torch.randint(0, width - w + 1, (1,)).item()), top, w, h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (width - w) // 2, (height - h) // 2, w, h


def files(workers: int, folder: str) -> Iterator[int]:
    dataset: Any = PillowFolder(folder)
    if datasets is not None:
        steps = [
            transforms.RandomResizedCrop(SIZE),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
        dataset = datasets.ImageFolder(folder, transforms.Compose(steps))
    batches = torch.utils.data.DataLoader(
        dataset,
        FILE_BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=True,  # else they start anew each epoch
    )
    while True:
        for images, _ in batches:
            yield len(images)


def arrays() -> Iterator[int]:
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, ARRAYS, np.uint8))
    dataset = torch.utils.data.TensorDataset(images, torch.zeros(len(images), dtype=torch.int32))
    batches = torch.utils.data.DataLoader(dataset, ARRAY_BATCH, shuffle=True, drop_last=True)
    while True:
        for batch, _ in batches:
            yield len(batch)


if __name__ == "__main__":
    if sys.argv[1] == "about":
        print("Pillow" if datasets is None else "torchvision")
    elif sys.argv[1] == "files":
        count = int(sys.argv[2])
        turns.serve(files(count, sys.argv[3]), ahead=2 * count)
    else:
        turns.serve(arrays())
