"""Do tokens of equal bits generate alike? One small MaskGIT on the tokens of each tokenizer.

    python benchmarks/equal_bits_generators.py --output FOLDER [--bits 2770] [--updates 800]

On 64x64 drawn shapes (`tools.draw_shapes`, 8000 to train and 1000 held out), with `demo/vae` of
`make demo`: CODA with LoRA, 300 updates from random codes; CODA from data; training-free (`vq`,
`lloyd-max`), whose codes are embedded by their values or by their factors; Gaussian Quant. Each
tokenizer is made of the same drawings at the same bits, its tokens train the same MaskGIT for as
many updates, and 300 samples are compared with held-out drawings. `model_bits` is what the
generator needs to say the tokens of a held-out drawing (`training.maskgit_step.bits_of_images`).
Every step is a command of the package in a process of its own; the same call continues a run that
was stopped. The last line is JSON; FOLDER/results.json has it too.
"""

import argparse
import json
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # where tools/ is

import jax

from coda_jax.generation.generator import load_generator
from coda_jax.training.logging import read_metrics
from tools.demo import command

SIZE = 64
SIDES = "1,2,4,16"  # 277 tokens of 10 bits
SHAPES = ["--image-size", SIZE, "--resize-ratio", 1, "--images", 1000]
IMAGES = 300  # samples, and held-out drawings beside them
STEPS = 16  # of the sampler
# Method and options of `coda_jax.discretize`; CODA without data is trained.
TOKENIZERS = {
  "coda": None,
  "data": ["--method", "coda", "--patch-sizes", SIDES],
  "vq": [],
  "free": ["--method", "lloyd-max"],
  "gaussian": ["--method", "gaussian"],
}
# Tokenizer and `config.model.embedding`.
GENERATORS = {
  "coda": ("coda", "codes"),
  "data": ("data", "codes"),
  "vq": ("vq", "codes"),
  "vq_factors": ("vq", "factors"),
  "free": ("free", "codes"),
  "free_factors": ("free", "factors"),
  "gaussian": ("gaussian", "codes"),
}


def run(config: str, workdir: pathlib.Path, **changes) -> None:
  """Trains, with changes to the config, `__` for dots."""
  keys = [f"--config.{key.replace('__', '.')}={value}" for key, value in changes.items()]
  command("coda_jax.train", f"--config={config}", f"--workdir={workdir}", *keys)


def places(folder: pathlib.Path, name: str, seed: int) -> tuple[pathlib.Path, pathlib.Path]:
  """(workdir of the generator `name`, evaluation of its samples), in its tokenizer's folder."""
  kind, embedding = GENERATORS[name]
  which = f"{embedding}_{seed}"
  return folder / kind / f"generator_{which}", folder / kind / f"samples_{which}"


def make_tokenizer(name: str, folder: pathlib.Path, vae: str, bits: int) -> pathlib.Path:
  """The directory of the tokenizer `name`."""
  train, held_out = (f"folder:{folder / split}@train" for split in ("shapes", "held_out"))
  if (options := TOKENIZERS[name]) is not None:
    made = folder / name / "tokenizer"
    if not made.exists():
      where = ["--vae", vae, "--data", train, "--bits", bits, "--output", made]
      command("coda_jax.discretize", *where, *SHAPES, *options)
    return made
  workdir = folder / name / "training"
  run(
    "configs/demo.py",
    workdir,
    tokenizer__vae=vae,
    tokenizer__image_size=SIZE,
    tokenizer__quantizer__patch_sizes=f"({SIDES})",
    data__train=train,
    data__eval=held_out,
    data__resize_ratio=1.0,
    eval__every=0,
    eval__images=100,
  )
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
  workdir, samples = places(folder, name, seed)
  run(
    "configs/maskgit.py:demo",
    workdir,
    data__tokenizer=tokenizer,
    data__train=where / "tokens" / "shapes",
    data__eval=where / "tokens" / "held_out",
    model__depth=4,
    model__embedding=embedding,
    class_dropout=1.0,
    ema__decay=0.99,
    eval__every=200,
    eval__images=500,
    eval__batch_size=50,
    steps=updates,
    seed=seed,
  )
  command(
    "coda_jax.eval", "--generator", workdir / "generator", *data, "--classes", "null",
    "--count", IMAGES, "--batch-size", 50, "--steps", STEPS, "--guidance", 0, "--yardsticks",
    "--output", samples,
  )  # fmt: skip


def seconds_of_samples(folder: pathlib.Path, names: list[str], seed: int) -> dict[str, float]:
  """Seconds of a sample in `STEPS` steps, the best of three batches of 16; they take turns."""
  generators = {n: load_generator(places(folder, n, seed)[0] / "generator") for n in names}
  best = {}
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
  workdir, drawn = places(folder, name, seed)
  quality, samples = (
    json.loads((x / "results.json").read_text())
    for x in (workdir.parent / "reconstructions", drawn)
  )
  tokenizer = quality["entries"]["tokenizer"]
  held_out = [r for r in read_metrics(workdir) if r["kind"] == "eval"]
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
