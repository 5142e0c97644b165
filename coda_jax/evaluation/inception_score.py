"""Inception score (Salimans et al., arXiv 1606.03498) from sums that add up over hosts."""

import numpy as np
from flax import struct
from jaxtyping import Float

from coda_jax.errors import UserError

SPLIT = 5000  # images of a split, as ADM and the original code take them


@struct.dataclass
class ClassSums:
  """Sums over the images of each split, in float64.

  Attributes:
    counts: [S] images.
    probabilities: [S, classes] sums of p(y|x).
    information: [S] sums of sum_y p log p.
    split: images of a split, in the order of the samples.
  """

  counts: np.ndarray
  probabilities: np.ndarray
  information: np.ndarray
  split: int = struct.field(pytree_node=False, default=SPLIT)

  @classmethod
  def of(
    cls, logits: Float[np.ndarray, "n classes"], first: int, split: int = SPLIT
  ) -> "ClassSums":
    """Of the samples `first`, `first` + 1, ... of the whole set."""
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    log_p = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    where = (first + np.arange(len(x))) // split
    splits = int(where[-1]) + 1 if len(x) else 0
    out = cls(np.zeros(splits), np.zeros((splits, x.shape[1])), np.zeros(splits), split)
    np.add.at(out.counts, where, 1)
    np.add.at(out.probabilities, where, p)
    np.add.at(out.information, where, (p * log_p).sum(axis=1))
    return out

  def merge(self, other: "ClassSums") -> "ClassSums":
    """Of the samples of both, none of which is in both."""
    assert self.split == other.split
    size = max(len(self.counts), len(other.counts))

    def add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
      pad = lambda x: np.pad(x, ((0, size - len(x)),) + ((0, 0),) * (x.ndim - 1))
      return pad(a) + pad(b)

    return ClassSums(
      add(self.counts, other.counts),
      add(self.probabilities, other.probabilities),
      add(self.information, other.information),
      self.split,
    )

  def score(self) -> tuple[float, float]:
    """Mean and standard deviation over splits of exp(mean KL of p(y|x) from p(y)).

    The last split may hold fewer images. Raises UserError without images.
    """
    there = self.counts > 0
    if not there.any():
      raise UserError("an Inception score needs images")
    n = self.counts[there]
    p = self.probabilities[there] / n[:, None]
    entropy = np.sum(p * np.log(np.where(p > 0, p, 1)), axis=1)
    scores = np.exp(self.information[there] / n - entropy)
    return float(scores.mean()), float(scores.std())
