"""Every command on tiny data, in an empty folder: do the installed versions work together?

`python tools/smoke.py` tries the `coda_jax` that its Python finds: an installed wheel, or with
`PYTHONPATH` a checkout, as `make test-lowest` has it with the lowest versions. Where
gcp-storage-emulator and gcsfs are installed, the directories are in a bucket of a fake server.
"""

import contextlib
import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIG = """
from coda_jax import config as c
from coda_jax.models.lora import LoRAConfig
from coda_jax.models.quantizer import QuantizerConfig

RUN = c.TrainConfig(
  tokenizer=c.TokenizerSettings(
    vae="vae",
    lora=LoRAConfig(rank=2),
    quantizer=QuantizerConfig(codebook_size=64, patch_sizes=(2, 8), chunk_size=64),
    image_size=32,
  ),
  data=c.DataSettings(train="folder:images@train", eval="folder:images@val", batch_size=4),
  steps=4,
  losses=c.LossSettings(perceptual=0.0),
  adversarial=c.AdversarialSettings(discriminator="patch", patch_width=4, patch_layers=1),
  eval=c.EvalSettings(batch_size=4, lpips=False),
  logging=c.LoggingSettings(every=1),
)

def get_config(arg):
  if arg == "tokenizer":
    return c.config_dict(RUN)
  if arg == "ablation":
    table = c.Table("Levels", (("psnr", ""),), (c.Line("VAE"), c.Line("one", "one")))
    rows = {{"one": {{"steps": 1, "adversarial__discriminator": "none"}}}}
    return c.config_dict(c.AblationConfig(c.config_dict(RUN), rows, {{"1": table}}, (0,), 1.0))
  tokens = ("{place}/tokens", "{place}/tokens")
  return c.config_dict(
    c.MaskGITTrainConfig(
      data=c.TokenDataSettings("{place}/tokenizer/tokenizer", *tokens, batch_size=4),
      model=c.MaskGITSettings(width=32, depth=2, heads=2),
      steps=2,
      eval=c.EvalSettings(batch_size=4, lpips=False),
      logging=c.LoggingSettings(every=1),
    )
  )
"""


class Commands:
  """Runs commands in a folder, showing how long each took, and what it says if it fails."""

  def __init__(self, folder: pathlib.Path, environment: dict[str, str]):
    self._folder, self._environment = folder, environment

  def __call__(self, command: str, *words: object) -> None:
    began = time.monotonic()
    line = [sys.executable, "-m", "coda_jax", command, *map(str, words)]
    done = subprocess.run(
      line, env=self._environment, cwd=self._folder, capture_output=True, text=True
    )
    if done.returncode:
      sys.exit(f"{' '.join(line)}: code {done.returncode}\n{done.stdout}{done.stderr}")
    print(f"{command}: {time.monotonic() - began:.0f} s", flush=True)


def has(*modules: str) -> bool:
  return all(importlib.util.find_spec(m) for m in modules)


def make_images(folder: pathlib.Path) -> None:
  """Noisy gradients in `folder`/images, 12 to train on and 4 held out."""
  rng = np.random.default_rng(0)
  for split, count in (("train", 12), ("val", 4)):
    path = folder / "images" / split / "one"
    path.mkdir(parents=True)
    for i in range(count):
      ramp = np.linspace(0, 200, 48)[:, None, None] * rng.uniform(0, 1, (1, 1, 3))
      noise = rng.uniform(0, 50, (48, 48, 3))
      Image.fromarray((ramp + noise).astype(np.uint8)).save(path / f"{i}.png")


def run_all(run: Commands, folder: pathlib.Path, place: str) -> None:
  """Every command once; what is saved goes to `place`, a folder or a bucket."""
  (folder / "config.py").write_text(CONFIG.format(place=place))
  make_images(folder)
  demo = ROOT / "assets/demo_vae"
  options = ("--scale", (demo / "scale.txt").read_text().strip(), "--norm-groups", 8)
  run("convert", "mar-vae", demo / "kl_small.safetensors", *options, "--output", "vae")
  train = ["--config=config.py:tokenizer", f"--workdir={place}/tokenizer"]
  run("train", *train, "--config.steps=2")
  run("train", *train)  # continues it
  # A config of the package by its name.
  data = ["--config.data.train=folder:images@train", "--config.data.eval=folder:images@val"]
  size = ["--config.tokenizer.image_size=32", "--config.tokenizer.quantizer.patch_sizes=(2,8)"]
  named = ["--config=configs/demo.py", "--config.tokenizer.vae=vae", "--config.steps=1"]
  run("train", *named, *data, *size)
  model = f"{place}/tokenizer/tokenizer"
  tokenizer, images = ["--tokenizer", model], ["--data", "folder:images@val"]
  run("reconstruct", *tokenizer, "--images", "images/val", "--output", f"{place}/reconstructions")
  run("visualize", *tokenizer, *images, "--tokens-per-code", 1, "--output", "report")
  run("eval", *tokenizer, *images, "--continuous", "--output", "eval")
  run(
    "tokenize_dataset", *tokenizer, "--data", "folder:images@train", "--output", f"{place}/tokens"
  )
  run("train", "--config=config.py:generator", f"--workdir={place}/generator")
  generator = [f"{place}/generator/generator", "--classes", 0, "--steps", 2]
  run("generate", "--model", *generator, "--output", f"{place}/samples")
  few = ["--image-size", 32, "--bits", 128, "--images", 8, "--gradients", 4]
  run("discretize", "--vae", "vae", *images, *few, "--output", "discrete")
  run("ablate", "--config=config.py:ablation", "--workdir=ablation")
  if not place.startswith("gs:"):
    run("convert", "to-torch", model, "--output", "torch")
    sizes = ("--patch-sizes", "2,8", "--image-size", 32, *options)
    run("convert", "coda-mar", "torch", *sizes, "--output", "again")
  if has("libtpu"):
    shape = ("--topology=v5e-4", "--config.data.batch_size=4")
    run("compile_check", "--config=config.py:tokenizer", *shape)
  run("serve", "--help")
  for file in ("report/report.html", "eval/results.json", "ablation/tables.md"):
    assert (folder / file).exists(), file


def main() -> None:
  with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
    folder = pathlib.Path(name)
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    place = "saved"
    if has("gcp_storage_emulator", "gcsfs"):
      sys.path.append(str(ROOT))
      from tests import stores

      environment |= stack.enter_context(stores.fake_gcs(folder))
      place = f"gs://{stores.BUCKET}"
    code = "import coda_jax; print(coda_jax.__version__, coda_jax.__path__[0])"
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=folder, check=True)
    run_all(Commands(folder, environment), folder, place)


if __name__ == "__main__":
  main()
