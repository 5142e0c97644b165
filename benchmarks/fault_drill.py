"""Kills a training run at random moments, starts it again, and compares the end.

    python benchmarks/fault_drill.py [--kills 50] [--processes 1] [--seed 0] [--output results.json]

A tiny tokenizer on made-up photos, with an evaluation every 3 updates and a checkpoint every 2.
Each time the run is up, it is killed after a random time, by SIGKILL or by SIGTERM; of several
processes, joined as hosts are, a random one is, and the others have to end by themselves. What it
was doing is noted. The last line is JSON: `kills` by signal, what they `hit`, how often the run was
`resumed`, and `identical`: weights, averages, optimizer and every record of the training equal
those of a run that was left alone, to the bit. The records hold the losses, so that other images
would show. With several processes `seconds_to_end` is the longest time that the others took.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

PHASE = "phase.txt"  # with the process's number before it
UPDATED = "updated.txt"  # likewise; there after the first update
STEPS = {1: 240}  # else 60
AGAIN = 75
CONFIG = """
import pathlib
from coda_jax import config as c
from tests.training import runs

def get_config():
  changes = {{"tokenizer__lora": None, "eval__every": 3, "checkpoint__every": 2,
              "distributed__heartbeat_timeout": 10}}
  return c.config_dict(runs.config(pathlib.Path({folder!r}), steps={steps}, **changes))
"""


def child(process: str, words: list[str]) -> None:
  """Trains, and keeps a file that says what the process is doing."""
  from coda_jax import train
  from coda_jax.sharding import GlobalBatches
  from coda_jax.training.loop import _Window as window_type
  from coda_jax.training.tokenizer_trainer import TokenizerTrainer

  file = pathlib.Path(process + PHASE)

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
  updated = window_type.add

  def adding(self, *args):
    pathlib.Path(process + UPDATED).touch()
    return updated(self, *args)

  window_type.add = adding
  train.main(words)


def start(folder: pathlib.Path, workdir: pathlib.Path, count: int) -> list[subprocess.Popen]:
  """The run, over `count` processes."""
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "PYTHONPATH": str(ROOT),
  }
  words = [f"--config={folder}/config.py", f"--workdir={workdir}"]
  with socket.socket() as s:
    s.bind(("localhost", 0))
    join = [f"--coordinator=localhost:{s.getsockname()[1]}", f"--num-processes={count}"]
  processes = []
  for i in range(count):
    for name in (PHASE, UPDATED):
      (folder / f"{i}{name}").unlink(missing_ok=True)
    join_i = [*join, f"--process-id={i}"] if count > 1 else []
    processes.append(
      subprocess.Popen(
        [sys.executable, __file__, "--child", str(i), *words, *join_i],
        cwd=folder,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
      )
    )
  return processes


def doing(file: pathlib.Path, workdir: pathlib.Path) -> str:
  """What the process of a phase file does now; a save goes on beside others and counts first."""
  names = [p.name for p in (workdir / "checkpoints").glob("*")]
  if any("tmp" in name for name in names):
    return "save"
  return file.read_text() if file.exists() else "start"


def result(workdir: pathlib.Path, steps: int) -> tuple:
  """(checksums of every array of the last state, losses of every update)."""
  file = workdir / "checkpoints" / str(steps) / "_CHECKPOINT_METADATA"
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
  parser.add_argument("--processes", type=int, default=1)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument(
    "--output", type=pathlib.Path, help="JSON lines, of which the one for --processes is replaced"
  )
  args = parser.parse_args()
  from tests.training import runs

  rng, hit, by_signal, resumed = random.Random(args.seed), collections.Counter(), {}, 0
  count, steps, slowest = args.processes, STEPS.get(args.processes, 60), 0.0
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    runs.make_inputs(folder)
    (folder / "config.py").write_text(CONFIG.format(folder=name, steps=steps))
    alone, records, began = start(folder, folder / "alone", count), "alone/metrics.jsonl", 0.0
    while not began and alone[0].poll() is None:
      time.sleep(0.01)
      if (folder / records).exists() and '"train"' in (folder / records).read_text():
        began = time.monotonic()
    ended = [run.communicate()[1] for run in alone]
    if any(run.returncode for run in alone):
      sys.exit("\n".join(ended))
    longest = 1.5 * (time.monotonic() - began) / args.kills  # between start and kill
    workdir, kills = folder / "killed", 0
    while True:
      processes = start(folder, workdir, count)
      victim = rng.randrange(count)
      run, file = processes[victim], folder / f"{victim}{PHASE}"
      # Most kills are after the first update, of which the compilation takes longer than the rest.
      awaited = file if rng.random() < 0.25 else folder / f"{victim}{UPDATED}"
      while kills < args.kills and run.poll() is None and not awaited.exists():
        time.sleep(0.005)
      if kills < args.kills:
        time.sleep(rng.uniform(0, longest))
        what, sent = doing(file, workdir), rng.choice([signal.SIGKILL, signal.SIGTERM])
        if run.poll() is None:
          run.send_signal(sent)
          kills += 1
          hit[what] += 1
          by_signal[sent.name] = by_signal.get(sent.name, 0) + 1
      since = time.monotonic()
      errors = [p.communicate()[1] for p in processes]
      codes = {p.returncode for p in processes}
      resumed += "continuing" in errors[0]
      if codes != {0} and codes <= {0, AGAIN, -signal.SIGKILL, -signal.SIGTERM}:
        slowest = max(slowest, time.monotonic() - since)
        continue
      if codes != {0}:
        sys.exit("\n".join(errors))
      if kills < args.kills:
        print(f"the run ended after {kills} kills: its updates are too few", file=sys.stderr)
      break
    identical = result(workdir, steps) == result(folder / "alone", steps)
  found = {"processes": count, "kills": by_signal, "hit": dict(hit), "resumed": resumed}
  if count > 1:
    found["seconds_to_end"] = round(slowest, 1)
  text = json.dumps(found | {"identical": identical})
  if args.output:
    lines = args.output.read_text().splitlines() if args.output.exists() else []
    kept = [line for line in lines if json.loads(line).get("processes") != count]
    args.output.write_text("\n".join([*kept, text]) + "\n")
  print(text)
  sys.exit(not identical)


if __name__ == "__main__":
  if sys.argv[1:2] == ["--child"]:
    child(sys.argv[2], sys.argv[3:])
  else:
    main()
