"""The demo: a continuous VAE becomes a discrete tokenizer on the embedded photos.

Runs the commands that a user would run, its two trainings side by side, and prints where the report
is, which shows the embedded tokenizer too. `make demo` calls it; run again it continues where it
stopped.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent
OUT = ROOT / "demo"


def start(*words, log: pathlib.Path | None = None) -> subprocess.Popen:
  """Starts `python -m …`, showing the command; its lines go to `log` if one is given."""
  words = [sys.executable, "-m", *map(str, words)]
  note = f"   # its lines: {log.relative_to(ROOT)}" if log else ""
  print(f"\n$ python {' '.join(words[1:])}{note}", flush=True)
  if log is None:
    return subprocess.Popen(words, cwd=ROOT)
  log.parent.mkdir(parents=True, exist_ok=True)
  with log.open("w") as lines:
    return subprocess.Popen(words, cwd=ROOT, stdout=lines, stderr=subprocess.STDOUT)


def command(*words) -> None:
  """Runs `python -m …` to its end, showing the command."""
  if code := start(*words).wait():
    sys.exit(code)


def main() -> None:
  began = time.monotonic()
  if not (OUT / "vae").exists():
    weights = "assets/demo_vae/kl_small.safetensors"
    scale = (ROOT / "assets/demo_vae/scale.txt").read_text().strip()
    command(
      "convert", "mar-vae", weights, "--scale", scale, "--norm-groups", "8", "--output", "demo/vae"
    )  # fmt: skip
  # Two at a time: starting, compiling and saving leave cores idle.
  log = OUT / "no_lora.log"
  without = start(
    "coda_jax.train", "--config=configs/demo.py:attention", "--workdir=demo/no_lora", log=log
  )
  try:
    if os.environ.get("JAX_PLATFORMS") != "cpu":  # an accelerator serves one process at a time
      without.wait()
    command("coda_jax.train", "--config=configs/demo.py", "--workdir=demo/lora")
    print(f"waiting for the run without LoRA ({log.relative_to(ROOT)})", flush=True)
    if without.wait():
      sys.exit(log.read_text())
  finally:
    without.terminate()
  shutil.rmtree(OUT / "report", ignore_errors=True)
  command(
    "coda_jax.visualize", "--tokenizer", "demo/lora/tokenizer", "--name", "with LoRA",
    "--compare", "without LoRA=demo/no_lora/tokenizer",
    "--compare", "from data, longer=assets/demo_tokenizer", "--title", "CODA demo",
    "--data", "embedded@val", "--tokens-per-code", "20", "--output", "demo/report",
  )  # fmt: skip
  minutes = (time.monotonic() - began) / 60
  print(f"\nDone in {minutes:.1f} minutes. Open {OUT / 'report' / 'report.html'}")


if __name__ == "__main__":
  main()
