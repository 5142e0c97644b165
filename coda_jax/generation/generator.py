"""Images from classes: a MaskGIT and its tokenizer."""

import dataclasses
import functools
import operator
import os
from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from coda_jax import arrays, sharding, storage, weights
from coda_jax.errors import UserError
from coda_jax.generation import editing, sampler
from coda_jax.generation.sampler import Sampled, SamplerSettings
from coda_jax.models.inputs import check_ids, check_images
from coda_jax.models.maskgit import MaskGIT
from coda_jax.models.tokenizer import Tokenizer

Classes = Sequence[int | str | None] | Int[np.ndarray, "b"]


def decode(tokenizer: Tokenizer, ids):
  """Images of ids [B, N]; masked tokens add nothing to their level."""
  q = tokenizer.config.quantizer
  ends = np.cumsum([p * p for p in q.patch_sizes])[:-1]
  grids = zip(jnp.split(ids, ends, 1), q.patch_sizes, strict=True)
  grids = [i.reshape(-1, p, p) for i, p in grids]
  levels = tokenizer.quantizer.level_latents(grids, (q.latent_side, q.latent_side))
  latents = functools.reduce(jnp.add, levels)
  return tokenizer.vae.decode(tokenizer.vae.unscale_latents(latents))


def _encode(tokenizer: Tokenizer, images):
  return tokenizer.encode_flat(images)[0]


_decode_ids, _encode_images = arrays.jit_module(decode), arrays.jit_module(_encode)


