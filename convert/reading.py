"""From the entries of published files to our configs and arrays."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx

from coda_jax import weights
from coda_jax.errors import UserError
from coda_jax.models.clip_text import CLIPText, CLIPTextConfig
from coda_jax.models.dino import DINO
from coda_jax.models.inception import Inception
from coda_jax.models.lora import LoRAConfig
from coda_jax.models.lpips import LPIPS
from coda_jax.models.quantizer import FLUX_PATCH_SIZES, MAR_PATCH_SIZES, QuantizerConfig
from coda_jax.models.tokenizer import TokenizerConfig
from coda_jax.models.vae import FLUX2_VAE, FLUX_VAE, MAR_VAE, SD3_VAE, SD_VAE, VAEConfig

from . import (
  clip_text,
  coda,
  dino,
  flux2_vae,
  flux_vae,
  inception,
  lpips,
  mar_vae,
  relatives,
  rules,
  sd_vae,
  shapes,
  unwrapping,
)
from .rules import Entry, Layout

State = Mapping[str, Any]
Flat = dict[str, np.ndarray]
Entries = dict[str, Entry]  # by our keys


@dataclasses.dataclass(frozen=True)
class Family:
  """A family of autoencoders: its layouts (the first is the one we write) and defaults."""

  layouts: tuple[Layout, ...]
  default: VAEConfig
  patch_sizes: tuple[int, ...] = FLUX_PATCH_SIZES


MAR = Family((mar_vae.LAYOUT,), MAR_VAE, MAR_PATCH_SIZES)
FLUX = Family((flux_vae.DIFFUSERS, flux_vae.SINGLE_FILE), FLUX_VAE)
SD = Family((sd_vae.DIFFUSERS, sd_vae.LDM), SD_VAE)
SD3 = Family(FLUX.layouts, SD3_VAE)
FLUX2 = Family((flux2_vae.DIFFUSERS, flux2_vae.SINGLE_FILE), FLUX2_VAE)
_FAMILIES = {
  "mar-vae": MAR,
  "flux-vae": FLUX,
  "sd-vae": SD,
  "sd3-vae": SD3,
  "flux2-vae": FLUX2,
  "coda-mar": MAR,
  "coda-flux": FLUX,
}
_FROZEN: dict[str, tuple[Layout, Callable[[], nnx.Module]]] = {
  "dino": (dino.LAYOUT, DINO),
  "inception": (inception.LAYOUT, Inception),
}
LAYOUTS = (*_FAMILIES, *_FROZEN, "lpips", "clip-text")
_TINY, _HUGE = 1e-30, 1e30  # float32 holds what lies between, and its inverse


def check_layout(layout: str) -> None:
  """Raises UserError unless `layout` is one of `LAYOUTS`."""
  if layout not in LAYOUTS:
    raise UserError(f"unknown layout {layout!r}; known are {', '.join(LAYOUTS)}")


def ours(entries: Entries) -> Flat:
  """Arrays in our layouts, still of the files' types: views of the mapped files."""
  return {k: e.ours for k, e in entries.items()}


def read(layout: str, states: Sequence[tuple[str, State]], **options) -> tuple[Any, Flat]:
  """Config and arrays of the states of a layout's files.

  Args:
    layout: one of `LAYOUTS`.
    states: (the file, for messages; its nested dict) of every file.
    options: see `api.convert`.

  Returns:
    (config, flat): VAEConfig, TokenizerConfig, or for frozen networks {"kind": layout}; `ours` of
    the entries.

  Raises:
    UserError: entries are missing, extra or misshapen (all are listed), or an unknown layout.
  """
  check_layout(layout)
  if layout == "lpips":
    config, entries = _read_lpips(states, **options)
  elif layout in ("coda-mar", "coda-flux"):
    config, entries = _read_tokenizer(layout, states, **options)
  else:
    if len(states) > 1:
      raise UserError(f"{layout} is one file; {' and '.join(w for w, _ in states)} were given")
    ((where, state),) = states
    if layout in _FROZEN:
      table, make = _FROZEN[layout]
      config, entries = _read_frozen(layout, table, make, state, where, **options)
    elif layout == "clip-text":
      config, entries = _read_clip_text(state, where, **options)
    else:
      config, _, entries = read_vae(layout, state, where, lora=False, **options)
  return config, ours(entries)


