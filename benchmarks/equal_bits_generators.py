"""Do tokens of equal bits generate alike? One small MaskGIT on the tokens of each tokenizer.

    python benchmarks/equal_bits_generators.py --output FOLDER [--bits 2770] [--updates 800]

On 64x64 drawn shapes (`tools.draw_shapes`, 8000 to train and 1000 held out), with `demo/vae` of
`make demo`: CODA with LoRA, 300 updates from random codes; CODA from data; training-free
(`lloyd-max`), whose codes are embedded by their values or by their factors; Gaussian Quant. Each
tokenizer is made of the same drawings at the same bits, its tokens train the same MaskGIT for as
many updates, and 300 samples are compared with held-out drawings. `model_bits` is what the
generator needs to say the tokens of a held-out drawing (`training.maskgit_step.bits_of_images`).
Every step is a command of the package in a process of its own; the same call continues a run that
was stopped. The last line is JSON; FOLDER/results.json has it too.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time

import jax

from coda_jax.generation.generator import load_generator
from coda_jax.training.logging import read_metrics

ROOT = pathlib.Path(__file__).parents[1]
SIZE = 64
SIDES = "1,2,4,16"  # 277 tokens of 10 bits
SHAPES = ["--image-size", SIZE, "--resize-ratio", 1, "--images", 1000]
IMAGES = 300  # samples, and held-out drawings beside them
STEPS = 16  # of the sampler
# Method and options of `coda_jax.discretize`; CODA without data is trained.
TOKENIZERS = {
  "coda": None,
  "data": ["--method", "coda", "--patch-sizes", SIDES],
  "free": [],
  "gaussian": ["--method", "gaussian"],
}
# Tokenizer and `config.model.embedding`.
GENERATORS = {
  "coda": ("coda", "codes"),
  "data": ("data", "codes"),
  "free": ("free", "codes"),
  "free_factors": ("free", "factors"),
  "gaussian": ("gaussian", "codes"),
}


def command(*words) -> None:
  """Runs `python -m …` to its end, showing the command."""
  words = [sys.executable, "-m", *map(str, words)]
  print(f"$ python {' '.join(words[1:])}", flush=True)
  if code := subprocess.run(words, cwd=ROOT).returncode:
    sys.exit(code)


def make_tokenizer(name: str, folder: pathlib.Path, vae: str, bits: int) -> pathlib.Path:
  """The directory of the tokenizer `name`."""
  train, held_out = (f"folder:{folder / split}@train" for split in ("shapes", "held_out"))
  if (options := TOKENIZERS[name]) is not None:
    made = folder / name / "tokenizer"
    if not made.exists():
      where = ["--vae", vae, "--data", train, "--bits", bits, "--output", made]
      command("coda_jax.discretize", *where, *SHAPES, *options)
    return made
  keys = {
    "tokenizer.vae": vae,
    "tokenizer.image_size": SIZE,
    "tokenizer.quantizer.patch_sizes": f"({SIDES})",
    "data.train": train,
    "data.eval": held_out,
    "data.resize_ratio": 1.0,
    "eval.every": 0,
    "eval.images": 100,
  }
  keys = [f"--config.{key}={value}" for key, value in keys.items()]
  workdir = folder / name / "training"
  command("coda_jax.train", "--config=configs/demo.py", f"--workdir={workdir}", *keys)
  return workdir / "tokenizer"


def train(name: str, folder: pathlib.Path, vae: str, bits: int, updates: int, seed: int) -> None:
  """Makes the generator `name` and the tokenizer of its tokens, and measures both."""
  kind, embedding = GENERATORS[name]
  tokenizer = make_tokenizer(kind, folder, vae, bits)
  data = ["--data", f"folder:{folder / 'held_out'}@train", "--resize-ratio", 1]
  data += ["--max-images", IMAGES]
  where = folder / kind
  command("coda_jax.eval", "--tokenizer", tokenizer, *data, "--output", where / "reconstructions")
  for split in ("shapes", "held_out"):
    which = ["--data", f"folder:{folder / split}@train", "--resize-ratio", 1, "--batch-size", 50]
    made = where / "tokens" / split
    command("coda_jax.tokenize_dataset", "--tokenizer", tokenizer, *which, "--output", made)
  keys = {
    "data.tokenizer": tokenizer,
    "data.train": where / "tokens" / "shapes",
    "data.eval": where / "tokens" / "held_out",
    "model.depth": 4,
    "model.embedding": embedding,
    "class_dropout": 1.0,
    "ema.decay": 0.99,
    "eval.every": 200,
    "eval.images": 500,
    "eval.batch_size": 50,
    "steps": updates,
    "seed": seed,
  }
  keys = [f"--config.{key}={value}" for key, value in keys.items()]
  workdir = where / f"generator_{embedding}_{seed}"
  command("coda_jax.train", "--config=configs/maskgit.py:demo", f"--workdir={workdir}", *keys)
  command(
    "coda_jax.eval", "--generator", workdir / "generator", *data, "--classes", "null",
    "--count", IMAGES, "--batch-size", 50, "--steps", STEPS, "--guidance", 0, "--yardsticks",
    "--output", where / f"samples_{embedding}_{seed}",
  )  # fmt: skip


def seconds_of_samples(folder: pathlib.Path, names: list[str], seed: int) -> dict[str, float]:
  """Seconds of a sample in `STEPS` steps, the best of three batches of 16; they take turns."""
  generators, best = {}, {}
  for name in names:
    kind, embedding = GENERATORS[name]
    generators[name] = load_generator(folder / kind / f"generator_{embedding}_{seed}" / "generator")
  for i in range(4):  # the first compiles
    for name, generator in generators.items():
      start = time.perf_counter()
      jax.block_until_ready(generator.generate([None] * 16, STEPS, guidance=0.0))
      seconds = (time.perf_counter() - start) / 16
      if i:
        best[name] = min(seconds, best.get(name, seconds))
  return best


def results_of(folder: pathlib.Path, name: str, seed: int) -> dict:
  """What the evaluations of a generator and its tokenizer found."""
  kind, embedding = GENERATORS[name]
  where = folder / kind
  quality, samples = (
    json.loads((where / x / "results.json").read_text())
    for x in ("reconstructions", f"samples_{embedding}_{seed}")
  )
  tokenizer = quality["entries"]["tokenizer"]
  history = read_metrics(where / f"generator_{embedding}_{seed}")
  held_out = [r for r in history if r["kind"] == "eval"]
  return {
    "tokens": tokenizer["codebook"]["tokens_per_image"],
    "bits": round(tokenizer["codebook"]["bits_per_image"]),
    **{key: tokenizer["values"][key] for key in ("psnr", "ssim", "lpips", "vgg_kd")},
    "updates": held_out[-1]["step"],
    "model_bits": held_out[-1]["bits"],
    "model_bits_over_updates": {r["step"]: round(r["bits"], 1) for r in held_out},
    "samples_vgg_kd": samples["entries"]["samples"]["values"]["vgg_kd"],
    "yardsticks_vgg_kd": {k: x["values"]["vgg_kd"] for k, x in samples["yardsticks"].items()},
  }


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--output", type=pathlib.Path, required=True)
  parser.add_argument("--vae", default="demo/vae", help="from `convert` (demo/vae)")
  parser.add_argument("--bits", type=int, default=2770, help="of an image, at most")
  parser.add_argument("--updates", type=int, default=800, help="of each generator")
  parser.add_argument("--seed", type=int, default=0, help="of the generators")
  parser.add_argument("--only", nargs="+", choices=GENERATORS, help="some of them")
  args = parser.parse_args()
  folder, vae = args.output.resolve(), str(pathlib.Path(args.vae).resolve())
  for split, seed, count in (("shapes", 0, 8000), ("held_out", 1, 1000)):
    if not (folder / split).exists():
      made = ["--size", SIZE, "--seed", seed, "--train", count, "--unseen", 1]
      command("tools.draw_shapes", "--output", folder / split, *made)
  names = args.only or list(GENERATORS)
  for name in names:
    train(name, folder, vae, args.bits, args.updates, args.seed)
  found = {name: results_of(folder, name, args.seed) for name in names}
  for name, seconds in seconds_of_samples(folder, names, args.seed).items():
    found[name]["seconds_a_sample"] = round(seconds, 4)
  (folder / "results.json").write_text(json.dumps(found, indent=1) + "\n")
  for name, values in found.items():
    shown = {k: v for k, v in values.items() if not isinstance(v, dict)}
    print(name, ", ".join(f"{k} {v:.4g}" for k, v in shown.items()))
  print(json.dumps(found))


if __name__ == "__main__":
  main()
