"""Tables of an ablation beside published figures: mean and spread over seeds, and the orders."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from coda_jax.config import AblationConfig, Table
from coda_jax.config.ablation import plain
from coda_jax.errors import UserError

Values = Mapping[int, float]  # by seed
Measures = Mapping[str, Mapping[int, Mapping[str, float]]]  # row -> seed -> name -> value


@dataclasses.dataclass(frozen=True)
class Quantity:
  """A measure, or a figure of the paper.

  Attributes:
    label: as people read it, with its unit.
    form: of its values.
    better: 1 if more is better, -1 if less is.
  """

  label: str
  form: str
  better: int


QUANTITIES = {
  "psnr": Quantity("PSNR (dB)", ".2f", 1),
  "ssim": Quantity("SSIM", ".3f", 1),
  "lpips": Quantity("LPIPS", ".3f", -1),
  "vgg_kd": Quantity("VGG-KD", ".3f", -1),
  "quantization_error": Quantity("quantization error", ".3f", -1),
  "relative_error": Quantity("error (% of variance)", ".1f", -1),
  "codes_used": Quantity("codes used (%)", ".1f", 1),
  "codes_perplexity": Quantity("perplexity of codes", ".0f", 1),
  "bits_per_pixel": Quantity("bits a pixel", ".2f", -1),
}
PAPER = {
  "rfid": Quantity("rFID", ".2f", -1),
  "psnr": Quantity("PSNR (dB)", ".2f", 1),
  "ssim": Quantity("SSIM", ".3f", 1),
  "error": Quantity("quantization error", ".3f", -1),
  "used": Quantity("codes used (%)", ".0f", 1),
}


_FEW = 12  # rows that are named if they are missing


def check_columns(ablation: AblationConfig) -> None:
  """Raises UserError for a column that is no measure, or no figure that papers give."""
  for name, table in ablation.tables.items():
    for ours, theirs in table.columns:
      if ours not in QUANTITIES:
        known = ", ".join(QUANTITIES)
        raise UserError(f"config.tables.{name}: no measure {ours!r}; it is one of {known}")
      if theirs and theirs not in PAPER:
        known = ", ".join(PAPER)
        raise UserError(f"config.tables.{name}: no published figure {theirs!r}; there are {known}")


def values(measures: Measures, row: str, name: str) -> dict[int, float]:
  """A measure of a row by seed, of the runs that have it."""
  return {seed: x[name] for seed, x in measures.get(row, {}).items() if name in x}


def mean_and_spread(found: Values) -> tuple[float, float | None]:
  """(mean, standard deviation over seeds with N - 1, or None of one seed); NaN of none."""
  x = list(found.values())
  if not x:
    return math.nan, None
  return float(np.mean(x)), float(np.std(x, ddof=1)) if len(x) > 1 else None


def compare(a: Values, b: Values) -> tuple[float, float | None] | None:
  """(mean of a - b, its standard error or None of one seed), seed by seed; None without a seed."""
  both = [a[seed] - b[seed] for seed in a if seed in b]
  if not both:
    return None
  error = float(np.std(both, ddof=1)) / len(both) ** 0.5 if len(both) > 1 else None
  return float(np.mean(both)), error


def orders(table: Table, measures: Measures) -> dict[str, dict[str, list[str]]]:
  """By "OURS ~ PAPER", which pairs of lines our measure puts in the paper's order.

  Pairs of tokenizers whose published figures differ are listed as "worse < better" under "same",
  "reversed", "unclear" (the mean difference is below two standard errors) or "missing".
  """
  out = {}
  for ours, theirs in table.columns:
    if not theirs:
      continue
    found = {"same": [], "reversed": [], "unclear": [], "missing": []}
    lines = [x for x in table.lines if x.row and theirs in x.paper]
    for a, b in itertools.combinations(lines, 2):
      gain = (b.paper[theirs] - a.paper[theirs]) * PAPER[theirs].better
      if not gain:
        continue
      worse, better = (a, b) if gain > 0 else (b, a)
      pair = (values(measures, x.row, ours) for x in (better, worse))
      difference = compare(*pair)
      if difference is None:
        kind = "missing"
      else:
        mean, error = difference
        clear = error is None or abs(mean) > 2 * error
        kind = (
          ("same" if mean * QUANTITIES[ours].better > 0 else "reversed") if clear else "unclear"
        )
      found[kind].append(f"{worse.label} < {better.label}")
    out[f"{ours} ~ {theirs}"] = found
  return out


def as_json(
  ablation: AblationConfig, measures: Measures, missing: Mapping[str, Sequence[int]]
) -> dict:
  """Everything that the tables and plots show, and every measure of every run."""
  tables = {}
  for name, table in ablation.tables.items():
    lines = []
    for line in table.lines:
      ours = {n: mean_and_spread(values(measures, line.row, n)) for n, _ in table.columns}
      lines.append(
        {
          "label": line.label,
          "row": line.row,
          "paper": line.paper,
          "mean": {n: mean for n, (mean, _) in ours.items() if math.isfinite(mean)},
          "spread": {n: spread for n, (_, spread) in ours.items() if spread is not None},
          "seeds": len(measures.get(line.row, {})),
        }
      )
    tables[name] = {"title": table.title, "lines": lines, "orders": orders(table, measures)}
  rows = {
    row: {"changes": {k.replace("__", "."): v for k, v in changes.items()}, "runs": measures[row]}
    for row, changes in ablation.rows.items()
    if row in measures
  }
  return {
    "base": plain(ablation.base),
    "tokens_per_code": ablation.tokens_per_code,
    "missing": {row: list(seeds) for row, seeds in missing.items()},
    "continuous_vae": measures.get("", {}).get(0, {}),
    "tables": tables,
    "rows": rows,
  }


def as_markdown(
  ablation: AblationConfig, measures: Measures, missing: Mapping[str, Sequence[int]]
) -> str:
  """The tables as Markdown: ours as mean ± spread, the paper's figures beside them."""
  parts = []
  if missing:
    rows = [f"{row} (seed {', '.join(map(str, seeds))})" for row, seeds in missing.items()]
    if len(rows) > _FEW:
      rows = [f"{sum(map(len, missing.values()))} runs of {len(rows)} rows (all in tables.json)"]
    parts.append(f"Not there yet: {'; '.join(rows)}.")
  for name, table in ablation.tables.items():
    theirs = list(dict.fromkeys(p for _, p in table.columns if p))
    head = ["", *(QUANTITIES[n].label + _arrow(QUANTITIES[n]) for n, _ in table.columns), "seeds"]
    head += [f"paper: {PAPER[p].label}" for p in theirs]
    rows = [head, ["---"] * len(head)]
    for line in table.lines:
      cells = [_cell(values(measures, line.row, n), QUANTITIES[n].form) for n, _ in table.columns]
      seeds = str(len(measures.get(line.row, {}))) if line.row else ""
      published = [f"{line.paper[p]:{PAPER[p].form}}" if p in line.paper else "–" for p in theirs]
      rows.append([line.label, *cells, seeds, *published])
    text = "\n".join(f"| {' | '.join(r)} |" for r in rows)
    parts += [f"## {table.title}", text, *filter(None, [_orders_text(table, measures)])]
    if has_runs(table, measures):
      parts.append(f"![{table.title}]({plot_name(name)})")
  return "\n\n".join(parts) + "\n"


