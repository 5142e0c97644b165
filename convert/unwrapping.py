"""Takes the weights of one network out of what training scripts and publishers save with them.

A nested dict is flattened first, so that `{"model": {"a.weight": ...}}` and the file of a
compiled module, `{"model.a.weight": ...}`, are the same.
"""

import logging
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from coda_jax.errors import UserError

from .rules import Layout, listed, matches

_log = logging.getLogger("coda_jax")

# First parts of keys under which running averages of weights are kept.
_AVERAGED = re.compile(r"(.*[_-])?(ema|swa)([_-].*)?|(.*_)?averaged?(_.*)?|shadow\w*", re.I)
_LDM = "model_ema."  # LDM keeps the average of `a.b.weight` as `model_ema.abweight`


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
  """Nested dicts as one dict with dotted keys."""
  out = {}
  for key, value in node.items():
    if isinstance(value, Mapping):
      name = str(key)
      name = name.replace(".", "_") if _AVERAGED.fullmatch(name) else name  # `ema_0.999`
      out.update(flatten(value, f"{prefix}{name}."))
    else:
      out[f"{prefix}{key}"] = value
  return out


def opened(
  layout: Layout, state: Mapping[str, Any], where: str, ema: bool = True
) -> dict[str, Any]:
  """The entries of `state` without what the layout's table says lies around and beside them.

  Args:
    layout: its wrappers, networks and what lies beside them.
    state: a (nested) dict.
    where: the file, for messages.
    ema: take the averaged weights where averaged ones and others are there. A log line says so.

  Raises:
    UserError: something unknown lies beside the weights, or the choice is not clear.
  """
  if not isinstance(state, Mapping):
    raise UserError(f"{where} holds a {type(state).__name__}; a dict of tensors is needed")
  try:
    flat = flatten(state)
  except RecursionError as e:
    raise UserError(f"{where}: a dict that holds itself") from e
  while (inner := _without_wrapper(layout, flat, where, ema)) is not None:
    flat = inner
  return _with_ldms_average(flat, where, ema)


def tensors(layout: Layout, flat: Mapping[str, Any], where: str) -> dict[str, np.ndarray]:
  """The entries but those that files of the layout carry besides.

  Raises:
    UserError: no arrays, or something that is none.
  """
  flat = {k: v for k, v in flat.items() if not matches(layout.carried, k)}
  arrays = {k: v for k, v in flat.items() if isinstance(v, np.ndarray)}
  if arrays:  # numbers and texts may lie beside bare weights as well as beside wrapped ones
    flat = {k: v for k, v in flat.items() if k in arrays or not matches(layout.beside, _first(k))}
  foreign = [f"{k} ({type(v).__name__})" for k, v in flat.items() if k not in arrays]
  if foreign:
    raise UserError(f"{where}: entries that are no tensors: {listed(foreign)}")
  if not arrays:
    raise UserError(f"{where} holds no tensors")
  return arrays


def _without_wrapper(
  layout: Layout, flat: dict[str, Any], where: str, ema: bool
) -> dict[str, Any] | None:
  """The entries in the outermost wrapper, or None if there is no wrapper."""
  parts = dict.fromkeys(_first(k) for k in flat)
  full = {_first(k) for k, v in flat.items() if k.count(".") > 1 and isinstance(v, np.ndarray)}
  networks = [p for p in layout.networks if p in full]
  plain = networks or [p for p in layout.wrappers if p in full]
  averaged = [
    p
    for p in parts
    if p in full and (_AVERAGED.fullmatch(p) or p in layout.averages)
    if not matches(layout.beside, p)
  ]
  pairs = [f"{p}_ema" for p in plain] + [f"ema_{p}" for p in plain]
  if networks:  # `model_ema` beside them averages another network
    averaged = [p for p in averaged if p in pairs]
  elif ema and not averaged:
    _refuse_lists(flat, where, plain)
  if not plain:
    averaged = [p for p in averaged if _averages_the_rest(layout, flat, p, averaged)]
  if not plain and not averaged:
    return None
  others = [
    p
    for p in parts
    if p not in (*plain[:1], *averaged)
    and not matches(layout.beside, p)
    and (p in full or not (_AVERAGED.fullmatch(p) or p in layout.wrappers))
  ]
  bare = not plain and any(p in full for p in others)  # the plain weights have no wrapper
  if networks[1:]:
    raise UserError(f"{where} holds several VAEs ({', '.join(networks)}); save one of them alone")
  if others and not networks and not bare:
    raise UserError(f"{where}: unknown beside {(plain or averaged)[0]!r}: {listed(others)}")
  if averaged and ema:
    taken = _only(averaged, [*pairs, "ema"], where)
  elif plain or bare:
    taken = plain[0] if plain else ""
  else:
    raise UserError(f"{where} holds averaged weights alone ({averaged[0]!r}); leave out --no-ema")
  if taken:
    inner = {k.removeprefix(f"{taken}."): v for k, v in flat.items() if _first(k) == taken}
  else:
    inner = {k: v for k, v in flat.items() if _first(k) in others}
  if networks and len(inner) < len(flat):
    left = len(flat) - len(inner)
    _log.info("%s: took the entries under %r; %d others are left out", where, f"{taken}.", left)
  if averaged and ema:
    choice = " (--no-ema takes the others)" if plain or bare else ""
    _log.info("%s: took the averaged weights, %r%s", where, taken, choice)
  elif averaged:
    _log.info("%s: took the weights that are not averaged", where)
  return inner


def _only(averaged: list[str], preferred: list[str], where: str) -> str:
  """The averaged weights to take, if it is clear which."""
  found = averaged if len(averaged) == 1 else [p for p in averaged if p in preferred]
  if len(found) != 1:
    names = ", ".join(map(repr, averaged))
    raise UserError(f"{where} holds several averages ({names}); save one of them alone")
  return found[0]


def _averages_the_rest(
  layout: Layout, flat: Mapping[str, Any], name: str, averaged: list[str]
) -> bool:
  """Whether what lies under `name` has the keys of what has no wrapper, if there is any."""
  rest = {k for k, v in flat.items() if "." in k and isinstance(v, np.ndarray)}
  rest -= {k for k in rest if _first(k) in averaged or matches(layout.beside, _first(k))}
  inside = [k.split(".") for k in flat if _first(k) == name]
  found = sum(any(".".join(k[i:]) in rest for i in (1, 2, 3)) for k in inside)
  return found > len(inside) / 2 or not rest


def _refuse_lists(flat: Mapping[str, Any], where: str, plain: list[str]) -> None:
  """Raises UserError if averaged weights are kept in a list, without their keys."""
  for key, value in flat.items():
    is_list = isinstance(value, list | tuple) and any(isinstance(v, np.ndarray) for v in value)
    if is_list and _AVERAGED.fullmatch(_first(key)):
      other = f"; --no-ema takes {plain[0]!r}" if plain else ""
      raise UserError(f"{where}: {key!r} lists averaged weights without their names{other}")


def _with_ldms_average(flat: dict[str, Any], where: str, ema: bool) -> dict[str, Any]:
  """What is not averaged in such a file did not train, and counts as it is."""
  rest = {k: v for k, v in flat.items() if not k.startswith(_LDM)}
  pairs = {k: a for k in rest if (a := _LDM + k.replace(".", "")) in flat}
  if not pairs:
    return flat
  what = f"averaged weights, {_LDM!r}" if ema else "weights that are not averaged"
  _log.info("%s: took the %s", where, what)
  return {k: flat[pairs[k]] if ema and k in pairs else v for k, v in rest.items()}


def _first(key: str) -> str:
  return key.partition(".")[0]
