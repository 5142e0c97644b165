import io
import pathlib

import numpy as np
import pytest
from PIL import Image

from coda_jax.data.whole_images import WholeImages, file_names, open_images
from coda_jax.errors import UserError


def test_batches_have_one_shape_per_size():
  sizes = [(4, 4), (4, 4), (6, 4), (4, 4), (6, 4)]
  rng = np.random.default_rng(0)
  images = [rng.integers(0, 256, (h, w, 3), np.uint8) for w, h in sizes]

  def read(i):
    buffer = io.BytesIO()
    Image.fromarray(images[i]).save(buffer, "png")
    return buffer.getvalue()

  source = WholeImages("here", [f"{i}.png" for i in range(5)], read, stride=2)
  batches = list(source.batches(2))
  assert min(min(s) for s in source.sizes()) == 4
  assert [(b["image"].shape, b["index"].tolist(), b["valid"].tolist()) for b in batches] == [
    ((2, 4, 4, 3), [0, 1], [True, True]),
    ((2, 4, 6, 3), [2, 4], [True, True]),
    ((2, 4, 4, 3), [3, 3], [True, False]),  # padded to the shape that is compiled already
  ]
  for batch in batches:
    for index, image in zip(batch["index"], batch["image"], strict=True):
      np.testing.assert_array_equal(image, images[index])


def test_sizes_that_are_brought_to_the_stride():
  image = np.random.default_rng(0).integers(0, 256, (9, 14, 3), np.uint8)
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, "png")

  def read(_):
    return buffer.getvalue()

  with pytest.raises(UserError, match=r"x.png.*14 x 9 pixels.*stride 4.*--crop.*--image-size"):
    WholeImages("here", ["x.png"], read, 4).sizes()
  with pytest.raises(UserError, match="14 x 9 pixels is smaller than the VAE's stride 16"):
    WholeImages("here", ["x.png"], read, 16, crop=True).sizes()
  cropped = WholeImages("here", ["x.png"], read, 4, crop=True)
  assert min(min(s) for s in cropped.sizes()) == 8
  (batch,) = cropped.batches(3)
  np.testing.assert_array_equal(batch["image"], image[None, 0:8, 1:13])
  (batch,) = WholeImages("here", ["x.png"], read, 4, image_size=8).batches(3)
  assert batch["image"].shape == (1, 8, 8, 3)


def test_images_that_cannot_be_read(caplog):
  with pytest.raises(UserError, match="here cannot be read"):
    list(WholeImages("here", ["x.png"], lambda _: b"no image", 2).batches(1))
  assert list(WholeImages("here", ["x.png", "y.png"], lambda _: b"no image", 2).batches(1)) == []
  assert "unreadable image y.png" in caplog.text


def test_names(tmp_path):
  assert file_names(["a/b.jpg", "c.png", "c.bmp"]) == ["a/b.png", "c.png.png", "c.bmp.png"]
  for names in (
    ["a.jpg", "a.png", "a.jpg.png", "a.png.png"],
    ["a.jpg", "A.JPG", "A.png"],
    ["a.jpg", "a.png/b.jpg"],
    ["a", "a.jpg", "a_2.jpg"],
  ):
    files = file_names(names)
    folders = {str(p) for f in files for p in pathlib.PurePath(f).parents}
    assert len({f.lower() for f in files} - folders) == len(names), files
  (tmp_path / "a.png").write_bytes(b"x")
  names, read = open_images(str(tmp_path / "a.png"))
  assert names == ["a.png"] and read(0) == b"x"
  names, read = open_images(str(tmp_path))
  assert names == ["a.png"] and read(0) == b"x"
  with pytest.raises(UserError, match="nowhere: no such image file or folder"):
    open_images("nowhere")
