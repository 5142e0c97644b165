"""What an evaluation found, as JSON and as text."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from coda_jax.evaluation import measures, record
from coda_jax.evaluation.codebook import CodebookUsage
from coda_jax.evaluation.entries import Entry
from coda_jax.evaluation.image_quality import Quality
from coda_jax.evaluation.metrics import QuantizationError
from coda_jax.evaluation.parts import Measured

QUALITY = ("psnr", "ssim", "lpips")
LABELS = {"psnr": "PSNR (dB) ↑", "ssim": "SSIM ↑", "lpips": "LPIPS ↓", **measures.LABELS}
LABELS |= {"codes_used": "Codes used ↑", "bits_per_image": "Bits an image"}
_DIGITS = {"psnr": 2, "fid": 3, "sfid": 3, "inception_score": 2, "kid": 5, "bits_per_image": 0}


def quality_of(measured: Measured) -> Quality:
  """Likeness of every reconstruction."""
  lpips = measured.values("lpips") if "lpips" in measured.names else None
  return Quality(measured.values("psnr"), measured.values("ssim"), lpips)


def codebook_of(entry: Entry, measured: Measured) -> dict[str, Any] | None:
  """How an entry uses its codes, overall and by level; None without tokens."""
  if "ids" not in measured.names:
    return None
  known, tokens = entry.codebook_size, 0
  size = known or 1 + max(int(ids.max(initial=0)) for ids in measured.each("ids"))
  usage = None
  for ids in measured.each("ids"):
    tokens = ids.shape[1]
    levels = np.split(ids, np.cumsum(entry.levels or [tokens])[:-1], axis=1)
    found = CodebookUsage.count(levels, size, tuple(entry.level_codes))
    usage = found if usage is None else usage.merge(found)
  assert usage is not None
  by_level = [
    {
      "tokens": entry.levels[i] if entry.levels else tokens,
      **({"utilization": float(usage.level_utilization[i])} if known else {}),
      "perplexity": float(usage.level_perplexity[i]),
      "entropy_bits": float(usage.level_entropy[i]),
      "tokens_per_code": float(usage.level_tokens_per_code[i]),
    }
    for i in range(len(usage.counts))
  ]
  return {
    "codebook_size": known or None,
    "codes_seen": int(np.sum(usage.overall > 0)),
    "utilization": usage.utilization if known else None,
    "perplexity": usage.perplexity,
    "entropy_bits": usage.entropy,
    "tokens_per_code": usage.tokens_per_code if known else None,
    "tokens_per_image": tokens,
    "bits_per_image": entry.bits(tokens),
    "levels": by_level,
  }


def quantization_of(measured: Measured) -> dict[str, Any] | None:
  """Error of the quantized latents after each level; None without tokens or for other models."""
  if "level_errors" not in measured.names:
    return None
  arrays = (measured.values(n) for n in ("level_errors", "latent_mean", "latent_power"))
  error = QuantizationError(*arrays)
  return {
    "mean_squared": [float(x) for x in error.levels.mean(axis=0)],
    "relative": [float(x) for x in error.relative],
  }


def paired(a: Measured, b: Measured) -> dict[str, dict[str, float | int]]:
  """Differences a - b image by image: mean, standard error over images, and number of images."""
  _, ours, theirs = np.intersect1d(a.values("index"), b.values("index"), return_indices=True)
  out = {}
  for name in QUALITY:
    if name in a.names and name in b.names:
      x, y = a.values(name)[ours], b.values(name)[theirs]
      there = np.isfinite(x) & np.isfinite(y)  # the PSNR of equal images is infinite
      d = x[there].astype(np.float64) - y[there]
      if len(d) > 1:
        error = float(d.std(ddof=1) / len(d) ** 0.5)
        out[name] = {"mean": float(d.mean()), "standard_error": error, "images": len(d)}
  return out


def as_json(value: Any) -> Any:
  """The same with null for NaN and infinity, which JSON does not know."""
  if isinstance(value, Mapping):
    return {str(k): as_json(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [as_json(v) for v in value]
  if isinstance(value, (float, np.floating)):
    return float(value) if math.isfinite(value) else None
  return value


def row_of(entry: Mapping[str, Any]) -> dict[str, Any]:
  """The values of a table's row: those of an entry and two of its codebook."""
  row = {k: v for k, v in entry["values"].items() if k in LABELS}
  if codes := entry.get("codebook"):
    if codes["utilization"] is not None:
      row["codes_used"] = codes["utilization"]
    if codes["bits_per_image"] is not None:
      row["bits_per_image"] = codes["bits_per_image"]
  return row


