import pickle
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from cka_probe.inputs import decode as room
from cka_probe.inputs.decode import ImageError, decode_image, from_item, from_pil

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
ORIENTATION = 0x0112
TURNS = {  # EXIF: what row 0 and column 0 of the stored array are in the upright image
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


def expected(array):
    """uint8 (h, w) or (h, w, 3) -> float32 (3, h, w), one pixel at a time."""
    array = np.stack([array] * 3, -1) if array.ndim == 2 else array
    out = torch.empty(3, *array.shape[:2])
    for y, row in enumerate(array):
        for x, pixel in enumerate(row):
            out[:, y, x] = torch.tensor([float(v) for v in pixel]) / 255
    return out


def check(tensor, array):
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    assert torch.equal(tensor, expected(array))


@pytest.mark.parametrize("name", ["x.png", "x.bmp", "x.tif", "x.TIFF", "x.webp", "no_ending"])
def test_lossless_files_give_their_pixels_over_255(tmp_path, name):
    kind = {"no_ending": "PNG", "x.webp": "WEBP"}.get(name)
    Image.fromarray(RGB).save(tmp_path / name, kind, **({"lossless": True} if kind else {}))
    check(decode_image(tmp_path / name, name), RGB)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "tif", "webp"])
def test_every_exif_orientation_is_undone_once(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"lossless": True} if kind == "webp" else {}
    Image.fromarray(RGB).save(tmp_path / f"x.{kind}", exif=exif, **options)
    check(decode_image(tmp_path / f"x.{kind}", "x"), np.ascontiguousarray(TURNS[orientation](RGB)))


def test_a_jpeg_of_orientation_6_lies_on_its_side_until_turned(tmp_path):
    half = np.zeros((16, 32, 3), np.uint8)
    half[:, :16] = 255  # stored: left half white; upright (90 degrees clockwise): top half white
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.fromarray(half).save(tmp_path / "x.jpg", exif=exif, quality=95)
    image = decode_image(tmp_path / "x.jpg", "x")
    assert image.shape == (3, 32, 16)
    assert image[:, :15].min() > 0.9
    assert image[:, 17:].max() < 0.1


@pytest.mark.parametrize("block", [b"MM\0*\0\0\0\x08\xff\xff\x01", b"XX no TIFF header", b""])
def test_a_broken_exif_block_does_not_cost_the_image(tmp_path, block):
    Image.fromarray(RGB).save(tmp_path / "x.jpg", exif=b"Exif\0\0" + block)
    assert decode_image(tmp_path / "x.jpg", "x").shape == (3, 5, 7)


def test_an_exif_parser_that_trips_does_not_cost_the_image(tmp_path, monkeypatch):
    def trip(image):
        raise SyntaxError("not a TIFF file")

    Image.fromarray(RGB).save(tmp_path / "x.png")
    monkeypatch.setattr(Image.Image, "getexif", trip)
    check(decode_image(tmp_path / "x.png", "x"), RGB)


def test_grey_stands_in_all_three_channels(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "x.png")
    check(decode_image(tmp_path / "x.png", "x"), GREY)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_dropped_not_blended(tmp_path, mode):
    colour = RGB if mode == "RGBA" else GREY
    image = Image.fromarray(colour).convert(mode)
    image.putalpha(Image.fromarray(np.zeros_like(GREY)))  # all transparent
    image.save(tmp_path / "x.png")
    check(decode_image(tmp_path / "x.png", "x"), colour)


def test_premultiplied_grey_alpha_is_converted():
    image = Image.fromarray(GREY).convert("LA").convert("La")
    check(from_pil(image, "x"), GREY)


def test_a_palette_with_transparency_gives_its_colours(tmp_path):
    image = Image.new("P", (2, 2))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1, 1, 0])
    image.save(tmp_path / "x.png", transparency=b"\x00\x80")
    colours = np.array([[[10, 20, 30], [40, 50, 60]], [[40, 50, 60], [10, 20, 30]]], np.uint8)
    check(decode_image(tmp_path / "x.png", "x"), colours)


