"""Makes the golden cases of Stable Diffusion's and FLUX.2's VAEs with diffusers' own modules.

  python tests/goldens/make_vaes.py      # needs torch and diffusers; made with 2.13.0 and 0.42.1

Weights are `values.weight` of each key, as in every case; widths are small (16 to 64 channels in 8
groups, three levels of one block). The LDM layouts have no module in diffusers: its `convert_ldm_vae_checkpoint` renames their
keys to its own. `scaled` is what diffusers' pipelines make of the posterior's mean. The files
keys_*.json without `small` are of the published sizes.
"""

import json
import pathlib
import sys

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from tests.goldens import values  # noqa: E402



def blocks(*channels: int, **more) -> dict:
  return {
    "down_block_types": ("DownEncoderBlock2D",) * len(channels),
    "up_block_types": ("UpDecoderBlock2D",) * len(channels),
    "block_out_channels": channels,
    **more,
  }


SMALL = blocks(16, 32, 64, layers_per_block=1, norm_num_groups=8)
FULL = blocks(128, 256, 512, 512, layers_per_block=2)
SD = {"latent_channels": 4, "scaling_factor": 0.18215}
SD3 = {
  **{"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609},
  **{"use_quant_conv": False, "use_post_quant_conv": False},
}


def ldm_key(key: str, levels: int) -> str:
  """LDM's name of an entry of diffusers."""
  for a, b in (
    ("mid_block.resnets.0", "mid.block_1"),
    ("mid_block.resnets.1", "mid.block_2"),
    ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
    ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
    ("mid_block.attentions.0.to_", "mid.attn_1."),
    ("downsamplers.0", "downsample"),
    ("upsamplers.0", "upsample"),
    ("resnets", "block"),
    ("conv_shortcut", "nin_shortcut"),
    ("conv_norm_out", "norm_out"),
    ("down_blocks", "down"),
  ):
    key = key.replace(a, b)
  for i in range(levels):
    key = key.replace(f"up_blocks.{i}.", f"up.{levels - 1 - i}.")
  return key


def write_keys(name: str, shapes: dict[str, list[int]]) -> None:
  entries = {k: {"shape": s, "dtype": "float32" if s else "int64"} for k, s in shapes.items()}
  lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in entries.items()]
  (HERE / f"keys_{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def shapes_of(module) -> dict[str, list[int]]:
  return {k: list(v.shape) for k, v in module.state_dict().items()}


def in_ldms_layout(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
  """Attention as 1x1 convolutions, and LDM's names."""
  out, levels = {}, 1 + sum(k.endswith("upsamplers.0.conv.bias") for k in shapes)
  for key, shape in shapes.items():
    linear = "attentions" in key and len(shape) == 2
    out[ldm_key(key, levels)] = [*shape, 1, 1] if linear else shape
  return out


def in_bfls_layout(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
  """FLUX.2's single file: LDM's names, with `quant_conv` inside of encoder and decoder."""
  inside = {"quant_conv": "encoder.quant_conv", "post_quant_conv": "decoder.post_quant_conv"}
  shapes = in_ldms_layout(shapes)
  return {".".join([inside.get(k.split(".")[0], k.split(".")[0]), *k.split(".")[1:]]): v
          for k, v in shapes.items()}  # fmt: skip


@torch.no_grad()
def write_case(name: str, module, state, scaled) -> dict:
  """The case's outputs; `state` has diffusers' keys."""
  module.load_state_dict({k: torch.tensor(v) for k, v in state.items()})
  module.eval()
  shape = (2, 3, 32, 32)
  posterior = module.encode(torch.tensor(values.image(name, shape))).latent_dist
  np.savez_compressed(
    HERE / f"{name}.npz",
    moments=posterior.parameters.numpy(),
    decoded=module.decode(posterior.mean).sample.numpy(),
    scaled=scaled(posterior.mean).numpy(),
  )
  return {"input": ["image", name, list(shape)], "options": {"norm_groups": 8}}


def main() -> None:
  sd, sd3 = AutoencoderKL(**SMALL, **SD), AutoencoderKL(**SMALL, **SD3)
  flux2 = AutoencoderKLFlux2(**SMALL)
  write_keys("sd_vae_diffusers_small", shapes_of(sd))
  write_keys("sd_vae_ldm_small", in_ldms_layout(shapes_of(sd)))
  write_keys("sd3_vae_small", shapes_of(sd3))
  write_keys("flux2_vae_diffusers_small", shapes_of(flux2))
  write_keys("flux2_vae_bfl_small", in_bfls_layout(shapes_of(flux2)))
  full_sd = AutoencoderKL(**FULL, **SD)
  write_keys("sd_vae_diffusers", shapes_of(full_sd))
  write_keys("sd_vae_ldm", in_ldms_layout(shapes_of(full_sd)))
  write_keys("flux2_vae_diffusers", shapes_of(AutoencoderKLFlux2(**FULL)))
  published = json.loads((HERE / "keys_flux_vae_diffusers.json").read_text())
  full_sd3 = shapes_of(AutoencoderKL(**FULL, **SD3))
  assert full_sd3 == {k: v["shape"] for k, v in published.items()}, "SD3's layout is FLUX's"

  def scaled(module):
    shift = module.config.shift_factor or 0.0
    return lambda z: (z - shift) * module.config.scaling_factor

  def normalized(z):  # Flux2Pipeline._encode_vae_image, and back to 32 channels
    z, bn = Flux2Pipeline._patchify_latents(z), flux2.bn
    std = torch.sqrt(bn.running_var.view(1, -1, 1, 1) + flux2.config.batch_norm_eps)
    return Flux2Pipeline._unpatchify_latents((z - bn.running_mean.view(1, -1, 1, 1)) / std)

  def made(name, keep=None):
    return values.state_dict(HERE, keep or name)

  def from_ldm(name, module, **more):
    state = {k: torch.tensor(v) for k, v in made(name).items()}
    moved = {k.replace("encoder.quant", "quant").replace("decoder.post", "post"): v
             for k, v in state.items()}  # fmt: skip
    found = convert_ldm_vae_checkpoint(moved, module.config)
    found |= {k: v for k, v in state.items() if k.startswith("bn.")}
    return {k: v.numpy() for k, v in found.items()}

  cases = {
    "sd_vae_diffusers_small": ("sd-vae", sd, made("sd_vae_diffusers_small"), scaled(sd)),
    "sd_vae_ldm_small": ("sd-vae", sd, from_ldm("sd_vae_ldm_small", sd), scaled(sd)),
    "sd3_vae_small": ("sd3-vae", sd3, made("sd3_vae_small"), scaled(sd3)),
    "flux2_vae_diffusers_small": (
      "flux2-vae", flux2, made("flux2_vae_diffusers_small"), normalized
    ),  # fmt: skip
    "flux2_vae_bfl_small": ("flux2-vae", flux2, from_ldm("flux2_vae_bfl_small", flux2), normalized),
  }
  spec = json.loads((HERE / "cases.json").read_text())
  for name, (layout, module, state, scale) in cases.items():
    case = {"kind": "vae", "layout": layout, "keys": name}
    spec["cases"][name] = case | write_case(name, module, state, scale)
  (HERE / "cases.json").write_text(json.dumps(spec, indent=1) + "\n")


if __name__ == "__main__":
  main()
