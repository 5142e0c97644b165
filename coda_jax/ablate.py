"""Trains the rows of an ablation and writes its tables beside the paper's figures.

  python -m coda_jax.ablate --config=configs/ablation.py [--workdir=runs/ablation]

Every row and seed is an ordinary run of `coda_jax.train`, in WORKDIR/rows/ROW/seed_SEED; a row that
several tables show runs once; one with `trainable=()` measures the tokenizer that it starts from.
After each run WORKDIR/tables.json, tables.md and the plots are written anew, of what is there. The
same command continues one that was stopped or killed (exit code 75: told to stop, and saved).
Several can share a workdir, each with its own --seeds or --tables.
"""

import argparse
import functools
import gc
import json
import logging
from collections.abc import Mapping

import jax
import numpy as np

from coda_jax import cli, config, pretrained, storage, weights
from coda_jax.config import AblationConfig, TrainConfig
from coda_jax.data import pipeline, sources
from coda_jax.errors import UserError, describe
from coda_jax.evaluation.ablation import Images
from coda_jax.evaluation.ablation_plots import table_plot
from coda_jax.evaluation.ablation_tables import (
  as_json,
  as_markdown,
  check_columns,
  has_runs,
  plot_name,
)
from coda_jax.outputs import replaced, write_text
from coda_jax.training import registry
from coda_jax.training.preemption import Preemption
from coda_jax.training.run import train

log = logging.getLogger("coda_jax")
Run = tuple[str, int]  # a row and a seed
MEASURES, VAE = "measures.json", "continuous_vae.json"


