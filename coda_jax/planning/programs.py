"""The programs of a run for devices that need not exist: the trainer's own, of shapes."""

import contextlib
import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from coda_jax import arrays, sharding, weights
from coda_jax import config as c
from coda_jax.data import pipeline, tokens
from coda_jax.generation import generator, sampler
from coda_jax.models.maskgit import MaskGIT
from coda_jax.models.tokenizer import Tokenizer
from coda_jax.planning import inputs
from coda_jax.training.maskgit_trainer import MaskGITTrainer
from coda_jax.training.registry import TRAINERS
from coda_jax.training.tokenizer_trainer import TokenizerTrainer

WHAT = ("update", "eval", "sample", "encode")


@dataclasses.dataclass
class Program:
  """A jitted function and what it takes.

  Attributes:
    function: jitted.
    args: trees of `jax.ShapeDtypeStruct`s with shardings.
    groups: the same arrays by what they are: "frozen", "trained", "moments", "batch".
    images: of one call, over all devices.
    mesh: of the shardings.
    steps: calls of the whole run, of an update.
  """

  function: Any
  args: tuple
  groups: dict[str, Any]
  images: int
  mesh: Mesh
  steps: int = 0

  def lower(self) -> jax.stages.Lowered:
    with jax.set_mesh(self.mesh):
      return self.function.lower(*self.args)


def _shape(x, place) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)


class _Shapes:
  """Of a trainer: its arrays are shapes with places."""

  def _placed(self, tree, shardings):
    if isinstance(shardings, NamedSharding):
      return jax.tree.map(lambda x: _shape(x, shardings), tree)
    return jax.tree.map(_shape, tree, shardings)


@contextlib.contextmanager
def _trainer(settings, mesh: Mesh, tokenizer: c.TrainConfig | None) -> Iterator[Any]:
  """The trainer of the settings, and the settings that it has, while what it reads exists."""
  cls = TRAINERS[settings.kind][1]
  with tempfile.TemporaryDirectory() as folder:
    settings = inputs.stand_in(settings, pathlib.Path(folder), tokenizer)
    yield type(cls.__name__, (_Shapes, cls), {})(settings, mesh)


def make(what: str, settings, devices: list, tokenizer: c.TrainConfig | None = None) -> Program:
  """The program `what` of `WHAT` with the settings' mesh over `devices`.

  Tokenizers have no "sample", generators no "encode".

  Args:
    settings: resolved, of `registry.resolve`.
    devices: real, or of `chips.devices`.
    tokenizer: see `inputs.stand_in`.

  Raises:
    UserError: the settings do not fit the devices, or name what is neither there nor known.
  """
  mesh = sharding.make_mesh(settings.mesh, devices)
  with _trainer(settings, mesh, tokenizer) as trainer:
    if what == "update":
      return _update(trainer)
    if what == "encode":
      return _encode(trainer)
    if what == "sample":
      return _sample(trainer)
    return _evaluation(trainer)


def _batch(trainer, micro_batches: int, size: int):
  """Shapes of what an update or an evaluation takes, [micro_batches, B, ...]."""
  place = sharding.batch_sharding(trainer.mesh, leading=1)
  one = functools.partial(jax.ShapeDtypeStruct, sharding=place)
  lead = micro_batches, size // micro_batches
  if isinstance(trainer, MaskGITTrainer):
    m = trainer.model_config
    ids = one((*lead, m.tokens), tokens.id_type(m.codebook_size))
    shape, dtype = _condition(trainer)
    return {"ids": ids, "condition": one((*lead, *shape), dtype)}
  side = trainer.config.tokenizer.image_size
  return one((*lead, side, side, 3), np.uint8)


def _condition(trainer: MaskGITTrainer) -> tuple[tuple[int, ...], Any]:
  """Shape and type of what a batch holds for each image: a class, or a text."""
  text = trainer.conditions.text
  if text is None:
    return (), np.int32
  if trainer.conditions.tokenize:
    return (text.tokens,), np.int32
  return (text.tokens, text.width), np.float16


