"""FLUX's VAE: the diffusers folder, and the single file `ae.safetensors` with LDM-like keys.

The diffusers layout with `lora_layer` entries is `vae.pth` of CODA's FLUX checkpoints.
"""

from . import mar_vae
from .rules import CONV, POINTWISE, Layout, Rule

_ATTENTION = (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out"))

DIFFUSERS = Layout(
  title="FLUX's VAE as diffusers keeps it",
  marks=(r"encoder\.down_blocks\..*",),
  rules=(
    Rule("down_blocks.{i}", "down.{i}"),
    Rule("up_blocks.{-i}", "up.{i}"),
    Rule("mid_block.resnets.0", "mid.block_1"),
    Rule("mid_block.resnets.1", "mid.block_2"),
    Rule("mid_block.attentions.0", "mid.attn_1"),
    Rule("resnets.{i}", "block.{i}"),
    Rule("attentions.{i}", "attn.{i}"),
    Rule("downsamplers.0", "downsample"),
    Rule("upsamplers.0", "upsample"),
    Rule("conv_shortcut", "nin_shortcut"),
    Rule("conv_norm_out", "norm_out"),
    Rule("group_norm", "norm"),
    *(Rule(f"{theirs}.weight", f"{ours}.kernel", POINTWISE) for theirs, ours in _ATTENTION),
    *(Rule(theirs, ours) for theirs, ours in _ATTENTION),
    Rule("{norm}.weight", "{norm}.scale"),
    Rule("lora_layer.down.weight", "lora_down", CONV),
    Rule("lora_layer.up.weight", "lora_up", CONV),
    Rule("weight", "kernel", CONV),
  ),
  order=(
    *("encoder", "decoder"),
    *("conv_in", "down_blocks", "up_blocks", "mid_block", "conv_norm_out", "conv_out"),
    *("attentions", "resnets", "downsamplers", "upsamplers"),
    *("norm1", "conv1", "norm2", "conv2", "conv_shortcut"),
    *("group_norm", "to_q", "to_k", "to_v", "to_out"),
    *("conv", "weight", "bias", "lora_layer"),
  ),
  networks=mar_vae.NETWORKS,
)

SINGLE_FILE = Layout(
  title="FLUX's VAE as a single file",
  marks=(r"encoder\.down\.\d+\.block\..*",),
  rules=mar_vae.RULES,
  order=mar_vae.ORDER,
)
