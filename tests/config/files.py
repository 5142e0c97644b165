"""The repository's config files as settings."""

from coda_jax import cli
from coda_jax import config as c


def load(path: str = "configs/mar.py", *overrides: str) -> c.TrainConfig:
  return c.freeze(c.TrainConfig, cli.load_config(path, list(overrides)))
