"""NaN and infinity are named and never written."""

import ml_dtypes
import numpy as np
import pytest

import coda_jax
import convert
from coda_jax import arrays, weights
from coda_jax.errors import UserError
from convert import pickle
from tests import tiny
from tests.convert.test_convert import checkpoint, save, small_state

KEY = "decoder.conv_in.bias"
FLOATS = [np.float16, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2]
VALUES = [(t, np.nan) for t in (*FLOATS, ml_dtypes.float8_e4m3fn)]
VALUES += [(np.float32, v) for v in (np.nan, np.inf, -np.inf)]


@pytest.mark.parametrize(("dtype", "value"), VALUES)
def test_converters_list_what_is_not_finite(dtype, value):
  state = small_state()
  state[KEY] = np.where(np.arange(len(state[KEY])) == 5, value, state[KEY]).astype(dtype)
  del state["decoder.conv_out.bias"]
  with pytest.raises(UserError) as e:
    convert.to_flat("mar-vae", state)
  listed = str(e.value).partition(": ")[2].split("; ")
  assert listed == [f"{KEY} holds NaN or infinity", "missing decoder.conv_out.bias"]


def test_what_overflows_float32_is_not_finite():
  state = small_state()
  state[KEY] = np.full(state[KEY].shape, 1e300)
  with pytest.raises(UserError, match=f"{KEY} holds NaN or infinity"):
    convert.to_flat("mar-vae", state)


def test_nothing_that_is_not_finite_is_written(tmp_path):
  state = small_state()
  state[KEY][0] = np.nan
  with pytest.raises(UserError, match=f"vae.pth is not MAR's KL-16 VAE: {KEY} holds NaN"):
    convert.convert("mar-vae", [save(tmp_path / "vae.pth", state)], tmp_path / "out")
  flat = {f"a{i}": np.float32([1, np.inf]) for i in range(7)} | {"fine": np.ones(3)}
  message = (
    r"out: a0, a1, a2, a3, a4 and 2 more hold values that are not finite .*nothing is written"
  )
  with pytest.raises(UserError, match=message):
    weights.write_directory(tmp_path / "out", "vae", {}, flat)
  assert [p.name for p in tmp_path.iterdir()] == ["vae.pth"]


def test_loaders_name_what_is_not_finite(tmp_path):
  options = {"patch_sizes": (8,), "image_size": 16}
  convert.convert("coda-mar", [checkpoint(tmp_path / "in")], tmp_path / "out", **options)
  file = tmp_path / "out" / "model.safetensors"
  raw = bytearray(file.read_bytes())
  raw[-4:] = np.float32(np.nan).tobytes()  # the last value of the last array by name
  file.write_bytes(raw)
  message = r"model.safetensors: \S+ hold values that are not finite .*the weights are damaged"
  for load in (coda_jax.load_tokenizer, lambda p: convert.to_torch(p, tmp_path / "torch")):
    with pytest.raises(UserError, match=message):
      load(tmp_path / "out")
  assert not (tmp_path / "torch").exists()


def test_a_tokenizer_that_diverged_is_not_saved(tmp_path):
  tokenizer = tiny.tokenizer()
  flat = arrays.of(tokenizer)
  weights.set_params(tokenizer, {**flat, "quantizer.codebook": flat["quantizer.codebook"] * np.nan})
  with pytest.raises(UserError, match=r"tok: quantizer.codebook hold.*nothing is written"):
    coda_jax.save_tokenizer(tokenizer, tmp_path / "tok")
  assert not (tmp_path / "tok").exists()


def test_what_is_left_out_may_hold_anything(tmp_path):
  state = small_state() | {"loss.logvar": np.float32([np.nan])}
  assert convert.to_flat("mar-vae", state)
  nan = {k: v * np.nan for k, v in small_state().items()}
  assert convert.to_flat("mar-vae", {"model": small_state(), "ema": nan}, ema=False)
  file = tmp_path / "a.pth"
  save(file, {"a": np.float32([np.inf])})
  assert not np.isfinite(pickle.load(file)["a"]).any()
