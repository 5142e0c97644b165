"""Which files an input means, and what is in them."""

import json
import math
import mmap
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from coda_jax.errors import UserError

from . import pickle

_ENDINGS = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
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

  The format is found by the first bytes. Arrays are read-only views of the mapped file.

  Raises:
    UserError: missing, damaged, truncated, of no known format, or no dict.
  """
  if not path.is_file():
    what = "is a directory; name the file in it" if path.is_dir() else "no such file"
    raise UserError(f"{path}: {what}")
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
    return [_checkpoint(path, part, ema) for part in ("vae", "quantizer")]
  if not path.is_dir():
    return [path]
  found = sorted(p for p in path.iterdir() if p.suffix in _ENDINGS)
  if len(found) > 1:
    names = ", ".join(p.name for p in found)
    raise UserError(f"{path} holds several weight files ({names}); name one")
  if not found:
    raise UserError(f"{path} holds no weight file ({', '.join(_ENDINGS)})")
  return found


def _checkpoint(folder: pathlib.Path, part: str, ema: bool) -> pathlib.Path:
  stems = [f"{part}_ema", part] if ema else [part]
  for stem in stems:
    for ending in _ENDINGS:
      if (folder / f"{stem}{ending}").is_file():
        return folder / f"{stem}{ending}"
  raise UserError(f"{folder} holds no {' or '.join(f'{s}.pth' for s in stems)}")


def diffusers_options(file: pathlib.Path) -> dict[str, float]:
  """Latent scale, shift and norm groups of the `config.json` beside a diffusers file.

  What is not there or null is left to the defaults. Only a null shift means none.

  Raises:
    UserError: the file is no JSON, or a value is no number.
  """
  path = file.parent / "config.json"
  if not path.is_file():
    return {}
  try:
    fields = json.loads(path.read_text())
    if not isinstance(fields, dict) or "scaling_factor" not in fields:
      return {}
    options = {"shift": float(fields.get("shift_factor") or 0.0)}
    if fields["scaling_factor"] is not None:
      options["scale"] = float(fields["scaling_factor"])
    if fields.get("norm_num_groups") is not None:
      options["norm_groups"] = int(fields["norm_num_groups"])
    return options
  except (ValueError, TypeError) as e:
    raise UserError(f"{path} is damaged: {e}") from e
