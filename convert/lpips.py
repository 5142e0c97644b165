"""LPIPS: torchvision's VGG16 and the heads of the `lpips` package."""

from .rules import CONV, WRAPPERS, Layout, Rule, Transform

_CONVS = (  # torchvision numbers ReLU and pooling too
  *((0, "conv1_1"), (2, "conv1_2"), (5, "conv2_1"), (7, "conv2_2")),
  *((10, "conv3_1"), (12, "conv3_2"), (14, "conv3_3")),
  *((17, "conv4_1"), (19, "conv4_2"), (21, "conv4_3")),
  *((24, "conv5_1"), (26, "conv5_2"), (28, "conv5_3")),
)
_HEAD = Transform(lambda x: x[0, :, 0, 0] if x.ndim == 4 else x, lambda x: x[None, :, None, None])

LAYOUT = Layout(
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
  wrappers=tuple(w for w in WRAPPERS if w != "net"),  # the whole LPIPS module's VGG16 is `net.`
  # The classifier; the whole LPIPS module's constants, and its heads a second time.
  carried=(r"classifier\..*", r"scaling_layer\..*", r"lins\..*"),
)
