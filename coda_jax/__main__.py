"""`coda-jax COMMAND ...`, or `python -m coda_jax COMMAND ...`: every command under one name."""

import importlib.util
import runpy
import sys

from coda_jax import __version__

COMMANDS = {
  "convert": "published PyTorch weights to our directories, and back",
  "train": "a tokenizer or a generator, by a config",
  "discretize": "a tokenizer from a continuous VAE, without training",
  "eval": "how good reconstructions or samples are",
  "reconstruct": "images through a tokenizer and back",
  "visualize": "a report of a tokenizer",
  "tokenize_dataset": "the tokens of an image set",
  "generate": "images of classes",
  "serve": "a web page to try a tokenizer and a generator",
  "ablate": "tables of trainings that differ in a few settings, over seeds",
  "compile_check": "does it fit a TPU pod, and how fast can it be",
}


def main() -> None:
  name, *rest = sys.argv[1:] or ["--help"]
  if name == "--version":
    print(__version__)
  elif name in ("--help", "-h", "help"):
    width = max(map(len, COMMANDS))
    print("usage: coda-jax COMMAND ...   (coda-jax COMMAND --help)\n")
    print("\n".join(f"  {command:{width}}  {text}" for command, text in COMMANDS.items()))
  elif name.replace("-", "_") not in COMMANDS:
    print(f"coda-jax: error: no command {name!r}; coda-jax --help lists them", file=sys.stderr)
    sys.exit(2)
  else:
    module = f"coda_jax.{name.replace('-', '_')}"
    if importlib.util.find_spec(module) is None:  # in a checkout
      module = "convert"
    sys.argv[1:] = rest
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
  main()
