"""The rows of the paper's Table 1."""

import pytest

from coda_jax.errors import UserError
from tests.config.files import load


def test_variants():
  vq, rq = load("configs/mar.py:vq"), load("configs/mar.py:rq")
  for config in (vq, rq):
    assert config.tokenizer.quantizer.lookup == "euclidean" and config.tokenizer.lora is None
  assert vq.tokenizer.quantizer.patch_sizes == (16,)
  assert len(rq.tokenizer.quantizer.patch_sizes) == 10
  attention = load("configs/flux.py:attention").tokenizer
  assert attention.quantizer.lookup == "attention" and attention.lora is None
  full = load("configs/mar.py:full,codebook_size=65536,norm=layer").tokenizer
  assert full.quantizer.codebook_size == 65536 and full.quantizer.norm == "layer"
  assert full.lora is not None
  for arg in ("nothing", "codebook_size=many", "size=3"):
    with pytest.raises(UserError, match=f"config argument '{arg}'"):
      load(f"configs/mar.py:{arg}")
  with pytest.raises(UserError, match="codebook_size is 0"):
    load("configs/mar.py:codebook_size=0")
