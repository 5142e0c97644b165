"""What brings images through tokens, or latents, and back: the entries of an evaluation."""

import dataclasses
import importlib.util
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from coda_jax import sharding, storage, weights
from coda_jax.arrays import jit_module
from coda_jax.data.pipeline import normalize
from coda_jax.errors import UserError, one_line
from coda_jax.evaluation.image_files import sha256
from coda_jax.evaluation.reconstruction import BatchResult, frozen_vae, reconstruct_batch
from coda_jax.models.tokenizer import Tokenizer
from coda_jax.models.vae import AutoencoderKL

# Images in [-1, 1] and the number of the first, to their reconstructions.
Reconstruct = Callable[[Float[np.ndarray, "b h w 3"], int], BatchResult]


@dataclasses.dataclass(frozen=True)
class Entry:
  """A tokenizer, a VAE without tokens, or somebody else's tokenizer.

  Attributes:
    name: what results call it; kind: "tokenizer", "vae" or "module"; path: where it is from.
    identity: JSON of all that decides its reconstructions.
    weights: fingerprints by name.
    averaged: whether its weights are a moving average; None if it does not say.
    posterior: "mean" or "sample"; None where there is none, or it is not known.
    codebook_size: V; 0 without tokens or if it is not known.
    levels: tokens of each level, for `levels_of`; () is one level.
    reconstruct: runs it, compiled.
  """

  name: str
  kind: str
  path: str
  identity: Mapping[str, Any]
  weights: Mapping[str, str]
  averaged: bool | None
  posterior: str | None
  codebook_size: int
  levels: Sequence[int]
  reconstruct: Reconstruct
  level_codes: Sequence[int] = ()  # codes that the tokens of each level choose from; () is V

  def bits(self, tokens: int) -> float | None:
    """Of an image with so many tokens."""
    if self.level_codes:
      levels = zip(self.levels, self.level_codes, strict=True)
      return sum(n * math.log2(codes) for n, codes in levels)
    return tokens * math.log2(self.codebook_size) if self.codebook_size and tokens else None


def open_entry(
  name: str, path: storage.Path, size: int, *, posterior: str = "mean", seed: int = 0
) -> Entry:
  """The tokenizer or VAE of a directory, or the tokenizer of a Python file.

  Args:
    size: pixels of a side of the images.
    posterior: "mean", or "sample" by `seed`.

  Raises:
    UserError: missing, damaged or foreign files, or a size that does not fit.
  """
  if path.suffix == ".py":
    return _module(name, storage.on_disk(path, "copy the module to a disk"))
  kind = weights.kind_of(path)
  if kind == "tokenizer":
    return _tokenizer(name, path, size, posterior, seed)
  if kind == "vae":
    vae = weights.load_vae(path)
    vae.config.latent_size(size, size)
    hashed = {"vae": weights.fingerprint_of(path, "vae")}
    return _vae(name, vae, str(path), hashed, posterior, seed, weights.is_averaged(path))
  raise UserError(f"{path} holds a {kind!r}; give a tokenizer, a VAE or a Python file")


def image_size(path: storage.Path) -> int | None:
  """The image size that a tokenizer was trained on; None for what has no such size."""
  if path.suffix == ".py" or weights.kind_of(path) == "vae":
    return None
  return weights.read_config(path, "tokenizer")["image_size"]


def _key(posterior: str, seed: int, first: int) -> jax.Array | None:
  return None if posterior == "mean" else jax.random.fold_in(jax.random.key(seed), first)


_through_tokenizer = jit_module(
  lambda tokenizer, x, key=None: reconstruct_batch(tokenizer, x, None, key)
)


def _through_vae_with(vae: AutoencoderKL, x: Float[Array, "b h w 3"], key=None) -> Array:
  posterior = vae.encode(x)
  return vae.decode(posterior.mean if key is None else posterior.sample(key))


_through_vae = jit_module(_through_vae_with)


