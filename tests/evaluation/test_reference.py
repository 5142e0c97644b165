import numpy as np
import pytest

from coda_jax.errors import UserError
from coda_jax.evaluation import reference
from coda_jax.evaluation.frechet import Moments
from coda_jax.evaluation.reference import read_reference, write_statistics


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
  """Of 4 and 3 features, so that files are small."""
  monkeypatch.setattr(reference, "POOL3", 4)
  monkeypatch.setattr(reference, "_WIDTHS", {"mu": 4, "mu_s": 3})


def moments(n, seed):
  rng = np.random.default_rng(seed)
  return Moments(rng.normal(size=n), np.cov(rng.normal(size=(n, 9))))


POOL3, SPATIAL = moments(4, 0), moments(3, 1)


def test_pytorch_fids_and_clean_fids_files(tmp_path):
  for save in (np.savez, np.savez_compressed):
    save(tmp_path / "a.npz", mu=POOL3.mean, sigma=POOL3.covariance)
    found = read_reference(tmp_path / "a.npz")
    np.testing.assert_array_equal(found.pool3.mean, POOL3.mean)
    np.testing.assert_array_equal(found.pool3.covariance, POOL3.covariance)
    assert (found.spatial, found.images, found.features, found.count) == (None,) * 4
    found.check_convention("adm")  # the file does not say
  np.savez(tmp_path / "kid.npz", feats=np.ones((5, 4), np.float32))
  assert read_reference(tmp_path / "kid.npz").features.shape == (5, 4)


def test_adms_file(tmp_path):
  images = np.zeros((2, 8, 8, 3), np.uint8)
  np.savez(
    tmp_path / "a.npz",
    arr_0=images,
    mu=POOL3.mean,
    sigma=POOL3.covariance,
    mu_s=SPATIAL.mean,
    sigma_s=SPATIAL.covariance,
  )
  found = read_reference(tmp_path / "a.npz")
  np.testing.assert_array_equal(found.spatial.covariance, SPATIAL.covariance)
  assert len(found.images) == 2 and found.count is None  # the moments are of more images
  np.savez(tmp_path / "b.npz", images)
  found = read_reference(tmp_path / "b.npz")
  assert (found.pool3, found.count, len(found.images)) == (None, 2, 2)


def test_ours_is_read_by_the_other_tools_names(tmp_path):
  file = tmp_path / "a.npz"
  write_statistics(file, POOL3, SPATIAL, {"convention": "adm", "images": 50})
  with np.load(file) as f:
    assert set(f.files) == {"mu", "sigma", "mu_s", "sigma_s", "coda_jax"}
    assert f["sigma"].dtype == np.float64
    np.testing.assert_array_equal(f["mu_s"], SPATIAL.mean)
  found = read_reference(file)
  assert found.count == 50 and len(found.hash) == 64
  found.check_convention("adm")
  with pytest.raises(UserError, match="of convention 'adm', not 'coda'; take --convention adm"):
    found.check_convention("coda")
  assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


@pytest.mark.parametrize(
  ("arrays", "message"),
  [
    ({"mu": np.ones(3), "sigma": np.eye(3)}, r"shapes \[3\] and \[3, 3\], expected \[4\]"),
    ({"mu": np.ones(4), "sigma": np.eye(3)}, "of another network"),
    ({"mu": np.ones(4)}, "mu without the other"),
    ({"mu": np.ones(4) * np.nan, "sigma": np.eye(4)}, "NaN or infinity"),
    ({"feats": np.ones((2, 3))}, r"feats has shape \[2, 3\]"),
    ({"x": np.ones(3)}, r"no statistics \(mu, sigma\).*; it has x"),
  ],
)
def test_files_that_do_not_fit(tmp_path, arrays, message):
  np.savez(tmp_path / "a.npz", **arrays)
  with pytest.raises(UserError, match=message) as e:
    read_reference(tmp_path / "a.npz")
  assert "\n" not in str(e.value) and "a.npz" in str(e.value)


def test_damaged_files(tmp_path):
  file = tmp_path / "a.npz"
  with pytest.raises(UserError, match="no such file"):
    read_reference(file)
  write_statistics(file, POOL3, None, {})
  whole = file.read_bytes()
  np.save(tmp_path / "b.npy", np.ones(3))
  for content in (whole[:-200], b"", b"x", (tmp_path / "b.npy").read_bytes()):
    file.write_bytes(content)
    with pytest.raises(UserError, match="damaged, truncated or not|holds no statistics"):
      read_reference(file)