def read_vae(
  layout: str,
  state: State,
  where: str,
  *,
  lora: bool,
  scale: float | None = None,
  shift: float | None = None,
  norm_groups: int = 32,
  ema: bool = True,
) -> tuple[VAEConfig, LoRAConfig | None, Entries]:
  """The autoencoder of a state; with `lora`, its adapters too. Raises as `read`."""
  family = _FAMILIES[layout]
  if scale is not None and not _TINY < abs(scale) < _HUGE:
    raise UserError(f"the latents' scale is {scale}; it must be a number other than 0 (--scale)")
  if shift is not None and not abs(shift) < _HUGE:
    raise UserError(f"the latents' shift is {shift}; it must be a number (--shift)")
  if norm_groups < 1:
    raise UserError(f"norm_groups is {norm_groups}; it must be at least 1 (--norm-groups)")

  def describe(found):
    config = shapes.vae_config(
      found,
      family.default,
      scale=family.default.scale if scale is None else scale,
      shift=family.default.shift if shift is None else shift,
      norm_groups=norm_groups,
    )
    adapters = shapes.lora_config(found) if lora else None
    return (config, adapters), shapes.of_vae(config, adapters)

  (config, adapters), entries = _fit(layout, family.layouts, state, where, describe, ema)
  z, usual = config.z_channels, family.default.z_channels
  if scale is None and z != usual and not lora:
    hint = relatives.hint({e.key: e.array.shape for e in entries.values()}, layout)
    raise UserError(
      f"{where} has {z} latent channels, {family.layouts[0].title} has {usual}{hint}. "
      "The published scale is not that of its latents: give --scale and --shift"
    )
  return config, adapters, entries


def read_quantizer(
  state: State, where: str, patch_sizes: Sequence[int], ema: bool = True
) -> tuple[QuantizerConfig, Entries]:
  """The quantizer of a state. Raises as `read`."""

  def describe(found):
    config = shapes.quantizer_config(found, tuple(patch_sizes))
    return config, shapes.of_quantizer(config)

  return _fit("quantizer", (coda.QUANTIZER,), state, where, describe, ema)


def _read_tokenizer(
  layout: str,
  states: Sequence[tuple[str, State]],
  *,
  patch_sizes: Sequence[int] | None = None,
  image_size: int = 256,
  ema: bool = True,
  **options,
) -> tuple[TokenizerConfig, Entries]:
  if patch_sizes is None:
    patch_sizes = _FAMILIES[layout].patch_sizes
  sides = [n for n in patch_sizes if isinstance(n, int | np.integer) and n > 0]
  if not sides or list(patch_sizes) != sorted(sides):
    raise UserError(
      f"the patch sizes are {','.join(map(str, patch_sizes)) or 'none'}; "
      "give sides of at least 1, none smaller than the one before (--patch-sizes)"
    )
  if image_size < 1:
    raise UserError(f"the image size is {image_size}; it must be at least 1 (--image-size)")
  if len(states) == 1:  # both files' entries in one dict
    ((where, state),) = states
    is_quantizer = {k: k.startswith(("codebooks.", "attn.")) for k in state}
    states = [
      (where, {k: v for k, v in state.items() if not is_quantizer[k]}),
      (where, {k: v for k, v in state.items() if is_quantizer[k]}),
    ]
  (vae_where, vae_state), (quantizer_where, quantizer_state) = states
  vae, lora, vae_entries = read_vae(layout, vae_state, vae_where, lora=True, ema=ema, **options)
  quantizer, quantizer_entries = read_quantizer(quantizer_state, quantizer_where, patch_sizes, ema)
  try:
    config = TokenizerConfig(vae=vae, quantizer=quantizer, lora=lora, image_size=image_size)
  except UserError as e:
    raise UserError(f"{vae_where}: {e} (--patch-sizes, --image-size)") from e
  entries = {f"vae.{k}": e for k, e in vae_entries.items()}
  return config, entries | {f"quantizer.{k}": e for k, e in quantizer_entries.items()}


