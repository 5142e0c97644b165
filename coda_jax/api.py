"""What `import coda_jax` gives: models that take images as people have them and compile themselves.

The modules of `coda_jax.models` are for use under `jax.jit`. The classes here are the same modules;
called outside of a transformation, their methods bring images into form, pad the batch to a size
that is compiled once, and run compiled. Under `nnx.jit` and the like they are the plain methods.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Int
from PIL import Image

from coda_jax import arrays, hub, weights
from coda_jax.data.decode import UnreadableImage, decode_image, to_rgb
from coda_jax.data.pipeline import normalize
from coda_jax.errors import UserError
from coda_jax.evaluation.image_quality import to_uint8
from coda_jax.generation import generator
from coda_jax.models import tokenizer as plain_tokenizer
from coda_jax.models import vae as plain_vae
from coda_jax.models.inputs import check_ids, check_images, check_latents
from coda_jax.models.lora import merge_lora
from coda_jax.models.vae import Posterior

Images = Any  # a picture, a path, an array, or a list of those; see `as_images`
save_tokenizer, save_vae = weights.save_tokenizer, weights.save_vae
push = hub.push


def as_images(images: Images) -> np.ndarray | jax.Array:
  """A batch of images, floats [B, H, W, 3] in [-1, 1].

  Args:
    images: a PIL image, the path of an image file, an array, or a list of them, all of one size.
      Arrays are [H, W, 3] or [B, H, W, 3], uint8 or floats in [-1, 1]. A single image is a batch
      of one. Grey, 16-bit and transparent images become RGB as `data.decode` does it.

  Raises:
    UserError: no image, an unreadable file, or images of several sizes.
  """
  if isinstance(images, (list, tuple)):
    parts = [as_images(x) for x in images]
    sizes = {x.shape[1:3] for x in parts}
    if len(sizes) != 1:
      found = ", ".join(sorted(f"{w} x {h}" for h, w in sizes)) or "none at all"
      raise UserError(f"images of one size are needed, not {found}; resize or crop them")
    return np.concatenate(parts) if len(parts) > 1 else parts[0]
  if isinstance(images, (str, os.PathLike)):
    return _pixels(_read(pathlib.Path(images).expanduser()))
  if isinstance(images, Image.Image):
    try:
      return _pixels(to_rgb(images))
    except UnreadableImage as e:
      raise UserError(f"an image of mode {images.mode}: {e}") from e
  if not isinstance(images, (np.ndarray, jax.Array)) and hasattr(images, "__array__"):
    images = np.asarray(images)
  if isinstance(images, (np.ndarray, jax.Array)):
    if images.ndim == 3 and images.shape[2] == 3:
      images = images[None]
    if images.dtype == np.uint8:
      images = normalize(images)
  check_images(images)
  return images


def to_pil(images: Array | np.ndarray) -> list[Image.Image]:
  """PIL images of floats [B, H, W, 3] in about [-1, 1], clamped and rounded to bytes."""
  check_images(images)
  return [Image.fromarray(x) for x in to_uint8(np.asarray(images), "nearest")]


def _read(file: pathlib.Path) -> Image.Image:
  if file.is_dir():
    raise UserError(f"{file} is a folder; list its files, sorted(folder.glob('*.png'))")
  try:
    return decode_image(file.read_bytes())
  except OSError as e:
    raise UserError(f"{file}: {e.strerror}") from e
  except UnreadableImage as e:
    raise UserError(f"{file} is no readable image: {e}") from e


def _pixels(image: Image.Image) -> np.ndarray:
  return normalize(np.asarray(image)[None])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(function: Callable, graphdef, options: tuple, params, inputs):
  return function(arrays.merge(graphdef, params), *inputs, **dict(options))


_compiled: set[tuple] = set()


def _call(function: Callable, module: nnx.Module, *inputs, key=None, **options):
  """`function(module, *inputs, **options)`, compiled once for each padded batch; see `_padded`.

  The first of the inputs, an array or a list of arrays, has the batch in front. A random `key` goes
  behind them; the batch is then not padded, since random numbers depend on its shape.
  """
  first = jax.tree.leaves(inputs[0])
  batch, options = len(first[0]), tuple(sorted(options.items()))
  if key is None:
    inputs = jax.tree.map(functools.partial(_padded, to=arrays.padded_size(batch)), inputs)
  else:
    inputs = *inputs, key
  graphdef, params = arrays.split(module)
  shapes = tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves(inputs))
  with _told(function.__name__, (function, graphdef, options, shapes)):
    out = _run(function, graphdef, options, params, inputs)
  return jax.tree.map(lambda x: x[:batch] if len(x) != batch else x, out)


def _padded(x, to: int):
  """`x` with its last row repeated up to `to` rows."""
  x = jnp.asarray(x)
  return jnp.concatenate([x, jnp.repeat(x[-1:], to - len(x), 0)]) if to > len(x) else x


@contextlib.contextmanager
def _told(name: str, program: tuple) -> Iterator[None]:
  """Tells a person that the first call for a shape compiles."""
  new = program not in _compiled
  shown = new and (sys.stderr.isatty() or "ipykernel" in sys.modules)
  if shown:
    shape = program[-1][0][0]
    text = f"compiling {name} for {' x '.join(map(str, shape))}, once; seconds to a minute ..."
    print(text, end="", file=sys.stderr, flush=True)
  start = time.monotonic()
  yield
  _compiled.add(program)
  if shown:
    print(f" {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def _traced(*values) -> bool:
  """Whether a method runs inside of a transformation: some array is a tracer."""
  return any(isinstance(x, Tracer) for x in jax.tree.leaves(values))


class AutoencoderKL(plain_vae.AutoencoderKL):
  """A continuous VAE; see `coda_jax.models.vae`."""

  def encode(self, images: Images) -> Posterior:
    """The posterior of images: `.mean` and `.logvar`, raw latents [B, h, w, z]."""
    if _traced(self, images):
      return super().encode(images)
    images = as_images(images)
    self.config.latent_size(*images.shape[1:3])
    return _call(plain_vae.AutoencoderKL.encode, self, images)

  def decode(self, z: Any) -> Array:
    """Images, about [-1, 1], of raw latents [B, h, w, z]."""
    if _traced(self, z):
      return super().decode(z)
    check_latents(z, self.config.z_channels)
    return _call(plain_vae.AutoencoderKL.decode, self, z)

  def reconstruct(self, images: Images) -> Array:
    """Images through the posterior's mean and back."""
    return self.decode(self.encode(images).mean)

  def __repr__(self) -> str:
    c = self.config
    return (
      f"AutoencoderKL({c.downsampling}x downsampling, {c.z_channels} channels, "
      f"ch {c.ch} x {c.ch_mult}, {jnp.dtype(self.dtype).name})"
    )

  __str__ = __repr__


