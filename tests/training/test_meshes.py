"""Updates on every mesh of 8 devices against one device, and what the devices exchange."""

import dataclasses
import re

import jax
import numpy as np
import optax
import pytest

from coda_jax import config as c
from coda_jax import sharding, tokenize_dataset, weights
from coda_jax.training.maskgit_trainer import MaskGITTrainer
from coda_jax.training.tokenizer_trainer import TokenizerTrainer
from tests import tiny
from tests.collectives import collectives
from tests.training import runs

MESHES = [(2, 2, 2), (8, 1, 1), (4, 1, 2), (1, 1, 8)]
CODES = 512


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("meshes")
  runs.make_inputs(folder)
  quantizer = dataclasses.replace(tiny.QUANTIZER, codebook_size=CODES)
  tokenizer = tiny.tokenizer(dataclasses.replace(tiny.TOKENIZER, quantizer=quantizer))
  weights.save_tokenizer(tokenizer, folder / "tokenizer")
  words = ["--tokenizer", "tokenizer", "--data", "folder:images@train", "--output", "tokens"]
  words = [str(folder / w) if w in ("tokenizer", "tokens") else w for w in words]
  words[3] = f"folder:{folder}/images@train"
  tokenize_dataset.run(tokenize_dataset.parser().parse_args(words))
  return folder


def tokenizer_config(folder, **changes):
  settings = runs.config(folder, tokenizer__quantizer__codebook_size=CODES, **changes)
  return dataclasses.replace(settings, trainable=(("LoRAParam", ""), ("Param", r"^quantizer\.")))


def maskgit_config(folder, embedding="codes", **changes):
  settings = c.MaskGITTrainConfig(
    data=c.TokenDataSettings(
      tokenizer=str(folder / "tokenizer"), train=str(folder / "tokens"), batch_size=8
    ),
    model=c.MaskGITSettings(width=32, depth=2, heads=2, embedding=embedding),
    steps=10,
    dtype="float32",
    optimizer=dataclasses.replace(c.MaskGITTrainConfig.optimizer, warmup_steps=0, clip=1e6),
  )
  return c.changed(settings, **changes)


TRAINERS = {
  "tokenizer": (TokenizerTrainer, tokenizer_config),
  "maskgit": (MaskGITTrainer, maskgit_config),
  "maskgit, table": (MaskGITTrainer, lambda *a, **k: maskgit_config(*a, embedding="table", **k)),
}


def make(kind, folder, mesh=(1, 1, 1), **changes):
  trainer, config = TRAINERS[kind]
  axes = dict(zip(("mesh__data", "mesh__fsdp", "mesh__model"), mesh, strict=True))
  settings = config(folder, **axes, **changes)
  devices = jax.devices()[: int(np.prod(mesh))]
  return trainer(settings, sharding.make_mesh(settings.mesh, devices))


def updates(trainer, count=5):
  """(first moments after the first update, losses, the compiled update's text)."""
  with jax.set_mesh(trainer.mesh):
    state, batches, losses = trainer.initial_state(), trainer.batches(0), []
    for i in range(count):
      batch = next(batches)
      if i == 0:
        lowered = trainer._step.lower(state, trainer._frozen, trainer._key, batch)
        step = lowered.compile()
      state, metrics = step(state, trainer._frozen, trainer._key, batch)
      losses.append(float(metrics["loss"]))
      if i == 0:
        adam = next(s for s in state.optimizer if isinstance(s, optax.ScaleByAdamState))
        first = jax.device_get(adam.mu)
    batches.close()
  return first, losses, step.as_text()


@pytest.fixture(scope="module")
def of_one_device(folder):
  found = {}

  def get(kind):
    if kind not in found:
      found[kind] = updates(make(kind, folder))
    return found[kind]

  return get


@pytest.mark.parametrize(
  ("kind", "mesh"),
  [
    # The mesh of `make test` has all three axes.
    pytest.param(kind, mesh, marks=[pytest.mark.slow] * ((kind, mesh) != ("tokenizer", MESHES[0])))
    for kind in TRAINERS
    for mesh in MESHES
  ],
)
def test_every_mesh_computes_the_same(folder, of_one_device, kind, mesh):
  expected, losses, _ = of_one_device(kind)
  trainer = make(kind, folder, mesh)
  ours, losses8, text = updates(trainer)
  largest = max(np.abs(x).max() for x in expected.values())
  for name, gradient in expected.items():
    assert np.abs(gradient - ours[name]).max() <= 1e-5 * largest, name
  np.testing.assert_allclose(losses8, losses, rtol=1e-4)
  check_collectives(trainer, text)


def check_collectives(trainer, text):
  """No loop exchanges anything, and nothing is gathered against the rules.

  Parameters that a rule spreads over fsdp are gathered where they are used. Codes that lie over
  model never are, and neither are logits.
  """
  found = collectives(text)
  loops = [one for one in found if one.in_loop and one.elements > 1]  # 1: whether a loop ends
  assert found and not loops, loops
  for one in found:
    assert one.elements < 8 * 16 * CODES, f"logits: {one}"
    if one.kind in ("all-gather", "all-to-all") and trainer.mesh.shape["model"] > 1:
      assert CODES not in map(int, re.findall(r"\d+", one.shapes)), f"all codes: {one}"


@pytest.mark.parametrize(
  "rule", [("", "model"), pytest.param(("fsdp", ""), marks=pytest.mark.slow)]
)
def test_a_wrong_rule_gathers_the_codebook(folder, rule):
  """Codes belong over model; split in any other way every device fetches all of them."""
  rules = ((r"quantizer\.codebook$", rule),)
  trainer = make("tokenizer", folder, (1, 4, 2), mesh__rules=rules)
  *_, text = updates(trainer, count=1)
  with pytest.raises(AssertionError, match="all codes"):
    check_collectives(trainer, text)


@pytest.mark.parametrize("kind", TRAINERS)
def test_rules_hold_for_averages_and_moments_too(folder, kind):
  trainer = make(kind, folder, (2, 2, 2))
  state = trainer._state_shardings
  adam = next(s for s in state.optimizer if isinstance(s, optax.ScaleByAdamState))
  for name, place in state.params.items():
    assert place == state.ema[name] == adam.mu[name] == adam.nu[name]
  frozen = trainer._shardings(trainer._frozen)
  codes = {"tokenizer": "quantizer.codebook", "maskgit, table": "embedding.embedding"}
  place = state.params[codes[kind]] if kind in codes else frozen["codes"]["embedding.codes"]
  assert place.spec[0] == "model"
  kernels = [p for n, p in state.params.items() if n.endswith((".kernel", ".lora_down"))]
  assert any("fsdp" in p.spec for p in kernels)