def test_16_bit_grey_is_scaled_by_65535_not_cut_to_8_bits(tmp_path):
    values = np.array([[0, 255, 256], [1000, 40000, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    image = decode_image(tmp_path / "x.png", "x")
    want = torch.from_numpy(values.astype(np.float64) / 65535).float()
    for channel in image:
        torch.testing.assert_close(channel, want, rtol=0, atol=6e-8)


def test_big_endian_16_bit_tiff_equals_little_endian(tmp_path):
    values = np.array([[0, 255], [256, 65535]], np.uint16)
    image = Image.frombytes("I;16B", (2, 2), values.astype(">u2").tobytes())
    image.save(tmp_path / "x.tif")
    little = from_pil(Image.fromarray(values), "x")
    assert torch.equal(decode_image(tmp_path / "x.tif", "x"), little)


def test_16_bit_grey_is_turned_too(tmp_path):
    values = np.arange(6, dtype=np.uint16).reshape(2, 3) * 9000
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.fromarray(values).save(tmp_path / "x.png", exif=exif)
    want = torch.from_numpy(np.rot90(values, -1).astype(np.float32)) / 65535
    assert torch.equal(decode_image(tmp_path / "x.png", "x")[0], want)


@pytest.mark.parametrize(
    ("values", "white"),
    [
        (np.array([[0, 65535]], np.int32), 65535),
        (np.array([[0.25, 1.0]], np.float32), 1),
    ],
)
def test_32_bit_grey_is_scaled_by_a_level_that_holds_it(values, white):
    image = from_pil(Image.fromarray(values), "x")
    torch.testing.assert_close(image[1], torch.from_numpy(values / white).float())


@pytest.mark.parametrize("value", [-1.0, 1.5, 255.0, float("nan"), float("inf")])
def test_32_bit_values_without_a_known_white_are_refused(value):
    """One level for a set: a dark file of a set of 0..255 would pass for one of 0..1."""
    with pytest.raises(ImageError, match=r"lie outside 0..1; divide the whole set by"):
        from_pil(Image.fromarray(np.array([[0.5, value]], np.float32)), "x")


def test_a_cmyk_jpeg_is_not_inverted(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "x.jpg", quality=95)  # red
    red = decode_image(tmp_path / "x.jpg", "x").mean((1, 2))
    torch.testing.assert_close(red, torch.tensor([1.0, 0.0, 0.0]), rtol=0, atol=0.02)


def test_only_the_first_frame_of_an_animation_counts(tmp_path):
    frames = [Image.new("P", (4, 4), k) for k in (0, 1)]
    for frame in frames:
        frame.putpalette([250, 0, 0, 0, 250, 0])
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    image = decode_image(tmp_path / "x.gif", "x")
    assert torch.equal(image[:, 0, 0], torch.tensor([250.0, 0, 0]) / 255)


def jpeg(path, size=64):
    noise = RNG.integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, "JPEG")
    return path.read_bytes()


FAULTS = {
    "truncated": (lambda data: data[: len(data) // 2], "truncated"),
    "head only": (lambda data: data[:20], "truncated|no image that"),
    "empty": (lambda data: b"", "no image that"),
    "text": (lambda data: b"not an image\n", "no image that"),
    "postscript": (
        lambda data: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "no image that",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_cannot_be_read_gives_one_line_with_the_way_out(tmp_path, fault):
    damage, reason = FAULTS[fault]
    path = tmp_path / "x.jpg"
    path.write_bytes(damage(jpeg(path)))
    with pytest.raises(ImageError, match=reason) as caught:
        decode_image(path, "sub/x.jpg")
    text = str(caught.value)
    assert text.startswith("cannot read image: 'sub/x.jpg': ")
    assert "skip_bad=True (--skip-bad)" in text
    assert text.count(": ") == 2
    assert "\n" not in text
    assert str(tmp_path) not in text
    assert str(pickle.loads(pickle.dumps(caught.value))) == text


@pytest.mark.parametrize("kind", ["png", "webp", "bmp", "gif", "tif"])
def test_truncation_is_noticed_in_every_format(tmp_path, kind):
    path = tmp_path / f"x.{kind}"
    noise = RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-600])
    with pytest.raises(ImageError, match=r"cannot read image: 'x': (?!KeyError)"):
        decode_image(path, "x")


def test_a_missing_file_is_named_without_its_folder(tmp_path):
    with pytest.raises(
        ImageError, match=r"^cannot read image: 'a.jpg': no such file or directory;"
    ):
        decode_image(tmp_path / "a.jpg", "a.jpg")


def test_running_out_of_memory_is_no_bad_image(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(room, "_pixels", fail)
    jpeg(tmp_path / "x.jpg")
    with pytest.raises(MemoryError):
        decode_image(tmp_path / "x.jpg", "x")


def test_a_huge_image_is_read_up_to_twice_the_limit_and_refused_above(tmp_path, monkeypatch):
    Image.new("RGB", (10, 10)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)  # PIL warns: an error under -W error
    assert decode_image(tmp_path / "x.png", "x").shape == (3, 10, 10)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with pytest.raises(ImageError, match=r"cannot read image: 'x': .*100 pixels"):
        decode_image(tmp_path / "x.png", "x")


def test_warnings_are_as_before_after_decoding(tmp_path):
    jpeg(tmp_path / "x.jpg")
    before = list(warnings.filters)
    decode_image(tmp_path / "x.jpg", "x")
    assert warnings.filters == before


PIL_RGB = Image.fromarray(RGB)
FLOATS = torch.rand(3, 4, 5)


@pytest.mark.parametrize(
    ("item", "array"),
    [
        (PIL_RGB, RGB),
        ((PIL_RGB, 3), RGB),
        ([PIL_RGB, 3], RGB),
        ({"image": PIL_RGB, "label": 3}, RGB),
        (RGB, RGB),
        (GREY, GREY),
        (GREY[:, :, None], GREY),
        (np.dstack([RGB, GREY]), RGB),
    ],
)
def test_pixels_are_found_in_whatever_an_item_is(item, array):
    image, is_pixels = from_item(item, "0")
    assert is_pixels
    check(image, array)


@pytest.mark.parametrize("item", [FLOATS, (FLOATS, 1), {"image": FLOATS}])
def test_float_tensors_are_passed_on_as_they_are(item):
    image, is_pixels = from_item(item, "0")
    assert not is_pixels
    assert torch.equal(image, FLOATS)


@pytest.mark.parametrize(
    ("item", "error", "text"),
    [
        (torch.zeros(3, 4, 4, dtype=torch.uint8), TypeError, "'7' is torch.uint8: convert them"),
        (torch.zeros(4, 4), ValueError, r"'7' is \(4, 4\): give \(c, h, w\)"),
        (torch.zeros(3, 0, 4), ValueError, r"'7' is \(3, 0, 4\)"),
        (np.zeros((4, 4, 3)), TypeError, r"'7' is float64 array \(4, 4, 3\): return a PIL image"),
        (np.zeros((3, 4, 5), np.uint8), TypeError, r"'7' is uint8 array \(3, 4, 5\)"),
        (np.zeros((0, 4, 3), np.uint8), TypeError, "'7' is uint8 array"),
        ({"pixels": PIL_RGB}, TypeError, "'7' has 'pixels'"),
        ({}, TypeError, "'7' has no keys"),
        ((), TypeError, "'7' is tuple"),
        (5, TypeError, "'7' is int"),
        (None, TypeError, "'7' is NoneType"),
    ],
)
def test_other_items_are_refused_in_three_parts(item, error, text):
    with pytest.raises(error, match=text) as caught:
        from_item(item, "7")
    assert str(caught.value).count(": ") == 2
