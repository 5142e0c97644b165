"""A tokenizer of one image size used at another."""

import numpy as np
import pytest

import convert
from coda_jax import weights
from coda_jax.errors import UserError
from tests import tiny
from tests.convert.test_convert import command


@pytest.mark.slow
def test_the_same_ids_and_pixels_at_another_size(tmp_path):
  tok = tiny.tokenizer()
  weights.save_tokenizer(tok, tmp_path / "small")
  convert.resize(tmp_path / "small", tmp_path / "large", image_size=32)
  large = weights.load_tokenizer(tmp_path / "large")
  assert large.config.image_size == 32 and large.config.vae == tok.config.vae
  assert large.config.quantizer.patch_sizes == (2, 4, 6, 16)
  images = tiny.images(1, 32, 32)
  ids = tiny.tokens(tok, images)
  for ours, theirs in zip(tiny.tokens(large, images), ids, strict=True):
    np.testing.assert_array_equal(ours, theirs)
  # The first levels alone need the size where it is not that of training.
  few, few_again = tiny.pixels(tok, ids[:2], (32, 32)), tiny.pixels(large, ids[:2], None)
  np.testing.assert_array_equal(few, few_again)
  with pytest.raises(UserError, match="the image size is 0; it must be at least 1"):
    convert.resize(tmp_path / "small", tmp_path / "none", image_size=0)
  with pytest.raises(UserError, match="give size= for other than the training size"):
    tok.decode(ids[:2])
  first, second = (weights.read_config(tmp_path / k, "tokenizer") for k in ("small", "large"))
  assert first["fingerprint"] != second["fingerprint"]
  convert.resize(tmp_path / "large", tmp_path / "back", image_size=16)
  assert weights.read_config(tmp_path / "back", "tokenizer") == first


def test_the_command(tmp_path, monkeypatch, capsys):
  weights.save_tokenizer(tiny.tokenizer(), tmp_path / "small")
  start = ("resize", tmp_path / "small", "--output", tmp_path / "large")
  for size, code, line in (
    (("--image-size", "17"), 1, "17x17 is not a multiple of the VAE's stride 2"),
    (("--image-size=-2",), 2, "--image-size"),
    (("--image-size", "9999999"), 2, "--image-size"),
    ((), 2, "--image-size"),
    (("--image-size", "8"), 0, ""),
    (("--image-size", "8"), 1, "--overwrite replaces it"),
  ):
    found, message = command(monkeypatch, capsys, *start, *size)
    assert found == code and line in message, message
  config = weights.read_config(tmp_path / "large", "tokenizer")
  assert config["quantizer"]["patch_sizes"] == [1, 1, 2, 4] and config["image_size"] == 8