def _read_lpips(states: Sequence[tuple[str, State]], ema: bool = True) -> tuple[dict, Entries]:
  merged: dict[str, Any] = {}
  for where, state in states:
    part = unwrapping.tensors(
      lpips.LAYOUT, unwrapping.opened(lpips.LAYOUT, state, where, ema), where
    )
    if twice := sorted(set(merged) & set(part)):
      raise UserError(f"{where}: entries that another file holds too: {rules.listed(twice)}")
    merged |= part
  where = " and ".join(where for where, _ in states)
  return _read_frozen("lpips", lpips.LAYOUT, LPIPS, merged, where)


def _read_clip_text(
  state: State,
  where: str,
  *,
  heads: int | None = None,
  activation: str | None = None,
  ema: bool = True,
) -> tuple[CLIPTextConfig, Entries]:
  """CLIP's text encoder. By default heads are of 64 numbers, as in all published ones."""

  def describe(found):
    config = shapes.clip_text_config(found, heads, activation)
    make = lambda: CLIPText(config, rngs=nnx.Rngs(0))
    return config, weights.expected_shapes(make)

  layouts = clip_text.HUGGING_FACE, clip_text.OPENAI
  state = clip_text.unfused(unwrapping.flatten(state))
  return _fit("clip-text", layouts, state, where, describe, ema)


def _read_frozen(
  kind: str,
  layout: Layout,
  make: Callable[[], nnx.Module],
  state: State,
  where: str,
  ema: bool = True,
) -> tuple[dict, Entries]:
  """A network without settings."""
  expected = _shapes_of(make)
  return _fit(kind, (layout,), state, where, lambda _: ({"kind": kind}, expected), ema)


@functools.cache
def _shapes_of(make: Callable[[], nnx.Module]) -> shapes.Shapes:
  return weights.expected_shapes(make)


def _fit(
  command: str,
  layouts: Sequence[Layout],
  state: State,
  where: str,
  describe: Callable[[shapes.Shapes], tuple[Any, shapes.Shapes]],
  ema: bool = True,
) -> tuple[Any, Entries]:
  """The config that `describe` finds in the shapes, and the entries, which fit it exactly.

  Raises:
    UserError: the keys are those of no layout, or entries are missing, extra or misshapen.
  """
  flat: Flat = {}
  opened = unwrapping.opened(layouts[0], state, where, ema)
  for layout in layouts:
    flat = unwrapping.tensors(layout, opened, where)
    if all(any(rules.matches([mark], k) for k in flat) for mark in layout.marks):
      break
  else:
    titles = " nor of ".join(layout.title for layout in layouts)
    some = ", ".join(list(flat)[:3])
    hint = _checked_hint(flat, command, where)
    raise UserError(f"{where} does not have the keys of {titles}{hint}; it has {some}, ...")
  entries = rules.rename(layout, flat, where)
  try:
    config, expected = describe({k: e.ours.shape for k, e in entries.items()})
    if problems := rules.check(layout, entries, expected):
      raise UserError(rules.listed(problems))
  except UserError as e:
    hint = _checked_hint(flat, command, where)
    raise UserError(f"{where} is not {layout.title}{hint}: {e}") from e
  return config, entries


def _checked_hint(flat: Flat, command: str, where: str) -> str:
  """The hint at another command. Raises UserError if there is none, for a known relative."""
  found = {k: v.shape for k, v in flat.items()}
  if name := relatives.unsupported(found):
    raise UserError(f"{where} is {name}, which is not supported; {relatives.SUPPORTED}") from None
  return relatives.hint(found, command)