def parser() -> argparse.ArgumentParser:
  p = cli.Parser(
    prog="python -m coda_jax.ablate",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  p.add_argument("--workdir", type=cli.path, help="folder of all runs (runs/CONFIG[_ARGUMENT])")
  p.add_argument("--tables", metavar="NAME,...", help="run what these tables show (all)")
  seed = cli.integer(0, 2**32 - 1)
  p.add_argument("--seeds", type=cli.several(seed), metavar="N,...", help="instead of the config's")
  p.add_argument("--no-training", action="store_true", help="write the tables of what is there")
  return p


def main(argv=None):
  cli.main(run, parser(), argv, config=True)


def run(args: argparse.Namespace) -> int:
  """Trains, measures and writes; see the module's docstring. Returns the exit code."""
  ablation = config.freeze(AblationConfig, args.config)
  check_columns(ablation)
  workdir = args.workdir or cli.default_workdir(args.config_spec)
  tables, seeds = _tables(args.tables, ablation), args.seeds or ablation.seeds
  rows = dict.fromkeys(x.row for t in tables for x in ablation.tables[t].lines if x.row)
  chosen = [(row, seed) for seed in seeds for row in rows]
  every = [
    (row, seed) for seed in dict.fromkeys([*ablation.seeds, *seeds]) for row in ablation.rows
  ]
  asked = [] if args.no_training else chosen
  runs = {run: (_settings if run in asked else _settings_if_there)(ablation, *run) for run in every}
  write = functools.partial(_write, workdir, ablation, runs)
  if args.no_training:
    if not workdir.is_dir():
      raise UserError(f"--workdir={workdir}: no such folder")
    write()
    return 0
  failed = []
  for i, (row, seed) in enumerate(chosen, 1):
    folder, settings = _folder(workdir, row, seed), runs[row, seed]
    assert settings is not None, "it is asked for"
    if _measured(folder, ablation, settings):
      continue
    log.info("row %s, seed %d: run %d of %d", row, seed, i, len(chosen))
    try:
      with Preemption() as preemption:
        if settings.trainable and not train(settings, folder, preemption):
          return cli.RUN_AGAIN
      _measure(ablation, settings, workdir, folder)
    except UserError as e:
      if i == 1:  # nothing says that the others would do better
        raise
      failed.append(f"row {row}, seed {seed}")
      log.error("%s failed and is left out: %s", failed[-1], describe(e))
    jax.clear_caches()
    gc.collect()
    write()
  missing = write()
  if failed:
    raise UserError(f"{len(failed)} of {len(chosen)} runs failed: {'; '.join(failed)}")
  log.info("done: %s (%d of %d runs)", workdir / "tables.md", len(runs) - missing, len(runs))
  return 0


def _tables(text: str | None, ablation: AblationConfig) -> list[str]:
  """The tables of `--tables`. Raises UsageError for one that the config does not have."""
  names = list(ablation.tables) if text is None else text.split(",")
  for name in names:
    if name not in ablation.tables:
      known = ", ".join(ablation.tables)
      raise cli.UsageError(f"--tables {text}: no table {name!r}; there are {known}")
  return names


def _settings(ablation: AblationConfig, row: str, seed: int) -> TrainConfig:
  """The settings of a run. Raises UserError naming the row if they do not fit."""
  try:
    settings = registry.resolve(ablation.run_values(row, seed))
  except UserError as e:
    raise UserError(f"row {row}: {e}") from e
  if not isinstance(settings, TrainConfig):
    raise UserError(f"config.base.kind={settings.kind!r}: an ablation is of tokenizers")
  if not settings.trainable and not settings.tokenizer.start:
    raise UserError(f"row {row}: with trainable=() there must be a tokenizer.start to measure")
  return settings


def _settings_if_there(ablation: AblationConfig, row: str, seed: int) -> TrainConfig | None:
  """The settings of a run that is not asked for; None if what it starts from is not there."""
  start = ablation.run_values(row, seed).to_dict().get("tokenizer", {}).get("start", "")
  if start and not weights.is_there(start):
    return None
  return _settings(ablation, row, seed)


def _folder(workdir: storage.Path, row: str, seed: int) -> storage.Path:
  return workdir / "rows" / row / f"seed_{seed}"


def _wanted(ablation: AblationConfig, settings: TrainConfig) -> dict:
  """What measures depend on; a run whose measures are of other settings is not complete."""
  wanted = config.to_json(settings) | {"tokens_per_code": ablation.tokens_per_code}
  if start := settings.tokenizer.start:  # another may come to stand in its place
    wanted["start"] = weights.fingerprint_of(start, "tokenizer")
  return wanted


def _read(file: storage.Path) -> dict:
  """A JSON file that this command wrote; {} if it is missing or damaged."""
  try:
    return json.loads(file.read_text())
  except (OSError, ValueError):
    return {}


def _measured(
  folder: storage.Path, ablation: AblationConfig, settings: TrainConfig
) -> dict[str, float]:
  """The measures of a run if it is complete, else {}."""
  found = _read(folder / MEASURES)
  theirs = config.with_defaults(type(settings), found.get("config", {}))
  changed = config.differences(_wanted(ablation, settings), theirs)
  return {} if config.decisive(changed, length=True) else found["measures"]


def _write(
  workdir: storage.Path, ablation: AblationConfig, runs: Mapping[Run, TrainConfig | None]
) -> int:
  """Writes tables and plots of the runs that are complete; returns how many are not."""
  measures, missing = {"": {}}, {}
  if vae := _read(workdir / VAE):
    measures[""][0] = vae["measures"]
  for (row, seed), settings in runs.items():
    folder = _folder(workdir, row, seed)
    found = {} if settings is None else _measured(folder, ablation, settings)
    measures.setdefault(row, {}).update({seed: found} if found else {})
    if not found:
      missing.setdefault(row, []).append(seed)
  count = sum(map(len, missing.values()))
  text = json.dumps(as_json(ablation, measures, missing), indent=1)
  write_text(workdir / "tables.json", text + "\n")
  write_text(workdir / "tables.md", as_markdown(ablation, measures, missing))
  for name, table in ablation.tables.items():
    if has_runs(table, measures):
      with replaced(workdir / plot_name(name)) as file:
        table_plot(table, measures).savefig(file, format="png", dpi=160, facecolor="white")
  return count


def _measure(
  ablation: AblationConfig, settings: TrainConfig, workdir: storage.Path, folder: storage.Path
) -> None:
  """Writes the measures of a run that is complete, and once those of the continuous VAE."""
  images = _images(settings)
  folder.mkdir(parents=True, exist_ok=True)  # of a row without training nothing is there
  vae = {"vae": settings.tokenizer.vae, "data": config.to_json(settings.data)["eval"]}
  if _read(workdir / VAE).get("config") != vae:
    measures = images.measure_vae(weights.load_vae(settings.tokenizer.vae))
    write_text(workdir / VAE, json.dumps({"config": vae, "measures": measures}, indent=1) + "\n")
  made = folder / registry.product(settings) if settings.trainable else settings.tokenizer.start
  tokenizer = weights.load_tokenizer(made)
  measures = images.measure(tokenizer, ablation.tokens_per_code)
  found = {"config": _wanted(ablation, settings), "measures": measures}
  write_text(folder / MEASURES, json.dumps(found, indent=1) + "\n")


def _images(settings: TrainConfig) -> Images:
  """The held-out images of a run, cut as its evaluations cut them."""
  data, batch_size = settings.data, settings.eval.batch_size
  source = sources.open_source(data.eval)
  with pipeline.eval_batches(
    source,
    image_size=settings.tokenizer.image_size,
    batch_size=batch_size,
    resize_ratio=data.resize_ratio,
    limit=settings.eval.images or None,
    max_unreadable=data.max_unreadable,
  ) as batches:
    images = np.concatenate([b["image"][b["valid"]] for b in batches])
  if not len(images):
    raise UserError(f"{data.eval} has no readable image")
  lpips = None
  if settings.eval.lpips:
    lpips, note = pretrained.find_lpips(settings.losses.perceptual_weights or None)
    if note:
      log.warning(note)
  return Images(source, images, lpips, data.resize_ratio, batch_size)


if __name__ == "__main__":
  main()
