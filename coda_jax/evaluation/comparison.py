"""One evaluation from its sets to its results: claims the folder, shares the work, writes them."""

import collections
import dataclasses
import json
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from coda_jax import outputs
from coda_jax.data import pipeline
from coda_jax.errors import UserError
from coda_jax.evaluation import conventions, parts, record, reference, results
from coda_jax.evaluation.conventions import Convention
from coda_jax.evaluation.features import Networks
from coda_jax.evaluation.frechet import FeatureStatistics
from coda_jax.evaluation.image_sets import MeasuredSet, RealImages, Reconstructions, Samples
from coda_jax.evaluation.measures import FeatureSet, measure
from coda_jax.evaluation.parts import Measured, Progress
from coda_jax.evaluation.record import Side
from coda_jax.evaluation.rows import Rows

log = logging.getLogger("coda_jax")
RESULTS, SETTINGS = "results.json", "settings.json"
_FORMAT = "coda_jax evaluation 1"
WAIT = 3600.0  # seconds for another process to compute the distances


@dataclasses.dataclass
class Evaluation:
  """What is measured, and against what.

  Attributes:
    options: of the command, for results and to tell two evaluations apart.
    convention, networks: how, and by what.
    real: the real images, None if a statistics file alone stands for them.
    file: the statistics file, or None.
    sides: what each set's images are, by its name.
    entries: reconstructions, the first is the one that others are compared with.
    samples: sets of samples; the first of a generator is the one of the settings given.
    models: for records: fingerprints, averaged or not, sampler, by a set's name.
    part: images of a part.
  """

  options: Mapping[str, Any]
  convention: Convention
  networks: Networks
  real: RealImages | None
  file: reference.Reference | None
  sides: dict[str, Side]
  entries: Sequence[Reconstructions] = ()
  samples: Sequence[MeasuredSet] = ()
  sweep: Sequence[Samples] = ()
  yardsticks: Sequence[MeasuredSet] = ()
  models: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
  part: int = 1000

  @property
  def sets(self) -> list[MeasuredSet]:
    """Every set once."""
    real = [] if self.real is None else [self.real]
    return [*real, *self.entries, *self.samples, *self.sweep, *self.yardsticks]

  def settings(self) -> dict[str, Any]:
    """All that decides the numbers."""
    return {
      "format": _FORMAT,
      "options": dict(self.options),
      "file": None if self.file is None else self.file.hash,
      "sets": {s.name: {"images": s.count, **s.identity} for s in self.sets},
      "images_of_a_part": self.part,
    }


def claim(output: pathlib.Path, settings: dict[str, Any], overwrite: bool) -> bool:
  """Notes the settings in a folder; True if their results are there already.

  Raises:
    UserError: the folder holds something else, or another evaluation.
  """
  file, text = output / SETTINGS, json.loads(json.dumps(settings))
  if not file.exists():
    if any(not p.name.startswith(outputs.LOCK) for p in output.iterdir()):
      raise UserError(f"{output} is not empty and holds no evaluation; name a new --output")
    _write(file, text)
    return False
  try:
    there = json.loads(file.read_text())
    if there["format"] != _FORMAT:
      raise ValueError
  except (OSError, ValueError, KeyError, TypeError):
    raise UserError(f"{file} is not that of an evaluation; name a new --output") from None
  if there != text:
    if outputs.writers(output):
      raise UserError(f"{output} is in use by an evaluation with other settings; name a new one")
    if not overwrite and (output / RESULTS).exists():
      raise UserError(
        f"{output} holds another evaluation ({_difference(there, text)}); name a new --output, or "
        "--overwrite, which takes again what still holds"
      )
    (output / RESULTS).unlink(missing_ok=True)
    _write(file, text)
  return (output / RESULTS).exists()


def check_same(ours: dict[str, Any], first: dict[str, Any]) -> None:
  """Raises UserError if the settings of this process are not those of process 0."""
  if (ours := json.loads(json.dumps(ours))) != first:
    raise UserError(
      f"this is not what process 0 measures ({_difference(first, ours)}); every host must see the "
      "same images and weights: a shared folder, or a full copy on each"
    )


