"""Which runs a workdir may be continued with."""

import dataclasses
import json
import typing
from collections.abc import Iterable, Mapping

from coda_jax.config.engine import to_json, unwrap
from coda_jax.errors import UserError

# What may differ when a workdir is continued: where and how a run computes, not its result.
# Workdirs of older versions hold `fold`, which nothing reads today.
MAY_CHANGE_ON_RESUME = (
  "checkpoint",
  "data.max_unreadable",
  "data.workers",
  "distributed",
  "epochs",
  "fold",
  "logging",
  "mesh",
  "remat",
  "steps",
)


def check_resumable(settings, theirs: Mapping, workdir) -> None:
  """Checks that a run with `settings` may continue the run that `workdir` holds.

  A key that an older version did not write has its default.

  Args:
    settings: the dataclass of our run.
    theirs: what the workdir's `config.json` holds.
    workdir: for the message.

  Raises:
    UserError: they differ in more than MAY_CHANGE_ON_RESUME; names every key with both values.
  """
  ours, theirs = to_json(settings), with_defaults(type(settings), theirs)
  changed = decisive(differences(ours, theirs))
  if changed:
    shown = ", ".join(f"{k} (there {_value(theirs, k)}, here {_value(ours, k)})" for k in changed)
    raise UserError(f"{workdir} holds a run with another config: {shown}; take a new --workdir")


def decisive(keys: Iterable[str], length: bool = False) -> list[str]:
  """The dotted keys that decide a run's result; with `length` also those that say how long it is.

  Steps and epochs may change on resume, but a longer run has another result.
  """
  free = set(MAY_CHANGE_ON_RESUME) - ({"steps", "epochs"} if length else set())
  return [k for k in keys if not f"{k}.".startswith(tuple(f"{key}." for key in free))]


def with_defaults(cls: type, values: Mapping) -> dict:
  """JSON `values` and, for the fields of the dataclass `cls` that they lack, the defaults.

  Defaults are filled in within groups too. Keys that `cls` does not know stay.
  """
  hints = typing.get_type_hints(cls)
  out = dict(values)
  for field in dataclasses.fields(cls):
    value, hint = out.get(field.name), unwrap(hints[field.name])
    if field.name not in out and field.default is not dataclasses.MISSING:
      out[field.name] = to_json(field.default)
    elif isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
      out[field.name] = with_defaults(hint, value)
  return out


def differences(ours: Mapping, theirs: Mapping, prefix: str = "") -> list[str]:
  """Dotted keys in which two JSON configs differ."""
  out = []
  for key in sorted(set(ours) | set(theirs)):
    a, b = ours.get(key), theirs.get(key)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
      out += differences(a, b, f"{prefix}{key}.")
    elif key not in ours or key not in theirs or a != b:
      out.append(f"{prefix}{key}")
  return out


def _value(values, key: str) -> str:
  """The value at a dotted key as JSON; null where there is none."""
  for part in key.split("."):
    values = values.get(part) if isinstance(values, Mapping) else None
  return json.dumps(values)
