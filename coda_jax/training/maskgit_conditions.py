"""What the tokens of a generator's training come with: classes, or texts."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from coda_jax import arrays, text
from coda_jax.arrays import Arrays
from coda_jax.config import MaskGITTrainConfig
from coda_jax.data.tokens import TokenSource
from coda_jax.errors import UserError
from coda_jax.models.conditions import TextShape


@dataclasses.dataclass(frozen=True)
class Conditions:
  """What a trainer needs to know about them.

  Attributes:
    num_classes, text: of `MaskGITConfig`.
    fixed: arrays of the model that do not train, by dotted path.
    tokenize: captions to token ids, for `TokenBatches`; None where the tokens hold what the model
      takes.
    encoder: arrays of the text encoder that the update runs on token ids; {} for none.
    text_encoder: fingerprint of the text encoder, of a model of texts.
    text_encoder_dir: where it is, if the config says so.
  """

  num_classes: int = 0
  text: TextShape | None = None
  fixed: Arrays = dataclasses.field(default_factory=dict)
  tokenize: Callable[[Sequence[str]], np.ndarray] | None = None
  encoder: Arrays = dataclasses.field(default_factory=dict)
  text_encoder: str | None = None
  text_encoder_dir: str | None = None
  _graphdef: nnx.GraphDef | None = None

  def embedded(self, encoder: Arrays, condition: jax.Array) -> jax.Array:
    """What the model takes, of what a batch holds; traceable."""
    if self._graphdef is None:
      return condition
    return arrays.merge(self._graphdef, encoder)(condition)


def conditions_of(
  config: MaskGITTrainConfig, train: TokenSource, held_out: TokenSource | None
) -> Conditions:
  """Those of the tokens to train on.

  Raises:
    UserError: the held-out tokens have others, the config asks for others, or the text encoder is
      missing or another one.
  """
  if held_out and _kind(held_out) != _kind(train):
    raise UserError(
      f"{config.data.train} comes with {_shown(train)}, {config.data.eval} with {_shown(held_out)}"
    )
  return (_of_texts if train.text else _of_classes)(config, train, held_out)


def _of_classes(
  config: MaskGITTrainConfig, train: TokenSource, held_out: TokenSource | None
) -> Conditions:
  where, names = config.data.train, train.class_names
  if config.data.text_encoder:
    raise UserError(
      f"config.data.text_encoder is set, but the tokens {where} have no captions; "
      "`coda_jax.tokenize_dataset --text captions` writes them"
    )
  classes = config.model.num_classes or len(names)
  if classes != len(names):
    raise UserError(
      f"config.model.num_classes={classes}, but the tokens {where} have {len(names)} classes"
    )
  if not classes and config.class_dropout < 1:
    raise UserError(f"the tokens {where} have no classes; config.class_dropout=1 trains without")
  if held_out and held_out.class_names != names:
    raise UserError(f"{where} and {config.data.eval} have different classes")
  return Conditions(num_classes=classes)


def _of_texts(
  config: MaskGITTrainConfig, train: TokenSource, held_out: TokenSource | None
) -> Conditions:
  where, named, info = config.data.train, config.data.text_encoder, train.text
  assert info is not None
  if config.model.num_classes:
    raise UserError(
      f"config.model.num_classes={config.model.num_classes}, but the tokens {where} have texts"
    )
  embedded = info["kind"] == "embeddings"
  if not named and not embedded:
    raise UserError(
      f"the tokens {where} have captions: config.data.text_encoder names the directory of the text "
      "encoder that is to read them, made by `python -m convert clip-text`"
    )
  encoder = text.load_text_encoder(named, dtype=config.dtype) if named else None
  for path, source in ((where, train), (config.data.eval, held_out)):
    theirs = source.text["encoder"]["fingerprint"] if source and source.text and embedded else None
    mine = encoder.fingerprint if encoder else info["encoder"]["fingerprint"]
    if theirs not in (None, mine):
      raise UserError(
        f"the texts of {path} were embedded by text encoder {theirs[:12]}, "
        f"{named or where} is {mine[:12]}"
      )
  common: dict[str, Any] = {"text_encoder_dir": named or None}
  if embedded:
    empty = np.asarray(train.empty(), np.float32)
    shape = TextShape(int(info["tokens"]), int(info["width"]))
    common["text_encoder"] = info["encoder"]["fingerprint"]
    return Conditions(text=shape, fixed={"condition.empty": empty}, **common)
  assert encoder is not None
  graphdef, flat = arrays.split(encoder.model)
  return Conditions(
    text=TextShape(encoder.tokens, encoder.width),
    fixed={"condition.empty": encoder.encode([""])[0]},
    tokenize=encoder.ids,
    encoder=flat,
    text_encoder=encoder.fingerprint,
    _graphdef=graphdef,
    **common,
  )


def _kind(source: TokenSource) -> str:
  return source.text["kind"] if source.text else "classes"


def _shown(source: TokenSource) -> str:
  return {"captions": "captions", "embeddings": "embeddings of captions"}.get(
    _kind(source), "classes"
  )
