"""Frozen settings of a training run, made from the `ml_collections.ConfigDict` of a config file.

from coda_jax import config as c

def get_config(arg: str = "full"):
  config = c.TrainConfig(tokenizer=c.TokenizerSettings(...), data=c.DataSettings(...))
  return c.config_dict(c.variant(config, arg))
"""

from coda_jax.config.ablation import AblationConfig, Line, Table
from coda_jax.config.engine import changed, config_dict, freeze, to_json
from coda_jax.config.maskgit import (
  MaskGITSettings,
  MaskGITTrainConfig,
  MaskingSettings,
  TokenDataSettings,
)
from coda_jax.config.resume import (
  MAY_CHANGE_ON_RESUME,
  check_resumable,
  decisive,
  differences,
  with_defaults,
)
from coda_jax.config.schema import (
  DTYPES,
  REMAT,
  CheckpointSettings,
  DistributedSettings,
  EMASettings,
  EvalSettings,
  LoggingSettings,
  MeshSettings,
  OptimizerSettings,
)
from coda_jax.config.tokenizer import (
  AdversarialSettings,
  DataSettings,
  LossSettings,
  TokenizerSettings,
  TrainConfig,
)
from coda_jax.config.variants import VARIANTS, best, variant

__all__ = [
  "DTYPES",
  "MAY_CHANGE_ON_RESUME",
  "REMAT",
  "VARIANTS",
  "AblationConfig",
  "AdversarialSettings",
  "CheckpointSettings",
  "DataSettings",
  "EMASettings",
  "EvalSettings",
  "LoggingSettings",
  "Line",
  "LossSettings",
  "MaskGITSettings",
  "MaskGITTrainConfig",
  "MaskingSettings",
  "DistributedSettings",
  "MeshSettings",
  "OptimizerSettings",
  "Table",
  "TokenDataSettings",
  "TokenizerSettings",
  "TrainConfig",
  "best",
  "changed",
  "check_resumable",
  "config_dict",
  "decisive",
  "differences",
  "freeze",
  "to_json",
  "variant",
  "with_defaults",
]
