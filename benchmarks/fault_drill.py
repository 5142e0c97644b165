"""Kills a training run at random moments, starts it again, and compares the end.

    python benchmarks/fault_drill.py [--kills 50] [--seed 0] [--output results.json]

A tiny tokenizer on made-up photos, with an evaluation every 3 updates and a checkpoint every 2.
Each time the run is up, it is killed after a random time, by SIGKILL or by SIGTERM. What it was
doing is noted. The last line is JSON: `kills` by signal, what they `hit`, how often the run was
`resumed`, and `identical`: weights, averages, optimizer and every record of the training equal
those of a run that was left alone, to the bit. The records hold the losses, so that other images
would show.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

PHASE = "phase.txt"
STEPS = 240
CONFIG = """
import pathlib
from coda_jax import config as c
from tests.training import runs

def get_config():
  changes = {{"tokenizer__lora": None, "eval__every": 3, "checkpoint__every": 2}}
  return c.config_dict(runs.config(pathlib.Path({folder!r}), steps={steps}, **changes))
"""


def child(words: list[str]) -> None:
  """Trains, and keeps a file that says what the run is doing."""
  from coda_jax import train
  from coda_jax.sharding import GlobalBatches
  from coda_jax.training.tokenizer_trainer import TokenizerTrainer

  file = pathlib.Path(PHASE)

  def telling(owner: type, name: str, phase: str) -> None:
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
      file.write_text(phase)
      try:
        return original(*args, **kwargs)
      finally:
        file.write_text("update")

    setattr(owner, name, wrapped)

  telling(TokenizerTrainer, "evaluate", "evaluation")
  telling(TokenizerTrainer, "export", "export")
  telling(GlobalBatches, "__next__", "reading data")
  train.main(words)


def start(folder: pathlib.Path, workdir: pathlib.Path) -> subprocess.Popen:
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "PYTHONPATH": str(ROOT),
  }
  words = [f"--config={folder}/config.py", f"--workdir={workdir}"]
  command = [sys.executable, __file__, "--child", *words]
  return subprocess.Popen(
    command,
    cwd=folder,
    env=environment,
    stderr=subprocess.PIPE,
    stdout=subprocess.DEVNULL,
    text=True,
  )


def doing(folder: pathlib.Path, workdir: pathlib.Path) -> str:
  """What the run is doing now; a save goes on beside other things and counts before them."""
  names = [p.name for p in (workdir / "checkpoints").glob("*")]
  if any("tmp" in name for name in names):
    return "save"
  file = folder / PHASE
  return file.read_text() if file.exists() else "start"


def result(workdir: pathlib.Path) -> tuple:
  """(checksums of every array of the last state, losses of every update)."""
  file = workdir / "checkpoints" / str(STEPS) / "_CHECKPOINT_METADATA"
  checksums = json.loads(file.read_text())["custom_metadata"]["checksums"]
  records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  clocks = ("steps_per_second", "images_per_second")
  kept = [{k: v for k, v in r.items() if k not in clocks} for r in records]
  return checksums, sorted(kept, key=lambda r: (r["kind"], r["step"]))


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--kills", type=int, default=50)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--output", type=pathlib.Path, help="a file for the last line")
  args = parser.parse_args()
  from tests.training import runs

  rng, hit, by_signal, resumed = random.Random(args.seed), collections.Counter(), {}, 0
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    runs.make_inputs(folder)
    (folder / "config.py").write_text(CONFIG.format(folder=name, steps=STEPS))
    alone = start(folder, folder / "alone")
    _, errors = alone.communicate()
    if alone.returncode:
      sys.exit(errors)
    workdir, kills = folder / "killed", 0
    while True:
      (folder / PHASE).unlink(missing_ok=True)
      run = start(folder, workdir)
      while kills < args.kills and run.poll() is None and not (folder / PHASE).exists():
        time.sleep(0.005)
      if kills < args.kills:
        time.sleep(rng.uniform(0, 1.5))
        what, sent = doing(folder, workdir), rng.choice([signal.SIGKILL, signal.SIGTERM])
        if run.poll() is None:
          run.send_signal(sent)
          kills += 1
          hit[what] += 1
          by_signal[sent.name] = by_signal.get(sent.name, 0) + 1
      _, errors = run.communicate()
      resumed += "continuing" in errors
      if run.returncode in (-signal.SIGKILL, -signal.SIGTERM, 75):
        continue
      if run.returncode:
        sys.exit(errors)
      if kills < args.kills:
        print(f"the run ended after {kills} kills: its updates are too few", file=sys.stderr)
      break
    identical = result(workdir) == result(folder / "alone")
  found = {"kills": by_signal, "hit": dict(hit), "resumed": resumed, "identical": identical}
  text = json.dumps(found)
  if args.output:
    args.output.write_text(text + "\n")
  print(text)
  sys.exit(not identical)


if __name__ == "__main__":
  if sys.argv[1:2] == ["--child"]:
    child(sys.argv[2:])
  else:
    main()
