"""What the configs of all quantizers share: an image is token grids, coarse to fine."""

import math
from collections.abc import Sequence

from jaxtyping import Array, Int

from coda_jax.errors import UserError
from coda_jax.models.inputs import check_ids


class TokenGrids:
  """Base of the quantizers' configs. By default all levels share codes, and the last is h x w.

  Attributes:
    codebook_size: number of ids V.
    patch_sizes: side of each level's token grid, coarse to fine, at the training size.
    code_dim: width of a code's value.
    lookup: how a vector finds its code.
  """

  codebook_size: int
  patch_sizes: tuple[int, ...]
  code_dim: int
  lookup: str

  @property
  def tokens(self) -> int:
    """Tokens of an image of the training size."""
    return sum(p * p for p in self.patch_sizes)

  @property
  def codes_by_level(self) -> tuple[int, ...]:
    """How many ids each level's tokens choose from."""
    return (self.codebook_size,) * len(self.patch_sizes)

  @property
  def bits(self) -> float:
    """Bits of an image of the training size."""
    return self.bits_of([p * p for p in self.patch_sizes])

  def bits_of(self, tokens: Sequence[int]) -> float:
    """Bits of so many tokens of each of the first levels."""
    return sum(n * math.log2(v) for n, v in zip(tokens, self.codes_by_level, strict=False))

  @property
  def ranges(self) -> list[tuple[int, int]]:
    """The first id of each level and the one behind its last."""
    return [(0, self.codebook_size)] * len(self.patch_sizes)

  @property
  def channels(self) -> int:
    """Channels of the latents."""
    return self.code_dim

  @property
  def latent_side(self) -> int:
    """Side of the latents of an image of the training size."""
    return self.patch_sizes[-1]

  def level_sizes(self, h: int, w: int) -> list[tuple[int, int]]:
    """Token grid of every level for latents of h x w."""
    raise NotImplementedError

  def latent_size(self, grids: Sequence[tuple[int, ...]]) -> tuple[int, int]:
    """Latent height and width of the grids of the first levels; where unknown, the training's."""
    complete = len(grids) == len(self.patch_sizes)
    h, w = grids[-1] if complete else (self.latent_side, self.latent_side)
    return h, w

  def check(self, ids: list[Int[Array, "b _ _"]], size: tuple[int, int] | None) -> tuple[int, int]:
    """Latent height and width that ids of the first levels are of.

    Args:
      size: what it should be; None to see it from the ids.

    Raises:
      UserError: no levels, too many, ids that are no codes, or grids that do not belong to `size`.
    """
    check_ids(ids, self.ranges)
    grids, levels = [tuple(i.shape[1:]) for i in ids], len(self.patch_sizes)
    if not 1 <= len(ids) <= levels:
      raise UserError(f"{len(ids)} levels of ids given; the tokenizer has {levels}")
    if size is None:
      size = self.latent_size(grids)
    expected = self.level_sizes(*size)[: len(ids)]
    if grids != expected:
      raise UserError(
        f"ids of grids {grids} do not fit latents of {size[0]}x{size[1]}, which need "
        f"{expected}; give size= for other than the training size"
      )
    return size
