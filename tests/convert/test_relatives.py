"""Files of other networks: named, and no hint leads in a circle."""

import dataclasses
import json
import re

import numpy as np
import pytest

import convert
from coda_jax import weights
from coda_jax.errors import UserError
from convert import LAYOUTS, flux_vae, mar_vae, shapes
from tests.convert.test_convert import (
  GOLDENS,
  QUANTIZER,
  SMALL,
  SMALL_FLUX,
  SMALL_LORA,
  full_size,
  random_state,
  save,
  small_state,
)
from tests.goldens import values

LDM, DIFFUSERS = mar_vae.LAYOUT, flux_vae.DIFFUSERS


def vae(layout, z=16, quant_conv=True, **more):
  """A small file of `layout` with z latent channels and more entries."""
  config = dataclasses.replace(SMALL_FLUX, z_channels=z, quant_conv=quant_conv)
  return random_state(layout, shapes.of_vae(config, None)) | more


def array(*shape):
  return np.zeros(shape, np.float32)


def old_attention(state):
  """The names that diffusers gave attention before 0.12: SD 1.5 is published with them."""
  new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
  return {re.sub("to_[qkv]|to_out.0", lambda m: new[m[0]], k): v for k, v in state.items()}


UNSUPPORTED = {
  "vqgan": (lambda: vae(LDM, 8, **{"quantize.embedding.weight": array(64, 8)}), "codebook of its"),
  "vq_diffusers": (lambda: vae(DIFFUSERS, 4, **{"quantize.embedding.weight": array(9, 4)}), "VQ"),
  "video": (lambda: {"encoder.conv1.weight": array(8, 3, 3, 3, 3)}, "a video VAE"),
  "taesd": (lambda: {"encoder.layers.0.weight": array(64, 3, 3, 3)}, "a tiny autoencoder"),
  "dc_ae": (lambda: {"encoder.down_blocks.0.0.conv1.weight": array(8, 3, 3, 3)}, "DC-AE"),
  "flux_dev": (lambda: {"double_blocks.0.img_attn.qkv.weight": array(8, 8)}, "a diffusion model"),
  "unet": (lambda: {"model.diffusion_model.input_blocks.0.weight": array(8)}, "a diffusion model"),
  "mar": (lambda: {"encoder_blocks.0.attn.qkv.weight": array(8, 8)}, "MAR's generator"),
  "vit_b": (
    lambda: {
      "cls_token": array(1, 1, 768),
      "patch_embed.proj.weight": array(768, 3, 16, 16),
      "blocks.0.attn.qkv.weight": array(2304, 768),
    },
    "a ViT of width 768 with patches of 16",
  ),
  "vit_s8": (
    lambda: full_size("dino_deitsmall16") | {"patch_embed.proj.weight": array(384, 3, 8, 8)},
    "a ViT of width 384 with patches of 8",
  ),
}
OURS = {
  "mar-vae": small_state,
  "flux-vae": lambda: small_state("flux"),
  "single": lambda: vae(LDM, quant_conv=False),
  "sd_ldm": lambda: vae(LDM, 4),
  "sd_diffusers": lambda: vae(DIFFUSERS, 4),
  "sd_old": lambda: old_attention(vae(DIFFUSERS, 4)),
  "flux2_diffusers": lambda: full_size("flux2_vae_diffusers_small"),
  "flux2": lambda: full_size("flux2_vae_bfl_small"),
  "flux2_bare": lambda: vae(DIFFUSERS, 32),
  "kl16_diffusers": lambda: vae(DIFFUSERS, 16),
  "coda-mar": lambda: small_state("mar", SMALL_LORA),
  "coda-flux": lambda: small_state("flux", SMALL_LORA),
  "coda single": lambda: random_state(LDM, shapes.of_vae(SMALL_FLUX, SMALL_LORA)),
  "quantizer": lambda: values.state_dict(GOLDENS, QUANTIZER),
  "dino": lambda: full_size("dino_deitsmall16"),
  "inception": lambda: {
    k: v for k, v in full_size("inception_fid").items() if k.startswith(("Conv2d_1a", "Mixed_7c"))
  },
  "lpips": lambda: full_size("vgg16_torchvision"),
  "unknown": lambda: {"a.b.weight": array(3)},
}


@pytest.mark.parametrize("layout", ["mar-vae", "flux-vae", "sd-vae", "dino"])
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_known_relatives_are_named_as_not_supported(name, layout):
  make, title = UNSUPPORTED[name]
  with pytest.raises(UserError, match=f"{title}.* is not supported") as e:
    convert.to_flat(layout, make())
  assert "\n" not in str(e.value)
  assert "missing" not in str(e.value)
  assert "supported are MAR's KL-16 (mar-vae)" in str(e.value)


