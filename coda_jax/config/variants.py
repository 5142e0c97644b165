"""Rows of the paper's Table 1, and sizes of images, as changes to the full method at 256 pixels."""

import dataclasses

import ml_collections

from coda_jax.config.tokenizer import TrainConfig
from coda_jax.errors import UserError
from coda_jax.models.quantizer import PATCH_SIZES
from coda_jax.models.scalar_lookups import FSQ_LEVELS

VARIANTS = ("vq", "rq", "attention", "full")
FURTHER = ("product", "ibq", "fsq", "lfq", "bsq")  # look-ups


def variant(config: TrainConfig, arg: str) -> TrainConfig:
  """The row of the paper's Table 1 that `arg` names, with changes to the quantizer.

  Args:
    config: the full method.
    arg: comma-separated: one of `vq` (Euclidean look-up, one level), `rq` (Euclidean, all
      levels), `attention` (attention look-up) or `full` (attention and LoRA, the default); or
      `full` with another look-up: `product`, `ibq`, `fsq`, `lfq` or `bsq`; and any of
      `codebook_size=N` (`fsq` takes the largest of its paper's sizes within),
      `norm=rms|layer|none`, `rotation` (the rotation trick, for `vq`, `rq` and `product`), and
      the side of the images in pixels, such as `512`.

  Raises:
    UserError: anything else.
  """
  words = [word for word in arg.split(",") if word]
  for word in filter(str.isdecimal, words):
    config = _sized(config, int(word))
  quantizer, lora = config.tokenizer.quantizer, config.tokenizer.lora
  changes = {}
  for word in words:
    key, equals, value = word.partition("=")
    if word.isdecimal():
      continue
    if not equals and word in VARIANTS:
      if word != "full":
        lora = None
      if word in ("vq", "rq"):
        changes |= {"lookup": "euclidean", "beta": None}
      if word == "vq":
        changes["patch_sizes"] = quantizer.patch_sizes[-1:]
    elif not equals and word in FURTHER:
      changes |= {"lookup": word, "beta": None}
    elif word == "rotation":
      changes["gradient"] = word
    elif key == "codebook_size" and value.isdigit():
      changes["codebook_size"] = int(value)
    elif key == "norm" and equals:
      changes["norm"] = value
    else:
      raise UserError(
        f"config argument {word!r} is none of {', '.join(VARIANTS + FURTHER)}, rotation,"
        " codebook_size=N, norm=NAME, 512 (pixels)"
      )
  size = changes.get("codebook_size", quantizer.codebook_size)
  if changes.get("lookup") == "fsq":
    changes["codebook_size"] = max((v for v in FSQ_LEVELS if v <= size), default=size)
  quantizer = dataclasses.replace(quantizer, **changes)
  tokenizer = dataclasses.replace(config.tokenizer, quantizer=quantizer, lora=lora)
  return dataclasses.replace(config, tokenizer=tokenizer)


def best(config: ml_collections.ConfigDict, prefix: str, arg: str) -> ml_collections.ConfigDict:
  """The recipe of docs/equal_bits.md: training starts from what `coda_jax.discretize` made.

  Args:
    config: the paper's recipe.
    prefix: of the directories to start from: PREFIX_free, PREFIX_free_half, PREFIX_data.
    arg: "" and "half" adapt the decoder of a training-free tokenizer, whose codes stay; "data"
      trains the paper's quantizer from data. Two epochs, since codes are there.

  Raises:
    UserError: another `arg`.
  """
  starts = {"": "free", "half": "free_half", "data": "data"}
  if arg not in starts:
    raise UserError(f"config argument {arg!r} is none of half, data")
  changes = {
    "tokenizer": {"start": f"{prefix}_{starts[arg]}"},
    "epochs": 2,
    "ema": {"start_epoch": 0},
  }
  if arg == "data":
    changes["optimizer"] = {"rates": ((r"^quantizer\.", 0.1),)}
  else:
    changes["trainable"] = (("LoRAParam", "decoder"),)
  config.update(changes)
  return config


def _sized(config: TrainConfig, image_size: int) -> TrainConfig:
  """The config for images of another size: VAR's patch sizes, and as many pixels a micro-batch."""
  before, quantizer = config.tokenizer.image_size, config.tokenizer.quantizer
  stride = before // quantizer.patch_sizes[-1]
  if image_size % stride or image_size // stride not in PATCH_SIZES:
    known = ", ".join(str(side * stride) for side in PATCH_SIZES)
    raise UserError(
      f"config argument '{image_size}': images of {known} pixels have patch sizes here; for others"
      " set config.tokenizer.image_size and config.tokenizer.quantizer.patch_sizes"
    )
  factor = max(1, image_size // before) ** 2
  quantizer = dataclasses.replace(quantizer, patch_sizes=PATCH_SIZES[image_size // stride])
  return dataclasses.replace(
    config,
    tokenizer=dataclasses.replace(config.tokenizer, quantizer=quantizer, image_size=image_size),
    data=dataclasses.replace(config.data, accumulation=config.data.accumulation * factor),
    eval=dataclasses.replace(config.eval, batch_size=config.eval.batch_size // factor),
  )
