"""Text to image: what a text encoder and 77 vectors of a caption cost beside a class.

    python benchmarks/text_to_image.py [--batch 2] [--steps 4] [--dtype float32]

MaskGIT-S on MAR's 680 tokens: the trainer's whole update with classes, with embeddings of captions
[77, 768], and with captions on which the update runs CLIP ViT-L/14's text encoder; they alternate
in one process and the best of each counts. Then captions a second of that encoder alone. Weights
and tokens are made up: times do not depend on them. The last line is JSON.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # where configs/ and benchmarks/ are

import jax
import numpy as np
from flax import nnx

from benchmarks.flops import flops
from benchmarks.harness import host
from coda_jax import config as c
from coda_jax import sharding, text, weights
from coda_jax.models.clip_text import CLIPText, CLIPTextConfig
from coda_jax.models.quantizer import MAR_PATCH_SIZES, QuantizerConfig
from coda_jax.models.tokenizer import Tokenizer, TokenizerConfig
from coda_jax.models.vae import VAEConfig
from coda_jax.planning import inputs
from coda_jax.training.maskgit_trainer import MaskGITTrainer
from configs.maskgit import SIZES

KINDS = ("classes", "embeddings", "captions")
TEXT = CLIPTextConfig()


def write_inputs(folder: pathlib.Path) -> None:
  """A tokenizer with MAR's levels, CLIP's text encoder, and tokens of every kind."""
  rng = np.random.default_rng(0)

  def write(name: str, kind: str, fields: dict, make) -> None:
    shapes = weights.expected_shapes(make)
    flat = {k: 0.02 * rng.standard_normal(shape, np.float32) for k, shape in shapes.items()}
    weights.write_directory(folder / name, kind, fields, flat)

  vae = VAEConfig(ch=32, ch_mult=(1,), encoder_blocks=1, decoder_blocks=1, encoder_attn=())
  quantizer = QuantizerConfig(16384, MAR_PATCH_SIZES)
  tokenizer = TokenizerConfig(vae, quantizer, image_size=MAR_PATCH_SIZES[-1])
  fields = dataclasses.asdict(tokenizer)
  write("tokenizer", "tokenizer", fields, lambda: Tokenizer(tokenizer, rngs=nnx.Rngs(0)))
  shape = {"clip_text": dataclasses.asdict(TEXT)}
  write("text", "clip-text", shape, lambda: CLIPText(TEXT, rngs=nnx.Rngs(0)))
  encoder = {
    "kind": "clip-text",
    "fingerprint": weights.fingerprint_of(folder / "text", "clip-text"),
  }
  texts = {
    "classes": None,
    "embeddings": {
      "kind": "embeddings",
      "encoder": encoder,
      "tokens": TEXT.context,
      "width": TEXT.width,
      "padding": "end",
    },
    "captions": {"kind": "captions"},
  }
  fields = weights.read_config(folder / "tokenizer", "tokenizer")
  for kind in KINDS:
    names = [] if texts[kind] else [str(i) for i in range(1000)]
    inputs.write_tokens(folder / kind, fields, names, texts[kind])


def make_trainer(folder: pathlib.Path, kind: str, batch: int, dtype: str) -> MaskGITTrainer:
  """The trainer of MaskGIT-S on tokens of a kind, on one device."""
  encoder = str(folder / "text") if kind == "captions" else ""
  tokens = str(folder / kind)
  data = c.TokenDataSettings(
    str(folder / "tokenizer"), tokens, batch_size=batch, text_encoder=encoder
  )
  settings = c.MaskGITTrainConfig(data, model=SIZES["s"], dtype=dtype, class_dropout=0.1)
  settings = c.changed(settings, eval__batch_size=1)
  return MaskGITTrainer(settings, sharding.make_mesh(settings.mesh, jax.devices()[:1]))


def measure_updates(folder: pathlib.Path, batch: int, dtype: str, steps: int) -> dict[str, float]:
  """Seconds of an update of each kind, the best of `steps`; the kinds take turns."""
  trainers = {kind: make_trainer(folder, kind, batch, dtype) for kind in KINDS}
  states, data, times = {}, {}, {kind: [] for kind in KINDS}
  for kind, trainer in trainers.items():
    batches = trainer.batches(0)
    data[kind] = next(batches)
    batches.close()
    states[kind] = trainer.initial_state()
    args = states[kind], trainer._frozen, trainer._key, data[kind]
    count = flops(trainer._keyed_update, *args)
    print(f"{kind}: an update of {batch} images takes {count / 1e9:,.0f} GFLOP", flush=True)
  for i in range(steps + 1):  # the first compiles
    for kind, trainer in trainers.items():
      start = time.perf_counter()
      states[kind], metrics = jax.block_until_ready(trainer.step(states[kind], data[kind]))
      if i:
        times[kind].append(time.perf_counter() - start)
      assert np.isfinite(metrics["loss"])
  found = {kind: min(x) for kind, x in times.items()}
  for kind, seconds in found.items():
    ratio = seconds / found["classes"]
    print(f"{kind}: an update of {batch} images {seconds:.2f} s, {ratio:.2f} of that with classes")
  return found


def measure_encoder(folder: pathlib.Path, batch: int, dtype: str, repeats: int) -> float:
  """Captions a second of the text encoder, tokenizing included."""
  encoder = text.load_text_encoder(folder / "text", dtype=dtype)
  captions = [f"a photo of {i} red birds on a branch in front of a house" for i in range(batch)]
  encoder.encode(captions)
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    encoder.encode(captions)
    times.append(time.perf_counter() - start)
  print(f"CLIP ViT-L/14's text encoder: {batch / min(times):.1f} captions a second", flush=True)
  return batch / min(times)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--batch", type=int, default=2, help="images of an update")
  parser.add_argument("--steps", type=int, default=4, help="updates of each kind that are timed")
  parser.add_argument("--captions", type=int, default=8, help="captions that are encoded at a time")
  parser.add_argument("--dtype", default="float32", help="of the computation")
  args = parser.parse_args()
  print(host(), flush=True)
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    write_inputs(folder)
    seconds = measure_updates(folder, args.batch, args.dtype, args.steps)
    rate = measure_encoder(folder, args.captions, args.dtype, args.steps)
  result = {f"update_seconds_{kind}": round(x, 3) for kind, x in seconds.items()}
  result["update_ratio_text"] = round(seconds["embeddings"] / seconds["classes"], 3)
  result["update_ratio_captions"] = round(seconds["captions"] / seconds["classes"], 3)
  result["captions_per_second"] = round(rate, 2)
  print(json.dumps(result))


if __name__ == "__main__":
  main()
