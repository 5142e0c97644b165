"""Every command on tiny data, with its directories in a bucket of a fake server: do the installed
versions work together? `make test-lowest` calls it with the lowest ones.
"""

import os
import pathlib
import subprocess
import sys
import tempfile
import time

from tests import stores
from tests.training import runs

ROOT = pathlib.Path(__file__).parent.parent
BUCKET = f"gs://{stores.BUCKET}"
CONFIG = """
import pathlib
from coda_jax import config as c
from tests.training import runs

def get_config(arg):
  plain = c.LoggingSettings(every=1)
  if arg == "tokenizer":
    patchgan = c.AdversarialSettings(discriminator="patch", patch_width=4, patch_layers=1)
    settings = runs.config(pathlib.Path({folder!r}), steps=4, adversarial=patchgan, logging=plain)
  else:
    where = [f"{bucket}/{{name}}" for name in ("tokenizer/tokenizer", "tokens", "tokens")]
    settings = c.MaskGITTrainConfig(
      data=c.TokenDataSettings(*where, batch_size=8),
      model=c.MaskGITSettings(width=32, depth=2, heads=2),
      steps=2,
      eval=c.EvalSettings(batch_size=8, lpips=False),
      logging=plain,
    )
  return c.config_dict(settings)
"""


def run(environment: dict[str, str], command: str, *words: object) -> None:
  """Runs `python -m coda_jax.COMMAND`, showing how long it took; what it says if it fails."""
  began = time.monotonic()
  line = [sys.executable, "-m", f"coda_jax.{command}", *map(str, words)]
  done = subprocess.run(line, env=environment, cwd=ROOT, capture_output=True, text=True)
  if done.returncode:
    sys.exit(f"{' '.join(line)}: code {done.returncode}\n{done.stdout}{done.stderr}")
  print(f"{command}: {time.monotonic() - began:.0f} s", flush=True)


def main() -> None:
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    runs.make_inputs(folder)
    (folder / "config.py").write_text(CONFIG.format(folder=name, bucket=BUCKET))
    images, tokenizer = folder / "images", ("--tokenizer", f"{BUCKET}/tokenizer/tokenizer")
    config = f"--config={folder}/config.py"
    with stores.fake_gcs(folder) as gcs:
      environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} | gcs
      train = [f"{config}:tokenizer", f"--workdir={BUCKET}/tokenizer"]
      run(environment, "train", *train, "--config.steps=2")
      run(environment, "train", *train)  # continues it
      data = ["--data", f"folder:{images}@train", "--output"]
      run(environment, "tokenize_dataset", *tokenizer, *data, f"{BUCKET}/tokens")
      run(environment, "train", f"{config}:generator", f"--workdir={BUCKET}/generator")
      model = ["--model", f"{BUCKET}/generator/generator", "--classes", "0"]
      run(environment, "generate", *model, "--steps", 2, "--output", f"{BUCKET}/samples")
      output = ["--output", f"{BUCKET}/reconstructions"]
      run(environment, "reconstruct", *tokenizer, "--images", images / "val", *output)
      run(environment, "visualize", *tokenizer, *data, folder / "report")
      assert stores.request(gcs, "samples/grid.png") and (folder / "report/report.html").exists()


if __name__ == "__main__":
  main()