@pytest.mark.parametrize("name", [*UNSUPPORTED, *OURS, *(f"damaged {k}" for k in OURS)])
@pytest.mark.slow
def test_no_hint_leads_back(name):
  key = name.removeprefix("damaged ")
  state = UNSUPPORTED[key][0]() if key in UNSUPPORTED else OURS[key]()
  if name != key:  # every third entry is lost
    state = {k: v for i, (k, v) in enumerate(state.items()) if i % 3}
  for first in LAYOUTS:
    command, tried = first, []
    while command:
      assert command not in tried, (first, tried)
      tried.append(command)
      try:
        convert.to_flat(command, state)
        break
      except UserError as e:
        hint = re.search(r"python -m convert ([\w-]+)", str(e))
        command = hint and hint[1]
    assert len(tried) <= 2


@pytest.mark.parametrize("family", ["mar", "flux"])
def test_a_lost_quant_conv_is_not_taken_for_the_other_family(family):
  state = small_state(family)
  state.pop("quant_conv.weight", None)
  state.pop("quant_conv.bias", None)
  state.pop("decoder.conv_in.bias")
  with pytest.raises(UserError, match="missing") as e:
    convert.to_flat(f"{family}-vae", state)
  assert "python -m convert" not in str(e.value)


def test_a_swapped_quantizer_is_told():
  with pytest.raises(UserError, match="it holds the quantizer"):
    convert.vae_to_flat("coda-mar", values.state_dict(GOLDENS, QUANTIZER))


def test_another_latent_needs_its_own_scale():
  state = vae(LDM, 4)
  told = "has 4 latent channels, MAR's KL-16 VAE has 16 .*python -m convert sd-vae.*--scale"
  with pytest.raises(UserError, match=told):
    convert.to_flat("mar-vae", state)
  config, _ = convert.to_flat("mar-vae", state, scale=0.18215)
  assert (config.z_channels, config.scale, config.shift) == (4, 0.18215, 0.0)


def converted(folder, layout, state, fields=None, **options):
  """The VAE's fields of a converted file with `config.json` beside it."""
  folder.mkdir()
  save(folder / "diffusion_pytorch_model.bin", state)
  if fields is not None:
    (folder / "config.json").write_text(json.dumps(fields))
  convert.convert(layout, [folder], folder / "out", **options)
  return weights.read_config(folder / "out", "vae")["vae"]


@pytest.mark.parametrize("layout", ["flux-vae", "sd3-vae"])
def test_sd3_has_the_shapes_of_flux_and_its_config_tells_the_scale(tmp_path, layout):
  fields = {"scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False}
  state = vae(DIFFUSERS, quant_conv=False)
  found = converted(tmp_path / "with", layout, state, fields)
  assert (found["scale"], found["shift"], found["z_channels"]) == (1.5305, 0.0609, SMALL.z_channels)
  if layout == "sd3-vae":  # a single file has no config beside it
    state = vae(LDM, quant_conv=False)
    found = converted(
      tmp_path / "single", layout, {f"first_stage_model.{k}": v for k, v in state.items()}
    )
    assert (found["scale"], found["shift"]) == (1.5305, 0.0609)


def test_stable_diffusions_layouts(tmp_path, caplog):
  state = vae(DIFFUSERS, 4)
  config, flat = convert.to_flat("sd-vae", state)
  assert (config.z_channels, config.quant_conv, config.scale, config.shift) == (4, True, 0.18215, 0)
  old = convert.to_flat("sd-vae", old_attention(state))[1]
  assert old.keys() == flat.keys() and all((old[k] == flat[k]).all() for k in flat)
  xl = converted(tmp_path / "xl", "sd-vae", state, {"scaling_factor": 0.13025})
  assert (xl["scale"], xl["shift"]) == (0.13025, 0.0)
  with caplog.at_level("INFO"):
    assert converted(tmp_path / "told", "sd-vae", state, scale=0.13025)["scale"] == 0.13025
    assert not caplog.text
    whole = {f"first_stage_model.{k}": v for k, v in vae(LDM, 4).items()}
    whole |= {"model.diffusion_model.a.weight": array(3)}
    assert converted(tmp_path / "whole", "sd-vae", whole)["scale"] == 0.18215
  assert "took 0.18215, of Stable Diffusion 1 and 2. SDXL's is 0.13025" in caplog.text


def test_flux2s_statistics_stand_where_the_latents_are():
  state = values.state_dict(GOLDENS, "flux2_vae_bfl_small")
  config, flat = convert.to_flat("flux2-vae", state, norm_groups=8)
  assert (config.norm_patch, config.z_channels, config.scale, config.stride) == (2, 32, 1.0, 8)
  for channel, row, column in ((0, 0, 1), (5, 1, 0), (31, 1, 1)):
    theirs = state["bn.running_var"][channel * 4 + row * 2 + column]
    assert flat["latent_norm.var"][row, column, channel] == theirs
  del state["bn.running_mean"]
  with pytest.raises(UserError, match="missing bn.running_mean$"):
    convert.to_flat("flux2-vae", state, norm_groups=8)
  state["bn.running_mean"] = array(127)
  with pytest.raises(UserError, match=r"bn.running_mean has shape \[127\], expected \[128\]$"):
    convert.to_flat("flux2-vae", state, norm_groups=8)
