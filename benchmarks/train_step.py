"""One update of a tokenizer: seconds, peak memory, and FLOPs beside those of the plain form.

    python benchmarks/train_step.py [--cases mar mar_last flux] [--steps 3] [--no-parts]
    python benchmarks/train_step.py --official CHECKOUT [--official-python PYTHON]

The trainer's own update with the settings of `configs/mar.py` and `configs/flux.py` (LPIPS, DINO's
discriminator, both optimizers, the average) on one 256x256 image, float32, on the CPU, random
weights. `mar` has the official adaptive layer, `mar_last` the decoder's last convolution with an
adapter, which FLUX's official one is. Each case has a process of its own: seconds are the median of
`--steps` updates after a first one; the peak is the process's largest resident size while they run,
with Python, jax, weights and moments in it, but (on Linux) without what only the compiler held. The
parts of the update follow, each compiled by itself: forward, and forward + backward. The last line
is JSON.

With `--official` the authors' update runs too, in another process: `official_step.py`, which takes
its networks, losses and settings from a checkout of github.com/LeapLabTHU/CODA. Updates of both
alternate. The ratios are theirs / ours. `--official-python` is an interpreter with torch,
torchvision, diffusers, einops, requests, safetensors and tqdm.

FLOPs are counted as `flops.py` says, in the update's jaxpr. The minimum is the least that the plain
form takes, with adapters beside their convolutions and nothing rematerialised; adapters in the
kernels can take less. It never looks at a backward pass: it walks the jaxprs of the networks'
forward passes, where an operation costs once forward and once backward for each operand that
depends on what the gradient is for. Frozen kernels have no gradient.

  head: encoder, quantizer, decoder up to the adaptive layer   forward, backward
  tail: the decoder from this layer on                         forward, twice backward
  nll with LPIPS                                               two images forward, one backward
  DINO                                                         three views forward, one backward
  heads                                                        three times forward; backward once to
                                                               the features, twice to parameters

The look-up's minimum is that of the materialised form: q kᵀ forward; g vᵀ, dq and dk backward.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # where configs/ and benchmarks/ are

import jax
import numpy as np

from benchmarks.flops import flops, least
from benchmarks.harness import cores, forget_peak, host, peak
from benchmarks.update import CASES, gradient, make_trainer, parts
from coda_jax import sharding
from coda_jax.config import REMAT
from coda_jax.models import lora

OFFICIAL = ("mar", "flux")  # cases that the authors train
KEYS = (
  *("seconds_mar", "seconds_mar_last", "seconds_flux", "peak_gb_mar", "peak_gb_flux"),
  *("flops_ratio_mar", "flops_ratio_mar_last", "flops_ratio_flux"),
)
# How often the objective runs each part forward and backward.
RUNS = {
  "head": (1, 1),
  "tail": (1, 2),
  "nll": (1, 1),
  "DINO": (3, 1),
  "heads, to features": (1, 1),
  "heads, to parameters": (2, 2),
}


# In the process of a case.


def _beside(conv, x, kernel, down, up):
  """The plain form of `lora._adapted`: the adapter's two convolutions beside the frozen one."""
  return lora._convolve(conv, x, kernel) + lora._convolve(conv, x, down) @ up[0, 0]


def minimum(trainer) -> dict[str, float]:
  """Least FLOPs of an update, by part; see the top of this file."""
  quantizer = trainer.config.tokenizer.quantizer
  logits, dim = quantizer.tokens * quantizer.codebook_size, quantizer.code_dim + 1
  lookup = 2 * logits * (dim + 2 * dim + quantizer.code_dim)
  with mock.patch.object(lora, "_adapted", _beside):
    cases = parts(trainer, trainer.abstract_state(), 1)
    found = {name: float(least(f, *args) @ RUNS[name]) for name, (f, args) in cases.items()}
  return found | {"head": found["head"] + lookup}


def measure_parts(trainer) -> dict[str, list[float]]:
  """[seconds forward, seconds forward + backward, GB of temporaries of both] by part."""
  draw = lambda x: x if isinstance(x, jax.Array) else jax.random.normal(jax.random.key(1), x.shape)
  result = {}
  for name, (function, args) in parts(trainer, trainer.initial_state(), 1).items():
    args, seconds, temporaries = jax.tree.map(draw, args), [], []
    for f in (function, gradient(function)):
      f = jax.jit(f).lower(*args).compile()
      temporaries.append(f.memory_analysis().temp_size_in_bytes / 1e9)
      seconds.append(min(_seconds(f, *args) for _ in range(3)))
    result[name] = seconds + temporaries
  return result


def _seconds(function, *args) -> float:
  start = time.perf_counter()
  jax.block_until_ready(function(*args))
  return time.perf_counter() - start


