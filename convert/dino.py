"""DINO ViT-S/16 (`dino_deitsmall16_pretrain.pth`, or the same as safetensors)."""

import numpy as np

from .rules import CONV, LINEAR, Layout, Rule, Transform


def _without_key_bias(x):
  # As the official code does on loading. The same number on all logits of a query changes nothing
  # but rounding.
  out = np.array(x)
  out[len(x) // 3 : 2 * len(x) // 3] = 0
  return out


_TOKEN = Transform(lambda x: x[0, 0] if x.ndim == 3 else x, lambda x: x[None, None])
_EMBEDDING = Transform(lambda x: x[0] if x.ndim == 3 else x, lambda x: x[None])
_QKV_BIAS = Transform(_without_key_bias, lambda x: x)

LAYOUT = Layout(
  title="DINO ViT-S/16",
  marks=(r"cls_token", r"blocks\.\d+\.attn\.qkv\..*"),
  rules=(
    Rule("cls_token", "cls_token", _TOKEN),
    Rule("pos_embed", "pos_embed", _EMBEDDING),
    Rule("patch_embed.proj.weight", "patch_embed.kernel", CONV),
    Rule("patch_embed.proj.bias", "patch_embed.bias"),
    Rule("attn.qkv.bias", "attn.qkv.bias", _QKV_BIAS),
    Rule("{norm}.weight", "{norm}.scale"),
    Rule("weight", "kernel", LINEAR),
  ),
  networks=("backbone",),  # beside DINO's own head in a training checkpoint
  averages=("teacher",),
  # The last norm, which the discriminator does not use; a classifier; constants of the official
  # module.
  carried=(r"norm\.(weight|bias)", r"head\..*", r"x_(scale|shift)"),
)
