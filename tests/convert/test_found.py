"""Published files as they are found: wrappers, averages, prefixes, shards and folders."""

import argparse
import collections
import json
import logging
import pathlib
import pickle as python_pickle

import numpy as np
import pytest
import safetensors.numpy

import convert
from coda_jax import weights
from coda_jax.errors import UserError
from convert import files
from tests.convert.test_convert import (
  GOLDENS,
  QUANTIZER,
  SMALL,
  SMALL_LORA,
  checkpoint,
  command,
  full_size,
  save,
  small_state,
)
from tests.goldens import values

STATE = small_state()
AVERAGED = {k: v + 1 for k, v in STATE.items()}
PROBE = "decoder.conv_in.bias"  # the same in their keys and ours
BESIDE = {
  "optimizer": {"state": {0: {"exp_avg": np.zeros(3)}}, "param_groups": [{"lr": 0.1}]},
  "lr_scheduler": {"milestones": collections.Counter({3: 1})},
  "discriminator": {"conv.main.weight": np.zeros(3)},
  "steps": 7,
  "config": {"ch": 128},
}
DDP = {f"module.{k}": v for k, v in AVERAGED.items()}


def under(prefix, state):
  return {f"{prefix}{k}": v for k, v in state.items()}


def taken(state, layout="mar-vae", **options):
  """How much the weights that were taken lie above STATE's."""
  _, flat = convert.to_flat(layout, state, **options)
  difference = flat[PROBE] - STATE[PROBE]
  assert np.ptp(difference) < 1e-5
  return round(float(difference[0]))


@pytest.fixture
def lines(caplog):
  """The log's lines so far."""
  caplog.set_level(logging.INFO, "coda_jax")
  return lambda: [r.getMessage() for r in caplog.records]


@pytest.mark.parametrize(
  "state",
  [
    {"model": STATE, "ema": AVERAGED, **BESIDE},
    {"model": STATE, "model_ema": AVERAGED, "epoch": 3, "scaler": {}, "args": {"lr": 1}},
    {"state_dict": STATE, "ema_state_dict": AVERAGED},
    {"model": STATE, "ema": DDP},
    {"model": {"module": STATE}, "ema_model": {"module": AVERAGED, "n_averaged": 3}},
    {"model": STATE, "ema": {"decay": 0.999, "num_updates": 3, "shadow": AVERAGED}},
    {"model": STATE, "ema": {"decay": np.float32(0.9), "updates": 2, "state_dict": AVERAGED}},
    {"params": STATE, "params_ema": AVERAGED},
    {"vae": STATE, "vae_ema": AVERAGED, "discriminator_ema": {"a.b": np.ones(2)}},
    {"model": STATE, "model_ema": AVERAGED, "ema_vgg": {"a.b": np.ones(2)}},
    {"generator_ema": AVERAGED, "generator": STATE, **BESIDE},
    {"model": STATE, "ema_0.999": AVERAGED},
    under("online_model.", STATE) | under("ema_model.", AVERAGED) | {"initted": True, "step": 3},
    STATE | under("ema.", AVERAGED),
    STATE | under("ema.module.", AVERAGED),
    under("model.", STATE) | under("model_ema.module.", AVERAGED),
    STATE | {"model_ema." + k.replace(".", ""): v for k, v in AVERAGED.items()},
    {"state_dict": STATE | {"model_ema." + k.replace(".", ""): v for k, v in AVERAGED.items()}},
  ],
  ids=range(18),
)
def test_averaged_weights_are_taken_unless_the_others_are_asked_for(lines, state):
  assert taken(state) == 1
  assert any("took the averaged weights" in line for line in lines())
  assert taken(state, ema=False) == 0
  assert "not averaged" in lines()[-1]


@pytest.mark.parametrize("ema", [None, True, 0.999, {"decay": 0.999}, {}, [0.9, 0.99]])
def test_what_is_called_ema_and_holds_no_weights_is_passed_over(lines, ema):
  assert taken({"model": STATE, "ema": ema, "ema_decay": 0.9, "model_ema": None}) == 0
  assert not lines()


