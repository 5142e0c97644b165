"""Speed and memory of an evaluation: images a second of each part, peak memory by their number.

    python benchmarks/evaluation.py [--torch-python PYTHON]

The networks have random weights, which changes neither figure. Inception of pytorch-fid runs beside
ours, in turns, on the same cores, where PYTHON has the package; it needs no weights either.

Memory is that of a whole evaluation of reconstructions by pytorch-fid's convention, in a process of
its own: features of both sides kept in parts, FID, sFID, KID, precision and recall. Inception and
VGG run on the first batch of a set; later batches take its features plus noise, so that 10,000
images take minutes. The last line is JSON: `images_per_second` by part, `peak_gb_1000` and
`peak_gb_10000`.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import cores, host, peak
from coda_jax.arrays import of
from coda_jax.data.pipeline import normalize
from coda_jax.evaluation import comparison
from coda_jax.evaluation.comparison import Evaluation
from coda_jax.evaluation.conventions import convention
from coda_jax.evaluation.entries import Entry
from coda_jax.evaluation.features import Networks
from coda_jax.evaluation.image_quality import psnr, ssim
from coda_jax.evaluation.image_sets import RealImages, Reconstructions
from coda_jax.evaluation.readers import SampleFiles
from coda_jax.evaluation.reconstruction import BatchResult, lpips_from
from coda_jax.models.inception import Inception
from coda_jax.models.lpips import LPIPS

SIZE, BATCH = 64, 16
CONVENTION = convention("pytorch-fid")

_TORCH = """
import sys, time
import torch
from pytorch_fid import inception
inception.load_state_dict_from_url = lambda *_, **__: {}
load, torch.nn.Module.load_state_dict = torch.nn.Module.load_state_dict, lambda *_, **__: None
model = inception.InceptionV3([3]).eval()
x = torch.rand(%d, 3, %d, %d)
with torch.no_grad():
  model(x)
  start = time.perf_counter()
  model(x)
  print(len(x) / (time.perf_counter() - start))
"""


class Noisy(Networks):
  """Features of the first batch plus noise."""

  def features(self, convention):
    run, first, rng = super().features(convention), {}, np.random.default_rng(0)

    def noisy(images):
      if not first:
        first.update({name: np.asarray(x) for name, x in run(images).items()})
      scale = {name: 1e-3 + x.std() for name, x in first.items()}
      draw = lambda x, s: (x + s * rng.standard_normal(x.shape, np.float32)).astype(np.float32)
      return {name: draw(x, scale[name]) for name, x in first.items()}

    return noisy


def networks(cls=Networks) -> Networks:
  """Inception and LPIPS with random weights of the usual scale."""
  rng = np.random.default_rng(0)

  def filled(module):
    for name, x in of(module).items():
      node = module
      *parents, last = name.split(".")
      for part in parents:
        node = node[int(part)] if part.isdecimal() else getattr(node, part)
      if last in ("kernel",):
        fan = np.prod(x.shape[:-1])
        value = rng.standard_normal(x.shape, np.float32) * np.float32((2 / fan) ** 0.5)
        getattr(node, last)[...] = value
    return module

  return cls(filled(Inception()), filled(LPIPS()), (), {"inception": "random", "lpips": "random"})


def images(n: int, seed: int = 0) -> np.ndarray:
  """Bytes [n, SIZE, SIZE, 3]."""
  return np.random.default_rng(seed).integers(0, 256, (n, SIZE, SIZE, 3), np.uint8)


def speed(function, n: int = BATCH) -> float:
  """Images a second, compiled before."""
  jax.block_until_ready(function())
  start = time.perf_counter()
  jax.block_until_ready(function())
  return n / (time.perf_counter() - start)


def speeds(torch_python: str, rounds: int) -> dict[str, float]:
  """The best of several rounds of every part, in turns."""
  nets, x, y = networks(), images(BATCH), images(BATCH, 1)
  inception = Networks(nets.inception, None).features(CONVENTION)
  vgg = Networks(None, nets.lpips).features(CONVENTION)
  parts = {
    "inception": lambda: inception(x),
    "vgg": lambda: vgg(x),
    "lpips": lambda: lpips_from(nets.lpips, normalize(x))(jnp.asarray(normalize(y))),
    "psnr_ssim": lambda: (psnr(x, y), ssim(x, y)),
  }
  best: dict[str, float] = {}
  for _ in range(rounds):
    for name, function in parts.items():
      best[name] = max(best.get(name, 0.0), speed(function))
    if (theirs := torch_speed(torch_python)) is not None:
      best["inception_pytorch_fid"] = max(best.get("inception_pytorch_fid", 0.0), theirs)
  return best


def torch_speed(python: str) -> float | None:
  """Images a second of pytorch-fid's Inception; None without the package."""
  code = _TORCH % (BATCH, SIZE, SIZE)
  done = subprocess.run([python, "-c", code], capture_output=True, text=True)
  return float(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def evaluate(count: int) -> float:
  """Peak memory in GB of an evaluation of `count` images."""
  nets = networks(Noisy)
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder) / "images.npy"
    out = np.lib.format.open_memmap(file, "w+", np.uint8, (count, SIZE, SIZE, 3))
    for i in range(0, count, 500):
      out[i : i + 500] = images(min(500, count - i), i)
    del out
    reader = SampleFiles(file)
    noise = np.random.default_rng(1)
    run = lambda x, first: BatchResult(x + noise.normal(0, 0.1, x.shape).astype(np.float32))
    entry = Entry("noise", "module", "", {}, {}, None, None, 0, (), run)
    how = nets, CONVENTION, BATCH
    evaluation = Evaluation(
      {"image_size": SIZE},
      CONVENTION,
      nets,
      RealImages("real", reader, *how),
      None,
      {"noise": reader.side, "reference": reader.side},
      entries=[Reconstructions(entry, reader, *how)],
    )
    output = pathlib.Path(folder) / "out"
    found = comparison.run(evaluation, output, False, lambda *_: None)
    print(found["entries"]["noise"]["values"], file=sys.stderr)
  return peak()


def main() -> None:
  p = argparse.ArgumentParser(description=__doc__)
  p.add_argument("--torch-python", default=sys.executable, help="an interpreter with pytorch-fid")
  p.add_argument("--rounds", type=int, default=3)
  p.add_argument("--measure", type=int, metavar="N", help="peak memory of N images, and no more")
  args = p.parse_args()
  if args.measure:
    print(json.dumps(evaluate(args.measure)))
    return
  print(host())
  found: dict = {"images_per_second": speeds(args.torch_python, args.rounds)}
  for name, x in found["images_per_second"].items():
    print(f"{name:24} {x:9.1f} images a second of {SIZE} x {SIZE}, {cores()} cores")
  for count in (1000, 10_000):
    command = [sys.executable, "-m", "benchmarks.evaluation", "--measure", str(count)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    out = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found[f"peak_gb_{count}"] = json.loads(out.stdout.splitlines()[-1])
    print(f"{count:6} images: peak of {found[f'peak_gb_{count}']:.2f} GB")
  print(json.dumps(found))


if __name__ == "__main__":
  main()
