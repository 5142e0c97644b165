"""The demo: a continuous VAE becomes a discrete tokenizer on the embedded photos.

Runs the commands that a user would run, one after the other, and prints where the report is.
`make demo` calls it; run again it continues where it stopped.
"""

import pathlib
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent
OUT = ROOT / "demo"


def command(*words) -> None:
  """Runs `python -m …`, showing the command."""
  words = [str(w) for w in words]
  print(f"\n$ python -m {' '.join(words)}", flush=True)
  code = subprocess.run([sys.executable, "-m", *words], cwd=ROOT).returncode
  if code:
    sys.exit(code)


def main() -> None:
  start = time.monotonic()
  if not (OUT / "vae").exists():
    weights = "assets/demo_vae/kl_small.safetensors"
    scale = (ROOT / "assets/demo_vae/scale.txt").read_text().strip()
    command(
      "convert", "mar-vae", weights, "--scale", scale, "--norm-groups", "8", "--output", "demo/vae"
    )  # fmt: skip
  command("coda_jax.train", "--config=configs/demo.py", "--workdir=demo/lora")
  command("coda_jax.train", "--config=configs/demo.py:attention", "--workdir=demo/no_lora")
  shutil.rmtree(OUT / "report", ignore_errors=True)
  command(
    "coda_jax.visualize", "--tokenizer", "demo/lora/tokenizer", "--name", "with LoRA",
    "--compare", "without LoRA=demo/no_lora/tokenizer", "--title", "CODA demo",
    "--data", "embedded@val", "--tokens-per-code", "20", "--output", "demo/report",
  )  # fmt: skip
  minutes = (time.monotonic() - start) / 60
  print(f"\nDone in {minutes:.1f} minutes. Open {OUT / 'report' / 'report.html'}")


if __name__ == "__main__":
  main()
