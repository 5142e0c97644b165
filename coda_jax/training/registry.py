"""Which trainer a config is for. A further trainer is one line here."""

import jax
import ml_collections

from coda_jax import config as c
from coda_jax.errors import UserError
from coda_jax.training.maskgit_trainer import MaskGITTrainer
from coda_jax.training.tokenizer_trainer import TokenizerTrainer
from coda_jax.training.trainer import Trainer

# By `config.kind`: the settings and the trainer.
TRAINERS: dict[str, tuple[type, type[Trainer]]] = {
  "tokenizer": (c.TrainConfig, TokenizerTrainer),
  "maskgit": (c.MaskGITTrainConfig, MaskGITTrainer),
}


def resolve(values: ml_collections.ConfigDict) -> c.TrainConfig | c.MaskGITTrainConfig:
  """The frozen settings of a config file, as the workdir keeps them.

  Raises:
    UserError: an unknown kind or key, or a value that does not fit.
  """
  kind = values.get("kind", "tokenizer")
  if kind not in TRAINERS:
    raise UserError(f"config.kind={kind!r}; it is one of {', '.join(TRAINERS)}")
  settings, trainer = TRAINERS[kind]
  return trainer.resolved(c.freeze(settings, values))


def product(config: c.TrainConfig | c.MaskGITTrainConfig) -> str:
  """The folder that the trainer of resolved settings writes, and the kind of its weights."""
  return TRAINERS[config.kind][1].product


def make_trainer(config: c.TrainConfig | c.MaskGITTrainConfig, mesh: jax.sharding.Mesh) -> Trainer:
  """The trainer of resolved settings. Raises UserError if its data or weights cannot be read."""
  return TRAINERS[config.kind][1](config, mesh)
