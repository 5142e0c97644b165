"""Text encoders: texts to one vector a token, for text-to-image models.

`ENCODERS` names the class of every kind of directory that `python -m convert` writes for texts; an
encoder more is a class more. See `TextEncoder` for what a class offers.
"""

import logging
import os
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from coda_jax import arrays, pretrained, sharding, weights
from coda_jax.errors import UserError
from coda_jax.text import bpe

log = logging.getLogger("coda_jax")


@runtime_checkable
class TextEncoder(Protocol):
  """What a text encoder offers.

  Attributes:
    kind: its name in `ENCODERS`.
    tokens, width: vectors of a text, and numbers of a vector.
    padding: what short texts are filled up with: "end" for the end token.
    fingerprint: of weights and settings; embeddings of another one are another language.
    model: the module that makes vectors [B, tokens, width] of token ids, traceable.
  """

  kind: str
  tokens: int
  width: int
  padding: str
  fingerprint: str

  @property
  def model(self) -> nnx.Module: ...

  def tokenize(self, texts: Sequence[str]) -> tuple[Int[np.ndarray, "b n"], list[int]]:
    """(ids int32 [B, tokens] of the texts, the numbers of those that were cut)."""
    ...

  def ids(self, texts: Sequence[str]) -> Int[np.ndarray, "b n"]:
    """Token ids int32 [B, tokens]; what is longer is cut, with a warning the first time."""
    ...

  def embed(self, ids: Int[np.ndarray, "b n"]) -> Float[np.ndarray, "b n c"]:
    """Vectors float32 [B, tokens, width] of the texts of ids [B, tokens]."""
    ...

  def encode(self, texts: Sequence[str]) -> Float[np.ndarray, "b n c"]:
    """Vectors of the texts, float32 [B, tokens, width]."""
    ...


class CLIPTextEncoder:
  """CLIP's text encoder with its tokenizer: `last_hidden_state`, after the final norm.

  Texts are padded with the end token, as Hugging Face's tokenizer does it.

  Raises:
    UserError: missing, damaged or foreign files.
  """

  kind, padding = "clip-text", "end"

  def __init__(self, path: str | os.PathLike, *, dtype: DTypeLike = jnp.float32):
    model, fields = pretrained.load_clip_text(path, dtype=dtype)
    config = model.config
    if config.vocabulary != bpe.END + 1:
      raise UserError(f"{path} has {config.vocabulary} tokens; CLIP's tokenizer has {bpe.END + 1}")
    self.tokens, self.width = config.context, config.width
    self.fingerprint: str = fields["fingerprint"]
    self.model, self._run, self._told = model, _run(model), False

  def tokenize(self, texts: Sequence[str]) -> tuple[np.ndarray, list[int]]:
    """See `TextEncoder`."""
    return bpe.encode(texts, context=self.tokens)

  def ids(self, texts: Sequence[str]) -> np.ndarray:
    """See `TextEncoder`."""
    ids, cut = self.tokenize(texts)
    if cut and not self._told:
      log.warning(
        "%d of %d texts are longer than %d tokens and are cut: %r",
        *(len(cut), len(texts), self.tokens - 2, texts[cut[0]][:60]),
      )
      self._told = True
    return ids

  def embed(self, ids: np.ndarray) -> np.ndarray:
    """See `TextEncoder`. All devices of this process share the work if they divide it."""
    size = arrays.padded_size(len(ids))
    padded = np.pad(ids, ((0, size - len(ids)), (0, 0)), constant_values=bpe.END)
    return np.asarray(self._run(sharding.over_local_devices(padded)))[: len(ids)]

  def encode(self, texts: Sequence[str]) -> np.ndarray:
    """Vectors float32 [B, tokens, width] of the texts; what is longer is cut, with one warning."""
    return self.embed(self.ids(texts))


_run = arrays.jit_module(lambda model, ids: model(ids))
ENCODERS: dict[str, type[CLIPTextEncoder]] = {CLIPTextEncoder.kind: CLIPTextEncoder}


def load_text_encoder(path: str | os.PathLike, *, dtype: DTypeLike = jnp.float32) -> TextEncoder:
  """The text encoder that `python -m convert clip-text` wrote to `path`.

  Raises:
    UserError: no such directory, or none of a text encoder.
  """
  try:
    kind = weights.kind_of(path)
  except UserError:
    kind = None
  if kind not in ENCODERS:
    made = ", ".join(f"`python -m convert {name}`" for name in ENCODERS)
    what = f"holds a {kind!r}" if kind else "has no readable config.json"
    raise UserError(f"{path} {what}; give the directory of a text encoder, made by {made}")
  return ENCODERS[kind](path, dtype=dtype)
