"""CLIP's text encoder: Hugging Face's layout, and OpenAI's and OpenCLIP's."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from .rules import LINEAR, Layout, Rule

HUGGING_FACE = Layout(
  title="CLIP's text encoder (Hugging Face)",
  marks=(
    r"embeddings\.token_embedding\.weight",
    r"encoder\.layers\.\d+\.self_attn\.q_proj\.weight",
  ),
  rules=(
    Rule("embeddings.token_embedding.weight", "token_embedding"),
    Rule("embeddings.position_embedding.weight", "position_embedding"),
    Rule("encoder.layers", "layers"),
    Rule("self_attn.q_proj", "q"),
    Rule("self_attn.k_proj", "k"),
    Rule("self_attn.v_proj", "v"),
    Rule("self_attn.out_proj", "out"),
    Rule("layer_norm1", "norm1"),
    Rule("layer_norm2", "norm2"),
    Rule("mlp.fc1", "fc1"),
    Rule("mlp.fc2", "fc2"),
    Rule("final_layer_norm", "final_norm"),
    Rule("{norm}.weight", "{norm}.scale"),
    Rule("weight", "kernel", LINEAR),
  ),
  networks=("text_model", "text"),  # beside the image half; the second in OpenCLIP's files
  carried=(r"embeddings\.position_ids", r"(text_|visual_)?projection\.weight", r"logit_scale"),
)

OPENAI = Layout(
  title="CLIP (OpenAI, OpenCLIP)",
  marks=(r"token_embedding\.weight", r"transformer\.resblocks\.\d+\.attn\.out_proj\.weight"),
  rules=(
    Rule("token_embedding.weight", "token_embedding"),
    Rule("positional_embedding", "position_embedding"),
    Rule("transformer.resblocks", "layers"),
    Rule("attn.out_proj", "out"),
    Rule("attn.q", "q"),
    Rule("attn.k", "k"),
    Rule("attn.v", "v"),
    Rule("ln_1", "norm1"),
    Rule("ln_2", "norm2"),
    Rule("mlp.c_fc", "fc1"),
    Rule("mlp.c_proj", "fc2"),
    Rule("ln_final", "final_norm"),
    Rule("{norm}.weight", "{norm}.scale"),
    Rule("weight", "kernel", LINEAR),
  ),
  carried=(
    r"visual\..*",
    r"text_projection(\.weight)?",
    r"logit_(scale|bias)|attn_mask|input_resolution|context_length|vocab_size",
  ),
)

_FUSED = "attn.in_proj_"


def unfused(state: Mapping[str, Any]) -> dict[str, Any]:
  """`attn.in_proj_weight` and `_bias`, queries, keys and values in one, as three entries each."""
  out = {}
  for key, value in state.items():
    before, fused, what = key.rpartition(_FUSED)
    if not fused or not isinstance(value, np.ndarray) or value.ndim < 1 or len(value) % 3:
      out[key] = value
      continue
    for name, part in zip("qkv", np.split(value, 3), strict=True):
      out[f"{before}attn.{name}.{what}"] = part
  return out