class Generator:
  """Generates and edits images of a MaskGIT's classes.

  A batch is split over the local devices if they divide it. The i-th image of a call has the global
  index `first + i`, which with the key decides its random numbers.

  Attributes:
    config: the MaskGIT's.
    class_names: may be empty.
    order: how samples are drawn unless a call says otherwise: as training masked them.

  Raises:
    UserError: levels or codes of the two models differ.
  """

  def __init__(
    self,
    model: MaskGIT,
    tokenizer: Tokenizer,
    class_names: Sequence[str] = (),
    order: str = "uniform",
  ):
    q = tokenizer.config.quantizer
    theirs = {"patch_sizes": q.patch_sizes, "codebook_size": q.codebook_size}
    weights.check_tokens_fit(model.config, theirs, "the generator", "its tokenizer")
    self.config, self.tokenizer_config = model.config, tokenizer.config
    self.class_names, self.order = tuple(class_names), order
    devices = jax.local_devices()
    mesh = jax.sharding.Mesh(np.asarray(devices), ("data",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def everywhere(module):
      graphdef, flat = arrays.split(module)
      return arrays.merge(graphdef, jax.device_put(flat, whole))

    self._sample = sampler.bind(everywhere(model), len(devices))
    tokenizer = everywhere(tokenizer)
    self._decode, self._encode = _decode_ids(tokenizer), _encode_images(tokenizer)

  @property
  def image_size(self) -> int:
    """Side of the images in pixels."""
    return self.tokenizer_config.image_size

  def class_ids(self, classes: Classes) -> Int[np.ndarray, "b"]:
    """Numbers of classes given by number or name; None is the null class.

    Raises:
      UserError: one of them is out of range or unknown.
    """
    if isinstance(classes, (str, int)) or classes is None:
      raise UserError(f"classes is {classes!r}; give a list with a class for each image")
    return np.array([self._class_id(c) for c in classes], np.int32)

  def _class_id(self, c) -> int:
    if c is None:
      return self.config.null_class
    if isinstance(c, str) and c in self.class_names:
      return self.class_names.index(c)
    try:
      number = int(c) if isinstance(c, str) else operator.index(c)
    except (TypeError, ValueError):
      raise UserError(self.unknown_class(c)) from None
    if not 0 <= number < self.config.num_classes:
      raise UserError(
        f"class {number} is out of range: the generator has classes 0 to "
        f"{self.config.num_classes - 1}"
      )
    return number

  def unknown_class(self, c: object) -> str:
    """What to tell about a class that is no name."""
    names = ", ".join(self.class_names[:10]) or "none"
    more = ", ..." if len(self.class_names) > 10 else ""
    return f"no class {c!r}; the generator's names are: {names}{more}"

  def label(self, c: int | None) -> str:
    """The name of a class, or its number if it has none; "null" for no class."""
    if c is None:
      return "null"
    return self.class_names[c] if c < len(self.class_names) else str(c)

  def sample(
    self,
    ids: Int[np.ndarray, "b n"],
    classes: Classes,
    settings: SamplerSettings,
    key: PRNGKeyArray,
    *,
    first: int = 0,
    keep_steps: bool = False,
  ) -> Sampled:
    """Replaces the masked ids (`config.mask_id`); see `sampler.sample`."""
    condition, index = self.class_ids(classes), first + np.arange(len(ids))
    return self._sample(
      sharding.over_local_devices(np.asarray(ids, np.int32)),
      sharding.over_local_devices(condition),
      key,
      settings,
      index=index,
      keep_steps=keep_steps,
    )

  def masked(self, count: int) -> Int[np.ndarray, "{count} n"]:
    """Ids of images of which nothing is known."""
    return np.full((count, self.config.tokens), self.config.mask_id, np.int32)

  def decode(self, ids: Int[Array | np.ndarray, "b n"]) -> Float[Array, "b h w 3"]:
    """Images, about [-1, 1], of ids; masked tokens add nothing to their level.

    Raises:
      UserError: ids of another shape or out of range.
    """
    if getattr(ids, "ndim", 0) != 2 or ids.shape[1] != self.config.tokens:
      raise UserError(f"ids have shape {list(np.shape(ids))}, not [B, {self.config.tokens}]")
    check_ids([ids[:, None]], [(0, self.config.mask_id + 1)])
    return self._decode(sharding.over_local_devices(ids))

  def encode(self, images: Float[Array | np.ndarray, "b h w 3"]) -> Int[Array, "b n"]:
    """Ids of images in [-1, 1] of the training size. Raises UserError for another size."""
    self._check_images(images)
    return self._encode(sharding.over_local_devices(images))

  def generate(
    self,
    classes: Classes,
    steps: int = 8,
    key: PRNGKeyArray | None = None,
    *,
    first: int = 0,
    **settings,
  ) -> Float[Array, "b h w 3"]:
    """One image of each class, about [-1, 1].

    Args:
      classes: numbers, names or None (no class).
      steps: runs of the transformer.
      key: of the random numbers; `jax.random.key(0)` by default.
      first: global index of the first image.
      settings: others of `SamplerSettings`.

    Raises:
      UserError: an unknown class, more steps than tokens, or a bad setting.
    """
    settings = self._settings(steps, settings)
    ids = self.masked(len(classes))
    return self.decode(self.sample(ids, classes, settings, _key(key), first=first).ids)

  def inpaint(
    self,
    images: Float[Array | np.ndarray, "b h w 3"],
    mask: Bool[np.ndarray, "h w"],
    classes: Classes,
    steps: int = 8,
    key: PRNGKeyArray | None = None,
    *,
    least: float = 0.0,
    paste: bool = True,
    first: int = 0,
    **settings,
  ) -> Float[Array | np.ndarray, "b h w 3"]:
    """Images with the pixels of the mask made anew, as of the classes; also outpainting.

    Args:
      images: in [-1, 1], of the training size; inside of the mask they do not matter but for the
        tokens that overlap it in part.
      mask: True where the image is to change; True around a picture paints its surroundings.
      least: see `editing.touched_tokens`.
      paste: put the original pixels back outside of the mask.
      Others as for `generate`.
    """
    self._check_images(images)
    settings, mask = self._settings(steps, settings), np.asarray(mask, bool)
    stride = self.image_size // self.config.patch_sizes[-1]
    touched = editing.touched_tokens(mask, self.config.patch_sizes, stride, least)
    ids = np.where(touched, self.config.mask_id, np.asarray(self.encode(images)))
    made = self.decode(self.sample(ids, classes, settings, _key(key), first=first).ids)
    return editing.paste(np.asarray(images), np.asarray(made), mask) if paste else made

  def change_class(
    self,
    images: Float[Array | np.ndarray, "b h w 3"],
    classes: Classes,
    steps: int = 8,
    key: PRNGKeyArray | None = None,
    *,
    keep_levels: int = 1,
    first: int = 0,
    **settings,
  ) -> Float[Array, "b h w 3"]:
    """Images remade as of other classes: tokens of the first `keep_levels` levels stay.

    To change an object in its place and nothing else, `inpaint` its box with another class.

    Raises:
      UserError: `keep_levels` leaves nothing to change, and as for `generate`.
    """
    if not 0 <= keep_levels < len(self.config.patch_sizes):
      raise UserError(
        f"keep_levels is {keep_levels}; the generator has {len(self.config.patch_sizes)} levels"
      )
    self._check_images(images)
    settings = self._settings(steps, settings)
    change = self.config.levels >= keep_levels
    ids = np.where(change, self.config.mask_id, np.asarray(self.encode(images)))
    return self.decode(self.sample(ids, classes, settings, _key(key), first=first).ids)

  def _settings(self, steps: int, others: dict) -> SamplerSettings:
    return dataclasses.replace(SamplerSettings(steps=steps, order=self.order), **others)

  def _check_images(self, images) -> None:
    check_images(images)
    if images.shape[1:3] != (self.image_size,) * 2:
      h, w = images.shape[1:3]
      raise UserError(
        f"an image of {w} x {h} pixels; the generator's have {self.image_size} x {self.image_size}"
      )


def _key(key: PRNGKeyArray | None) -> PRNGKeyArray:
  return jax.random.key(0) if key is None else key


G = TypeVar("G", bound=Generator)


def load_generator(
  path: str | os.PathLike, *, dtype: DTypeLike = jnp.float32, cls: type[G] = Generator
) -> G:
  """The generator that training wrote to `path`, with the tokenizer in it.

  Args:
    dtype: of the computation.
    cls: what it becomes.

  Raises:
    UserError: missing, damaged or foreign files, or models that do not fit each other.
  """
  model, fields = weights.load_generator_weights(path, dtype=dtype)
  tokenizer = weights.load_tokenizer(storage.path(path) / "tokenizer", dtype=dtype)
  return cls(model, tokenizer, fields["class_names"], fields.get("order", "uniform"))
