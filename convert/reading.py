"""From the entries of published files to our configs and arrays."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx

from coda_jax import weights
from coda_jax.errors import UserError
from coda_jax.models.dino import DINO
from coda_jax.models.lora import LoRAConfig
from coda_jax.models.lpips import LPIPS
from coda_jax.models.quantizer import FLUX_PATCH_SIZES, MAR_PATCH_SIZES, QuantizerConfig
from coda_jax.models.tokenizer import TokenizerConfig
from coda_jax.models.vae import FLUX_VAE, MAR_VAE, VAEConfig

from . import coda, dino, flux_vae, lpips, mar_vae, rules, shapes
from .rules import Entry, Layout

State = Mapping[str, Any]
Flat = dict[str, np.ndarray]
Entries = dict[str, Entry]  # by our keys


@dataclasses.dataclass(frozen=True)
class Family:
  """A family of autoencoders: its layouts (the first is the one we write) and defaults."""

  layouts: tuple[Layout, ...]
  default: VAEConfig
  patch_sizes: tuple[int, ...]


MAR = Family((mar_vae.LAYOUT,), MAR_VAE, MAR_PATCH_SIZES)
FLUX = Family((flux_vae.DIFFUSERS, flux_vae.SINGLE_FILE), FLUX_VAE, FLUX_PATCH_SIZES)
_FAMILIES = {"mar-vae": MAR, "flux-vae": FLUX, "coda-mar": MAR, "coda-flux": FLUX}
LAYOUTS = (*_FAMILIES, "dino", "lpips")


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
    if layout == "dino":
      config, entries = _read_frozen("dino", dino.LAYOUT, DINO, state, where, **options)
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
) -> tuple[VAEConfig, LoRAConfig | None, Entries]:
  """The autoencoder of a state; with `lora`, its adapters too. Raises as `read`."""
  family = _FAMILIES[layout]
  if scale == 0:
    raise UserError("the latents' scale is 0; it must be another number")

  def describe(found):
    config = shapes.vae_config(
      found,
      quant_conv=family.default.quant_conv,
      scale=family.default.scale if scale is None else scale,
      shift=family.default.shift if shift is None else shift,
      norm_groups=norm_groups,
    )
    adapters = shapes.lora_config(found) if lora else None
    return (config, adapters), shapes.of_vae(config, adapters)

  (config, adapters), entries = _fit(layout, family.layouts, state, where, describe)
  return config, adapters, entries


def read_quantizer(
  state: State, where: str, patch_sizes: Sequence[int]
) -> tuple[QuantizerConfig, Entries]:
  """The quantizer of a state. Raises as `read`."""

  def describe(found):
    config = shapes.quantizer_config(found, tuple(patch_sizes))
    return config, shapes.of_quantizer(config)

  return _fit("quantizer", (coda.QUANTIZER,), state, where, describe)


def _read_tokenizer(
  layout: str,
  states: Sequence[tuple[str, State]],
  *,
  patch_sizes: Sequence[int] | None = None,
  image_size: int = 256,
  **options,
) -> tuple[TokenizerConfig, Entries]:
  if len(states) == 1:  # both files' entries in one dict
    ((where, state),) = states
    is_quantizer = {k: k.startswith(("codebooks.", "attn.")) for k in state}
    states = [
      (where, {k: v for k, v in state.items() if not is_quantizer[k]}),
      (where, {k: v for k, v in state.items() if is_quantizer[k]}),
    ]
  (vae_where, vae_state), (quantizer_where, quantizer_state) = states
  vae, lora, vae_entries = read_vae(layout, vae_state, vae_where, lora=True, **options)
  quantizer, quantizer_entries = read_quantizer(
    quantizer_state, quantizer_where, patch_sizes or _FAMILIES[layout].patch_sizes
  )
  try:
    config = TokenizerConfig(vae=vae, quantizer=quantizer, lora=lora, image_size=image_size)
  except UserError as e:
    raise UserError(f"{vae_where}: {e} (--patch-sizes, --image-size)") from e
  entries = {f"vae.{k}": e for k, e in vae_entries.items()}
  return config, entries | {f"quantizer.{k}": e for k, e in quantizer_entries.items()}


def _read_lpips(states: Sequence[tuple[str, State]]) -> tuple[dict, Entries]:
  merged: dict[str, Any] = {}
  for where, state in states:
    part = rules.unwrapped(lpips.LAYOUT, state, where)
    if twice := sorted(set(merged) & set(part)):
      raise UserError(f"{where}: entries that another file holds too: {rules.listed(twice)}")
    merged |= part
  where = " and ".join(where for where, _ in states)
  return _read_frozen("lpips", lpips.LAYOUT, LPIPS, merged, where)


def _read_frozen(
  kind: str, layout: Layout, make: Callable[[], nnx.Module], state: State, where: str
) -> tuple[dict, Entries]:
  """A network without settings."""
  expected = weights.expected_shapes(make)
  return _fit(kind, (layout,), state, where, lambda _: ({"kind": kind}, expected))


def _fit(
  command: str,
  layouts: Sequence[Layout],
  state: State,
  where: str,
  describe: Callable[[shapes.Shapes], tuple[Any, shapes.Shapes]],
) -> tuple[Any, Entries]:
  """The config that `describe` finds in the shapes, and the entries, which fit it exactly.

  Raises:
    UserError: the keys are those of no layout, or entries are missing, extra or misshapen.
  """
  flat: Flat = {}
  for layout in layouts:
    flat = rules.unwrapped(layout, state, where)
    if all(any(rules.matches([mark], k) for k in flat) for mark in layout.marks):
      break
  else:
    titles = " nor of ".join(layout.title for layout in layouts)
    some = ", ".join(list(flat)[:3])
    hint = _hint(flat, command)
    raise UserError(f"{where} does not have the keys of {titles}{hint}; it has {some}, ...")
  entries = rules.rename(layout, flat, where)
  try:
    config, expected = describe({k: e.ours.shape for k, e in entries.items()})
    if problems := rules.check(layout, entries, expected):
      raise UserError(rules.listed(problems))
  except UserError as e:
    raise UserError(f"{where} is not {layout.title}{_hint(flat, command)}: {e}") from e
  return config, entries


def _hint(flat: Flat, command: str) -> str:
  """Which command the file seems to be for, if it is another."""
  adapted = any(".lora_layer." in k for k in flat)

  def has(start):
    return any(k.startswith(start) for k in flat)

  if has("codebooks."):
    other = "coda-mar or coda-flux, with the folder that holds it and the VAE"
  elif has("encoder.down_blocks."):
    other = "coda-flux" if adapted else "flux-vae"
  elif has("encoder.down."):
    other = ("coda-mar" if adapted else "mar-vae") if has("quant_conv.") else "flux-vae"
  elif has(("features.", "lin0.")):
    other = "lpips"
  elif has(("VGG16_0.", "NetLinLayer_0.")):
    other = "lpips --from-package"
  elif has("blocks.0.attn.qkv."):
    other = "dino"
  else:
    return ""
  known = command in (other, "quantizer")
  return "" if known else f" (such files are for `python -m convert {other}`)"
