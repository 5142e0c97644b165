"""MAR's KL-16 (`kl16.safetensors`): LDM's keys, all convolutions 4-dimensional.

The same with `lora_layer` entries is `vae.pth` and `vae_ema.pth` of CODA's MAR checkpoints.
"""

from .rules import CONV, Layout, Rule

RULES = (
  Rule("{norm}.weight", "{norm}.scale"),
  Rule("lora_layer.down.weight", "lora_down", CONV),
  Rule("lora_layer.up.weight", "lora_up", CONV),
  Rule("weight", "kernel", CONV),
)

ORDER = (
  *("encoder", "decoder", "quant_conv", "post_quant_conv"),
  *("conv_in", "down", "mid", "up", "norm_out", "conv_out"),
  *("block", "attn", "downsample", "upsample", "block_1", "attn_1", "block_2"),
  *("norm1", "conv1", "norm2", "conv2", "nin_shortcut", "norm", "q", "k", "v", "proj_out"),
  *("conv", "weight", "bias", "lora_layer"),
)

NETWORKS = ("vae", "first_stage_model", "autoencoder")  # of a whole pipeline in one file

LAYOUT = Layout(
  title="MAR's KL-16 VAE",
  marks=(r"encoder\.down\.\d+\.block\..*",),
  rules=RULES,
  order=ORDER,
  # LDM's training keeps its discriminator and LPIPS in the same state dict.
  carried=(r"loss\..*", r".*\.num_batches_tracked", r"model_ema\.(decay|num_updates)"),
  networks=NETWORKS,
)
