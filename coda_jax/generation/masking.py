"""How many tokens stay masked while an image is sampled, and which are revealed first."""

import numpy as np
from jaxtyping import Int

from coda_jax.errors import UserError

SCHEDULES = ("cosine", "arccos", "linear")
ORDERS = ("uniform", "coarse_to_fine")


def mask_ratio(schedule: str, progress: float | np.ndarray) -> np.ndarray:
  """Part of the tokens that is masked at a progress of 0 to 1: from 1 down to 0.

  cos(π/2 t) (MaskGIT, arXiv 2202.04200), 2/π arccos(t), or 1 − t. Raises UserError for another
  schedule.
  """
  t = np.asarray(progress, np.float64)
  if schedule == "cosine":
    return np.cos(np.pi / 2 * t)
  if schedule == "arccos":
    return 2 / np.pi * np.arccos(t)
  if schedule == "linear":
    return 1 - t
  raise UserError(f"schedule is {schedule!r}; it is one of {', '.join(SCHEDULES)}")


def masked_counts(
  schedule: str, steps: int, tokens: int | Int[np.ndarray, "*b"]
) -> Int[np.ndarray, "{steps} *b"]:
  """Tokens still masked after each of `steps` steps, of `tokens` that are at the beginning.

  floor(ratio · tokens), but every step reveals at least one as long as there are any. The last
  entry is 0, and with as many tokens as steps or more no earlier one is: all ratios are concave.
  """
  left = np.asarray(tokens)
  ratios = mask_ratio(schedule, np.arange(1, steps + 1) / steps)
  counts = []
  for ratio in ratios:  # the small number makes up for a ratio that rounding put below 1 − t
    left = np.maximum(0, np.minimum(np.floor(ratio * np.asarray(tokens) + 1e-9), left - 1))
    counts.append(left)
  counts[-1] = np.zeros_like(left)
  return np.stack(counts).astype(np.int32)
