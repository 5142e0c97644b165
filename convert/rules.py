"""The engine behind the tables: renames keys and turns arrays, in both directions.

A `Layout` is data. Its rules are pairs of templates for consecutive dotted parts of a key, tried
in order, each on the result of the one before; read from right to left they rename back.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from coda_jax import arrays
from coda_jax.errors import UserError

SHOWN = 20  # entries that an error lists before "and N more"

# Placeholders of templates. `{-i}` counts levels from the other end.
_PLACEHOLDERS = {
  "{i}": r"(?P<i>\d+)",
  "{-i}": r"(?P<minus_i>\d+)",
  "{norm}": r"(?P<norm>\w*norm\w*)",
  "{half}": r"(?P<half>encoder|decoder)",
}


@dataclasses.dataclass(frozen=True)
class Transform:
  """What happens to an array on the way in and on the way out. Views wherever possible."""

  to_ours: Callable[[np.ndarray], np.ndarray]
  to_theirs: Callable[[np.ndarray], np.ndarray]


def _hwio(x):
  if x.ndim == 2:  # a 1x1 convolution kept as a linear layer
    return x.T[None, None]
  return x.transpose(2, 3, 1, 0) if x.ndim == 4 else x


def _linear(x):
  return x.T if x.ndim == 2 else x


def _oihw(x):
  return x.transpose(3, 2, 0, 1)


SAME = Transform(lambda x: x, lambda x: x)
CONV = Transform(_hwio, _oihw)  # [out, in, h, w] or [out, in] to [h, w, in, out]
POINTWISE = Transform(_hwio, lambda x: x[0, 0].T)  # the same, written as [out, in]
LINEAR = Transform(_linear, _linear)  # [out, in] to [in, out]


@dataclasses.dataclass(frozen=True)
class Rule:
  """Parts of their key, parts of ours, and what happens to the array if they match."""

  theirs: str
  ours: str
  transform: Transform | None = None


WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "_orig_mod", "online_model")
WRAPPERS += ("params", "weights", "student", "generator", "net")


@dataclasses.dataclass(frozen=True)
class Layout:
  """How one published file names and stores a network.

  Attributes:
    title: for messages.
    marks: regular expressions of keys that only this layout has (all must be found).
    rules: see the module.
    order: parts of keys in the order in which PyTorch lists them; needed to write the layout.
    carried: regular expressions of entries that files of this layout may hold besides.
    wrappers: keys or first parts of keys under which training scripts put the weights.
    beside: regular expressions of what may lie beside a wrapper.
    networks: first parts of keys that mark this network among others, which are left out.
    averages: keys of averaged weights that are not called so.
  """

  title: str
  marks: tuple[str, ...]
  rules: tuple[Rule, ...]
  order: tuple[str, ...] = ()
  carried: tuple[str, ...] = ()
  wrappers: tuple[str, ...] = WRAPPERS
  beside: tuple[str, ...] = (
    r"\w*(args|config|cfg|hparams|hyper_parameters|meta|metadata|version|hparams_name)|name|arch|seed",
    r"\w*(step|epoch|iter|update|time|date)s?|\w*iterations?|initted|n_averaged|\w*decay",
    r"best_\w+|\w*(metric|callback|loop|rng|random|sampler|dataloader|datamodule)\w*",
    r"\w*(optim|sched|scaler|amp_|grad|disc|loss|lpips|percep|critic|wandb|Plugin|Precision)\w*|opt(_\w+)?|lr\w*",
    r"pytorch-lightning_version|collected_params|online_\w*|inv_gamma|power|amp",
  )
  networks: tuple[str, ...] = ()
  averages: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Entry:
  """One array of a file: its key there, its values, and how they become ours."""

  key: str
  array: np.ndarray
  transform: Transform

  @property
  def ours(self) -> np.ndarray:
    return self.transform.to_ours(self.array)


def matches(patterns: Sequence[str], key: str) -> bool:
  """Whether one of the regular expressions fits the whole key."""
  return any(re.fullmatch(p, key) for p in patterns)


def rename(layout: Layout, state: Mapping[str, np.ndarray], where: str) -> dict[str, Entry]:
  """Entries by our keys. A key that no rule changes keeps its name.

  Raises:
    UserError: two keys mean the same.
  """
  names = _apply(layout, list(state), reverse=False)
  out = {}
  for key, (name, transform) in names.items():
    if name in out:
      raise UserError(f"{where}: {key} and {out[name].key} are the same entry")
    out[name] = Entry(key, state[key], transform)
  return out


def names_in(layout: Layout, ours: Sequence[str]) -> dict[str, tuple[str, Transform]]:
  """Their key and the transform of each of our keys, in the order of a PyTorch state dict."""
  names = _apply(layout, list(ours), reverse=True)
  ranks = {part: i for i, part in enumerate(layout.order)}

  def rank(ours):
    parts = names[ours][0].split(".")
    return [int(p) if p.isdecimal() else ranks.get(p, len(ranks)) for p in parts]

  return {k: names[k] for k in sorted(names, key=rank)}


def _apply(layout: Layout, keys: list[str], reverse: bool) -> dict[str, tuple[str, Transform]]:
  names = {key: (key, SAME) for key in keys}
  for rule in layout.rules:
    source, target = (rule.ours, rule.theirs) if reverse else (rule.theirs, rule.ours)
    pattern = _pattern(source)
    found = {k: m for k, (name, _) in names.items() if (m := pattern.search(name))}
    counts = [int(n) for m in found.values() if (n := _level(m)) is not None]
    for key, match in found.items():
      name, transform = names[key]
      filled = _fill(target, match, max(counts, default=0))
      name = name[: match.start()] + filled + name[match.end() :]
      names[key] = (name, rule.transform or transform)
  return names


def _pattern(template: str) -> re.Pattern:
  text = re.escape(template)
  for placeholder, pattern in _PLACEHOLDERS.items():
    text = text.replace(re.escape(placeholder), pattern)
  return re.compile(rf"(?<![^.]){text}(?![^.])")


def _level(match: re.Match) -> str | None:
  groups = match.groupdict()
  return groups.get("i") or groups.get("minus_i")


def _fill(template: str, match: re.Match, last: int) -> str:
  """The template with what `match` found; `last` is the highest level of any key."""
  groups = match.groupdict()
  level = _level(match)
  if level is not None:
    other_end = ("{-i}" in template) != (groups.get("minus_i") is not None)
    level = str(last - int(level)) if other_end else level
    template = template.replace("{-i}", level).replace("{i}", level)
  for name in ("norm", "half"):
    if groups.get(name) is not None:
      template = template.replace(f"{{{name}}}", groups[name])
  return template


def check(
  layout: Layout,
  entries: Mapping[str, Entry],
  expected: Mapping[str, tuple[int, ...]],
) -> list[str]:
  """What is missing, extra, misshapen or not finite, in the file's own names and shapes."""
  problems = []
  names = names_in(layout, list(expected))
  for ours, (theirs, transform) in names.items():
    if ours not in entries:
      problems.append(f"missing {theirs}")
      continue
    entry = entries[ours]
    if entry.ours.shape != tuple(expected[ours]):
      dummy = np.broadcast_to(np.float32(0), expected[ours])  # takes no memory
      wanted = transform.to_theirs(dummy).shape
      problems.append(f"{entry.key} has shape {list(entry.array.shape)}, expected {list(wanted)}")
    elif entry.array.dtype.kind not in "fV":  # V: bfloat16
      problems.append(f"{entry.key} holds {entry.array.dtype} instead of floats")
    elif arrays.not_finite({entry.key: entry.array}):
      problems.append(f"{entry.key} holds NaN or infinity")
  problems += [f"extra {e.key}" for ours, e in entries.items() if ours not in expected]
  return problems


def listed(items) -> str:
  """At most `SHOWN` of the items, and how many more there are."""
  items = list(items)
  more = f"; and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
  return "; ".join(items[:SHOWN]) + more
