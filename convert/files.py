"""Which files an input means, and what is in them."""

import json
import logging
import math
import mmap
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from coda_jax.errors import UserError

from . import pickle, rules

_log = logging.getLogger("coda_jax")

_ENDINGS = (".safetensors", ".sft", ".pth", ".pt", ".ckpt", ".bin")
# A file of weights or the index of one in shards; diffusers writes `.fp16` at several places.
_WEIGHTS = re.compile(
  r"(?P<stem>[^.].*?)\.(?P<kind>safetensors|sft|pth|pt|ckpt|bin)"
  r"(?P<index>(?P<before>\.\w+)?\.index(?P<after>\.\w+)?\.json)?"
)
_BESIDE = re.compile(r"(optimizer|scheduler|scaler|sampler|training_args|random_|rng_).*")
_SHARD = re.compile(r"(?P<stem>.+)-\d+-of-(?P<count>\d+)")
_SAFETENSORS = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
  "F8_E4M3": ml_dtypes.float8_e4m3fn,
  "F8_E5M2": ml_dtypes.float8_e5m2,
  "I64": np.int64,
  "I32": np.int32,
  "I16": np.int16,
  "I8": np.int8,
  "U8": np.uint8,
  "BOOL": np.bool_,
}


def read(path: pathlib.Path) -> Mapping[str, Any]:
  """The (nested) dict of a safetensors file, a file of `torch.save`, or a pickle of arrays.

  The format is found by the first bytes; `.json` is an index of shards, which are merged. Arrays
  are read-only views of the mapped file.

  Raises:
    UserError: missing, damaged, truncated, of no known format, or no dict.
  """
  if not path.is_file():
    what = "is a directory; name the file in it" if path.is_dir() else "no such file"
    raise UserError(f"{path}: {what}")
  if path.suffix == ".json":
    return _read_shards(path)
  with path.open("rb") as f:
    head = f.read(40)
  if head.startswith(b"version https://git-lfs"):
    raise UserError(f"{path} is a Git LFS pointer, not the weights; fetch it with `git lfs pull`")
  if head[8:9] == b"{":
    return _read_safetensors(path)
  if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80" or not head:
    found = pickle.load(path)
    if not isinstance(found, Mapping):
      raise UserError(f"{path} holds a {type(found).__name__}; a dict of tensors is needed")
    return found
  raise UserError(f"{path} is neither safetensors nor a file of torch.save")


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  with path.open("rb") as f:
    data = memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))
  start = 8 + int.from_bytes(data[:8], "little")
  if start > len(data):
    raise UserError(f"{path} is damaged or truncated: its header is cut off")
  out = {}
  try:
    header = json.loads(bytes(data[8:start]))
    header.pop("__metadata__", None)
    for key, entry in header.items():
      dtype = np.dtype(_SAFETENSORS[entry["dtype"]])
      begin, end = entry["data_offsets"]
      if not 0 <= begin <= end or end - begin != math.prod(entry["shape"]) * dtype.itemsize:
        raise ValueError(f"{key} has {end - begin} bytes")
      if start + end > len(data):
        raise UserError(f"{path} is truncated: {key} lies behind its end")
      out[key] = np.frombuffer(data[start + begin : start + end], dtype).reshape(entry["shape"])
  except (AttributeError, KeyError, TypeError, ValueError) as e:
    raise UserError(f"{path} is damaged: {e!r}") from e
  return out


def _shards(index: pathlib.Path) -> dict[str, list[str]]:
  """The keys of every shard that an index names."""
  out: dict[str, list[str]] = {}
  try:
    for key, name in json.loads(index.read_text())["weight_map"].items():
      if pathlib.PurePath(name).name != name:
        raise ValueError(f"a shard outside of its folder, {name!r}")
      out.setdefault(name, []).append(key)
  except (AttributeError, KeyError, TypeError, ValueError) as e:
    raise UserError(f"{index} is no index of shards, or damaged: {e!r}") from e
  return out


def _read_shards(index: pathlib.Path) -> dict[str, Any]:
  shards = _shards(index)
  if missing := [n for n in shards if not (index.parent / n).is_file()]:
    raise UserError(f"{index} names shards that are not there: {rules.listed(missing)}")
  out: dict[str, Any] = {}
  for name, keys in shards.items():
    found = read(index.parent / name)
    if lost := [k for k in keys if k not in found]:
      raise UserError(f"{index.parent / name} lacks what {index.name} says: {rules.listed(lost)}")
    if more := sorted(set(found) - set(keys)):
      raise UserError(f"{index.name} does not name all of {name}: {rules.listed(more)}")
    out |= {k: found[k] for k in keys}
  return out


