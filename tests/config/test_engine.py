"""Config files and overrides to settings: keys and types."""

import pytest

from coda_jax import cli
from coda_jax import config as c
from coda_jax.errors import UserError
from tests.config.files import load


def test_overrides():
  config = load(
    "configs/mar.py",
    "--config.optimizer.learning_rate=0.1",
    "--config.tokenizer.quantizer.patch_sizes=(2,16)",
    "--config.tokenizer.quantizer.beta=0.25",
    "--config.trainable=(('Param', 'quantizer'),)",
    "--config.data.flip",
  )
  assert config.optimizer.learning_rate == 0.1
  assert config.tokenizer.quantizer.patch_sizes == (2, 16)
  assert config.tokenizer.quantizer.beta == 0.25
  assert config.trainable == (("Param", "quantizer"),)
  assert config.data.flip
  assert config.tokenizer.quantizer.chunk_size is None


def test_missing_key_is_named():
  fields = cli.load_config("configs/mar.py").to_dict()
  del fields["data"]["train"]
  with pytest.raises(UserError, match="config.data.train is missing"):
    c.freeze(c.TrainConfig, fields)


def test_unknown_override_is_named():
  with pytest.raises(UserError, match="no config key 'lr'"):
    load("configs/mar.py", "--config.optimizer.lr=1")


def test_dictionaries():
  values = c.config_dict(c.AblationConfig({"steps": 1}, {"a": {"x": (1, None)}}, {})).to_dict()
  assert c.freeze(c.AblationConfig, values).rows == {"a": {"x": [1, None]}}
  line = {"label": "a", "paper": {"psnr": 20}}
  assert c.freeze(c.Line, line).paper == {"psnr": 20.0}
  with pytest.raises(UserError, match=r"config.paper.psnr is 'x' \(str\); it must be float"):
    c.freeze(c.Line, line | {"paper": {"psnr": "x"}})
  with pytest.raises(UserError, match="config.paper is 3; it must be a dictionary"):
    c.freeze(c.Line, line | {"paper": 3})
