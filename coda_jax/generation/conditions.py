"""What people ask a generator for, classes or texts, as its model takes it."""

import operator
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from coda_jax.errors import UserError
from coda_jax.models.maskgit import MaskGITConfig
from coda_jax.text import TextEncoder

Wanted = Sequence[int | str | None] | Int[np.ndarray, "b"]  # one for each image; None is nothing


class Classes:
  """Classes by number or name.

  Attributes:
    keyword: the argument of `Generator.generate` that takes them.
  """

  keyword = "classes"

  def __init__(self, config: MaskGITConfig, names: Sequence[str]):
    self._config, self._names = config, tuple(names)

  def __call__(self, wanted: Wanted) -> Int[np.ndarray, "b"]:
    """Numbers of the classes; None is the null class.

    Raises:
      UserError: one of them is out of range or unknown.
    """
    return np.array([self._id(c) for c in wanted], np.int32)

  def _id(self, c) -> int:
    if c is None:
      return self._config.null_class
    if isinstance(c, str) and c in self._names:
      return self._names.index(c)
    try:
      number = int(c) if isinstance(c, str) else operator.index(c)
    except (TypeError, ValueError):
      raise UserError(self.unknown(c)) from None
    if not 0 <= number < self._config.num_classes:
      raise UserError(
        f"class {number} is out of range: the generator has classes 0 to "
        f"{self._config.num_classes - 1}"
      )
    return number

  def has(self, name: str) -> bool:
    """Whether a class has this name."""
    return name in self._names

  def unknown(self, c: object) -> str:
    """What to tell about a class that is no name."""
    names = ", ".join(self._names[:10]) or "none"
    more = ", ..." if len(self._names) > 10 else ""
    return f"no class {c!r}; the generator's names are: {names}{more}"

  def label(self, c: int | str | None) -> str:
    """The name of a class, or its number if it has none; "null" for no class."""
    if c is None:
      return "null"
    return self._names[c] if isinstance(c, int) and c < len(self._names) else str(c)


class Prompts:
  """Texts, by the text encoder that the model was trained with.

  Attributes:
    keyword: the argument of `Generator.generate` that takes them.
  """

  keyword = "prompts"

  def __init__(self, encoder: TextEncoder):
    self._encoder = encoder

  def __call__(self, wanted: Wanted) -> Float[np.ndarray, "b t d"]:
    """Embeddings of the texts; None is the empty text.

    Raises:
      UserError: something is no text.
    """
    if wrong := [x for x in wanted if x is not None and not isinstance(x, str)]:
      raise UserError(f"prompt {wrong[0]!r} is no text; give texts, such as 'a red bird'")
    return self._encoder.encode([x if isinstance(x, str) else "" for x in wanted])

  def label(self, text: int | str | None) -> str:
    """The text; "null" for none."""
    return str(text or "null")
