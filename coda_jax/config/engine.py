"""Between an `ml_collections.ConfigDict` or JSON and frozen dataclasses."""

import dataclasses
import json
import math
import operator
import types
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections
from ml_collections.config_dict import placeholder

from coda_jax.errors import UserError


def ranged(default: Any = dataclasses.MISSING, **limits: int | float) -> Any:
  """A dataclass field of numbers within limits, which `freeze` checks.

  Args:
    default: its default value.
    limits: `least`, `above`, `most`, `below`. Without them a number is at least 0.
  """
  return dataclasses.field(default=default, metadata=limits)


_LARGEST_INT = 2**31 - 1  # that an int32 array holds
_LIMITS = {
  "least": ("at least", operator.ge),
  "above": ("above", operator.gt),
  "most": ("at most", operator.le),
  "below": ("below", operator.lt),
}


def _check_range(value: Any, limits: Mapping[str, int | float], where: str) -> None:
  """Raises UserError if a number, or one of a tuple, is out of range."""
  if isinstance(value, tuple):
    for i, x in enumerate(value):
      _check_range(x, limits, f"{where}[{i}]")
  if type(value) not in (int, float):
    return
  lower = {} if {"least", "above"} & set(limits) else {"least": 0}
  upper = {} if type(value) is float or {"most", "below"} & set(limits) else {"most": _LARGEST_INT}
  limits = lower | dict(limits) | upper
  if not all(_LIMITS[name][1](value, limit) for name, limit in limits.items()):
    text = " and ".join(f"{_LIMITS[name][0]} {limit}" for name, limit in limits.items())
    raise UserError(f"{where} is {value}; it must be {text}")


def freeze(cls: type, values: Mapping | ml_collections.ConfigDict, where: str = "config"):
  """The frozen dataclass `cls` of a `ConfigDict` or any other mapping.

  Raises:
    UserError: an unknown or missing key or a value of the wrong type, named with its full path.
  """
  fields = {f.name: f for f in dataclasses.fields(cls)}
  for key in values:
    if key not in fields:
      raise UserError(f"unknown key {where}.{key}; known here: {', '.join(fields)}")
  for key, field in fields.items():
    required = field.default is field.default_factory is dataclasses.MISSING
    if key not in values and required:
      raise UserError(f"{where}.{key} is missing")
  hints = typing.get_type_hints(cls)
  converted = {k: _convert(hints[k], values[k], f"{where}.{k}") for k in values}
  for key, value in converted.items():
    _check_range(value, fields[key].metadata, f"{where}.{key}")
  return cls(**converted)


def unwrap(hint):
  """`T` of the type `T | None`; any other type as it is."""
  if isinstance(hint, types.UnionType):
    (hint,) = (h for h in typing.get_args(hint) if h is not types.NoneType)
  return hint


def _convert(hint, value, where: str):
  """`value` as the type `hint`: a dataclass, a scalar, `T | None` or a tuple of these."""
  if value is None and hint is not unwrap(hint):
    return None
  hint = unwrap(hint)
  if isinstance(hint, type) and dataclasses.is_dataclass(hint):
    if not isinstance(value, (Mapping, ml_collections.ConfigDict)):
      raise UserError(f"{where} is {value!r}; it must be a group of settings")
    return freeze(hint, value, where)
  if typing.get_origin(hint) is tuple:
    if not isinstance(value, (tuple, list)):
      raise UserError(f"{where} is {value!r}; it must be a tuple")
    args = typing.get_args(hint)
    if args[-1] is not Ellipsis and len(args) != len(value):
      raise UserError(f"{where} is {value!r}; it must have {len(args)} entries")
    items = [args[0]] * len(value) if args[-1] is Ellipsis else args
    pairs = zip(items, value, strict=True)
    return tuple(_convert(h, v, f"{where}[{i}]") for i, (h, v) in enumerate(pairs))
  if typing.get_origin(hint) is dict:
    if not isinstance(value, (Mapping, ml_collections.ConfigDict)):
      raise UserError(f"{where} is {value!r}; it must be a dictionary")
    return {k: _convert(typing.get_args(hint)[1], value[k], f"{where}.{k}") for k in value}
  if hint is Any:
    return value
  if hint is float and type(value) is int:
    return float(value)
  if isinstance(value, float) and not math.isfinite(value):
    raise UserError(f"{where} is {value}; it must be finite")
  if type(value) is not hint:
    raise UserError(f"{where} is {value!r} ({type(value).__name__}); it must be {hint.__name__}")
  return value


def config_dict(settings) -> ml_collections.ConfigDict:
  """The `ConfigDict` of a settings dataclass, with every key, for `--config.key=value`."""
  hints = typing.get_type_hints(type(settings))
  out = ml_collections.ConfigDict()
  for field in dataclasses.fields(settings):
    value = getattr(settings, field.name)
    if dataclasses.is_dataclass(value):
      value = config_dict(value)
    elif isinstance(value, dict):
      value = {k: to_json(v) for k, v in value.items()}
    elif value is None:
      kind = unwrap(hints[field.name])
      if not dataclasses.is_dataclass(kind):  # None until set, but of a known type
        value = placeholder(kind)
    out[field.name] = value
  return out


def changed(settings, **changes):
  """A settings dataclass with other values, by dotted key with `__` for dots."""
  for key, value in changes.items():
    name, _, rest = key.partition("__")
    value = changed(getattr(settings, name), **{rest: value}) if rest else value
    settings = dataclasses.replace(settings, **{name: value})
  return settings


def to_json(settings):
  """A settings dataclass, or one value of it, as `config.json` of a workdir keeps it."""
  return json.loads(json.dumps(settings, default=dataclasses.asdict))