def _update(trainer) -> Program:
  data, state = trainer.config.data, trainer.abstract_state()
  batch = _batch(trainer, data.accumulation, data.batch_size)
  leaves = jax.tree.leaves_with_path(state)
  moment = [any(getattr(k, "name", "") == "optimizer" for k in path) for path, _ in leaves]
  groups = {
    "frozen": trainer._frozen,
    "trained": [x for (_, x), m in zip(leaves, moment, strict=True) if not m],
    "moments": [x for (_, x), m in zip(leaves, moment, strict=True) if m],
    "batch": batch,
  }
  args = state, trainer._frozen, trainer._key, batch
  return Program(trainer._step, args, groups, data.batch_size, trainer.mesh, trainer.steps)


def _evaluation(trainer) -> Program:
  size, ema, frozen = trainer.config.eval.batch_size, trainer.abstract_state().ema, trainer._frozen
  if isinstance(trainer, MaskGITTrainer):
    batch = _batch(trainer, 1, size)
    number = jax.ShapeDtypeStruct((), np.uint32, sharding=sharding.replicated(trainer.mesh))
    function, args = trainer._evaluate, (ema, frozen, trainer._key, batch, number)
  else:
    batch = _images(trainer, size)
    function, args = trainer._reconstruct, (ema, frozen, batch)
  groups = {"frozen": frozen, "trained": ema, "batch": batch}
  return Program(function, args, groups, size, trainer.mesh)


def _images(trainer, size: int) -> jax.ShapeDtypeStruct:
  side = trainer.config.tokenizer.image_size
  place = sharding.batch_sharding(trainer.mesh)
  return jax.ShapeDtypeStruct((size, side, side, 3), np.uint8, sharding=place)


def _encode(trainer: TokenizerTrainer) -> Program:
  """As `tokenize_dataset` does it, in the config's dtype, on all devices."""
  graphdef, size = trainer._networks.tokenizer, trainer.config.eval.batch_size
  ema, frozen = trainer.abstract_state().ema, trainer._frozen["tokenizer"]
  batch = _images(trainer, size)

  def encode(ema, frozen, images):
    tokenizer = arrays.merge(graphdef, frozen, ema)
    return tokenizer.encode_flat(pipeline.normalize(images))

  groups = {"frozen": frozen, "trained": ema, "batch": batch}
  return Program(jax.jit(encode), (ema, frozen, batch), groups, size, trainer.mesh)


def _sample(trainer: MaskGITTrainer) -> Program:
  """As `generate` does it with the sampler's default settings, in the config's dtype.

  All arrays are on every device in full; the decoder is part of the program.
  """
  config, mesh, size = trainer.model_config, trainer.mesh, trainer.config.eval.batch_size
  dtype = jnp.dtype(trainer.config.dtype)
  t = weights.read_tokenizer_config(trainer.config.data.tokenizer)
  rngs = lambda: nnx.Rngs(0)
  model, model_arrays = arrays.split(
    nnx.eval_shape(lambda: MaskGIT(config, dtype=dtype, rngs=rngs()))
  )
  decoder, decoder_arrays = arrays.split(
    nnx.eval_shape(lambda: Tokenizer(t, dtype=dtype, rngs=rngs()))
  )
  settings = sampler.SamplerSettings(order=trainer.config.masking.order)
  steps = settings.per_step(np.full(size, config.tokens))
  form = sampler.form_of(settings, config, size, mesh.size)
  whole = sharding.replicated(mesh)
  split = NamedSharding(mesh, PartitionSpec(tuple(mesh.axis_names)))
  sharding.check_batch("config.eval.batch_size", size, mesh)

  def sample(model_arrays, decoder_arrays, ids, condition, index, key, steps):
    key = jax.random.wrap_key_data(key)
    m = arrays.merge(model, model_arrays)
    ids = sampler.loop(m, ids, condition, None, index, key, steps, form).ids
    return generator.decode(arrays.merge(decoder, decoder_arrays), ids)

  per_image = functools.partial(jax.ShapeDtypeStruct, sharding=split)
  text = config.text
  condition = per_image((size,), np.int32)
  if text:  # of generate, whose text encoder is a program of its own
    condition = per_image((size, text.tokens, text.width), np.float32)
  batch = per_image((size, config.tokens), np.int32), condition
  index = per_image((size,), np.uint32)
  held = jax.tree.map(lambda x: _shape(x, whole), (model_arrays, decoder_arrays))
  steps = jax.tree.map(lambda x: _shape(x, whole), steps)
  args = *held, *batch, index, trainer._key, steps
  groups = {"frozen": held, "batch": (batch, index)}
  return Program(jax.jit(sample), args, groups, size, mesh)
