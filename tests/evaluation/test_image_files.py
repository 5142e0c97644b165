import numpy as np
import pytest

from coda_jax.errors import UserError
from coda_jax.evaluation.image_files import ImageFile, ImageFileWriter

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 6, 4, 3), np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed, np.save])
def test_any_rows_of_a_file(tmp_path, save):
  file = tmp_path / ("a.npy" if save is np.save else "a.npz")
  if save is np.save:
    np.save(file, IMAGES)
  else:
    save(file, labels=np.arange(5), arr_0=IMAGES)
  found = ImageFile(file)
  assert (len(found), found.shape) == (5, IMAGES.shape)
  for rows in (slice(0, 2), slice(3, 5), slice(1, 2), slice(4, 9)):
    np.testing.assert_array_equal(found[rows], IMAGES[rows])


def test_what_is_written_is_what_numpy_reads(tmp_path):
  writer = ImageFileWriter(tmp_path / "s.npz", 5, (6, 4))
  writer.write(2, IMAGES[2:])
  writer.write(0, IMAGES[:2])
  writer.close()
  with np.load(tmp_path / "s.npz") as f:
    assert f.files == ["arr_0"]
    np.testing.assert_array_equal(f["arr_0"], IMAGES)
  assert [p.name for p in tmp_path.iterdir()] == ["s.npz"]


@pytest.mark.parametrize(
  ("images", "message"),
  [
    (IMAGES / 127.5 - 1, "values from -1 to 1; samples are bytes"),
    (IMAGES.astype(np.int32) * 300, "samples are bytes, 0 to 255"),
    (IMAGES / 255, "holds fractions"),
    (IMAGES[..., 0], r"shape \[5, 6, 4\]; images are \[N, H, W, 3\]"),
    (IMAGES[:0], r"shape \[0, 6, 4, 3\]"),
    (IMAGES.astype(str), "holds <U"),
  ],
)
def test_what_are_no_bytes(tmp_path, images, message):
  np.savez(tmp_path / "a.npz", images)
  with pytest.raises(UserError, match=message) as e:
    ImageFile(tmp_path / "a.npz")[:5]
  assert "\n" not in str(e.value)


def test_whole_numbers_of_another_type_are_bytes_too(tmp_path):
  np.savez(tmp_path / "a.npz", IMAGES.astype(np.float32))
  np.testing.assert_array_equal(ImageFile(tmp_path / "a.npz")[:], IMAGES)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_and_foreign_files(tmp_path, save):
  file = tmp_path / "a.npz"
  with pytest.raises(UserError, match="no such file"):
    ImageFile(file)
  save(file, IMAGES)
  whole = file.read_bytes()
  for content in (whole[: len(whole) // 2], b"", b"text"):
    file.write_bytes(content)
    with pytest.raises(UserError, match="damaged, truncated or not an .npz file"):
      ImageFile(file)
  save(file, images=IMAGES)
  with pytest.raises(UserError, match="it holds images"):
    ImageFile(file)
