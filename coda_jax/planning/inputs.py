"""What a run reads, where it is not there: weights of zeros, one image, one record of tokens.

A program depends on their shapes alone. What the config names is taken where it exists, but for
images: of these one is enough.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping

import numpy as np
from flax import nnx
from PIL import Image

from coda_jax import config as c
from coda_jax import storage, weights
from coda_jax.data import records, tokens
from coda_jax.errors import UserError
from coda_jax.models.clip_text import CLIPText, CLIPTextConfig
from coda_jax.models.dino import DINO
from coda_jax.models.lpips import LPIPS
from coda_jax.models.tokenizer import Tokenizer
from coda_jax.models.vae import FLUX2_VAE, FLUX_VAE, MAR_VAE, SD_VAE, AutoencoderKL, VAEConfig

# That of the demo, which `make demo` converts.
DEMO_VAE = VAEConfig(
  ch=32,
  ch_mult=(1, 1, 2),
  encoder_blocks=1,
  decoder_blocks=1,
  encoder_attn=(2,),
  scale=0.8525,
  norm_groups=8,
)
_VAES = {
  "MAR's": MAR_VAE,
  "FLUX's": FLUX_VAE,
  "Stable Diffusion's": SD_VAE,
  "FLUX.2's": FLUX2_VAE,
  "the demo's": DEMO_VAE,
}
_CLASSES, _IMAGES = 1000, 1_281_167  # of ImageNet


def vae_config(settings: c.TokenizerSettings) -> VAEConfig:
  """The VAE of a config: of its directory, or the known one whose latents the quantizer takes.

  Raises:
    UserError: there is no directory, and none that is known fits.
  """
  if weights.is_there(settings.vae):
    fields = weights.read_config(settings.vae, "vae")
    return weights.config_from_fields(VAEConfig, fields["vae"], f"{settings.vae}/config.json: vae")
  for vae in _VAES.values():
    fits = settings.image_size == settings.quantizer.patch_sizes[-1] * vae.downsampling
    if fits and settings.quantizer.code_dim == vae.z_channels:
      return vae
  quantizer = settings.quantizer
  raise UserError(
    f"config.tokenizer.vae={settings.vae} is not there, and {settings.image_size} pixels in "
    f"{quantizer.patch_sizes[-1]} patches of {quantizer.code_dim} channels are the latents of no "
    f"VAE that is known ({', '.join(_VAES)}); name a directory that `python -m convert` wrote"
  )


def _write(path: pathlib.Path, kind: str, fields: Mapping, make: Callable[[], nnx.Module]) -> str:
  """A directory of zeros, for the module that `make` describes."""
  zeros = {
    name: np.broadcast_to(np.float32(0), shape)
    for name, shape in weights.expected_shapes(make).items()
  }
  weights.write_directory(path, kind, fields, zeros)
  return str(path)


def stand_in(settings, folder: pathlib.Path, tokenizer: c.TrainConfig | None = None):
  """The settings, with directories in `folder` for what they name and is not there.

  Args:
    settings: of a tokenizer or of a generator.
    tokenizer: settings of the generator's tokenizer; of no use where the tokenizer is there.

  Raises:
    UserError: a VAE or a tokenizer that is not there is not known either.
  """
  if isinstance(settings, c.TrainConfig):
    return _for_tokenizer(settings, folder)
  return _for_generator(settings, folder, tokenizer)


def _for_tokenizer(settings: c.TrainConfig, folder: pathlib.Path) -> c.TrainConfig:
  replace, t = dataclasses.replace, settings.tokenizer
  if not t.start and not weights.is_there(t.vae):
    vae = vae_config(t)
    fields = {"vae": dataclasses.asdict(vae)}
    make = lambda: AutoencoderKL(vae, rngs=nnx.Rngs(0))
    t = replace(t, vae=_write(folder / "vae", "vae", fields, make))
  losses, adversarial = settings.losses, settings.adversarial
  if losses.perceptual_weights and not weights.is_there(losses.perceptual_weights):
    losses = replace(losses, perceptual_weights=_write(folder / "lpips", "lpips", {}, LPIPS))
  if adversarial.discriminator == "dino" and not weights.is_there(adversarial.dino_weights):
    adversarial = replace(adversarial, dino_weights=_write(folder / "dino", "dino", {}, DINO))
  (folder / "images").mkdir()
  Image.new("RGB", (8, 8)).save(folder / "images" / "0.png")
  spec = f"folder:{folder / 'images'}"
  data = replace(settings.data, train=spec, eval=spec)
  steps = settings.steps or settings.epochs * (_IMAGES // settings.data.batch_size or 1)
  return replace(
    settings, tokenizer=t, data=data, losses=losses, adversarial=adversarial, steps=steps
  )


def _for_generator(
  settings: c.MaskGITTrainConfig, folder: pathlib.Path, tokenizer: c.TrainConfig | None
) -> c.MaskGITTrainConfig:
  where, data = settings.data.tokenizer, settings.data
  if not weights.is_there(where):
    if tokenizer is None:
      raise UserError(
        f"config.data.tokenizer={where} is not there; name the config that it is trained with: "
        "--tokenizer-config=configs/mar.py"
      )
    t = tokenizer.tokenizer
    made = t.shape(weights.read_tokenizer_config(t.start) if t.start else vae_config(t))
    make = lambda: Tokenizer(made, rngs=nnx.Rngs(0))
    where = _write(folder / "tokenizer", "tokenizer", dataclasses.asdict(made), make)
  fields, path = weights.read_config(where, "tokenizer"), storage.path(data.train)
  if (path / tokens.MANIFEST).is_file():
    manifest = tokens.read_manifest(path)
    names, text = manifest["class_names"], manifest.get("text")
  else:
    text = {"kind": "captions"} if data.text_encoder else None
    names = [] if text else [str(i) for i in range(settings.model.num_classes or _CLASSES)]
  encoder = data.text_encoder
  if text and encoder and not weights.is_there(encoder):
    encoder = ""
    if text["kind"] == "captions":
      shape = CLIPTextConfig()  # of ViT-L/14
      make = lambda: CLIPText(shape, rngs=nnx.Rngs(0))
      described = {"clip_text": dataclasses.asdict(shape)}
      encoder = _write(folder / "text", "clip-text", described, make)
  write_tokens(folder / "tokens", fields, names, text)
  where_tokens = str(folder / "tokens")
  data = dataclasses.replace(
    data, tokenizer=where, train=where_tokens, eval=where_tokens, text_encoder=encoder
  )
  return dataclasses.replace(settings, data=data)


def write_tokens(
  path: pathlib.Path, fields: Mapping, class_names: list[str], text: Mapping | None
) -> None:
  """Tokens of one image, of the tokenizer with these fields; `text` is that of a manifest."""
  q = fields["quantizer"]
  shard = {"file": "tokens-00000-of-00001.array_record", "images": 1}
  manifest = {
    "format": tokens.FORMAT,
    "complete": True,
    "tokenizer": fields["fingerprint"],
    "patch_sizes": q["patch_sizes"],
    "codebook_size": q["codebook_size"],
    "class_names": class_names,
    "shards": [shard],
  }
  ids = np.zeros((1, sum(p * p for p in q["patch_sizes"])), tokens.id_type(q["codebook_size"]))
  labels = np.zeros(1, np.int32)
  path.mkdir()
  if text:
    empty = np.zeros([text.get("tokens", 0), text.get("width", 0)], np.float16)
    np.save(path / "empty.npy", empty)
    records.write(path / tokens.text_file(shard["file"]), [empty.tobytes()])
    manifest["text"], shard["captions"] = {**text, "empty": "empty.npy"}, 1
    labels = np.array([[0, 0, 1]], np.int32)
  records.write(path / shard["file"], [tokens.pack(ids, labels)])
  (path / tokens.MANIFEST).write_text(json.dumps(manifest))
