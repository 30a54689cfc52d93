"""Every kind of image file comes out right, or is named in an error."""

import io
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flaxcls.data import decode as decode_module
from flaxcls.data.decode import (
    ImageSpec,
    UnreadableImage,
    check_images,
    decode,
    decode_all,
    resize_array,
)
from flaxcls.errors import InputError

CALTECH = Path(__file__).parents[1] / "../shared/data/caltech101_3"
ORANGE = (250, 120, 10)


def photo(height: int = 120, width: int = 160, seed: int = 0) -> Image.Image:
    """A smooth picture without symmetry, so that lossy formats keep it and every turn shows."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


def png_16_bit_colour(values: np.ndarray) -> bytes:
    """Pillow cannot write what it can read: a PNG of 16-bit RGB, values uint16 (H, W, 3)."""
    height, width, _ = values.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff_grey(
    values: np.ndarray, bits: int, sample_format: int = 1, black_is_zero: int = 1
) -> bytes:
    """An uncompressed TIFF of a type that Pillow reads but does not write; 12 bits are packed."""
    height, width = values.shape
    data = values.tobytes()
    if bits == 12:
        first, second = values.reshape(-1, 2).T.astype(np.uint16)
        data = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1)
        data = data.astype(np.uint8).tobytes()
    data += bytes(len(data) % 2)
    # Width, height, bits, uncompressed, photometric, offset, samples, rows, bytes, sample format.
    numbers = (256, 257, 258, 259, 262, 273, 277, 278, 279, 339)
    entries = (width, height, bits, 1, black_is_zero, 8, 1, height, len(data), sample_format)
    folder = struct.pack("<H", len(numbers)) + b"".join(
        struct.pack("<HHII", number, 4, 1, value)
        for number, value in zip(numbers, entries, strict=True)
    )
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + folder + bytes(4)


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("jpeg", {"quality": 95}, 3),
        ("jpeg", {"quality": 95, "progressive": True}, 3),
        ("png", {}, 0),
        ("bmp", {}, 0),
        ("webp", {"lossless": True}, 0),
        ("webp", {"quality": 95}, 4),
        ("tiff", {}, 0),
        ("ppm", {}, 0),
    ],
)
def test_every_format_gives_the_picture(kind, options, tolerance):
    image = photo(64, 64)
    decoded = decode(encoded(image, kind, **options), ImageSpec(64))
    assert decoded.shape == (64, 64, 3)
    assert decoded.dtype == np.uint8
    assert difference(decoded, np.asarray(image)) <= tolerance


JPEGS = {
    "plain": {},
    "fine colours": {"subsampling": 0, "quality": 95},
    "progressive": {"progressive": True},
    "RGB inside": {"keep_rgb": True},
    "restart markers": {"restart_marker_blocks": 3},
    "comment": {"comment": b"some words"},
}


@pytest.fixture
def pillow_alone(monkeypatch):
    """A function that decodes as `decode` does where simplejpeg declines a file."""

    def alone(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(decode_module, "_read_jpeg", lambda *_: None)
            return decode(*arguments)

    return alone


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_jpeg_has_the_pixels_that_pillow_gives_it(kind, mode, channels, pillow_alone):
    if (mode, kind) == ("L", "RGB inside"):
        pytest.skip("grey has no RGB inside")
    for shape in ((120, 160), (121, 33), (900, 1203)):
        data = encoded(photo(*shape).convert(mode), "jpeg", **JPEGS[kind])
        for spec, box in (
            (ImageSpec(64, channels), None),
            (ImageSpec(64, channels, "pad"), None),
            (ImageSpec(64, channels), (0.1, 0.3, 0.4, 0.5)),
        ):
            assert (decode(data, spec, box) == pillow_alone(data, spec, box)).all()


def test_a_plain_jpeg_is_decoded_without_pillow(monkeypatch):
    monkeypatch.setattr(Image, "open", None)
    for options in JPEGS.values():
        assert decode(encoded(photo(), "jpeg", **options), ImageSpec(8)).shape == (8, 8, 3)


def test_a_damaged_jpeg_is_taken_or_refused_as_pillow_does_it(pillow_alone):
    chance, spec, refused = random.Random(0), ImageSpec(16), 0
    for case in range(120):
        data = bytearray(encoded(photo(), "jpeg", **list(JPEGS.values())[case % len(JPEGS)]))
        if case % 2:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        else:
            start = chance.randrange(len(data))
            del data[start : start + chance.choice([7, len(data)])]
        outcomes = []
        for function in (decode, pillow_alone):
            try:
                outcomes.append(function(bytes(data), spec).tolist())
            except UnreadableImage as error:
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1]
        refused += isinstance(outcomes[0], str)
    assert 20 < refused < 120


def test_resampling_is_pillows_bilinear_filter_to_a_level():
    rng = np.random.default_rng(0)
    for case in range(60):
        height, width = (int(side) for side in rng.integers(1, 300, 2))
        mode, shape = ("L", (height, width)) if case % 3 == 0 else ("RGB", (height, width, 3))
        image = Image.fromarray(rng.integers(0, 256, shape, np.uint8), mode)
        size = int(rng.integers(1, 200))
        h, w = rng.uniform(0.05, 1, 2)
        y, x = rng.uniform(0, 1, 2) * (1 - h, 1 - w)
        decoded = decode(
            encoded(image, "png"), ImageSpec(size, 1 if mode == "L" else 3), (y, x, h, w)
        )
        box = x * width, y * height, min(width, (x + w) * width), min(height, (y + h) * height)
        expected = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))
        assert np.abs(decoded.astype(int) - expected.reshape(decoded.shape)).max() <= 1


def test_without_the_fast_resampler_images_are_the_same_to_a_level(monkeypatch):
    data = encoded(photo(), "png")
    for spec in (ImageSpec(50), ImageSpec(50, 1), ImageSpec(200, resize="pad")):
        fast = decode(data, spec)
        with monkeypatch.context() as patch:
            patch.setattr(decode_module, "_resizer", None)
            plain = decode(data, spec)
        assert plain.shape == fast.shape
        assert np.abs(plain.astype(int) - fast).max() <= 1


def test_gif_gives_its_first_frame():
    frames = [Image.new("P", (20, 20), i) for i in (1, 2)]
    for frame in frames:
        frame.putpalette([0, 0, 0, *ORANGE, 0, 0, 255])
    data = encoded(frames[0], "gif", save_all=True, append_images=frames[1:])
    assert (decode(data, ImageSpec(8)) == ORANGE).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "RGB"])
def test_every_png_mode_gives_rgb_and_grey(mode):
    image = photo(32, 32).convert(mode)
    data = encoded(image, "png")
    for channels, target in ((3, "RGB"), (1, "L")):
        expected = np.asarray(image.convert("RGB").convert(target)).reshape(32, 32, channels)
        assert difference(decode(data, ImageSpec(32, channels)), expected) < 0.6


def test_alpha_is_laid_on_white_and_opaque_alpha_changes_nothing():
    image = photo(16, 16).convert("RGBA")
    opaque = decode(encoded(image, "png"), ImageSpec(16))
    assert (opaque == np.asarray(image.convert("RGB"))).all()
    image.putalpha(0)
    assert (decode(encoded(image, "png"), ImageSpec(16)) == 255).all()
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert (decode(encoded(half, "webp", lossless=True), ImageSpec(4)) == 127).all()


def test_transparent_palette_entry_is_white():
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, *ORANGE])
    image.paste(0, (0, 0, 4, 8))
    for kind in ("gif", "png"):
        decoded = decode(encoded(image, kind, transparency=0), ImageSpec(8))
        assert (decoded[:, :4] == 255).all()
        assert (decoded[:, 4:] == ORANGE).all()


def test_cmyk_jpeg_gives_its_colours():
    image = Image.new("CMYK", (16, 16), (0, 130, 245, 5))
    decoded = decode(encoded(image, "jpeg", quality=95), ImageSpec(8))
    assert (
        difference(decoded, np.broadcast_to(image.convert("RGB").getpixel((0, 0)), (8, 8, 3))) < 4
    )


def test_sixteen_bit_values_are_scaled_not_clipped():
    levels = np.array([[0, 255, 257, 32768], [40000, 50000, 60000, 65535]], np.uint16)
    expected = np.rint(levels / 257).astype(np.uint8)
    grey = Image.fromarray(np.repeat(levels, 2, 0))
    for kind in ("png", "tiff"):
        decoded = decode(encoded(grey, kind), ImageSpec(4, 1))[..., 0]
        assert (decoded[::2] == expected).all(), kind
    pgm = b"P5 4 2 65535\n" + levels.astype(">u2").tobytes()
    assert (decode(pgm, ImageSpec(4, 1), (0, 0, 1, 1))[[0, 3], :, 0] == expected).all()
    colour = np.repeat(np.repeat(levels, 2, 0)[..., None], 3, 2)
    decoded = decode(png_16_bit_colour(colour), ImageSpec(4))
    assert np.abs(decoded[::2].astype(int) - expected[..., None]).max() <= 1


def test_twelve_bit_values_fill_the_range():
    levels = np.array([[0, 1024], [2048, 4095]], np.uint16)
    decoded = decode(tiff_grey(levels, 12), ImageSpec(2, 1))[..., 0]
    assert decoded.tolist() == [[0, 64], [128, 255]]


def test_a_tiff_whose_white_is_zero_is_not_shown_as_its_negative():
    for dtype, bits, white in ((np.uint8, 8, 255), (np.uint16, 16, 65535)):
        values = np.array([[0, white]], dtype)
        decoded = decode(tiff_grey(values, bits, black_is_zero=0), ImageSpec(2, 1))
        assert decoded[0, :, 0].tolist() == [255, 0]


@pytest.mark.parametrize(
    ("dtype", "words"),
    [("<i4", "signed 32-bit"), ("<u4", "32-bit"), ("<i2", "signed 16-bit")],
)
def test_integers_without_a_known_white_are_refused_not_darkened(dtype, words, tmp_path):
    kind = np.dtype(dtype)
    sample_format = 2 if kind.kind == "i" else 1
    file = tmp_path / "a.tif"
    file.write_bytes(
        tiff_grey(np.arange(256).reshape(16, 16).astype(kind), 8 * kind.itemsize, sample_format)
    )
    with pytest.raises(UnreadableImage, match=f"values are {words} integers.*save them as 8 or 16"):
        decode(file, ImageSpec(16, 1))
    assert list(check_images([str(file)], thorough=False)[1]) == [0]


def test_the_transparent_grey_is_white_with_8_and_16_bits():
    for dtype, transparent in ((np.uint8, 7), (np.uint16, 7000)):
        values = np.array([[0, transparent]], dtype)
        data = encoded(Image.fromarray(values), "png", transparency=transparent)
        for channels in (1, 3):
            decoded = decode(data, ImageSpec(2, channels))
            assert decoded[0, :, 0].tolist() == [0, 255]


def test_floating_point_pixels_are_refused():
    data = encoded(Image.new("F", (4, 4), 0.5), "tiff")
    with pytest.raises(UnreadableImage, match="floating-point"):
        decode(data, ImageSpec(4))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(orientation, tmp_path):
    upright = photo(48, 64)
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(turn[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("jpeg", "png", "webp", "tiff"):
        options = {"lossless": True} if kind == "webp" else {}
        file = tmp_path / f"a.{kind}"
        stored.save(file, kind, exif=exif, **options)
        for spec in (ImageSpec(32), ImageSpec(32, resize="crop"), ImageSpec(32, resize="pad")):
            expected = decode(encoded(upright, "png"), spec)
            assert difference(decode(file, spec), expected) < 4
        box = (0.5, 0.25, 0.5, 0.5)
        expected = np.asarray(upright.crop((16, 24, 48, 48)).resize((16, 16)))
        assert difference(decode(file, ImageSpec(16), box), expected) < 6
        aspect, faults = check_images([str(file)], thorough=False)
        assert aspect.tolist() == pytest.approx([64 / 48])
        assert not faults


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # pytest sets aside the module's own filter
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
@pytest.mark.parametrize(
    "exif",
    [
        b"II*\0\x08",
        b"MM\0\x2a\0\0\xff\xff garbage",
        b"MM\0\x2a\0\0\0\x08\0\x02\x01\x12\0\x03",
        b"garbage",
    ],
)
def test_broken_exif_changes_nothing_and_is_not_spoken_of(kind, exif, tmp_path):
    file = tmp_path / f"a.{kind}"
    options = {"lossless": True} if kind == "webp" else {}
    photo(40, 60).save(file, kind, exif=b"Exif\0\0" + exif if kind == "jpeg" else exif, **options)
    plain = decode(encoded(photo(40, 60), kind, **options), ImageSpec(16))
    assert (decode(file, ImageSpec(16)) == plain).all()
    aspect, faults = check_images([str(file)], thorough=False)
    assert aspect.tolist() == [1.5]
    assert not faults
    code = (
        "import sys; from flaxcls.data.decode import ImageSpec, decode\n"
        "decode(sys.argv[1], ImageSpec(8))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_orientation_that_does_not_exist_is_upright(tmp_path):
    for orientation in (0, 9, 65535):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for kind in ("jpeg", "png"):
            file = tmp_path / f"a.{kind}"
            photo(40, 60).save(file, kind, exif=exif)
            aspect, _ = check_images([str(file)], thorough=False)
            assert aspect.tolist() == [1.5]
            upright = decode(encoded(photo(40, 60), kind), ImageSpec(16, resize="pad"))
            assert (decode(file, ImageSpec(16, resize="pad")) == upright).all()


def test_squash_crop_and_pad_show_what_they_say():
    image = Image.new("RGB", (90, 30), ORANGE)
    image.paste((0, 0, 255), (0, 0, 30, 30))
    data = encoded(image, "png")
    squash, crop, pad = (decode(data, ImageSpec(30, resize=r)) for r in ("squash", "crop", "pad"))
    assert (squash[:, :9] == (0, 0, 255)).all()
    assert (squash[:, 11:] == ORANGE).all()
    assert (crop == ORANGE).all()
    assert not pad[:10].any()
    assert not pad[20:].any()
    assert (pad[10:20, 11:] == ORANGE).all()
    assert (pad[10:20, :9] == (0, 0, 255)).all()
    assert (decode(data, ImageSpec(30, 1, "pad"))[:10] == 0).all()


@pytest.mark.parametrize("shape", [(200, 300), (301, 200), (257, 257)])
def test_crop_after_resizing_is_resize_256_then_centre_224(shape):
    image = photo(*shape)
    spec = ImageSpec(224, resize="crop", crop_fraction=224 / 256)
    width, height = image.size
    scale = 256 / min(width, height)
    resized = image.resize((int(width * scale), int(height * scale)), Image.Resampling.BILINEAR)
    left, top = round((resized.width - 224) / 2), round((resized.height - 224) / 2)
    expected = np.asarray(resized.crop((left, top, left + 224, top + 224)))
    assert difference(decode(encoded(image, "png"), spec), expected) < 1.5


def test_order_of_crop_and_resize_matters_with_pad_only():
    data = encoded(photo(40, 80), "png")

    def orders(resize):
        return [decode(data, ImageSpec(40, 3, resize, 0.8, o)) for o in ("before", "after")]

    for resize in ("squash", "crop"):
        before, after = orders(resize)
        assert (before == after).all()
        assert (before != decode(data, ImageSpec(40, 3, resize))).any()
    before, after = orders("pad")
    assert [int(before.any((1, 2)).sum()), int(after.any((1, 2)).sum())] == [20, 25]


def test_box_is_that_part_of_the_image():
    image = photo(100, 200)
    decoded = decode(encoded(image, "png"), ImageSpec(50, crop_fraction=0.5), (0.2, 0.5, 0.5, 0.25))
    assert (decoded == np.asarray(image.crop((100, 20, 150, 70)))).all()


def test_large_jpeg_is_reduced_without_harm():
    image = photo(1500, 2000, seed=1)
    jpeg = encoded(image, "jpeg", quality=92)
    plain = encoded(Image.open(io.BytesIO(jpeg)).convert("RGB"), "png", compress_level=1)
    for spec, box in (
        (ImageSpec(64), None),
        (ImageSpec(100, resize="crop", crop_fraction=0.8), None),
        (ImageSpec(64, resize="pad"), None),
        (ImageSpec(64), (0.1, 0.6, 0.3, 0.2)),
    ):
        assert difference(decode(jpeg, spec, box), decode(plain, spec, box)) < 1


@pytest.mark.parametrize("kind", ["jpeg", "png", "gif", "webp", "bmp", "tiff"])
def test_truncated_file_is_named(kind, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (80, 80, 3), np.uint8)
    file = tmp_path / f"cut.{kind}"
    whole = encoded(Image.fromarray(noise), kind)
    for share in (0.5, 0.9):
        file.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(UnreadableImage, match=rf"cut\.{kind}' "):
            decode(file, ImageSpec(8))
        for thorough in (False, True):
            assert list(check_images([str(file)], thorough=thorough)[1]) == [0]
    file.write_bytes(whole)
    assert not check_images([str(file)], thorough=False)[1]


def test_truncated_jpeg_and_png_are_called_so(tmp_path):
    for kind in ("jpeg", "png"):
        data = encoded(photo(200, 200), kind)
        with pytest.raises(UnreadableImage, match="is truncated; replace or remove it"):
            decode(data[: len(data) // 2], ImageSpec(8))


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "is empty"), (b"no picture, just words", "is not an image"), (b"\xff\xd8\xff", "is")],
)
def test_file_that_is_no_image_is_named(content, words, tmp_path):
    file = tmp_path / "odd.jpg"
    file.write_bytes(content)
    with pytest.raises(UnreadableImage, match=rf"odd\.jpg' {words}"):
        decode(str(file), ImageSpec(8))
    assert check_images([str(file)], thorough=False)[1][0].startswith(words)


def test_missing_file_broken_link_and_folder_are_named(tmp_path):
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(UnreadableImage, match="does not exist"):
        decode(tmp_path / "none.png", ImageSpec(8))
    (tmp_path / "loop.png").symlink_to("loop.png")
    for link in ("link.png", "loop.png"):
        with pytest.raises(UnreadableImage, match=f"{link}' is a link that leads nowhere; replace"):
            decode(tmp_path / link, ImageSpec(8))
    with pytest.raises(UnreadableImage, match=r"cannot be read \(File name too long\)"):
        decode(tmp_path / ("n" * 300), ImageSpec(8))
    with pytest.raises(UnreadableImage, match="is a folder"):
        decode(tmp_path, ImageSpec(8))


def test_decompression_bomb_is_refused(monkeypatch):
    data = encoded(photo(50, 50), "png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableImage, match="too many pixels"):
        decode(data, ImageSpec(8))


def test_jpeg_with_bytes_after_its_end_is_fine(tmp_path):
    file = tmp_path / "a.jpg"
    file.write_bytes(encoded(photo(), "jpeg") + b"a trailer some cameras write")
    assert not check_images([str(file)], thorough=False)[1]
    assert decode(file, ImageSpec(8)).shape == (8, 8, 3)


def test_damage_inside_a_file_is_found_by_the_thorough_check(tmp_path):
    data = bytearray(encoded(photo(), "png"))
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "a.png").write_bytes(data)
    _, faults = check_images([str(tmp_path / "a.png")], thorough=True)
    assert list(faults) == [0]


def test_decode_all_keeps_order_for_any_number_of_threads(tmp_path):
    paths = []
    for i in range(12):
        photo(30 + i, 40, seed=i).save(tmp_path / f"{i}.png")
        paths.append(str(tmp_path / f"{i}.png"))
    spec = ImageSpec(16, resize="pad")
    expected = np.stack([decode(p, spec) for p in paths])
    for threads in (0, 1, 5):
        assert (decode_all(paths, spec, threads) == expected).all()


def test_decode_all_names_the_first_bad_file(tmp_path):
    paths = [str(tmp_path / f"{i}.png") for i in range(6)]
    for i, path in enumerate(paths):
        Path(path).write_bytes(b"junk" if i in (2, 4) else encoded(photo(8, 8), "png"))
    with pytest.raises(UnreadableImage, match=r"2\.png"):
        decode_all(paths, ImageSpec(8), threads=4)


def test_arrays_get_the_geometry_of_files():
    images = np.stack([np.asarray(photo(40, 60, seed=i)) for i in range(3)])
    for spec in (
        ImageSpec(32),
        ImageSpec(32, resize="crop", crop_fraction=0.8),
        ImageSpec(32, 3, "pad", 0.8, "before"),
        ImageSpec(32, 1, "pad"),
    ):
        files = np.stack([decode(encoded(Image.fromarray(i), "png"), spec) for i in images])
        assert (resize_array(images, spec) == files).all()


def test_small_square_arrays_stay_small():
    images = np.random.default_rng(0).integers(0, 256, (4, 28, 28, 1), np.uint8)
    assert resize_array(images, ImageSpec(32)) is images
    assert resize_array(images, ImageSpec(28, 1)) is images
    assert resize_array(images, ImageSpec(24)).shape == (4, 24, 24, 1)
    assert resize_array(images, ImageSpec(32, crop_fraction=0.8)).shape == (4, 32, 32, 1)
    assert resize_array(images[:, :20], ImageSpec(32)).shape == (4, 32, 32, 1)


def test_grey_of_arrays_is_pillows():
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    expected = np.stack([np.asarray(Image.fromarray(i).convert("L"))[..., None] for i in images])
    assert (resize_array(images, ImageSpec(16, 1)) == expected).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": 0}, "data.image_size"),
        ({"channels": 4}, "data.channels"),
        ({"resize": "stretch"}, "'squash', 'crop' or 'pad', not 'stretch'"),
        ({"crop_fraction": 0.0}, "crop_fraction"),
        ({"crop_fraction": 1.2}, "crop_fraction"),
        ({"crop_order": "first"}, "crop_order"),
    ],
)
def test_impossible_specs_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        ImageSpec(**{"size": 8, **options})


def test_real_photos():
    if not CALTECH.exists():
        pytest.skip(f"no {CALTECH}")
    paths = sorted(str(p) for p in (CALTECH / "schooner").iterdir())
    aspect, faults = check_images(paths, thorough=True)
    assert not faults
    assert ((aspect > 0.3) & (aspect < 4)).all()
    images = decode_all(paths, ImageSpec(64))
    assert images.shape == (63, 64, 64, 3)
    assert 60 < images.mean() < 220
