"""Every kind of image file is read right or refused, and the geometry is torchvision's."""

import io

import numpy as np
import pytest
from PIL import Image

from coda_jax.data import decode
from tests.data.images import encode, photo

RGB = photo(40, 56)


def pixels(data: bytes) -> np.ndarray:
  image = decode.decode_image(data)
  assert image.mode == "RGB"
  return np.asarray(image)


@pytest.mark.parametrize("form", ["png", "webp", "tiff", "bmp", "ppm"])
def test_lossless_rgb_is_exact(form):
  options = {"lossless": True} if form == "webp" else {}
  np.testing.assert_array_equal(pixels(encode(RGB, form, **options)), RGB)


def test_jpeg_is_close():
  assert np.abs(pixels(encode(RGB, "jpeg", quality=98)).astype(int) - RGB).mean() < 2


def test_grey():
  grey = RGB[..., 0]
  np.testing.assert_array_equal(pixels(encode(grey)), np.repeat(grey[..., None], 3, 2))


def test_bilevel():
  black_white = Image.fromarray(RGB[..., 0]).convert("1")
  np.testing.assert_array_equal(pixels(encode(black_white)), np.asarray(black_white.convert("RGB")))


def test_palette():
  palette = Image.fromarray(RGB).quantize(64)
  np.testing.assert_array_equal(pixels(encode(palette)), np.asarray(palette.convert("RGB")))


def test_animation_gives_its_first_frame():
  frames = [Image.fromarray(photo(40, 56, seed)).quantize(64) for seed in (0, 1)]
  data = encode(frames[0], "gif", save_all=True, append_images=frames[1:])
  np.testing.assert_array_equal(pixels(data), np.asarray(frames[0].convert("RGB")))


@pytest.mark.parametrize("form", ["jpeg", "tiff"])
def test_cmyk(form):
  cmyk = Image.fromarray(RGB).convert("CMYK")
  options = {"quality": 98, "subsampling": 0} if form == "jpeg" else {}
  assert Image.open(io.BytesIO(encode(cmyk, form, **options))).mode == "CMYK"
  assert np.abs(pixels(encode(cmyk, form, **options)).astype(int) - RGB).mean() < 2


@pytest.mark.parametrize("form", ["png", "tiff", "ppm"])
def test_16_bit_grey_is_scaled(form):
  values = np.array([[0, 128, 129, 257, 32768, 65407, 65535]], np.uint16)
  expected = np.round(values / 257).astype(np.uint8)
  np.testing.assert_array_equal(pixels(encode(values, form))[..., 1], expected)


@pytest.mark.parametrize("form", ["png", "webp", "tiff"])
def test_transparency_is_laid_over_white(form):
  alpha = np.zeros((40, 56, 1), np.uint8)
  alpha[:, 20:] = 255
  options = {"lossless": True, "exact": True} if form == "webp" else {}
  got = pixels(encode(np.concatenate([RGB, alpha], 2), form, **options))
  np.testing.assert_array_equal(got[:, 20:], RGB[:, 20:])
  assert (got[:, :20] == 255).all()


def test_transparent_palette_entry_is_white():
  palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
  palette.putpalette([10, 20, 30, 40, 50, 60])
  got = pixels(encode(palette, "png", transparency=0))
  assert got.tolist() == [[[255, 255, 255], [40, 50, 60]]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
  # How a camera stores the upright image for each value, after the EXIF 2.32 specification 4.6.4.
  stored = {
    1: RGB,
    2: RGB[:, ::-1],
    3: RGB[::-1, ::-1],
    4: RGB[::-1],
    5: RGB.transpose(1, 0, 2),
    6: np.rot90(RGB, 1),
    7: RGB[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(RGB, -1),
  }[orientation]
  exif = Image.Exif()
  exif[0x0112] = orientation
  np.testing.assert_array_equal(pixels(encode(np.ascontiguousarray(stored), exif=exif)), RGB)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_does_not_spoil_the_image():
  np.testing.assert_array_equal(pixels(encode(RGB, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff")), RGB)


JPEG = encode(RGB, "jpeg", quality=95)


@pytest.mark.parametrize(
  "data",
  [
    b"",
    b"<html>404</html>",
    JPEG[: len(JPEG) // 2],
    JPEG[:30],
    encode(RGB)[:-200],
    encode(RGB, "webp")[:100],
    encode(Image.fromarray(RGB[..., 0].astype(np.float32)), "tiff"),
    encode(Image.fromarray(RGB[..., 0].astype(np.int32) - 9), "tiff"),
  ],
  ids="empty html half-jpeg jpeg-header cut-png cut-webp float negative".split(),
)
def test_unreadable(data):
  with pytest.raises(decode.UnreadableImage) as e:
    decode.decode_image(data)
  assert str(e.value) and "\n" not in str(e.value)


def plain(image: Image.Image, size: tuple[int, int], left: int, top: int, edge: int) -> np.ndarray:
  resized = image.resize(size, Image.Resampling.LANCZOS)
  return np.asarray(resized.crop((left, top, left + edge, top + edge)))


@pytest.mark.parametrize("width,height", [(133, 100), (100, 133), (61, 20), (20, 61), (45, 45)])
def test_resize_is_that_of_the_whole_image(width, height):
  image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))
  short = min(width, height)
  size = int(36 * width / short), int(36 * height / short)
  for top, left in ((0, 0), (4, 4), (1, 3), (size[1] - 32, size[0] - 32)):
    got = decode.resize_and_crop(image, 32, resize_ratio=1.125, position=(top, left))
    np.testing.assert_array_equal(got, plain(image, size, left, top, 32))


def test_an_image_of_the_right_size_is_not_resampled():
  image = photo(36, 47)
  got = decode.resize_and_crop(Image.fromarray(image), 32, resize_ratio=1.125)
  np.testing.assert_array_equal(got, image[2:34, 8:40])


def test_too_elongated():
  with pytest.raises(decode.UnreadableImage, match="elongated"):
    decode.resize_and_crop(Image.new("RGB", (3000, 1)), 256, resize_ratio=1.125)


def test_crops():
  image = Image.fromarray(photo(40, 57))
  rows, columns = 40 - 32 + 1, 57 - 32 + 1

  def crop(**options):
    return decode.resize_and_crop(image, 32, resize_ratio=None, **options)

  array = np.asarray(image)
  np.testing.assert_array_equal(crop(), array[4:36, 12:44])  # 12.5 rounds to even
  np.testing.assert_array_equal(crop(position=(3, 9)), array[3:35, 9:41])
  np.testing.assert_array_equal(crop(position=(3 + 7 * rows, 9 + 5 * columns)), array[3:35, 9:41])
  last = crop(position=(rows - 1, columns - 1), flip=True)
  np.testing.assert_array_equal(last, array[-32:, -32:][:, ::-1])


@pytest.mark.parametrize("ratio,shorter", [(1.125, 36), (1.0, 32), (0.5, 32), (None, 32)])
def test_small_images_are_enlarged_to_what_the_crop_needs(ratio, shorter):
  image = Image.fromarray(photo(20, 30))
  got = decode.resize_and_crop(image, 32, resize_ratio=ratio, position=(0, 0))
  size = (int(shorter * 30 / 20), shorter)
  np.testing.assert_array_equal(got, plain(image, size, 0, 0, 32))