def serve(case: str, settings: dict) -> None:
  """Answers every line of the standard input, a name of a measurement, with a line of JSON."""
  trainer = make_trainer(case, **settings)
  size = trainer.config.tokenizer.image_size
  images = np.random.default_rng(0).integers(0, 256, (1, 1, size, size, 3), np.uint8)
  images = jax.device_put(images, sharding.batch_sharding(trainer.mesh, leading=1))
  with jax.set_mesh(trainer.mesh):
    state = trainer.initial_state()

    def update():
      nonlocal state
      start = time.perf_counter()
      state, metrics = jax.block_until_ready(trainer.step(state, images))
      seconds = time.perf_counter() - start
      assert all(np.isfinite(x).all() for x in jax.tree.leaves(metrics)), metrics
      return {"seconds": seconds, "peak_gb": peak()}

    def count():
      args = trainer.abstract_state(), trainer._frozen, trainer._key, images
      return {"flops": flops(trainer._keyed_update, *args), "minimum": minimum(trainer)}

    update()
    forget_peak()
    answers = {"update": update, "flops": count, "parts": lambda: measure_parts(trainer)}
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
      print(json.dumps(answers[line.strip()]()), flush=True)


# In the process that the user started.


class Server:
  """A process that answers a line with a line of JSON, after one when it is ready."""

  def __init__(self, *command: str):
    pipe, environment = subprocess.PIPE, {**os.environ, "JAX_PLATFORMS": "cpu"}
    try:
      self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, text=True)
    except OSError as e:
      sys.exit(f"cannot run {command[0]}: {e.strerror}")
    self._answer()

  def ask(self, what: str):
    print(what, file=self._process.stdin, flush=True)
    return self._answer()

  def _answer(self):
    line = self._process.stdout.readline()
    if not line:  # the process has said why
      sys.exit(self._process.wait())
    return json.loads(line)

  def close(self) -> None:
    self._process.stdin.close()
    self._process.wait()


def run_updates(servers: list[Server], steps: int) -> list[tuple[float, float]]:
  """(median of the seconds, GB of the peak) of each server, which take turns."""
  rounds = [[server.ask("update") for server in servers] for _ in range(steps)]
  return [
    (statistics.median(x["seconds"] for x in of), of[-1]["peak_gb"])
    for of in zip(*rounds, strict=True)
  ]


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
  parser.add_argument("--steps", type=int, default=3, help="updates that are timed")
  parser.add_argument("--remat", choices=REMAT, default="none")
  parser.add_argument("--no-parts", action="store_true", help="the update alone")
  parser.add_argument(
    "--official", metavar="CHECKOUT", help="of the authors' code, to compare with"
  )
  parser.add_argument("--official-python", metavar="PYTHON", default=sys.executable)
  parser.add_argument("--serve", metavar="CASE", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.steps < 1:
    parser.error(f"--steps is {args.steps}; at least one update is timed")
  if args.serve:
    serve(args.serve, {"remat": args.remat})
    return

  print(f"{host()}; remat {args.remat}", flush=True)
  official_step = str(pathlib.Path(__file__).with_name("official_step.py"))
  result = dict.fromkeys(KEYS)
  for case in args.cases:
    servers = []
    if args.official and case in OFFICIAL:
      words = args.official, case, str(cores())
      servers.append(Server(args.official_python, official_step, *words))
    ours = Server(sys.executable, __file__, "--serve", case, "--remat", args.remat)
    (seconds, gb), *theirs = run_updates([ours, *servers], args.steps)
    print(f"{case}: {seconds:.2f} s, peak {gb:.2f} GB", flush=True)
    found = {"seconds": seconds, "peak_gb": gb}
    for their_seconds, their_gb in theirs:
      ratios = their_seconds / seconds, their_gb / gb
      print(f"  the official code: {their_seconds:.2f} s, peak {their_gb:.2f} GB")
      print(f"  official / ours: seconds {ratios[0]:.2f}, peak {ratios[1]:.2f}", flush=True)
      result |= {f"seconds_ratio_{case}": round(ratios[0], 3)}
      result |= {f"peak_ratio_{case}": round(ratios[1], 3)}
    for server in servers:
      server.close()

    count = ours.ask("flops")
    minimum = sum(count["minimum"].values())
    found["flops_ratio"] = count["flops"] / minimum
    print(
      f"  {count['flops'] / 1e9:.0f} GFLOP, {found['flops_ratio']:.3f} of the plain form's least:"
    )
    for name, value in count["minimum"].items():
      print(f"    {name}: {value / 1e9:.0f}", flush=True)
    if not args.no_parts:
      print("  seconds (GB of temporaries) of the parts, forward; forward + backward:")
      for name, (forward, both, gb, gb_both) in ours.ask("parts").items():
        print(f"    {name}: {forward:.2f} ({gb:.2f}); {both:.2f} ({gb_both:.2f})", flush=True)
    ours.close()
    result |= {f"{k}_{case}": round(v, 3) for k, v in found.items() if f"{k}_{case}" in KEYS}
  print(json.dumps(result))


if __name__ == "__main__":
  main()
