"""The official discriminator's checkpoint in our module. None is published: no converter has it."""

from flax import nnx

import convert
from coda_jax import weights
from coda_jax.models.dino import DINO
from coda_jax.models.discriminators import DinoDiscriminator

_PLACES = {
  "0.0": "block1.conv",
  "0.1": "block1.norm",
  "1.fn.0": "block2.conv",
  "1.fn.1": "block2.norm",
  "2": "out",
}
_NAMES = {
  "weight_orig": "kernel",
  "weight_u": "u",
  "weight_v": "v",
  "weight": "scale",
  "running_mean": "mean",
  "running_var": "var",
  "bias": "bias",
}


def our_key(key: str) -> str | None:
  """`heads.N.….name` of ours; None for what we do not keep (batch norm's counter)."""
  _, head, *place, name = key.split(".")
  return f"heads.{head}.{_PLACES['.'.join(place)]}.{_NAMES[name]}" if name in _NAMES else None


def discriminator(golden) -> DinoDiscriminator:
  """DINO and heads of a golden case."""
  _, dino = convert.to_flat("dino", golden.state_dict("dino_deitsmall16"))
  flat = {f"dino.{k}": v for k, v in dino.items()}
  heads = golden.state_dict("dino_disc_heads")
  for key, x in heads.items():
    if name := our_key(key):
      if name.endswith(".kernel"):  # [out, in, k] -> [k, in, out]
        x = x.transpose(2, 1, 0)
      elif name.endswith(".v"):  # over in x k -> over k x in
        size = heads[key.replace("weight_v", "weight_orig")].shape[-1]
        x = x.reshape(-1, size).T.ravel()
      flat[name] = x
  return weights.build(lambda: DinoDiscriminator(DINO(), rngs=nnx.Rngs(0)), flat, "golden")
