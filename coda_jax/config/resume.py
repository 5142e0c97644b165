"""Which runs a workdir may be continued with."""

import json
from collections.abc import Mapping

from coda_jax.errors import UserError

# What may differ when a workdir is continued: where and how it runs, not what it computes.
MAY_CHANGE_ON_RESUME = (
  "checkpoint",
  "data.workers",
  "epochs",
  "logging",
  "mesh",
  "steps",
)


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


def check_resumable(ours: Mapping, theirs: Mapping, workdir) -> None:
  """Raises UserError if the config of `workdir` (`theirs`) is another than ours.

  Only what decides how a run is carried out may differ: see MAY_CHANGE_ON_RESUME.
  """
  free = tuple(f"{key}." for key in MAY_CHANGE_ON_RESUME)
  changed = [k for k in differences(ours, theirs) if not f"{k}.".startswith(free)]
  if changed:

    def look(d, key):
      for part in key.split("."):
        d = d.get(part) if isinstance(d, Mapping) else None
      return json.dumps(d)

    shown = ", ".join(f"{k} (there {look(theirs, k)}, here {look(ours, k)})" for k in changed)
    raise UserError(f"{workdir} holds a run with another config: {shown}; take a new --workdir")