class Tokenizer(plain_tokenizer.Tokenizer):
  """A discrete tokenizer; see `coda_jax.models.tokenizer`."""

  @property
  def token_shape(self) -> tuple[tuple[int, int], ...]:
    """Rows and columns of tokens of each level, coarse to fine, at the training size."""
    return tuple((p, p) for p in self.config.quantizer.patch_sizes)

  @property
  def tokens_per_image(self) -> int:
    """Tokens of an image of the training size."""
    return sum(h * w for h, w in self.token_shape)

  @property
  def codebook_size(self) -> int:
    """Codes; ids are 0 to one less."""
    return self.config.quantizer.codebook_size

  @property
  def bits_per_image(self) -> float:
    """Sum over the tokens of log2 of how many codes each chooses from."""
    return self.config.quantizer.bits

  def latents(self, images: Images, key: jax.Array | None = None) -> Array:
    """Scaled continuous latents [B, h, w, z]: the posterior's mean, or a sample with a `key`."""
    if _traced(self, images, key):
      return super().latents(images, key)
    return _call(plain_tokenizer.Tokenizer.latents, self, self._images(images), key=key)

  def encode(self, images: Images, key: jax.Array | None = None) -> list[Array]:
    """Ids of images, one int32 [B, ph, pw] per level, coarse to fine; see `as_images`."""
    if _traced(self, images, key):
      return super().encode(images, key)
    return _call(plain_tokenizer.Tokenizer.encode, self, self._images(images), key=key)

  def quantize(self, latents: Any) -> list[Array]:
    """Ids of scaled latents [B, h, w, z], as `encode` gives them."""
    if _traced(self, latents):
      return self.quantizer.encode(latents)
    check_latents(latents, self.config.quantizer.channels)
    return _call(_quantize, self, latents)

  def decode(self, ids: Any, size: Any = None) -> Array:
    """Images, about [-1, 1], of ids: grids of all or of the first levels, or rows [B, N].

    Args:
      ids: as `encode` or `flatten` gives them.
      size: height and width in pixels, or both at once, if it is not the training size.
    """
    if _traced(self, ids):
      return super().decode(ids, size)
    if not isinstance(ids, (list, tuple)):
      ids = self.unflatten(ids, size)
    check_ids(ids, self.config.quantizer.ranges)
    if size is not None and not isinstance(size, int):
      size = tuple(size)
    return _call(plain_tokenizer.Tokenizer.decode, self, list(ids), size=size)

  def reconstruct(
    self, images: Images, levels: int | None = None, key: jax.Array | None = None
  ) -> Array:
    """Images through all levels of tokens, or the first `levels`, and back."""
    if _traced(self, images, key):
      return super().reconstruct(images, levels, key)
    images = self._images(images)
    return self.decode(self.encode(images, key)[:levels], images.shape[1:3])

  def flatten(self, ids: Sequence[Array | np.ndarray]) -> Int[np.ndarray, "b n"]:
    """Ids of all levels in one row an image, coarse to fine, each level row by row."""
    check_ids(ids, self.config.quantizer.ranges)
    return np.concatenate([np.asarray(x).reshape(len(x), -1) for x in ids], 1)

  def unflatten(self, rows: Any, size: Any = None) -> list[np.ndarray]:
    """Grids of rows [B, N]; inverse of `flatten`. N may hold the first levels alone.

    Args:
      size: as for `decode`.

    Raises:
      UserError: N is not that of the first k levels.
    """
    rows = np.asarray(rows)
    size = self.config.image_size if size is None else size
    latent = self.config.vae.latent_size(*((size, size) if isinstance(size, int) else size))
    shapes = self.config.quantizer.level_sizes(*latent)
    ends = np.cumsum([h * w for h, w in shapes]).tolist()
    if rows.ndim != 2 or rows.shape[1] not in ends:
      raise UserError(
        f"ids of shape {list(rows.shape)}; rows [B, N] are needed with N = {ends[-1]}, or the first"
        f" levels' {', '.join(map(str, ends[:-1]))}"
      )
    count = ends.index(rows.shape[1]) + 1
    parts = np.split(rows, ends[: count - 1], 1)
    return [x.reshape(-1, h, w) for x, (h, w) in zip(parts, shapes, strict=False)]

  def merge_lora(self) -> "Tokenizer":
    """The same tokenizer without adapters: they are folded into a copy of the VAE's weights."""
    copy = nnx.clone(self)
    merge_lora(copy.vae)
    copy.config = dataclasses.replace(self.config, lora=None)
    return copy

  def _images(self, images: Images) -> np.ndarray | jax.Array:
    images = as_images(images)
    self.config.vae.latent_size(*images.shape[1:3])
    return images

  def __repr__(self) -> str:
    c, q = self.config, self.config.quantizer
    lora = f"LoRA of rank {c.lora.rank}" if c.lora else "no LoRA"
    return (
      f"Tokenizer({c.image_size} x {c.image_size} images, {self.tokens_per_image} tokens in "
      f"{len(q.patch_sizes)} levels, {q.codebook_size} codes ({q.lookup}), "
      f"{self.bits_per_image:,.0f} bits; {c.vae.downsampling}x VAE, {lora})"
    )

  __str__ = __repr__