def _difference(there: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
  for name in [*there["options"], *ours["options"]]:
    a, b = (x["options"].get(name) for x in (there, ours))
    if a != b:
      return f"{name.replace('_', '-')} was {a!r}, is {b!r}"
  return "its weights or images were others"


def _write(file: pathlib.Path, value: Any) -> None:
  outputs.write_text(file, json.dumps(value, indent=1, allow_nan=False) + "\n")


def measured(evaluation: Evaluation, output: pathlib.Path) -> dict[str, Measured]:
  """Measures what is missing of every set; the parts by name."""
  sets = evaluation.sets
  progress = Progress(sum(s.count for s in sets))
  try:
    found = parts.measure_all(sets, output, evaluation.part, progress)
  finally:
    progress.close()
  return {s.name: m for s, m in zip(sets, found, strict=True)}


def results_of(evaluation: Evaluation, found: Mapping[str, Measured]) -> dict[str, Any]:
  """Every figure, as JSON.

  Raises:
    UserError: too many images that cannot be read.
  """
  e = evaluation
  for s in e.sets:
    _check_readable(s, found[s.name])
  real = _real(e, found)
  out: dict[str, Any] = {
    "format": _FORMAT,
    "options": dict(e.options),
    "left_out": list(e.networks.notes),
    "entries": {s.name: _entry(e, s, found[s.name], real) for s in (*e.entries, *e.samples)},
  }
  if e.yardsticks:
    out["yardsticks"] = {s.name: _entry(e, s, found[s.name], real) for s in e.yardsticks}
  if len(e.entries) > 1:
    first, *others = e.entries
    out["paired"] = [
      {
        "a": first.name,
        "b": other.name,
        "differences": results.paired(found[first.name], found[other.name]),
      }
      for other in others
    ]
  if e.sweep:
    out["sweep"] = [
      {
        "steps": s.settings.steps,
        "guidance": s.settings.guidance,
        "seconds": float(np.mean(np.concatenate(found[s.name].notes("seconds")))),
        "sampler": dataclasses.asdict(s.settings),
        **dict(zip(("values", "left_out"), _measures(e, found[s.name], real), strict=True)),
      }
      for s in e.sweep
    ]
  return results.as_json(out)


def _check_readable(images: MeasuredSet, measured_: Measured) -> None:
  failed = [line for part in measured_.notes("failed") for line in part]
  if failed and pipeline.too_many_unreadable(len(failed), images.count, pipeline.MAX_UNREADABLE):
    raise UserError(
      f"{len(failed)} of {images.count} images could not be read, more than 1%: {failed[0]}; "
      f"restore or remove them, remove {measured_.folder.parent} and run the command again"
    )
  for line in failed:
    log.warning("unreadable image %s: left out", line)


def _features(measured_: Measured) -> dict:
  return {n: measured_.rows(n) for n in ("pool3", "spatial", "vgg") if n in measured_.names}


def _real(e: Evaluation, found: Mapping[str, Measured]) -> FeatureSet:
  rows = {} if e.real is None else _features(found[e.real.name])
  if e.file is None:
    return FeatureSet(rows)
  moments = {"pool3": e.file.pool3, "spatial": e.file.spatial}
  if e.file.features is not None and "pool3" not in rows:
    rows["pool3"] = Rows.of(e.file.features)
  return FeatureSet(rows, {k: m for k, m in moments.items() if m is not None}, e.file.count)


def _measures(e: Evaluation, measured_: Measured, real: FeatureSet):
  return measure(FeatureSet(_features(measured_)), real, e.networks)


def _entry(e: Evaluation, s: MeasuredSet, measured_: Measured, real: FeatureSet) -> dict[str, Any]:
  """Record and figures of one set."""
  values, left_out = _measures(e, measured_, real)
  found: dict[str, Any] = {"images": len(measured_.values("index"))}
  bits = None
  if isinstance(s, Reconstructions):
    values = results.quality_of(measured_).summary() | values
    if codes := results.codebook_of(s.entry, measured_):
      found["codebook"], bits = codes, codes["bits_per_image"]
    if error := results.quantization_of(measured_):
      found["quantization_error"] = error
  model = e.models.get(s.name, {})
  side = dataclasses.replace(e.sides[s.name], images=found["images"])
  pixels = e.options["image_size"]
  described = record.record(
    side,
    e.sides["reference"],
    e.convention,
    posterior=model.get("posterior"),
    averaged_weights=model.get("averaged"),
    weights={**model.get("weights", {}), **e.networks.fingerprints},
    sampler=model.get("sampler"),
    bits_per_image=bits,
    bits_per_pixel=None if bits is None or not pixels else bits / pixels**2,
  )
  return {**found, "values": values, "left_out": left_out, "record": described}


def write_statistics(e: Evaluation, found: Mapping[str, Measured], file: pathlib.Path) -> None:
  """Statistics of the real images for FID and sFID, which other tools read."""
  assert e.real is not None
  rows = _features(found[e.real.name])
  pool3, spatial = (FeatureStatistics.of(rows[n]) for n in ("pool3", "spatial"))
  side = dataclasses.asdict(e.sides["reference"])
  fields = {
    "convention": e.convention.name,
    "images": pool3.count,
    "data": side,
    "inception": e.networks.fingerprints["inception"],
  }
  reference.write_statistics(file, pool3, spatial, fields)


def run(evaluation: Evaluation, output: pathlib.Path, overwrite: bool, report) -> dict[str, Any]:
  """The results, computed here, by other processes of the folder, or in an earlier run.

  Args:
    report: (results, parts by a set's name) -> writes the pictures and pages into `output`;
      `results.json` is written after it, so what it says is there.

  Raises:
    UserError: two sets have one name, or the folder holds something else.
  """
  names = collections.Counter(s.name for s in evaluation.sets)
  if twice := [name for name, n in names.items() if n > 1]:
    raise UserError(
      f"two things are called {twice[0]!r}; give another --name or --compare NAME=PATH"
    )
  with outputs.locked(output, "--output", wait=WAIT):
    if claim(output, evaluation.settings(), overwrite):
      log.info("%s is complete", output)
      return json.loads((output / RESULTS).read_text())
  with outputs.present(output):
    found = measured(evaluation, output)
    with outputs.locked(output, "--output", wait=WAIT):
      if not (output / RESULTS).exists():
        made = results_of(evaluation, found)
        report(made, found)
        parts.clean(output)
        _write(output / RESULTS, made)
  outputs.writers(output)
  return json.loads((output / RESULTS).read_text())


def default_convention(name: str | None, samples: bool, rounding) -> Convention:
  """The convention of a name; by default that of tokenizers' or of generators' papers."""
  return conventions.convention(name or ("adm" if samples else "coda"), rounding)
