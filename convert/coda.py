"""CODA's `quantizer.pth`. Its VAE files have the layouts of `mar_vae` and `flux_vae`."""

from .rules import LINEAR, Layout, Rule

QUANTIZER = Layout(
  title="CODA's quantizer",
  marks=(r"codebooks\.weight",),
  rules=(
    Rule("codebooks.weight", "codebook"),
    Rule("attn.{norm}.weight", "{norm}.scale"),
    Rule("attn.{norm}.bias", "{norm}.bias"),
    Rule("attn.to_q.weight", "to_q.kernel", LINEAR),
    Rule("attn.to_k.weight", "to_k.kernel", LINEAR),
    Rule("attn.to_v.weight", "to_v.kernel", LINEAR),
    Rule("attn.to_q.bias", "to_q.bias"),
    Rule("attn.to_k.bias", "to_k.bias"),
    Rule("attn.to_v.bias", "to_v.bias"),
  ),
  order=(
    *("codebooks", "attn", "to_q", "to_k", "to_v", "norm_q", "norm_k"),
    *("weight", "bias"),
  ),
  networks=("quantizer",),
)
