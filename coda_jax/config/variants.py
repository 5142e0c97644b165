"""Rows of the paper's Table 1 as changes to the full method."""

import dataclasses

from coda_jax.config.tokenizer import TrainConfig
from coda_jax.errors import UserError

VARIANTS = ("vq", "rq", "attention", "full")


def variant(config: TrainConfig, arg: str) -> TrainConfig:
  """The row of the paper's Table 1 that `arg` names, with changes to the quantizer.

  Args:
    config: the full method.
    arg: comma-separated: one of `vq` (Euclidean look-up, one level), `rq` (Euclidean, all
      levels), `attention` (attention look-up) or `full` (attention and LoRA, the default), and
      any of `codebook_size=N`, `norm=rms|layer|none`.

  Raises:
    UserError: anything else.
  """
  quantizer, lora = config.tokenizer.quantizer, config.tokenizer.lora
  for word in filter(None, arg.split(",")):
    key, equals, value = word.partition("=")
    if not equals and word in VARIANTS:
      if word != "full":
        lora = None
      if word in ("vq", "rq"):
        quantizer = dataclasses.replace(quantizer, lookup="euclidean", beta=None)
      if word == "vq":
        quantizer = dataclasses.replace(quantizer, patch_sizes=quantizer.patch_sizes[-1:])
    elif key == "codebook_size" and value.isdigit():
      quantizer = dataclasses.replace(quantizer, codebook_size=int(value))
    elif key == "norm" and equals:
      quantizer = dataclasses.replace(quantizer, norm=value)
    else:
      raise UserError(
        f"config argument {word!r} is none of {', '.join(VARIANTS)}, codebook_size=N, norm=NAME"
      )
  tokenizer = dataclasses.replace(config.tokenizer, quantizer=quantizer, lora=lora)
  return dataclasses.replace(config, tokenizer=tokenizer)
