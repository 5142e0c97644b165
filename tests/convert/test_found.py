"""Published files as they are found: wrappers, averages and prefixes."""

import argparse
import collections
import logging
import pathlib
import pickle as python_pickle

import numpy as np
import pytest

import convert
from coda_jax import weights
from coda_jax.errors import UserError
from convert import files
from tests.convert.test_convert import (
  GOLDENS,
  QUANTIZER,
  SMALL_LORA,
  full_size,
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