def table(rows: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
  """(head, lines of cells) of named rows; columns that no row has are left out."""
  names = [name for name in LABELS if any(name in row for row in rows.values())]

  def cell(name: str, value: float | None) -> str:
    if value is None:
      return "–"
    if name in ("codes_used", "precision", "recall"):
      return f"{100 * value:.1f}%"
    return f"{value:.{_DIGITS.get(name, 4)}f}"

  lines = [[what, *(cell(n, row.get(n)) for n in names)] for what, row in rows.items()]
  return ["", *(LABELS[n] for n in names)], lines


def all_rows(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """The rows of the main table: entries, then yardsticks."""
  named = {**found["entries"], **found.get("yardsticks", {})}
  return {name: row_of(entry) for name, entry in named.items()}


def text_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
  """The table for a terminal."""
  head, lines = table(rows)
  widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]

  def line(cells: Sequence[str]) -> str:
    first, *rest = zip(cells, widths, strict=True)
    return "  ".join([f"{first[0]:{first[1]}}", *(f"{c:>{w}}" for c, w in rest)]).rstrip()

  return "\n".join(map(line, [head, *lines]))


def differences(found: Mapping[str, Any]) -> list[str]:
  """The paired comparisons in words."""
  out = []
  for pair in found.get("paired", []):
    for name, x in pair["differences"].items():
      digits = _DIGITS.get(name, 4)
      out.append(
        f"{LABELS[name].split()[0]}: {pair['a']} − {pair['b']} = {x['mean']:+.{digits}f} "
        f"± {x['standard_error']:.{digits}f} (standard error over {x['images']} images)"
      )
  return out


def notes(found: Mapping[str, Any]) -> list[str]:
  """What is left out and why, a line for each reason."""
  named = {**found["entries"], **found.get("yardsticks", {})}
  reasons = list(found["left_out"])
  for entry in named.values():
    for name, reason in entry["left_out"].items():
      label = LABELS[name].split()[0]
      reasons.append(reason if reason.startswith(label) else f"{label} is left out: {reason}")
  return list(dict.fromkeys(reasons))


def markdown(found: Mapping[str, Any], title: str) -> str:
  """The results for a page or a pull request."""

  def rows(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    escape = lambda cells: "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"
    return "\n".join([escape(head), "|---" + "|---:" * (len(head) - 1) + "|", *map(escape, lines)])

  parts = [f"# {title}", rows(*table(all_rows(found)))]
  if said := differences(found):
    parts.append("Image by image:\n\n" + "\n".join(f"- {line}" for line in said))
  if sweep := found.get("sweep"):
    named = {_setting(x): {**x["values"]} for x in sweep}
    head, lines = table(named)
    head.append("Seconds an image")
    lines = [[*line, f"{x['seconds']:.3g}"] for line, x in zip(lines, sweep, strict=True)]
    parts.append("## Steps and guidance\n\n" + rows(head, lines))
  for name, entry in found["entries"].items():
    said = "\n".join(f"- {line}" for line in record.lines(entry["record"]))
    parts.append(f"## How {name} was measured\n\n{said}")
  if said := notes(found):
    parts.append("## Left out\n\n" + "\n".join(f"- {line}" for line in said))
  return "\n\n".join(parts) + "\n"


def _setting(x: Mapping[str, Any]) -> str:
  return f"{x['steps']} steps, guidance {x['guidance']:g}"
