"""Images from classes or texts: a MaskGIT and its tokenizer."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from coda_jax import arrays, sharding, storage, text, weights
from coda_jax.errors import UserError
from coda_jax.generation import editing, sampler
from coda_jax.generation.conditions import Classes, Prompts, Wanted
from coda_jax.generation.sampler import Sampled, SamplerSettings
from coda_jax.models.inputs import check_ids, check_images
from coda_jax.models.maskgit import MaskGIT
from coda_jax.models.tokenizer import Tokenizer
from coda_jax.text import TextEncoder


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
  """Generates and edits images of a MaskGIT's classes, or of texts.

  A batch is split over the local devices if they divide it. The i-th image of a call has the global
  index `first + i`, which with the key decides its random numbers.

  Attributes:
    config: the MaskGIT's.
    class_names: may be empty.
    order: how samples are drawn unless a call says otherwise: as training masked them.
    conditions: what it can be asked for: `Classes` or `Prompts`.

  Raises:
    UserError: levels or codes of the two models differ, or the text encoder is missing or has
      another shape than the model was trained with.
  """

  def __init__(
    self,
    model: MaskGIT,
    tokenizer: Tokenizer,
    class_names: Sequence[str] = (),
    order: str = "uniform",
    text_encoder: TextEncoder | None = None,
  ):
    q = tokenizer.config.quantizer
    theirs = {"patch_sizes": q.patch_sizes, "codebook_size": q.codebook_size}
    weights.check_tokens_fit(model.config, theirs, "the generator", "its tokenizer")
    self.config, self.tokenizer_config = model.config, tokenizer.config
    self.class_names, self.order = tuple(class_names), order
    self.conditions = Classes(model.config, self.class_names)
    if shape := model.config.text:
      wanted, e = (shape.tokens, shape.width), text_encoder
      if e is None or (e.tokens, e.width) != wanted:
        raise UserError(f"the generator needs a text encoder of {wanted[0]} x {wanted[1]} numbers")
      self.conditions = Prompts(e)
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

  def label(self, wanted: int | str | None) -> str:
    """The name of a class, or its number if it has none, or a text; "null" for none."""
    return self.conditions.label(wanted)

  def asked(self, classes: Wanted | None, prompts: Wanted | None) -> Wanted:
    """What a call asks for. Raises UserError if the generator has the other of the two."""
    given = {"classes": classes, "prompts": prompts}
    wanted = given.pop(self.conditions.keyword)
    (other,) = given
    if given[other] is not None:
      has = "texts, no classes" if other == "classes" else "classes, no texts"
      raise UserError(f"the generator was trained on {has}: give {self.conditions.keyword}")
    if wanted is None or isinstance(wanted, (str, int)):
      name = self.conditions.keyword
      raise UserError(f"{name} is {wanted!r}; give a list with one for each image")
    return wanted

  def sample(
    self,
    ids: Int[np.ndarray, "b n"],
    wanted: Wanted,
    settings: SamplerSettings,
    key: PRNGKeyArray,
    *,
    negative: str | Wanted | None = None,
    first: int = 0,
    keep_steps: bool = False,
  ) -> Sampled:
    """Replaces the masked ids (`config.mask_id`); see `sampler.sample`.

    Args:
      wanted: classes or prompts.
      negative: prompts, or one for all, that guidance leads away from instead of the empty one.
    """
    condition, index = self.conditions(wanted), first + np.arange(len(ids))
    away = None if negative is None else self._negative(negative, len(ids), settings)
    return self._sample(
      sharding.over_local_devices(np.asarray(ids, np.int32)),
      sharding.over_local_devices(condition),
      key,
      settings,
      negative=None if away is None else sharding.over_local_devices(away),
      index=index,
      keep_steps=keep_steps,
    )

  def _negative(self, negative: str | Wanted, count: int, settings: SamplerSettings):
    if not isinstance(self.conditions, Prompts):
      raise UserError("negative prompts are of a generator that was trained on texts")
    if not settings.guidance:
      raise UserError("negative prompts do nothing without guidance: set it above 0")
    prompts = [negative] * count if isinstance(negative, str) else negative
    if len(prompts) != count:
      raise UserError(f"{len(prompts)} negative prompts for {count} images; give one, or one each")
    return self.conditions(prompts)

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
    classes: Wanted | None = None,
    steps: int = 8,
    key: PRNGKeyArray | None = None,
    *,
    prompts: Wanted | None = None,
    negative_prompts: str | Wanted | None = None,
    first: int = 0,
    **settings,
  ) -> Float[Array, "b h w 3"]:
    """One image of each class or prompt, about [-1, 1].

    Args:
      classes: numbers, names or None (no class), of a generator with classes.
      prompts: texts, of a generator of texts; what is longer than its encoder takes is cut.
      negative_prompts: texts, or one for all images, that guidance leads away from; by default the
        empty one.
      steps: runs of the transformer.
      key: of the random numbers; `jax.random.key(0)` by default.
      first: global index of the first image.
      settings: others of `SamplerSettings`.

    Raises:
      UserError: an unknown class, prompts for a generator with classes or the reverse, more steps
        than tokens, or a bad setting.
    """
    wanted, settings = self.asked(classes, prompts), self._settings(steps, settings)
    ids, how = self.masked(len(wanted)), {"negative": negative_prompts, "first": first}
    return self.decode(self.sample(ids, wanted, settings, _key(key), **how).ids)

  def inpaint(
    self,
    images: Float[Array | np.ndarray, "b h w 3"],
    mask: Bool[np.ndarray, "h w"],
    classes: Wanted | None = None,
    steps: int = 8,
    key: PRNGKeyArray | None = None,
    *,
    prompts: Wanted | None = None,
    negative_prompts: str | Wanted | None = None,
    least: float = 0.0,
    paste: bool = True,
    first: int = 0,
    **settings,
  ) -> Float[Array | np.ndarray, "b h w 3"]:
    """Images with the pixels of the mask made anew, of classes or prompts; also outpainting.

    Args:
      images: in [-1, 1], of the training size; inside of the mask they do not matter but for the
        tokens that overlap it in part.
      mask: True where the image is to change; True around a picture paints its surroundings.
      least: see `editing.touched_tokens`.
      paste: put the original pixels back outside of the mask.
      Others as for `generate`.
    """
    self._check_images(images)
    wanted, settings = self.asked(classes, prompts), self._settings(steps, settings)
    mask, stride = np.asarray(mask, bool), self.image_size // self.config.patch_sizes[-1]
    touched = editing.touched_tokens(mask, self.config.patch_sizes, stride, least)
    ids = np.where(touched, self.config.mask_id, np.asarray(self.encode(images)))
    how = {"negative": negative_prompts, "first": first}
    made = self.decode(self.sample(ids, wanted, settings, _key(key), **how).ids)
    return editing.paste(np.asarray(images), np.asarray(made), mask) if paste else made

  def change_class(
    self,
    images: Float[Array | np.ndarray, "b h w 3"],
    classes: Wanted | None = None,
    steps: int = 8,
    key: PRNGKeyArray | None = None,
    *,
    prompts: Wanted | None = None,
    negative_prompts: str | Wanted | None = None,
    keep_levels: int = 1,
    first: int = 0,
    **settings,
  ) -> Float[Array, "b h w 3"]:
    """Images remade of other classes or prompts: tokens of the first `keep_levels` levels stay.

    To change an object in its place and nothing else, `inpaint` its box with another class.

    Raises:
      UserError: `keep_levels` leaves nothing to change, and as for `generate`.
    """
    if not 0 <= keep_levels < len(self.config.patch_sizes):
      raise UserError(
        f"keep_levels is {keep_levels}; the generator has {len(self.config.patch_sizes)} levels"
      )
    self._check_images(images)
    wanted, settings = self.asked(classes, prompts), self._settings(steps, settings)
    change = self.config.levels >= keep_levels
    ids = np.where(change, self.config.mask_id, np.asarray(self.encode(images)))
    how = {"negative": negative_prompts, "first": first}
    return self.decode(self.sample(ids, wanted, settings, _key(key), **how).ids)

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
  path: str | os.PathLike,
  *,
  dtype: DTypeLike = jnp.float32,
  cls: type[G] = Generator,
  text_encoder: str | os.PathLike | None = None,
) -> G:
  """The generator that training wrote to `path`, with the tokenizer in it.

  Args:
    dtype: of the computation.
    cls: what it becomes.
    text_encoder: directory of the text encoder, of a generator of texts that does not hold it.

  Raises:
    UserError: missing, damaged or foreign files, or models that do not fit each other.
  """
  model, fields = weights.load_generator_weights(path, dtype=dtype)
  encoder = _text_encoder(path, fields.get("text_encoder_fingerprint"), dtype, text_encoder)
  tokenizer = weights.load_tokenizer(storage.path(path) / "tokenizer", dtype=dtype)
  return cls(model, tokenizer, fields["class_names"], fields.get("order", "uniform"), encoder)


def _text_encoder(path, wanted: str | None, dtype, given) -> TextEncoder | None:
  """The text encoder of a generator: the one that is given, or the one in it."""
  if wanted is None:
    if given is not None:
      raise UserError(f"{path} was trained on classes: it needs no text encoder {given}")
    return None
  where = storage.path(path) / "text_encoder" if given is None else given
  if given is None and not weights.is_there(where):
    raise UserError(
      f"{path} does not hold its text encoder, {wanted[:12]}; name its directory: "
      "--text-encoder DIR, text_encoder= in Python"
    )
  encoder = text.load_text_encoder(where, dtype=dtype)
  if encoder.fingerprint != wanted:
    found = encoder.fingerprint[:12]
    raise UserError(f"{where} is text encoder {found}, but {path} was trained with {wanted[:12]}")
  return encoder
