"""The embedded photos and the small VAE: sizes, licences, splits, and that they work."""

import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

import coda_jax
import convert
from coda_jax.evaluation.image_quality import psnr, to_uint8
from tools import make_photos

ASSETS = pathlib.Path(__file__).parents[1] / "assets"
FILES = sorted((ASSETS / "photos").glob("*/*/*"))
VAE, TOKENIZER = ASSETS / "demo_vae", ASSETS / "demo_tokenizer"
PSNR_FLOOR = 33.0  # dB, of the VAE
TOKENIZER_FLOOR = 26.5
LICENCES = {"public domain", "CC0 1.0", "CC BY 2.0", "CC BY 3.0", "CC BY 4.0"}


def photo_of(path):
  return re.fullmatch(r"(.+)_\d+\.webp", path.name)[1]


def attributed():
  """photo -> (subject, licence, split), of the attribution file."""
  rows = {}
  for line in (ASSETS / "ATTRIBUTION.md").read_text(encoding="utf-8").splitlines():
    if line.startswith("| `"):
      name, title, author, licence, package, split = (c.strip() for c in line[1:-1].split("|"))
      subject, photo = name.strip("`").split("/")
      assert title and author and package, line
      rows[photo] = subject, re.sub(r"\[(.*)\]\(.*\)", r"\1", licence), split
  return rows


def test_sizes():
  assert 150 <= len(FILES) <= 300
  assert sum(f.stat().st_size for f in FILES) <= 8 * 2**20
  assert (VAE / "kl_small.safetensors").stat().st_size <= 8 * 2**20


def test_every_file_is_attributed_under_an_allowed_licence():
  rows = attributed()
  for file in FILES:
    subject, licence, split = rows[photo_of(file)]
    assert (split, subject) == (file.parts[-3], file.parts[-2]), file
    assert licence in LICENCES, file
  assert set(rows) == {photo_of(f) for f in FILES}


def test_attribution_is_that_of_the_table():
  text = (ASSETS / "ATTRIBUTION.md").read_text(encoding="utf-8")
  assert text == make_photos.attribution(make_photos.read_table())


def test_no_photo_is_in_both_splits_and_every_class_is():
  photos, subjects = {}, {}
  for file in FILES:
    split = file.parts[-3]
    photos.setdefault(split, set()).add(photo_of(file))
    subjects.setdefault(split, set()).add(file.parts[-2])
  assert photos["train"].isdisjoint(photos["val"])
  assert subjects["train"] == subjects["val"]


def test_photos_load_and_differ():
  seen = set()
  for file in FILES:
    with Image.open(file) as image:
      assert (image.size, image.mode, image.format) == ((128, 128), "RGB", "WEBP"), file
      pixels = image.tobytes()
    assert pixels not in seen, file
    assert np.frombuffer(pixels, np.uint8).std() > 5, file
    seen.add(pixels)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
  """The committed weights through the converter, as the demo does it."""
  scale = float((VAE / "scale.txt").read_text())
  out = tmp_path_factory.mktemp("vae") / "vae"
  weights = VAE / "kl_small.safetensors"
  convert.convert("mar-vae", [weights], out, scale=scale, norm_groups=8)
  return coda_jax.load_vae(out)


@pytest.fixture(scope="module")
def photos():
  """The middles of some val photos, uint8 [B, 64, 64, 3]."""
  files = [f for f in FILES if f.parts[-3] == "val" and f.name.endswith("_0.webp")]
  return np.stack([np.asarray(Image.open(f)) for f in files])[:, 32:96, 32:96]


def test_vae_reconstructs_val_photos(vae, photos):
  mean = vae.encode(jnp.asarray(photos, jnp.float32) / 127.5 - 1).mean
  out = to_uint8(np.asarray(vae.decode(mean)), "nearest")
  assert psnr(photos, out).mean() > PSNR_FLOOR
  # The quantizer expects latents of about unit size.
  assert 0.8 < float(vae.scale_latents(mean).std()) < 1.25


def test_tokenizer_is_that_vae_and_reconstructs_val_photos(vae, photos, tmp_path):
  tok = coda_jax.load_tokenizer(TOKENIZER)
  assert tok.config.vae == vae.config and tok.bits_per_image == 6800
  out = to_uint8(np.asarray(tok.reconstruct(photos)), "nearest")
  assert psnr(photos, out).mean() > TOKENIZER_FLOOR
  convert.to_torch(TOKENIZER, tmp_path / "torch")  # the official format
  assert sum(f.stat().st_size for f in TOKENIZER.iterdir()) <= 4 * 2**20


def test_vae_file_has_mar_layout():
  keys = safetensors.numpy.load_file(VAE / "kl_small.safetensors")
  assert keys["encoder.conv_in.weight"].shape == (32, 3, 3, 3)
  assert {"encoder.mid.attn_1.q.weight", "post_quant_conv.weight"} <= set(keys)
  assert {v.dtype for v in keys.values()} == {np.dtype(np.float16)}