def _tokenizer(name: str, path: storage.Path, size: int, posterior: str, seed: int) -> Entry:
  tokenizer = weights.load_tokenizer(path)
  latent = tokenizer.config.vae.latent_size(size, size)
  hashed = weights.fingerprint_of(path, "tokenizer")
  return Entry(
    name,
    "tokenizer",
    str(path),
    {"tokenizer": hashed, "posterior": posterior, "seed": None if posterior == "mean" else seed},
    {"tokenizer": hashed},
    weights.is_averaged(path),
    posterior,
    tokenizer.config.quantizer.codebook_size,
    [h * w for h, w in tokenizer.config.quantizer.level_sizes(*latent)],
    _bound(_through_tokenizer(tokenizer), posterior, seed),
    tokenizer.config.quantizer.codes_by_level,
  )


def _bound(function: Callable, posterior: str, seed: int) -> Reconstruct:
  def run(x, first):
    key = _key(posterior, seed, first)
    out = function(sharding.over_local_devices(x), *([] if key is None else [key]))
    return out if isinstance(out, BatchResult) else BatchResult(out)

  return run


def _vae(
  name: str,
  vae: AutoencoderKL,
  path: str,
  hashed: Mapping[str, str],
  posterior: str,
  seed: int,
  averaged: bool | None,
) -> Entry:
  identity = {**hashed, "posterior": posterior, "seed": None if posterior == "mean" else seed}
  run = _bound(_through_vae(vae), posterior, seed)
  return Entry(name, "vae", path, identity, hashed, averaged, posterior, 0, (), run)


def own_vae(path: storage.Path, posterior: str, seed: int) -> Entry:
  """The continuous VAE inside of a tokenizer's directory, without its adapters."""
  tokenizer: Tokenizer = weights.load_tokenizer(path)
  hashed = {"vae of tokenizer": weights.fingerprint_of(path, "tokenizer")}
  return _vae("continuous VAE", frozen_vae(tokenizer), str(path), hashed, posterior, seed, None)


def _module(name: str, path: pathlib.Path) -> Entry:
  """A file's `encode(images)` and `decode(ids)`; images are float32 [B, H, W, 3] in [-1, 1].

  Ids are whole numbers in arrays [B, ...], or a list of such arrays. `codebook_size` may be there.
  """
  if not path.is_file():
    raise UserError(f"{path}: no such file; give a Python file with encode(images) and decode(ids)")
  spec = importlib.util.spec_from_file_location("coda_jax_evaluated", path)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except Exception as e:
    raise UserError(f"{path} cannot be run: {type(e).__name__}: {one_line(e)}") from e
  for function in ("encode", "decode"):
    if not callable(getattr(module, function, None)):
      raise UserError(f"{path} defines no {function}; it needs encode(images) and decode(ids)")
  codes = int(getattr(module, "codebook_size", 0))
  hashed = sha256(path)

  def run(x: np.ndarray, first: int) -> BatchResult:
    ids = module.encode(x)
    made = np.asarray(module.decode(ids))
    if made.shape != x.shape:
      raise UserError(f"{path}: decode gave {list(made.shape)}, not images {list(x.shape)}")
    if made.dtype == np.uint8:
      made = np.asarray(normalize(made))
    levels = ids if isinstance(ids, (list, tuple)) else [ids]
    rows = [np.asarray(level).reshape(len(x), -1) for level in levels]
    if any(level.dtype.kind not in "iu" for level in rows):
      raise UserError(f"{path}: encode gave ids of type {rows[0].dtype}; ids are whole numbers")
    flat = np.concatenate(rows, 1).astype(np.int32)
    if codes and not (flat.min() >= 0 and flat.max() < codes):
      raise UserError(
        f"{path}: ids from {flat.min()} to {flat.max()}, but codebook_size is {codes}"
      )
    return BatchResult(np.asarray(made, np.float32), ids=[flat], codebook_size=codes)

  identity = {"module": hashed}
  return Entry(name, "module", str(path), identity, identity, None, None, codes, (), run)


def flat_ids(result: BatchResult) -> np.ndarray | None:
  """Ids int32 [B, N] of all levels, coarse to fine; None without tokens."""
  if not len(result.ids):
    return None
  rows = [np.reshape(level, (len(level), math.prod(np.shape(level)[1:]))) for level in result.ids]
  return np.concatenate(rows, 1).astype(np.int32)