def has_runs(table: Table, measures: Measures) -> bool:
  """Whether there is anything of a table to plot."""
  return any(measures.get(line.row) for line in table.lines if line.row)


def plot_name(table: str) -> str:
  """The file of a table's plot."""
  return f"table_{table}.png" if table[:1].isdigit() else f"{table}.png"


def _arrow(quantity: Quantity) -> str:
  return " ↑" if quantity.better > 0 else " ↓"


def _cell(found: Values, form: str) -> str:
  mean, spread = mean_and_spread(found)
  if math.isnan(mean):
    return "–"
  return f"{mean:{form}}" + (f" ± {spread:{form}}" if spread is not None else "")


def _orders_text(table: Table, measures: Measures) -> str:
  """A line for each column that has the paper's beside it."""
  lines = []
  for name, found in orders(table, measures).items():
    ours, _, theirs = name.partition(" ~ ")
    count = sum(map(len, found.values())) - len(found["missing"])
    if not count:
      continue
    text = f"- {QUANTITIES[ours].label} beside the paper's {PAPER[theirs].label}: "
    text += f"{len(found['same'])} of {count} pairs in the paper's order"
    for kind in ("reversed", "unclear"):
      if found[kind]:
        text += f"; {kind}: {', '.join(found[kind])}"
    lines.append(f"{text}.")
  return "\n".join(lines)