class Generator(generator.Generator):
  """A MaskGIT and its tokenizer; see `coda_jax.generation.generator`."""

  def generate(
    self, classes=None, steps: int = 8, key=None, *, prompts=None, negative_prompts=None, **others
  ) -> Array:
    """One image of each class or prompt, about [-1, 1]; see the plain generator.

    The batch is padded to a size that compiles once.
    """
    wanted = self.asked(classes, prompts)
    count = len(wanted)
    more = [None] * (arrays.padded_size(count) - count) if count else []
    if negative_prompts is not None and not isinstance(negative_prompts, str):
      negative_prompts = [*negative_prompts, *more]
    how = {self.conditions.keyword: [*wanted, *more], "negative_prompts": negative_prompts}
    return super().generate(steps=steps, key=key, **how, **others)[:count]

  def encode(self, images: Images) -> Array:
    """Ids [B, N] of images of the training size."""
    return super().encode(as_images(images))

  def inpaint(self, images: Images, mask, *args, **settings):
    """Images with the pixels of the mask made anew; see the plain generator."""
    return super().inpaint(as_images(images), mask, *args, **settings)

  def change_class(self, images: Images, *args, **settings):
    """Images remade as of other classes or prompts; see the plain generator."""
    return super().change_class(as_images(images), *args, **settings)

  def __repr__(self) -> str:
    c = self.config
    of = "texts" if c.text else f"{c.num_classes} classes"
    return (
      f"Generator({of}, {self.image_size} x {self.image_size} images, "
      f"{c.tokens} tokens of {c.codebook_size} codes, width {c.width})"
    )


def _quantize(tokenizer: plain_tokenizer.Tokenizer, latents):
  return tokenizer.quantizer.encode(latents)


def load_vae(path: str | os.PathLike, *, dtype: DTypeLike = jnp.float32) -> AutoencoderKL:
  """The VAE that `python -m convert mar-vae` or `flux-vae` wrote to `path`.

  Args:
    path: a directory, or `hf://OWNER/NAME[@REVISION]` (`pip install 'coda_jax[hub]'`).
    dtype: of the computation.

  Raises:
    UserError: missing, damaged or foreign files.
  """
  return weights.load_vae(hub.local(path), dtype=dtype, cls=AutoencoderKL)


def load_tokenizer(path: str | os.PathLike, *, dtype: DTypeLike = jnp.float32) -> Tokenizer:
  """The tokenizer that training or `python -m convert coda-mar` wrote to `path`; see `load_vae`."""
  return weights.load_tokenizer(hub.local(path), dtype=dtype, cls=Tokenizer)


def load_generator(
  path: str | os.PathLike,
  *,
  dtype: DTypeLike = jnp.float32,
  text_encoder: str | os.PathLike | None = None,
) -> Generator:
  """The generator that training wrote to `path`, with the tokenizer in it; see `load_vae`.

  Args:
    text_encoder: directory of its text encoder, if it is of texts and does not hold it.
  """
  encoder = None if text_encoder is None else hub.local(text_encoder)
  how = {"dtype": dtype, "cls": Generator, "text_encoder": encoder}
  return generator.load_generator(hub.local(path), **how)
