"""The demo's recipe with and without LoRA, three seeds each: what the README's table shows.

    python benchmarks/demo_seeds.py --workdir DIR [--seeds 0,1,2] [--steps N] [--processes 1]

Trains `configs/demo.py` and `configs/demo.py:attention` with the same budget (run `make demo`
first: it converts the VAE), measures all val photos at 64x64 with the averaged weights, and prints
the table; the last line is JSON. Started again it continues. `--processes 2` trains two at a time,
each on half of the cores (Linux).
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import queue
import subprocess
import sys

import numpy as np

from coda_jax.training.logging import read_metrics

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECIPES = {"with LoRA": "", "without LoRA": ":attention"}
METRICS = ("psnr", "ssim", "lpips", "codebook_utilization")


def train(recipe: str, seed: int, free: queue.SimpleQueue, args) -> dict[str, float]:
  """The last evaluation of one run, trained on a set of `free` cores (None: all)."""
  workdir = args.workdir / f"{recipe.replace(' ', '_')}_{seed}"
  words = ["coda_jax.train", f"--config=configs/demo.py{RECIPES[recipe]}"]
  words += [f"--config.seed={seed}", f"--workdir={workdir.resolve()}"]
  words += [f"--config.tokenizer.vae={args.vae.resolve()}"]
  if args.steps:
    words += [f"--config.steps={args.steps}"]
    words += [f"--config.{key}.every={args.steps // 5}" for key in ("eval", "checkpoint")]
  log = args.workdir / f"{workdir.name}.log"
  cores = free.get()
  pin = (lambda: os.sched_setaffinity(0, cores)) if cores else None
  with open(log, "a") as f:
    command = [sys.executable, "-m", *words]
    code = subprocess.run(command, cwd=ROOT, stdout=f, stderr=f, preexec_fn=pin).returncode
  free.put(cores)
  if code:
    sys.exit(f"{recipe}, seed {seed} failed: see {log}")
  rows = [r for r in read_metrics(workdir) if r["kind"] == "eval"]
  return {k: rows[-1][k] for k in METRICS}


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--vae", type=pathlib.Path, default=ROOT / "demo" / "vae")
  parser.add_argument("--seeds", default="0,1,2")
  parser.add_argument("--steps", type=int, help="updates of each run; default: the config's")
  parser.add_argument("--processes", type=int, default=1)
  args = parser.parse_args()
  args.workdir.mkdir(parents=True, exist_ok=True)
  jobs = [(recipe, int(seed)) for seed in args.seeds.split(",") for recipe in RECIPES]
  cores = sorted(os.sched_getaffinity(0)) if args.processes > 1 else []
  free = queue.SimpleQueue()
  for i in range(args.processes):
    free.put(set(cores[i :: args.processes]) or None)
  with concurrent.futures.ThreadPoolExecutor(args.processes) as pool:
    futures = [pool.submit(train, *job, free, args) for job in jobs]
    results = dict(zip(jobs, (f.result() for f in futures), strict=True))
  print("| | seed | " + " | ".join(METRICS) + " |")
  for (recipe, seed), row in results.items():
    print(f"| {recipe} | {seed} | " + " | ".join(f"{row[k]:.4g}" for k in METRICS) + " |")
  means = {
    r: {k: np.mean([results[j][k] for j in jobs if j[0] == r]) for k in METRICS} for r in RECIPES
  }
  lora, plain = (means[r] for r in RECIPES)
  summary = {
    "psnr_gain_db": lora["psnr"] - plain["psnr"],
    "lpips_gain": 1 - lora["lpips"] / plain["lpips"],
    "utilization_min": min(results[j]["codebook_utilization"] for j in jobs if j[0] == "with LoRA"),
    "runs": [{"recipe": r, "seed": s, **v} for (r, s), v in results.items()],
  }
  print(json.dumps(summary))


if __name__ == "__main__":
  main()
