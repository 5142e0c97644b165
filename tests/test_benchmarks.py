"""The forms that benchmarks compare must compute the same, and counts be right."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from benchmarks import official_step
from benchmarks.flops import flops, least
from benchmarks.lookup import materialised
from benchmarks.train_step import minimum
from benchmarks.update import CASES, make_trainer
from coda_jax.ops.codebook_lookup import attention_lookup
from tests.ops.test_codebook_lookup import assert_equal, inputs, value_and_grad


def test_materialised_lookup_is_the_streamed_one():
  x, cotangents = inputs(24, 100)
  theirs, ours = (value_and_grad(f, cotangents)(*x) for f in (materialised, attention_lookup))
  assert_equal(ours, theirs)


def convolve(x, kernel, stride=1, padding=((1, 1), (1, 1))):
  numbers = ("NHWC", "HWIO", "NHWC")
  return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=numbers)


def test_flops_of_convolutions():
  """Two for every multiplication with an element of the image; 3 taps on 8 pixels meet 22."""
  x, kernel = jnp.zeros((2, 8, 8, 4)), jnp.zeros((3, 3, 4, 16))
  cost = 2 * 2 * 22 * 22 * 4 * 16
  assert flops(convolve, x, kernel) == cost
  assert flops(lambda x: convolve(x, kernel, 2, ((0, 1), (0, 1))), x) == 2 * 2 * 11 * 11 * 4 * 16
  for stride, forward in ((1, cost), (2, 2 * 2 * 11 * 11 * 4 * 16)):
    loss = lambda x, k: jnp.square(convolve(x, k, stride)).sum()  # noqa: B023
    assert flops(jax.grad(loss, argnums=(0, 1)), x, kernel) == 3 * forward
    assert flops(jax.grad(loss), x, kernel) == 2 * forward
    assert [*least(loss, x, kernel)] == [forward, forward]
    assert [*least(lambda both: loss(*both), (x, kernel))] == [forward, 2 * forward]  # noqa: B023


def test_flops_of_products():
  a, b = jnp.zeros((5, 3, 7)), jnp.zeros((5, 7, 2))
  product = 2 * 5 * 3 * 7 * 2
  assert flops(jnp.matmul, a, b) == product
  # What nothing uses is free; a scan counts its length, a branch the dearest way.
  assert flops(jax.jit(lambda a, b: (a @ b, a)[1]), a, b) == 0
  assert flops(lambda a, b: lax.map(lambda x: x[0] @ x[1], (a, b)), a, b) == product
  assert (
    flops(lambda a, b: lax.cond(a.sum() > 0, jnp.matmul, lambda a, b: 0 * a[..., :2], a, b), a, b)
    == product
  )


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_flops_of_an_update(case):
  """Without rematerialisation an update takes at most 5% more than the plain form's least."""
  trainer = make_trainer(case, remat="none")
  images = jax.ShapeDtypeStruct((1, 1, 256, 256, 3), jnp.uint8)
  with jax.set_mesh(trainer.mesh):
    args = trainer.abstract_state(), trainer._frozen, trainer._key, images
    ratio = flops(trainer._keyed_update, *args) / sum(minimum(trainer).values())
  assert 0.9 < ratio < 1.05


def run_official(checkout: pathlib.Path) -> str:
  """What the official step says to stderr in an interpreter without packages."""
  command = [sys.executable, "-S", official_step.__file__, str(checkout), "mar", "1"]
  done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
  assert done.returncode == 1 and not done.stdout
  return done.stderr


def test_official_step_names_what_is_missing(tmp_path):
  config = official_step.SHARED_FILES[0]
  assert run_official(tmp_path) == (
    f"{tmp_path} is no checkout of LeapLabTHU/CODA: it lacks {tmp_path / 'tokenizer' / config}\n"
  )
  for name in (*official_step.SHARED_FILES, *official_step.FILES["mar"]):
    path = tmp_path / "tokenizer" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
  said = run_official(tmp_path)
  assert said.count("\n") == 1 and "has no torch" in said and "--official-python" in said
