"""Fills the table of docs/scaling.md: updates at full settings, compiled for TPU pods without one.

    pip install -e '.[tpu]'
    nice python benchmarks/scaling.py [--only 'MAR v5e-64' ...]

A row is an update in bfloat16 in one go (`accumulation=1`), with `remat` where it does not fit
without. Compilers stop before they generate code (`--no-code`), unless `--code` is given.
A row that `benchmarks/results/scaling.json` holds for the installed libtpu is not compiled
again; the table is written after each. A row takes 1 to 5 minutes of two cores, with `--code` 5 to
60.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # where coda_jax/ is

from coda_jax import outputs
from coda_jax.planning import chips, compiling

ROOT = pathlib.Path(__file__).parents[1]
RESULTS, DOCUMENT = ROOT / "benchmarks/results/scaling.json", ROOT / "docs/scaling.md"
POINTS = ("<!-- from benchmarks/scaling.py -->", "<!-- to here -->")
PODS = ("v5e-16", "v5e-64", "v5e-256", "v4-32", "v5p-64", "v6e-64")
_TOKENIZER = ("--config.data.batch_size=512", "--config.dtype=bfloat16")
# By name: words of `compile_check`, and the one for remat.
MODELS = {
  "MAR": (
    ("--config=configs/mar.py:full,codebook_size=65536", *_TOKENIZER),
    "--config.remat=blocks",
  ),
  "FLUX": (("--config=configs/flux.py:full", *_TOKENIZER), "--config.remat=blocks"),
  "MaskGIT-L": (
    (
      "--config=configs/maskgit.py:mar_l",
      "--tokenizer-config=configs/mar.py:full,codebook_size=65536",
    ),
    "--config.remat=True",
  ),
}
ROWS = tuple(f"{model} {pod}" for model in MODELS for pod in PODS)


def words(row: str, remat: bool) -> list[str]:
  """What `python -m coda_jax.compile_check` is given for a row."""
  model, pod = row.split()
  given, more = MODELS[model]
  topology = chips.parse(pod)
  return [
    *given,
    f"--topology={pod}",
    "--config.data.accumulation=1",
    f"--config.eval.batch_size={topology.chips}",
    *([more] if remat else []),
  ]


def measure(row: str, code: bool) -> dict:
  """The result of a row; without remat if that fits."""
  result = {}
  for remat in (False, True):
    with tempfile.TemporaryDirectory() as folder:
      file = pathlib.Path(folder, "result.json")
      command = [sys.executable, "-m", "coda_jax.compile_check", *words(row, remat)]
      command += [] if code else ["--no-code"]
      done = subprocess.run([*command, "--no-remedies", f"--json={file}"], cwd=ROOT)
      if done.returncode > 1 or not file.exists():
        sys.exit(f"{row}: {' '.join(words(row, remat))} failed")
      result = json.loads(file.read_text())["result"] | {"remat": remat}
    if result["fits"]:
      break
  return result


def read() -> dict[str, dict]:
  return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def line(row: str, result: dict | None) -> str:
  """A row of the table."""
  model, pod = row.split()
  if result is None:
    return f"| {model} | {pod} |" + " |" * 9 + " not compiled yet |"
  cells = [model, pod, f"{result['images_per_chip']:g}", "yes" if result["remat"] else "no"]
  gib = chips.GIB
  needs = "?" if result["needs"] is None else f"{result['needs'] / gib:.1f}"
  needs += " + code" if result["fits"] and result["xla"] is None else ""
  cells.append(f"{needs} / {result['limit'] / gib:.2f}")
  if not result["fits"]:
    return "| " + " | ".join([*cells, *[""] * 6, "does not fit"]) + " |"
  seconds, costs = result["seconds"], result["costs"]
  time = seconds[result["bound"]]
  cells += [f"{costs['passes'] / 1e12:.1f}", f"{costs['traffic'] / 1e9:.0f}"]
  cells += [f"{costs['sent'] / 1e9:.2f}"]
  kinds = ("products", "memory", "collectives")
  cells += [" / ".join(f"{1e3 * seconds[k]:.0f}" for k in kinds)]
  cells += [f"{result['images_per_second']:,.0f}", f"{result['steps'] * time / 3600:.2f}"]
  return "| " + " | ".join([*cells, result["bound"]]) + " |"


def table(results: dict[str, dict]) -> str:
  head = (
    "| | pod | images a chip | remat | GiB / limit | TFLOP in passes | GB of memory | GB sent | "
    "least ms: products / memory / collectives | images/s at most | hours at least | bound by |"
  )
  lines = [line(row, results.get(row)) for row in ROWS]
  return "\n".join([head, "|---" * 12 + "|", *lines])


def write(results: dict[str, dict]) -> None:
  """The results, and the table in the document."""
  outputs.write_text(RESULTS, json.dumps(results, indent=1, sort_keys=True) + "\n")
  before, _, rest = DOCUMENT.read_text().partition(POINTS[0])
  _, _, after = rest.partition(POINTS[1])
  text = f"{before}{POINTS[0]}\n\n{table(results)}\n\n{POINTS[1]}{after}"
  outputs.write_text(DOCUMENT, text)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--only", nargs="*", choices=ROWS, default=list(ROWS), metavar="ROW")
  parser.add_argument("--code", action="store_true", help="compile to the end")
  args = parser.parse_args()
  write(read())
  for row in args.only:
    found = read().get(row, {})
    short = args.code and found.get("fits") and found["xla"] is None
    if found.get("versions") == compiling.versions() and not short:
      print(f"{row}: done", flush=True)
      continue
    print(f"{row}: python -m coda_jax.compile_check {' '.join(words(row, False))}", flush=True)
    found = measure(row, args.code)
    write(read() | {row: found})


if __name__ == "__main__":
  main()
