"""What a file is that a layout does not fit: one for another command, or a known relative.

All is decided by the file's keys and shapes alone and not by the command that was tried, so that
following a hint never leads back.
"""

import re
from collections.abc import Callable, Mapping

Shapes = Mapping[str, tuple[int, ...]]  # by the file's own keys

SUPPORTED = (
  "supported are MAR's KL-16 (mar-vae), the VAEs of FLUX.1 (flux-vae), FLUX.2 (flux2-vae), Stable "
  "Diffusion 1, 2 and XL (sd-vae) and 3 (sd3-vae), CODA's tokenizers (coda-mar, coda-flux), DINO "
  "ViT-S/16 (dino), FID's Inception (inception) and LPIPS with VGG16 (lpips)"
)
_DIFFUSERS = r"(encoder\.down|decoder\.up)_blocks\.\d+\.resnets\..*"
_LDM = r"(encoder\.down|decoder\.up)\.\d+\.block\..*"
_QUANT_CONV = r"(post_)?quant_conv\..*"
_PATCH_NORM = r"bn\.running_(mean|var)|encoder\.quant_conv\..*|decoder\.post_quant_conv\..*"


def latent_channels(shapes: Shapes) -> int:
  """What most of the entries beside the latent say, or 0."""
  votes = [shapes[k][0] // 2 for k in _keys(shapes, r"encoder\.conv_out\.\w+") if shapes[k]]
  votes += [s[1] for k in _keys(shapes, r"decoder\.conv_in\.weight") if len(s := shapes[k]) > 1]
  return max(votes, key=votes.count, default=0)


def _vit(shapes: Shapes) -> str:
  width = shapes.get("cls_token", ())[-1:]
  patch = shapes.get("patch_embed.proj.weight", ())[2:]
  known = width and len(patch) == 2 and _keys(shapes, r"blocks\.\d+\.attn\.qkv\.weight")
  if not known or (width, patch) == ((384,), (16, 16)):
    return ""
  return f"a ViT of width {width[0]} with patches of {patch[0]}"


def _has(name: str, pattern: str, ndim: int | None = None) -> Callable[[Shapes], str]:
  """Tells `name` of files with a key that fits, of so many dimensions."""

  def tell(shapes):
    keys = _keys(shapes, pattern)
    return name if any(ndim in (None, len(shapes[k])) for k in keys) else ""

  return tell


# In this order. Each gives a name or "".
_RELATIVES: tuple[Callable[[Shapes], str], ...] = (
  _has("a VAE with a codebook of its own (VQ)", r"(quantizer?|vq\w*|codebook)\..*"),
  _has("a video VAE (3D convolutions)", r"(encoder|decoder)\..*weight", ndim=5),
  _has("DC-AE", r"(encoder|decoder)\.(down_blocks|up_blocks|stages)\.\d+\.(\d|op_list).*"),
  _has("a tiny autoencoder (TAESD)", r"((encoder|decoder)\.)(layers\.)?\d+\.(conv\.\d+\.)?weight"),
  _has("MAR's generator, not its VAE", r"(diffloss|encoder_blocks)\..*"),
  _has(
    "a diffusion model, not its VAE",
    r"(diffusion_model|double_blocks|joint_blocks|(single_)?transformer_blocks"
    r"|down_blocks|input_blocks|time_embed\w*)\..*",
  ),
  _vit,
)


def unsupported(shapes: Shapes) -> str:
  """The name of a network that no command converts, or ""."""
  return next((name for tell in _RELATIVES if (name := tell(shapes))), "")


def hint(shapes: Shapes, command: str) -> str:
  """In parentheses, the command that the file seems to be for, if it is another than `command`."""
  other = _command(shapes, coda=command.startswith("coda-"))
  if not other or command in (other, "quantizer") or {command, other} == {"sd3-vae", "flux-vae"}:
    return ""
  if command.startswith("coda-") and other == _CODA:
    return " (it holds the quantizer)"
  return f" (such files are for `python -m convert {other}`)"


_CODA = "coda-mar or coda-flux, with the folder that holds it and the VAE"


def _command(shapes: Shapes, coda: bool) -> str:
  """The command for a file; `coda`: CODA's folders may hold a VAE without adapters too."""
  coda = coda or bool(_keys(shapes, r".*\.lora_layer\..*"))
  if _keys(shapes, r"codebooks\..*"):
    return _CODA
  diffusers, ldm, quant_conv = (bool(_keys(shapes, k)) for k in (_DIFFUSERS, _LDM, _QUANT_CONV))
  if (diffusers or ldm) and _keys(shapes, _PATCH_NORM):
    return "flux2-vae"
  if quant_conv and (diffusers or (ldm and latent_channels(shapes) == 4)):
    return "sd-vae"
  if diffusers or ldm:
    family = "mar" if quant_conv else "flux"
    return f"coda-{family}" if coda else f"{family}-vae"
  for command, pattern in (
    ("lpips", r"(features|lin0)\..*"),
    ("lpips --from-package", r"(VGG16_0|NetLinLayer_0)\..*"),
    ("dino", r"blocks\.0\.attn\.qkv\..*"),
    ("inception", r"Mixed_7c\.branch_pool\..*"),
  ):
    if _keys(shapes, pattern):
      return command
  return ""


def _keys(shapes: Shapes, pattern: str) -> list[str]:
  return [k for k in shapes if re.fullmatch(pattern, k)]
