"""One update of the authors' code for every line of the standard input; see `train_step.py`.

    PYTHON official_step.py CHECKOUT mar|flux THREADS

PYTHON is an interpreter with torch; nothing here needs jax. Networks, losses, adapters and settings
are the checkout's own modules (FLUX's VAE is diffusers'); only their order in an update stands
here, as `train_scripts/train_mar.py` and `train_flux.py` have it on one process without
accumulation: generator loss with the adaptive weight, backward, clip, AdamW, average; then the
discriminator. Weights are random, and nothing is downloaded. A first update precedes the line that
says "ready"; the answers are lines of JSON.
"""

import copy
import json
import pathlib
import resource
import runpy
import sys
import tempfile
import time
import types
import warnings

FILES = {
  "mar": ("configs/mar_16384_config.py", "coda/models/vae.py"),
  "flux": ("configs/flux_65536_config.py",),
}
SHARED_FILES = ("configs/base.py", "coda/losses/builder.py", "coda/models/multi_quantizer.py")
# Shape of FLUX's published VAE, which the authors read from its folder.
FLUX_VAE = {
  "down_block_types": ("DownEncoderBlock2D",) * 4,
  "up_block_types": ("UpDecoderBlock2D",) * 4,
  "block_out_channels": (128, 256, 512, 512),
  "layers_per_block": 2,
  "latent_channels": 16,
  "scaling_factor": 0.3611,
  "shift_factor": 0.1159,
  "use_quant_conv": False,
  "use_post_quant_conv": False,
}


def settings_of(root: pathlib.Path, case: str) -> types.SimpleNamespace:
  """The authors' settings of a case; their configs are plain Python."""
  missing = [name for name in (*SHARED_FILES, *FILES[case]) if not (root / name).exists()]
  if missing:
    sys.exit(f"{root.parent} is no checkout of LeapLabTHU/CODA: it lacks {root / missing[0]}")
  base, own = (runpy.run_path(str(root / name)) for name in (SHARED_FILES[0], FILES[case][0]))
  return types.SimpleNamespace(**(base | own))


def make_update(root: pathlib.Path, case: str, settings: types.SimpleNamespace):
  """A function of nothing: one update of freshly made networks."""
  import torch
  import torchvision

  sys.path.insert(0, str(root))
  from coda.losses import build_disc_criterion, dino, lpips
  from coda.models import CODAQuantizer, MARAutoencoderKL, build_peft_from_vae

  torch.manual_seed(0)

  # Random weights in place of those that LPIPS downloads and DINO reads.
  vgg = torchvision.models.vgg
  features = lambda **_: types.SimpleNamespace(features=vgg.make_layers(vgg.cfgs["D"]))
  torchvision.models.vgg16 = features
  lpips.LPIPS.load_from_pretrained = lambda self: None
  with tempfile.NamedTemporaryFile(suffix=".pth") as file:
    torch.save(dino.FrozenDINOSmallNoDrop().state_dict(), file.name)
    settings.criterion_cfg["pretrain_path"] = file.name
    criterion = build_disc_criterion(settings)

  if case == "mar":
    vae = MARAutoencoderKL(embed_dim=settings.vae_latent_channels, ch_mult=(1, 1, 2, 2, 4))
    encode = lambda x: vae.encode(x).sample() * 0.2325
    decode = lambda z: vae.decode(z / 0.2325)
  else:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(**FLUX_VAE)
    scale, shift = FLUX_VAE["scaling_factor"], FLUX_VAE["shift_factor"]
    encode = lambda x: (vae.encode(x).latent_dist.sample() - shift) * scale
    decode = lambda z: vae.decode(z / scale + shift).sample
  vae.requires_grad_(False)
  build_peft_from_vae(vae, settings.decoder_lora_rank, settings.decoder_lora_module_list)
  if case == "mar":
    adaptive = vae.decoder.up[-1].upsample.conv.lora_layer.up.weight
  else:
    adaptive = vae.decoder.up_blocks[-1].resnets[-1].conv2.lora_layer.up.weight
  quantizer = CODAQuantizer(
    settings.vae_latent_channels,
    settings.codebook_size,
    settings.patch_size_list,
    beta=settings.vq_commitment_beta,
    attn_norm_type=settings.vq_norm_type,
    attn_dim=settings.vq_attn_dim,
  )
  average = copy.deepcopy((vae, quantizer))

  def trained(*modules):
    return [p for module in modules for p in module.parameters() if p.requires_grad]

  def optimizer(parameters, weight_decay):
    betas = settings.adam_beta1, settings.adam_beta2
    rate = settings.learning_rate
    return torch.optim.AdamW(parameters, rate, betas=betas, weight_decay=weight_decay)

  def descend(loss, parameters, optimizer):
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()

  params, averaged, disc_params = trained(vae, quantizer), trained(*average), trained(criterion)
  generator = optimizer(params, settings.weight_decay_g)
  discriminator = optimizer(disc_params, settings.weight_decay_d)
  size = settings.dataset_cfg["resolution"]
  images = torch.rand(1, 3, size, size) * 2 - 1
  schedules = {"warmup_disc_schedule": 0.5, "fade_blur_schedule": 0.5}

  def update():
    _, latents, vq_loss, entropy_loss = quantizer(encode(images))
    reconstruction = decode(latents)
    loss, _ = criterion(images, reconstruction, 0, last_layer=adaptive, kwargs=schedules)
    loss = loss + settings.vq_loss_weight * vq_loss + settings.entropy_loss_weight * entropy_loss
    descend(loss, params, generator)
    with torch.no_grad():
      for mean, p in zip(averaged, params, strict=True):
        mean.lerp_(p, 1 - settings.ema_ratio)
    disc_loss, _ = criterion(images, reconstruction, 1, kwargs=schedules)
    descend(disc_loss, disc_params, discriminator)
    assert torch.isfinite(loss) and torch.isfinite(disc_loss)

  return update


def main() -> None:
  path, case, threads = sys.argv[1:]
  answers, sys.stdout = sys.stdout, sys.stderr  # the authors' modules print
  warnings.simplefilter("ignore")
  root = pathlib.Path(path, "tokenizer")
  settings = settings_of(root, case)
  try:
    import torch

    torch.set_num_threads(int(threads))
    update = make_update(root, case, settings)
  except ModuleNotFoundError as e:
    sys.exit(
      f"{sys.executable} has no {e.name}, which the official code needs: install it there, or name "
      "another interpreter with --official-python"
    )
  update()
  print(json.dumps("ready"), file=answers, flush=True)
  for _ in sys.stdin:
    start = time.perf_counter()
    update()
    seconds = time.perf_counter() - start
    gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(json.dumps({"seconds": seconds, "peak_gb": gb}), file=answers, flush=True)


if __name__ == "__main__":
  main()
