"""Model configs from the shapes in a file, and the shapes that such a model must have.

Every size is decided by the majority of the entries that tell it, so that one damaged entry is
reported as such, and not as a hundred others that do not fit it.
"""

import collections
import functools
import re
from collections.abc import Iterable, Mapping

from flax import nnx

from coda_jax import weights
from coda_jax.errors import UserError
from coda_jax.models.clip_text import CLIPTextConfig
from coda_jax.models.lora import LoRAConfig, add_lora
from coda_jax.models.quantizer import QuantizerConfig, ResidualQuantizer
from coda_jax.models.vae import AutoencoderKL, VAEConfig

Shapes = Mapping[str, tuple[int, ...]]

# In this order: the parts of names that CODA's configs use come first.
_LORA_PARTS = ("conv1", "conv2", "upsample", "downsample", "nin_shortcut")
_LORA_PARTS += ("proj_out", "attn", "conv_in", "conv_out")


def vae_config(
  shapes: Shapes, family: VAEConfig, *, scale: float, shift: float, norm_groups: int = 32
) -> VAEConfig:
  """The autoencoder with arrays of these shapes (by our keys, in our layouts).

  Args:
    family: tells what the shapes do not: `quant_conv` and `norm_patch`.
  """
  ch = _vote(
    [
      *_last(shapes, r"encoder\.conv_in\.(kernel|bias)"),
      *_last(shapes, r"encoder\.down\.0\.block\.0\.norm1\.(scale|bias)"),
    ],
    "channels of encoder.conv_in",
  )
  levels = max(_count(shapes, r"encoder\.down\.{}\..*"), _count(shapes, r"decoder\.up\.{}\..*"))
  mult = []
  for i in range(levels):
    level = rf"(encoder\.down|decoder\.up)\.{i}\.block\.\d+\.(conv[12]\.(kernel|bias)|norm2\.\w+)"
    mult.append(max(1, round(_vote(_last(shapes, level), f"channels of level {i}") / ch)))
  z = _vote(
    [
      *(n // 2 for n in _last(shapes, r"encoder\.conv_out\.(kernel|bias)|quant_conv\.bias")),
      *_last(shapes, r"post_quant_conv\.bias"),
      *(s[2] for k, s in shapes.items() if k == "decoder.conv_in.kernel" and len(s) == 4),
    ],
    "channels of the latent",
  )

  def blocks(half):
    counts = [_count(shapes, rf"{half}\.{i}\.block\.{{}}\..*") for i in range(levels)]
    return _vote([c for c in counts if c], f"blocks of {half}")

  def attention(half):
    return tuple(i for i in range(levels) if _keys(shapes, rf"{half}\.{i}\.attn\..*"))

  return VAEConfig(
    ch=ch,
    ch_mult=tuple(mult),
    z_channels=z,
    encoder_blocks=blocks(r"encoder\.down"),
    decoder_blocks=blocks(r"decoder\.up"),
    encoder_attn=attention(r"encoder\.down"),
    decoder_attn=attention(r"decoder\.up"),
    quant_conv=family.quant_conv,
    scale=scale,
    shift=shift,
    norm_groups=norm_groups,
    norm_patch=family.norm_patch,
  )


def lora_config(shapes: Shapes) -> LoRAConfig | None:
  """The rule behind the adapters that are there, or None.

  Raises:
    UserError: no list of name parts gives these adapters.
  """
  adapted = {k.rpartition(".")[0] for k in shapes if k.endswith((".lora_down", ".lora_up"))}
  if not adapted:
    return None
  rank = _vote(_last(shapes, r".*\.lora_down"), "the adapters' rank")
  halves = {p.partition(".")[0] for p in adapted}
  convs = {k.removesuffix(".kernel") for k, s in shapes.items() if k.endswith(".kernel")}
  convs = {p for p in convs if p.partition(".")[0] in halves}
  parts, covered = [], set()
  for part in _LORA_PARTS:
    more = {p for p in convs if part in p.partition(".")[2]} - covered
    # Most of them: a single lost adapter is to be reported as missing.
    if len(more & adapted) > len(more) / 2:
      parts.append(part)
      covered |= more
  if not parts:
    raise UserError(f"no rule of names gives the adapters of {', '.join(sorted(adapted)[:5])}")
  return LoRAConfig(
    rank=rank, name_parts=tuple(parts), encoder="encoder" in halves, decoder="decoder" in halves
  )


def quantizer_config(shapes: Shapes, patch_sizes: tuple[int, ...]) -> QuantizerConfig:
  """The attention quantizer with arrays of these shapes."""
  if any(k in shapes for k in ("norm_q.bias", "norm_k.bias")):
    norm = "layer"
  else:
    norm = "rms" if _keys(shapes, r"norm_[qk]\..*") else "none"
  return QuantizerConfig(
    codebook_size=_vote([shapes[k][0] for k in _keys(shapes, "codebook")], "the codebook's size"),
    patch_sizes=tuple(patch_sizes),
    code_dim=_vote(_last(shapes, r"codebook|to_v\.\w+"), "the codes' width"),
    attn_dim=_vote(_last(shapes, r"to_[qk]\.\w+|norm_[qk]\.\w+"), "the queries' width"),
    norm=norm,
  )


def clip_text_config(shapes: Shapes, heads: int | None, activation: str | None) -> CLIPTextConfig:
  """The text encoder with arrays of these shapes; heads of 64 numbers unless given."""
  vocabulary, width = _only(shapes, "token_embedding", 2)
  return CLIPTextConfig(
    vocabulary=vocabulary,
    context=_only(shapes, "position_embedding", 2)[0],
    width=width,
    layers=1 + max(int(k.split(".")[1]) for k in _keys(shapes, r"layers\.\d+\..*")),
    heads=heads or max(1, width // 64),
    hidden=_vote(_last(shapes, r"layers\.\d+\.fc1\.\w+"), "the MLPs' width"),
    activation=activation or "quick_gelu",
  )


def _only(shapes: Shapes, key: str, dimensions: int) -> tuple[int, ...]:
  shape = shapes.get(key)
  if shape is None or len(shape) != dimensions:
    raise UserError(f"{key} has shape {list(shape or ())}, not {dimensions} dimensions")
  return shape


@functools.cache
def of_vae(config: VAEConfig, lora: LoRAConfig | None) -> dict[str, tuple[int, ...]]:
  """Shape of every parameter of the autoencoder."""

  def make():
    rngs = nnx.Rngs(0)
    return add_lora(AutoencoderKL(config, rngs=rngs), lora, rngs=rngs)

  return weights.expected_shapes(make)


@functools.cache
def of_quantizer(config: QuantizerConfig) -> dict[str, tuple[int, ...]]:
  """Shape of every parameter of the quantizer."""
  return weights.expected_shapes(lambda: ResidualQuantizer(config, rngs=nnx.Rngs(0)))


def _keys(shapes: Shapes, pattern: str) -> list[str]:
  compiled = re.compile(pattern)
  return [k for k in shapes if compiled.fullmatch(k)]


def _last(shapes: Shapes, pattern: str) -> list[int]:
  """Length of the last axis of every matching array: in our layouts, its output channels."""
  return [shapes[k][-1] for k in _keys(shapes, pattern) if shapes[k]]


def _count(shapes: Shapes, pattern: str) -> int:
  """How many of the numbers 0, 1, ... in place of {} have a key."""
  count = 0
  while _keys(shapes, pattern.format(count)):
    count += 1
  return count


def _vote(values: Iterable[int], what: str) -> int:
  votes = collections.Counter(values)
  if not votes:
    raise UserError(f"the entries that tell {what} are missing")
  return max(votes.items(), key=lambda v: (v[1], v[0]))[0]