@pytest.mark.parametrize(
  ("state", "options", "message"),
  [
    ({"ema": AVERAGED}, {"ema": False}, "averaged weights alone .'ema'.; leave out --no-ema"),
    ({"ema": AVERAGED, "surprise": 1}, {}, "unknown beside 'ema': surprise"),
    ({"model": STATE, "ema": AVERAGED, "x": {"a.b": np.ones(2)}}, {}, "unknown beside 'model': x"),
    (
      {"model": STATE, "ema": {"decay": 0.9, "shadow_params": [np.ones(3)]}},
      {},
      "'ema.shadow_params' lists averaged weights without their names; --no-ema takes 'model'",
    ),
    ({"model": STATE, "ema_params": [np.ones(3)]}, {}, "'ema_params' lists averaged weights"),
    (
      {"model": STATE, "ema_fast": AVERAGED, "ema_slow": AVERAGED},
      {},
      "several averages .'ema_fast', 'ema_slow'.; save one",
    ),
    (under("vae.", STATE) | under("first_stage_model.", STATE), {}, "several VAEs"),
  ],
)
def test_an_unclear_choice_is_one_line(state, options, message):
  with pytest.raises(UserError, match=message) as e:
    convert.to_flat("mar-vae", state, **options)
  assert "\n" not in str(e.value)


def test_another_network_is_no_average(lines):
  """A part of the network, or its teacher, is extra as before."""
  for name in ("ema_vgg.conv.weight", "teacher.blocks.0.weight"):
    with pytest.raises(UserError, match=f"is not MAR's KL-16 VAE: extra {name}$"):
      convert.to_flat("mar-vae", STATE | {name: np.ones(2)})
  with pytest.raises(UserError, match="unknown beside 'model': teacher"):
    convert.to_flat("mar-vae", {"model": STATE, "teacher": AVERAGED})
  assert not lines()


def test_averaged_weights_alone_are_taken():
  assert taken({"ema": AVERAGED, **BESIDE}) == 1
  assert taken({"ema": AVERAGED, "model": None}) == 1


def test_numbers_may_lie_beside_bare_weights():
  assert taken(STATE | {"epoch": 3, "global_step": 5, "config": {"ch": 32}}) == 0
  with pytest.raises(UserError, match=r"entries that are no tensors: surprise \(int\)$"):
    taken(STATE | {"epoch": 3, "surprise": 5})
  with pytest.raises(UserError, match="holds a list; a dict of tensors is needed"):
    taken([STATE])


def test_lists_do_not_matter_where_the_others_are_asked_for():
  assert taken({"model": STATE, "ema": {"shadow_params": [np.ones(3)]}}, ema=False) == 0


@pytest.mark.parametrize("prefix", ["vae.", "first_stage_model.", "module.vae.", "model.vae."])
def test_a_vae_among_other_networks(lines, prefix):
  outer = prefix.rpartition(".")[0].rpartition(".")[0]
  outer = f"{outer}." if outer else ""
  others = under(outer, {"unet.in.weight": np.ones(3), "unet_ema.x.weight": np.ones(3)})
  assert taken(under(prefix, STATE)) == 0
  assert not lines()
  assert taken(under(prefix, STATE) | others) == 0
  assert lines() == [
    f"mar-vae: took the entries under '{prefix.split('.')[-2]}.'; 2 others are left out"
  ]


def test_a_checkpoint_of_stable_diffusions_form(lines):
  state = under("first_stage_model.", STATE)
  state |= {
    "model.diffusion_model.in.weight": np.ones(3),
    "model_ema.diffusion_modelin": np.ones(3),
  }
  state |= {"cond_stage_model.a.weight": np.ones(3), "alphas_cumprod": np.ones(3)}
  assert taken({"state_dict": state, "global_step": 3, "callbacks": {}}) == 0
  assert "4 others" in lines()[-1]


def test_the_quantizer_and_the_vae_of_a_coda_checkpoint_may_be_wrapped(tmp_path):
  folder = tmp_path / "source"
  folder.mkdir()
  vae, quantizer = small_state("mar", SMALL_LORA), values.state_dict(GOLDENS, QUANTIZER)
  for name, state in (("vae_ema.pth", vae), ("quantizer_ema.pth", quantizer)):
    more = {k: v + 1 for k, v in state.items()}
    (folder / name).write_bytes(python_pickle.dumps({"model": state, "ema": more, "step": 1}))
  options = {"patch_sizes": (8,), "image_size": 16}
  convert.convert("coda-mar", [folder], tmp_path / "out", **options)
  codebook = weights.read_arrays(tmp_path / "out")["quantizer.codebook"]
  np.testing.assert_array_equal(codebook, quantizer["codebooks.weight"] + 1)


