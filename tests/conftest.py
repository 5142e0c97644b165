"""Shared fixtures: goldens, shape checking, simulated devices.

`pytest tests -m parity --goldens FOLDER` takes goldens from another folder. Without `tests`, pytest
takes a FOLDER outside of the checkout for the place of the tests, and does not find this file.
"""

import json
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")  # commands would fill the user's
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "")
  + " --xla_force_host_platform_device_count=8"
  + " --xla_backend_optimization_level=1"  # most of the tests' time is LLVM's
)

import jax
import jaxtyping
import numpy as np
import pytest

# Shapes written in public signatures are checked in every call that a test makes.
jaxtyping.install_import_hook(["coda_jax"], "beartype.beartype")

from tests.goldens import values  # noqa: E402

GOLDENS = pathlib.Path(__file__).parent / "goldens"
# Another case of the same kind stays in `make test`.
SLOW_GOLDENS = (
  "clip_text",
  "dino_disc_256",
  "inception_256",
  "quantizer_mar_nonorm",
  "mar_vae",
  "train_step_flux",
  "train_step_mar",
  "quantizer_flux_layer",
  "coda_flux_vae",
  "coda_mar_vae",
  "flux_vae_bfl",
  "flux_vae_diffusers",
  "sd_vae_ldm_small",
  "sd3_vae_small",
  "flux2_vae_diffusers_small",
  "flux2_vae_bfl_small",
)


class Golden:
  """One case of `cases.json`: its settings, outputs, and the weights and inputs that made them."""

  def __init__(self, folder: pathlib.Path, name: str, case: dict, salt: str):
    self.folder, self.name, self.case, self.salt = folder, name, case, salt

  def __getitem__(self, key):
    return self.case[key]

  def outputs(self) -> dict[str, np.ndarray]:
    with np.load(self.folder / f"{self.name}.npz") as f:
      return dict(f)

  def state_dict(self, keys: str) -> dict[str, np.ndarray]:
    """The PyTorch checkpoint that `keys_<keys>.json` lists."""
    return values.state_dict(self.folder, keys, self.salt)

  def keys(self, keys: str) -> dict:
    return json.loads((self.folder / f"keys_{keys}.json").read_text())

  def input(self, field: str = "input") -> np.ndarray:
    """The input of the case, as PyTorch holds it (NCHW)."""
    maker, name, shape = self.case[field]
    return getattr(values, maker)(name, tuple(shape), self.salt)


def pytest_addoption(parser):
  parser.addoption(
    "--goldens", type=pathlib.Path, default=GOLDENS, help="folder of golden cases (cases.json)"
  )


def pytest_generate_tests(metafunc):
  if "golden" not in metafunc.fixturenames:
    return
  (kind,) = next(m for m in metafunc.definition.iter_markers("parity")).args
  folder = metafunc.config.getoption("--goldens")
  spec = json.loads((folder / "cases.json").read_text())
  cases = {n: c for n, c in spec["cases"].items() if c["kind"] == kind}
  goldens = [
    pytest.param(
      Golden(folder, n, c, spec.get("salt", "")), marks=[pytest.mark.slow] * (n in SLOW_GOLDENS)
    )
    for n, c in cases.items()
  ]
  metafunc.parametrize("golden", goldens, ids=list(cases))


# Most of the tests' time is compilation.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module")
def optimized():
  """For modules that test what a compiler may change: `usefixtures("optimized")`."""
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", True)


def assert_close(ours, golden, rtol: float, what: str = ""):
  """Largest difference at most `rtol` of the golden array's largest magnitude."""
  ours, golden = np.asarray(ours, np.float64), np.asarray(golden, np.float64)
  assert ours.shape == golden.shape, f"{what}: shape {ours.shape}, golden {golden.shape}"
  worst = np.abs(ours - golden).max() / max(np.abs(golden).max(), 1e-30)
  assert worst <= rtol, f"{what}: differs by {worst:.2e} of the largest magnitude, allowed {rtol}"
