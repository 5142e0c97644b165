"""What a training update of a tokenizer needs on one TPU v5e chip, compiled for it without one.

    pip install -e '.[tpu]'
    python benchmarks/chip_memory.py [--cases flux mar] [--images 16] [--parts]

The trainer's own update with the settings of `configs/flux.py` and `configs/mar.py` (LoRA,
quantizer, LPIPS, DINO's discriminator, adaptive weight, both optimizers, the average) for a batch
of 256x256 images in one go; `--dtype` and `--remat` are the config's. Memory is the compiler's own
account: what the update takes in (parameters, moments, images; donated), and its temporaries. HBM
traffic is the sum over the program's operations of what each reads and writes, as the compiler
counts it: an upper bound where buffers stay in the chip's fast memory; the bodies of the look-up's
loops count once. With `--parts` the networks follow (the head and the tail of `tokenizer_step`,
LPIPS, DINO, its heads), each compiled by itself, forward + backward. The last line is JSON;
`images_per_chip_v5e_*` is the batch of `--images` that was found to fit 16 GB, the largest if more
are given, or null.

Compiling takes minutes. Only one process can use libtpu at a time.
"""

import argparse
import json
import os
import pathlib
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # where configs/ and benchmarks/ are

import jax
import jax.numpy as jnp

from benchmarks.harness import V5E_GB, compile_for_chip, has_libtpu
from benchmarks.update import gradient, make_trainer, parts
from coda_jax.config import REMAT

CASES = ("flux", "mar")


def gigabytes(tree) -> float:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / 1e9


def measure(case: str, images: int, **settings) -> dict[str, float] | None:
  """GB of an update by kind and its HBM traffic; None if the compiler cannot fit it."""
  trainer = make_trainer(case, **settings)
  state, frozen = trainer.abstract_state(), trainer._frozen
  size = trainer.config.tokenizer.image_size
  batch = jax.ShapeDtypeStruct((1, images, size, size, 3), jnp.uint8)
  try:
    key = jax.eval_shape(jax.random.key_data, jax.random.key(0))
    step = compile_for_chip(trainer._keyed_update, state, frozen, key, batch, donate=True)
  except jax.errors.JaxRuntimeError as e:
    print(str(e).splitlines()[0], file=sys.stderr)
    return None
  memory = step.memory_analysis()
  moments = gigabytes((state.optimizer, state.discriminator.optimizer))
  fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
  return {
    "frozen networks": gigabytes(frozen),
    "trained, average": gigabytes(state) - moments,
    "moments": moments,
    "images": gigabytes(batch),
    "temporaries": memory.temp_size_in_bytes / 1e9,
    "together": (memory.argument_size_in_bytes + memory.temp_size_in_bytes + fresh) / 1e9,
    "traffic": step.cost_analysis()["bytes accessed"] / images / 1e9,
  }


def measure_parts(case: str, images: int, **settings) -> dict[str, tuple[float, float]]:
  """(GB of temporaries, GB of HBM traffic an image) of the networks, forward + backward."""
  trainer, found = make_trainer(case, **settings), {}
  for name, (function, args) in parts(trainer, trainer.abstract_state(), images).items():
    step = compile_for_chip(gradient(function), *args)
    traffic = step.cost_analysis()["bytes accessed"] / images / 1e9
    found[name] = step.memory_analysis().temp_size_in_bytes / 1e9, traffic
  return found


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
  parser.add_argument("--images", nargs="+", type=int, default=[16], help="batches to try")
  parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
  parser.add_argument("--remat", choices=REMAT, default="none")
  parser.add_argument("--parts", action="store_true", help="the networks one by one")
  args = parser.parse_args()
  if not has_libtpu():
    sys.exit("libtpu is not installed: pip install -e '.[tpu]'; no TPU is needed")
  settings = {"dtype": args.dtype, "remat": args.remat}
  result = {}
  for case in args.cases:
    result |= {f"images_per_chip_v5e_{case}": None, f"hbm_gb_per_image_{case}": None}
    for images in sorted(args.images):
      found = measure(case, images, **settings)
      what = f"{case}, {images} images, {', '.join(f'{k} {v}' for k, v in settings.items())}"
      if found is None:
        print(f"{what}: the compiler finds no way to fit the chip", flush=True)
        continue
      traffic = found.pop("traffic")
      print(f"{what}:")
      for name, gb in found.items():
        print(f"  {name:18} {gb:7.3f} GB")
      fits = found["together"] <= V5E_GB
      print(f"  {'fits' if fits else 'does not fit'} {V5E_GB:.0f} GB")
      print(f"  HBM traffic        {traffic:7.2f} GB an image", flush=True)
      if fits:
        result[f"images_per_chip_v5e_{case}"] = images
        result[f"hbm_gb_per_image_{case}"] = round(traffic, 2)
    if args.parts:
      rows = measure_parts(case, max(args.images), **settings)
      for name, (gb, traffic) in rows.items():
        print(f"  {name}: temporaries {gb:.2f} GB, traffic {traffic:.2f} GB an image", flush=True)
  print(json.dumps(result))


if __name__ == "__main__":
  main()
