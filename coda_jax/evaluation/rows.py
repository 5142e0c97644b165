"""Features of many images, a row each, in memory or in files."""

import pathlib
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Float, Int

from coda_jax.errors import UserError

BLOCK = 1024  # rows that are worked on at a time


class Rows:
  """Rows [N, D] of several arrays, one after the other.

  Args:
    parts: arrays [n, D], or `.npy` files of them, which are mapped and not held.
  """

  def __init__(self, parts: Iterable[np.ndarray | pathlib.Path]):
    self._parts = list(parts)
    shapes = [self._open(i).shape for i in range(len(self._parts))]
    widths = {s[1] for s in shapes}
    assert len(widths) <= 1, f"rows of several widths: {widths}"
    self.width: int = widths.pop() if widths else 0
    self._starts = np.cumsum([0, *(s[0] for s in shapes)])

  @classmethod
  def of(cls, rows: "Rows | np.ndarray") -> "Rows":
    """Rows as they are, or those of one array."""
    return rows if isinstance(rows, Rows) else cls([rows])

  def _open(self, part: int) -> np.ndarray:
    found = self._parts[part]
    if isinstance(found, np.ndarray):
      return found
    try:
      return np.load(found, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
      raise UserError(
        f"{found} is damaged or not there; remove it and run the command again"
      ) from e

  def __len__(self) -> int:
    return int(self._starts[-1])

  def blocks(self, size: int = BLOCK) -> Iterator[Float[np.ndarray, "_ d"]]:
    """All rows in order, `size` at a time; the last block may hold fewer."""
    for start in range(0, len(self), size):
      yield self[start : min(start + size, len(self))]

  def __getitem__(self, rows: slice | Int[np.ndarray, "m"]) -> Float[np.ndarray, "m d"]:
    """A copy of the rows of a slice (without step), or of given ones."""
    if isinstance(rows, slice):
      rows = np.arange(*rows.indices(len(self)))
    parts = np.searchsorted(self._starts, rows, side="right") - 1
    out = np.empty((len(rows), self.width), np.float32)
    for part in np.unique(parts):
      here = parts == part
      out[here] = self._open(int(part))[rows[here] - self._starts[part]]
    return out
