"""FID's Inception, as pytorch-fid and torch-fidelity publish it: two names, the same keys."""

from .rules import CONV, LINEAR, Layout, Rule

LAYOUT = Layout(
  title="FID's Inception",
  marks=(r"Conv2d_1a_3x3\.conv\.weight", r"Mixed_7c\.branch_pool\.conv\.weight"),
  rules=(
    Rule("conv.weight", "conv.kernel", CONV),
    Rule("bn.weight", "bn.scale"),
    Rule("running_mean", "mean"),
    Rule("running_var", "var"),
    Rule("fc.weight", "fc.kernel", LINEAR),
  ),
  carried=(r".*\.bn\.num_batches_tracked",),
)
