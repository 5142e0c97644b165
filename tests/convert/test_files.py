"""Which files of a folder are read, shards, and the config beside them."""

import json

import numpy as np
import pytest
import safetensors.numpy

import convert
from coda_jax import weights
from coda_jax.errors import UserError
from convert import files
from tests.convert.test_convert import SMALL, checkpoint, save, small_state

STATE = small_state()
PROBE = "decoder.conv_in.bias"


def sharded(folder, state, kind="safetensors", variant=""):
  """Two shards and their index, as Hugging Face's libraries write them."""
  folder.mkdir(exist_ok=True)
  stem = "diffusion_pytorch_model"
  parts = [dict(list(state.items())[i::2]) for i in range(2)]
  index = {}
  for i, part in enumerate(parts):
    file = folder / f"{stem}{variant}-0000{i + 1}-of-00002.{kind}"
    if kind == "bin":
      save(file, part)
    else:
      safetensors.numpy.save_file(part, file)
    index |= dict.fromkeys(part, file.name)
  path = folder / f"{stem}.{kind}{variant}.index.json"
  path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": index}))
  return path


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("given", ["folder", "index"])
def test_shards_with_an_index(tmp_path, kind, given):
  index = sharded(tmp_path / "in", STATE, kind)
  path = index.parent if given == "folder" else index
  convert.convert("mar-vae", [path], tmp_path / "out")
  flat = weights.read_arrays(tmp_path / "out")
  np.testing.assert_array_equal(flat[PROBE], STATE[PROBE])
  assert weights.load_vae(tmp_path / "out").config == SMALL


def test_damaged_shards_are_named(tmp_path):
  index = sharded(tmp_path / "in", STATE)
  first, second = sorted(index.parent.glob("*.safetensors"))
  state = safetensors.numpy.load_file(second)
  lost = next(iter(state))
  for change, message in (
    (lambda: safetensors.numpy.save_file(state | {"odd": np.ones(2)}, second), "not name all.*odd"),
    (
      lambda: state.pop(lost) is None or safetensors.numpy.save_file(state, second),
      f"lacks.*{lost}",
    ),
    (second.unlink, f"not there: {second.name}"),
    (lambda: index.write_text('{"weight_map": {"a": "../b"}}'), "outside of its folder"),
    (lambda: index.write_text('{"weight_map": [1]}'), "no index of shards"),
    (lambda: index.write_text("{"), "no index of shards"),
    (index.unlink, "shards without their index, diffusion_pytorch_model.safetensors.index.json"),
  ):
    change()
    with pytest.raises(UserError, match=message) as e:
      convert.convert("mar-vae", [index if index.exists() else index.parent], tmp_path / "out")
    assert "\n" not in str(e.value)
  with pytest.raises(
    UserError, match=r"one of several shards; give their index, .*safetensors.index.json"
  ):
    convert.convert("mar-vae", [first], tmp_path / "out")


def touched(folder, *names):
  for name in names:
    (folder / name).parent.mkdir(exist_ok=True, parents=True)
    (folder / name).touch()


@pytest.mark.parametrize(
  ("names", "expected"),
  [
    (("vae.sft",), "vae.sft"),
    (("model.safetensors", "model.bin"), "model.safetensors"),
    (("model.sft", "model.bin", "._model.sft"), "model.sft"),
    (("vae.pth", "optimizer.bin", "training_args.bin", "config.json"), "vae.pth"),
    (("model_index.json", "vae/a.safetensors", "flux1-dev.safetensors"), "vae/a.safetensors"),
    (("vae/a.safetensors", "vae/a.bin", "unet/b.bin"), "vae/a.safetensors"),
  ],
)
def test_which_file_of_a_folder(tmp_path, names, expected):
  touched(tmp_path, *names)
  assert files.find("flux-vae", tmp_path, True) == [tmp_path / expected]


@pytest.mark.parametrize(
  ("names", "message"),
  [
    (("m.safetensors", "m.fp16.safetensors"), "several weight files.*such as .*/m.safetensors$"),
    (("m.fp16.safetensors", "m.bin"), "several weight files.*such as .*/m.bin$"),
    (("a.pth", "b.pth"), "name one"),
    (("m-00001-of-00002.bin", "m-00002-of-00002.bin"), "shards without their index"),
    (("model_index.json", "vae/config.json", "ae.safetensors"), "vae holds no weight file"),
  ],
)
def test_an_unclear_folder_is_told(tmp_path, names, message):
  touched(tmp_path, *names)
  with pytest.raises(UserError, match=message):
    files.find("flux-vae", tmp_path, True)


def test_a_folder_with_shards_of_two_kinds_takes_safetensors(tmp_path):
  index = sharded(tmp_path, STATE)
  sharded(tmp_path, STATE, "bin")
  assert files.find("mar-vae", tmp_path, True) == [index]
  other = sharded(tmp_path, STATE, variant=".fp16")
  with pytest.raises(UserError, match=f"several weight files .*{other.name}"):
    files.find("mar-vae", tmp_path, True)


def test_averaged_and_plain_files_are_not_mixed(tmp_path):
  folder = checkpoint(tmp_path / "source")
  (folder / "quantizer_ema.pth").rename(folder / "quantizer.pth")
  with pytest.raises(UserError, match="holds vae_ema but no quantizer_ema$"):
    files.find("coda-mar", folder, True)
  save(folder / "vae.pth", STATE)
  with pytest.raises(UserError, match="; --no-ema takes what is not averaged"):
    files.find("coda-mar", folder, True)
  assert [p.name for p in files.find("coda-mar", folder, False)] == ["vae.pth", "quantizer.pth"]
  (folder / "vae.pth").unlink()
  with pytest.raises(UserError, match="holds no vae.pth$"):
    files.find("coda-mar", folder, False)


@pytest.mark.parametrize(
  ("fields", "expected"),
  [
    ({"scaling_factor": None}, {}),
    ({"scaling_factor": None, "shift_factor": None, "force_upcast": True}, {}),
    ({"scaling_factor": None, "shift_factor": 0.5}, {"shift": 0.5}),
    ({"scaling_factor": 2}, {"scale": 2, "shift": 0.0}),
    ({"scaling_factor": 1.5305, "shift_factor": 0.0609}, {"scale": 1.5305, "shift": 0.0609}),
    ({"shift_factor": 0.5, "norm_num_groups": 16}, {"shift": 0.5, "norm_groups": 16}),
    ({"force_upcast": True}, {}),
    ([1], {}),
  ],
)
def test_the_config_of_diffusers(tmp_path, fields, expected):
  (tmp_path / "config.json").write_text(json.dumps(fields))
  assert files.diffusers_options(tmp_path / "vae.safetensors") == expected


@pytest.mark.parametrize(
  "fields",
  [{"scaling_factor": True}, {"shift_factor": "0.5"}, {"norm_num_groups": 16.5}],
)
def test_a_damaged_config_of_diffusers(tmp_path, fields):
  (tmp_path / "config.json").write_text(json.dumps(fields))
  with pytest.raises(UserError, match=f"config.json is damaged: .*{next(iter(fields))}"):
    files.diffusers_options(tmp_path / "vae.safetensors")
