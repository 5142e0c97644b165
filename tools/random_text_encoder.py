"""Writes a small text encoder of random weights with CLIP's vocabulary.

  python -m tools.random_text_encoder --output demo/text_encoder

Its vectors tell words and their places apart, not what words mean. For captions of few words, such
as those of drawn shapes, that is enough, and nothing needs to be fetched.
"""

import argparse
import dataclasses
import pathlib

import jax
import numpy as np
from flax import nnx

from coda_jax import arrays, cli, weights
from coda_jax.models.clip_text import CLIPText, CLIPTextConfig
from coda_jax.outputs import check_output

CONFIG = CLIPTextConfig(context=24, width=128, layers=1, heads=4, hidden=256)


def parser() -> argparse.ArgumentParser:
  p = cli.Parser(prog="python -m tools.random_text_encoder", description=__doc__)
  p.add_argument("--output", required=True, type=pathlib.Path, help="directory of the encoder")
  p.add_argument("--seed", type=int, default=0, help="of its weights (0)")
  return p


def run(args: argparse.Namespace) -> None:
  check_output(args.output, "clip-text", overwrite=True)
  model = nnx.jit(lambda: CLIPText(CONFIG, rngs=nnx.Rngs(args.seed)))()
  flat = {name: np.array(x) for name, x in jax.device_get(arrays.of(model)).items()}
  # As large as what attention and MLP add, or the words would be lost behind the final norm.
  flat["token_embedding"] *= 50
  flat["position_embedding"] *= 50
  fields = {"clip_text": dataclasses.asdict(CONFIG)}
  weights.write_directory(args.output, "clip-text", fields, flat, made={"weights": "random"})
  print(args.output)


if __name__ == "__main__":
  cli.main(run, parser())