def test_a_full_checkpoint_of_dinos_training():
  state = full_size("dino_deitsmall16")
  heads = {"head.mlp.0.weight": np.ones((2, 2)), "head.last_layer.weight": np.ones((2, 2))}
  student = under("module.backbone.", state) | under("module.", heads)
  teacher = under("backbone.", {k: v + np.float32(k == "cls_token") for k, v in state.items()})
  rest = {"optimizer": {"state": {}}, "epoch": 3, "args": {}, "fp16_scaler": None}
  rest |= {"dino_loss": {"center": np.zeros(3)}}
  whole = {"student": student, "teacher": teacher | heads, **rest}
  for options, expected in (({}, 1), ({"ema": False}, 0)):
    assert convert.to_flat("dino", whole, **options)[1]["cls_token"][0] == expected


@pytest.mark.parametrize("protocol", [2, 4])
def test_options_of_a_training_script_are_passed_over(tmp_path, protocol):
  args = argparse.Namespace(lr=0.1, output_dir=pathlib.Path("out"), sizes=collections.Counter("a"))
  groups = collections.defaultdict(dict, {"a": {"lr": 1}})
  file = tmp_path / "vae.pth"
  whole = {"model": STATE, "args": args, "optimizer": groups, "epoch": 1}
  file.write_bytes(python_pickle.dumps(whole, protocol))
  assert taken(files.read(file)) == 0
  assert files.read(file)["args"] == {}
  assert files.read(file)["optimizer"] == {"a": {"lr": 1}}


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


def test_home_is_expanded(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  checkpoint(tmp_path / "source")
  options = {"patch_sizes": (8,), "image_size": 16}
  convert.convert("coda-mar", ["~/source"], "~/out", **options)
  convert.to_torch("~/out", pathlib.Path("~/torch"))
  assert (tmp_path / "torch" / "vae_ema.pth").is_file()
  with pytest.raises(UserError, match=f"{tmp_path}/out exists and is not empty"):
    convert.convert("coda-mar", ["~/source"], "~/out", **options)


@pytest.mark.parametrize(
  ("words", "code", "message"),
  [
    (("--scale", "nan"), 1, "scale is nan"),
    (("--scale=-inf",), 1, "scale is -inf"),
    (("--scale", "0"), 1, "scale is 0"),
    (("--scale", "1e-50"), 1, "scale is 1e-50"),
    (("--shift", "nan"), 1, "shift is nan"),
    (("--norm-groups", "0"), 1, "norm_groups is 0; it must be at least 1"),
    (("--norm-groups", "-32"), 1, "norm_groups is -32; it must be at least 1"),
    (("--norm-groups", "7"), 1, "vae.ch is 32, not a multiple of norm_groups=7"),
    (("--patch-sizes", ""), 2, "no list of sizes"),
    (("--patch-sizes", "1,,8"), 2, "no list of sizes"),
    (("--patch-sizes", "0,8"), 1, "patch sizes are 0,8; give sides of at least 1 that increase"),
    (("--patch-sizes", "-1,8"), 2, "expected one argument"),
    (("--patch-sizes=-1,8",), 1, "patch sizes are -1,8"),
    (("--patch-sizes", "2,1,8"), 1, "that increase"),
    (("--patch-sizes", "1,8,8"), 1, "that increase"),
    (("--patch-sizes", "1,9"), 1, "must end with 8"),
    (("--image-size", "0"), 1, "image size is 0"),
    (("--image-size", "-16"), 1, "image size is -16"),
    (("--image-size", "17"), 1, "17x17 is not a multiple"),
  ],
)
def test_options_out_of_range(tmp_path, monkeypatch, capsys, words, code, message):
  folder = checkpoint(tmp_path / "source")
  usual = [] if "--patch-sizes" in words[0] else ["--patch-sizes", "1,8"]
  usual += [] if words[0] == "--image-size" else ["--image-size", "16"]
  all_words = ("coda-mar", folder, "--output", tmp_path / "out", *usual, *words)
  found, line = command(monkeypatch, capsys, *all_words)
  assert (found, message in line) == (code, True), line
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sizes", [(), (1.5, 8), "1,8", (1, None)])
def test_patch_sizes_from_python(tmp_path, sizes):
  folder = checkpoint(tmp_path / "source")
  with pytest.raises(UserError, match="the patch sizes are"):
    convert.convert("coda-mar", [folder], tmp_path / "out", patch_sizes=sizes)
