import json

import jax
import numpy as np
import pytest

import coda_jax
from coda_jax import arrays, pretrained, weights
from coda_jax.errors import UserError
from tests import tiny


@pytest.fixture
def saved(tmp_path):
  coda_jax.save_tokenizer(tiny.tokenizer(), tmp_path / "tok")
  return tmp_path / "tok"


def edit(saved, **change):
  config = json.loads((saved / "config.json").read_text())
  config.update(change)
  (saved / "config.json").write_text(json.dumps(config))


def test_round_trip_is_exact(saved):
  tok = coda_jax.load_tokenizer(saved)
  assert tok.config == tiny.TOKENIZER
  for key, value in arrays.of(tiny.tokenizer()).items():
    np.testing.assert_array_equal(arrays.of(tok)[key], value)


def test_vae_is_saved_with_adapters_folded_in(tmp_path):
  vae = tiny.tokenizer().vae
  coda_jax.save_vae(vae, tmp_path / "vae")
  z = jax.numpy.ones((1, 8, 8, 16))
  plain = coda_jax.load_vae(tmp_path / "vae")
  one, other = tiny.decode(plain, z), tiny.decode(vae, z)
  np.testing.assert_allclose(one, other, atol=2e-5 * np.abs(other).max())
  assert any("lora" in k for k in arrays.of(vae)), "the saved model itself is untouched"


def test_fingerprint_follows_what_decides_ids_and_pixels():
  fields = {"quantizer": {"codebook_size": 2, "chunk_size": None, "beta": 0.1}}
  flat = {"a": np.zeros(2)}
  one = weights.fingerprint(fields, flat)
  faster = {"quantizer": {"codebook_size": 2, "chunk_size": 64, "beta": 0.2}}
  assert weights.fingerprint(faster, flat) == one
  assert weights.fingerprint({"quantizer": {"codebook_size": 3}}, flat) != one
  assert weights.fingerprint(fields, {"a": np.ones(2)}) != one
  added = {"fsq_levels": [], "product_heads": 2, "gradient": "rotation"}
  assert weights.fingerprint({"quantizer": fields["quantizer"] | added}, flat) == one
  added["fsq_levels"] = [2]
  assert weights.fingerprint({"quantizer": fields["quantizer"] | added}, flat) != one
  later = lambda patch: weights.fingerprint({**fields, "vae": {"norm_patch": patch}}, flat)
  assert later(0) == weights.fingerprint({**fields, "vae": {}}, flat) != later(2)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"kind": "vae"}, "holds a 'vae', not a 'tokenizer'"),
    ({"format_version": 99}, "format_version 99"),
    ({"colour": 1}, "unknown field 'colour'"),
    ({"image_size": 32}, "patch_sizes ends with 8"),
  ],
)
def test_foreign_config(saved, change, message):
  edit(saved, **change)
  with pytest.raises(UserError, match=message):
    coda_jax.load_tokenizer(saved)


def test_damaged_and_missing_files(saved, tmp_path):
  with pytest.raises(UserError, match="no config.json"):
    coda_jax.load_tokenizer(tmp_path / "nowhere")
  file = saved / "model.safetensors"
  file.write_bytes(file.read_bytes()[:-10])
  with pytest.raises(UserError, match=r"model.safetensors is damaged or truncated"):
    coda_jax.load_tokenizer(saved)
  file.unlink()
  with pytest.raises(UserError, match=r"model.safetensors is missing"):
    coda_jax.load_tokenizer(saved)
  (saved / "config.json").write_text("{")
  with pytest.raises(UserError, match="not valid JSON"):
    coda_jax.load_tokenizer(saved)


def test_every_wrong_entry_is_listed():
  flat = dict(tiny.tokenizer_params())
  flat["quantizer.extra"] = flat.pop("quantizer.codebook")
  flat["quantizer.to_q.bias"] = flat["quantizer.to_q.bias"][:3]
  with pytest.raises(UserError) as e:
    weights.set_params(tiny.tokenizer(), flat, "file.safetensors")
  for part in ("file.safetensors", "missing quantizer.codebook", "extra quantizer.extra", "[3]"):
    assert part in str(e.value)


def test_an_interrupted_save_leaves_the_old_directory(saved, monkeypatch):
  before = (saved / "model.safetensors").read_bytes()

  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(weights, "_save_safetensors", full)
  with pytest.raises(OSError, match="No space"):
    coda_jax.save_tokenizer(tiny.tokenizer(seed=1), saved)
  assert (saved / "model.safetensors").read_bytes() == before
  assert [p.name for p in saved.parent.iterdir()] == ["tok"]


@pytest.mark.parametrize("load", [pretrained.load_dino, pretrained.load_lpips])
def test_frozen_networks_need_a_converted_directory(tmp_path, load):
  with pytest.raises(UserError, match="no config.json; give a directory that `convert`"):
    load(tmp_path)


def test_whether_weights_are_averaged_is_kept_beside_them(saved, tmp_path):
  tokenizer = tiny.tokenizer()
  for averaged in (True, False):
    weights.save_tokenizer(tokenizer, tmp_path / "said", averaged=averaged)
    assert weights.is_averaged(tmp_path / "said") is averaged
  ours, theirs = (weights.read_config(p, "tokenizer") for p in (tmp_path / "said", saved))
  assert ours == theirs, "the fingerprint too"
  assert weights.is_averaged(saved) is None and weights.is_averaged(tmp_path) is None
  coda_jax.load_tokenizer(tmp_path / "said")