def find(layout: str, path: pathlib.Path, ema: bool) -> list[pathlib.Path]:
  """The weight files that an input means: itself, or what lies in a folder.

  Args:
    layout: one of `reading.LAYOUTS`.
    path: a file or folder; for `coda-mar` and `coda-flux` the folder of the VAE and the quantizer.
    ema: of a CODA checkpoint, take the averaged weights where both are there.

  Raises:
    UserError: no file, or several.
  """
  if layout in ("coda-mar", "coda-flux"):
    if not path.is_dir():
      raise UserError(f"{path}: give the folder that holds vae_ema.pth and quantizer_ema.pth")
    return _checkpoint(path, ema)
  if not path.is_dir():
    if index := _index_of(path):
      raise UserError(f"{path} is one of several shards; give their index, {index}")
    return [path]
  vae = path / "vae"
  if layout.endswith("-vae") and vae.is_dir():
    if (path / "model_index.json").is_file() or not _weights_in(path):
      _log.info("%s holds several networks; took %s", path, vae)
      path = vae
  found = _weights_in(path)
  if not found:
    raise UserError(f"{path} holds no weight file ({', '.join(_ENDINGS)})")
  names = ", ".join(p.name for p in found)
  if all(_index_of(p) for p in found):
    raise UserError(f"{path} holds shards without their index, {_index_of(found[0])} ({names})")
  if len(found) == 1:
    return found
  shortest = min(found, key=lambda p: len(p.name))
  raise UserError(f"{path} holds several weight files ({names}); name one, such as {shortest}")


def _index_of(path: pathlib.Path) -> str:
  """The name of the index, if this is one of several shards, else ""."""
  shard = _SHARD.fullmatch(path.stem)
  if shard is None or int(shard["count"]) < 2:
    return ""
  return f"{shard['stem']}{path.suffix}.index.json"


def _weights_in(folder: pathlib.Path) -> list[pathlib.Path]:
  """Weight files and indices, without shards and without a `.bin` of what safetensors holds."""
  names = sorted(p for p in folder.iterdir() if not _BESIDE.fullmatch(p.name))
  found = {p: m for p in names if (m := _WEIGHTS.fullmatch(p.name))}

  def holds(p):  # the name without the format
    stem, before, after = found[p].group("stem", "before", "after")
    return _SHARD.sub(r"\g<stem>", stem) + (before or "") + (after or "")

  safe = {holds(p) for p, m in found.items() if m["kind"] in ("safetensors", "sft")}
  kept = [p for p, m in found.items() if m["kind"] != "bin" or holds(p) not in safe]
  shards = {name for p in kept if found[p]["index"] for name in _shards(p)}
  return [p for p in kept if p.name not in shards and p.is_file()]


def _checkpoint(folder: pathlib.Path, ema: bool) -> list[pathlib.Path]:
  """The VAE's and the quantizer's file of a CODA checkpoint, both averaged or both not."""

  def named(stem):
    endings = [*_ENDINGS, ".safetensors.index.json", ".bin.index.json"]
    return next((p for e in endings if (p := folder / f"{stem}{e}").is_file()), None)

  suffixes = ("_ema", "") if ema else ("",)
  for suffix in suffixes:
    vae, quantizer = (named(f"{part}{suffix}") for part in ("vae", "quantizer"))
    if vae and quantizer:
      return [vae, quantizer]
    if suffix and (vae or quantizer):
      lost = f"{'quantizer' if vae else 'vae'}_ema"
      both = named("vae") and named("quantizer")
      other = "; --no-ema takes what is not averaged" if both else ""
      there = "vae" if vae else "quantizer"
      raise UserError(f"{folder} holds {there}_ema but no {lost}{other}")
  lost = [p for p in ("vae", "quantizer") if not any(named(f"{p}{s}") for s in suffixes)]
  raise UserError(f"{folder} holds no {' or '.join(f'{lost[0]}{s}.pth' for s in suffixes)}")


def diffusers_options(file: pathlib.Path) -> dict[str, float]:
  """Latent scale, shift and norm groups of the `config.json` beside a diffusers file.

  What is not there or null is left to the defaults. Only beside a scale, no shift means 0.

  Raises:
    UserError: the file is no JSON, or a value is no number.
  """
  path = file.parent / "config.json"
  if not path.is_file():
    return {}
  names = {"scale": "scaling_factor", "shift": "shift_factor", "norm_groups": "norm_num_groups"}
  try:
    fields = json.loads(path.read_text())
    if not isinstance(fields, dict):
      return {}
    found = {ours: fields[k] for ours, k in names.items() if fields.get(k) is not None}
    for name, value in found.items():
      if isinstance(value, bool) or not isinstance(value, int if "norm" in name else int | float):
        raise TypeError(f"{names[name]} is {value!r}")
  except (ValueError, TypeError) as e:
    raise UserError(f"{path} is damaged: {e}") from e
  return {"shift": 0.0, **found} if "scale" in found else found


def clip_text_options(file: pathlib.Path) -> dict[str, Any]:
  """Heads and activation of the `config.json` beside a file of Hugging Face's CLIP.

  Raises:
    UserError: the file is no JSON, or a value has another type.
  """
  path = file.parent / "config.json"
  if not path.is_file():
    return {}
  names = {"heads": ("num_attention_heads", int), "activation": ("hidden_act", str)}
  try:
    fields = json.loads(path.read_text())
    fields = fields.get("text_config") or fields  # of both halves
    found = {k: fields[n] for k, (n, _) in names.items() if fields.get(n) is not None}
    for name, value in found.items():
      if type(value) is not names[name][1]:
        raise TypeError(f"{names[name][0]} is {value!r}")
  except (ValueError, TypeError, AttributeError) as e:
    raise UserError(f"{path} is damaged: {e}") from e
  return found
