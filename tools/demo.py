"""The demo: a continuous VAE becomes a discrete tokenizer on the embedded photos.

Runs the commands that a user would run, its two trainings side by side, and prints where the report
is. `make demo` calls it; run again it continues where it stopped.
"""

import pathlib
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent
OUT = ROOT / "demo"


def command(*words, log: pathlib.Path | None = None) -> subprocess.Popen:
  """Starts `python -m …`, showing the command; its lines go to `log` if one is given."""
  words = [sys.executable, "-m", *map(str, words)]
  beside = f"   # beside the next one, see {log.relative_to(ROOT)}" if log else ""
  print(f"\n$ python {' '.join(words[1:])}{beside}", flush=True)
  if log is None:
    return subprocess.Popen(words, cwd=ROOT)
  log.parent.mkdir(parents=True, exist_ok=True)
  with log.open("w") as lines:
    return subprocess.Popen(words, cwd=ROOT, stdout=lines, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen) -> None:
  if process.wait():
    sys.exit(process.returncode)


def main() -> None:
  start = time.monotonic()
  if not (OUT / "vae").exists():
    weights = "assets/demo_vae/kl_small.safetensors"
    scale = (ROOT / "assets/demo_vae/scale.txt").read_text().strip()
    convert = command(
      "convert", "mar-vae", weights, "--scale", scale, "--norm-groups", "8", "--output", "demo/vae"
    )  # fmt: skip
    finish(convert)
  # Two at a time: starting, compiling and saving leave cores idle.
  log = OUT / "no_lora.log"
  without = command(
    "coda_jax.train", "--config=configs/demo.py:attention", "--workdir=demo/no_lora", log=log
  )
  try:
    finish(command("coda_jax.train", "--config=configs/demo.py", "--workdir=demo/lora"))
    print(f"waiting for the run without LoRA ({log.relative_to(ROOT)})", flush=True)
    if without.wait():
      sys.exit(log.read_text())
  finally:
    without.terminate()
  shutil.rmtree(OUT / "report", ignore_errors=True)
  report = command(
    "coda_jax.visualize", "--tokenizer", "demo/lora/tokenizer", "--name", "with LoRA",
    "--compare", "without LoRA=demo/no_lora/tokenizer", "--title", "CODA demo",
    "--data", "embedded@val", "--tokens-per-code", "20", "--output", "demo/report",
  )  # fmt: skip
  finish(report)
  minutes = (time.monotonic() - start) / 60
  print(f"\nDone in {minutes:.1f} minutes. Open {OUT / 'report' / 'report.html'}")


if __name__ == "__main__":
  main()
