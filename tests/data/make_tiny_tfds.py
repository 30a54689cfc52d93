"""Makes tiny_tfds.zip, the two prepared TFDS data sets that tests/test_data_sources.py reads.

    python tests/data/make_tiny_tfds.py

Needs no TensorFlow: images are given as encoded bytes. It is an archive because array_record fills
every file up to 128 KB.

- `tiny_shapes`: discs and squares, PNG and JPEG of 20x12 to 23x15 pixels, and a mask that is not
  the image; splits train (8), validation (4), test (4, labels never published: -1), extra (2).
- `tiny_marks/bars`: 8x8 grey bars, a config, splits train (6) and test (3), versions 1.0.0 and
  1.10.0.
"""

import io
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, ImageDraw


def encoded(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def shape(number: int) -> Image.Image:
    image = Image.new("RGB", (20 + number % 4, 12 + number % 4), (20 * (number % 5), 0, 40))
    draw = ImageDraw.Draw(image)
    (draw.ellipse if number % 2 == 0 else draw.rectangle)((4, 2, 12, 10), (250, 200, 30))
    return image


class TinyShapes(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description="Discs and squares.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "mask": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=["disc", "square"]),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, manager):
        ranges = {"train": (0, 8), "validation": (8, 12), "test": (12, 16), "extra": (16, 18)}
        return {key: self._generate_examples(key, *ends) for key, ends in ranges.items()}

    def _generate_examples(self, split, start, stop):
        for number in range(start, stop):
            image = shape(number)
            yield (
                number,
                {
                    "image": encoded(image, "jpeg" if number % 3 == 0 else "png"),
                    "mask": encoded(image.convert("L"), "png"),
                    "label": -1 if split == "test" else number % 2,
                },
            )


class TinyMarks(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.10.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="bars", description="Bars.")]  # noqa: RUF012

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description="Bars.",
            features=tfds.features.FeaturesDict(
                {
                    "picture": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "kind": tfds.features.ClassLabel(names=["lying", "sloping", "standing"]),
                }
            ),
        )

    def _split_generators(self, manager):
        return {"train": self._generate_examples(0, 6), "test": self._generate_examples(6, 9)}

    def _generate_examples(self, start, stop):
        for number in range(start, stop):
            pixels = np.zeros((8, 8), np.uint8)
            place = number // 3 + (3 if self.version == "1.10.0" else 0)
            bars = [(place, slice(None)), (range(8), range(8)), (slice(None), place)]
            pixels[bars[number % 3]] = 255
            yield (
                number,
                {"picture": encoded(Image.fromarray(pixels), "png"), "kind": number % 3},
            )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        options = {"data_dir": folder, "file_format": "array_record"}
        TinyShapes(**options).download_and_prepare()
        for version in ("1.0.0", "1.10.0"):
            TinyMarks.VERSION = tfds.core.Version(version)
            TinyMarks(config="bars", **options).download_and_prepare()
        archive = Path(__file__).with_name("tiny_tfds.zip")
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as packed:
            for file in sorted(Path(folder).rglob("*")):
                if file.is_file():
                    packed.write(file, file.relative_to(folder))


if __name__ == "__main__":
    main()
