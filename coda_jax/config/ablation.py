"""Settings of an ablation: runs that differ from a base in a few keys, and tables of them."""

import copy
import dataclasses
from typing import Any

import ml_collections

from coda_jax.config.engine import ranged
from coda_jax.errors import UserError


def plain(values: Any) -> dict:
  """A copy of a `ConfigDict` or of nested dictionaries as dictionaries."""
  return values.to_dict() if hasattr(values, "to_dict") else copy.deepcopy(dict(values))


@dataclasses.dataclass(frozen=True)
class Line:
  """A line of a table.

  Attributes:
    label: what people read.
    row: the row of `AblationConfig.rows` that it shows; "" is the continuous VAE.
    paper: published figures by name.
    x: place on the axis of the table's plot.
  """

  label: str
  row: str = ""
  paper: dict[str, float] = dataclasses.field(default_factory=dict)
  x: float | None = None


@dataclasses.dataclass(frozen=True)
class Table:
  """Lines that are compared.

  Attributes:
    title: what people read.
    columns: (a measure of ours, the paper's figure beside it or "") pairs.
    lines: from top to bottom.
    axis: what `Line.x` means, for a plot of curves; "" plots a bar for each line.
  """

  title: str
  columns: tuple[tuple[str, str], ...]
  lines: tuple[Line, ...]
  axis: str = ""


@dataclasses.dataclass(frozen=True)
class AblationConfig:
  """An ablation.

  Attributes:
    base: config of the run that the rows change, as a config file of `coda_jax.train` gives it.
    rows: changes to it by row, each a dictionary of dotted keys with `__` for dots.
    tables: by name.
    seeds: every row is trained with each.
    tokens_per_code: crops are counted until each code could have been used so often on average.
  """

  base: Any
  rows: dict[str, dict[str, Any]]
  tables: dict[str, Table]
  seeds: tuple[int, ...] = (0, 1, 2)
  tokens_per_code: float = ranged(20.0, above=0)

  def __post_init__(self):
    for name, table in self.tables.items():
      for line in table.lines:
        if line.row and line.row not in self.rows:
          raise UserError(
            f"config.tables.{name}: there is no row {line.row!r}; rows: {', '.join(self.rows)}"
          )

  def run_values(self, row: str, seed: int) -> ml_collections.ConfigDict:
    """The config of the run of a row and a seed.

    Raises:
      UserError: a change names a group that the base does not have.
    """
    values = plain(self.base)
    for key, value in {**self.rows[row], "seed": seed}.items():
      *groups, last = key.split("__")
      place = values
      for i, group in enumerate(groups):
        place = place.get(group)
        if not isinstance(place, dict):
          raise UserError(f"config.base has no group {'.'.join(groups[: i + 1])}")
      place[last] = value
    return ml_collections.ConfigDict(values)
