"""Exports functions for machines that are not there."""

import jax
from jax import export

from tests.conftest import assert_close

PLATFORMS = ("cpu", "cuda", "tpu")


def exported(function, *args):
  """The program of each platform, all traced here."""
  return {p: export.export(jax.jit(function), platforms=[p])(*args) for p in PLATFORMS}


def check(function, *args, tolerance=1e-5):
  """Every platform has a program of its own, and that of the CPU computes what a call does."""
  programs = exported(function, *args)
  assert {p: x.platforms for p, x in programs.items()} == {p: (p,) for p in PLATFORMS}
  found, expected = programs["cpu"].call(*args), jax.jit(function)(*args)
  for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    assert_close(a, b, tolerance)
  return {p: x.mlir_module() for p, x in programs.items()}
