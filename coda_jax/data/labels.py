"""Labels as datasets hold them, to classes that are numbered from 0."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from coda_jax.data.folder import few
from coda_jax.errors import UserError

MOST_CLASSES = 1_000_000  # what is above numbers no classes


def number_labels(
  labels: Sequence[Any], *, names: Sequence[str] | None, others: Collection[Any], where: str
) -> tuple[tuple[str, ...], np.ndarray]:
  """Class names, and the number of each label's class as int32 [n], -1 for None and -1.

  Args:
    labels: whole numbers, or all of them class names.
    names: of the classes that the numbers mean; None if they are not known.
    others: labels of the dataset's other splits, which count where the names are not known.
    where: the data, for messages.

  Raises:
    UserError: numbers that number no classes, numbers beside names, or a name that is not known.
  """
  found = ({*labels} | {*others}) - {None, -1}
  if not found:
    return tuple(names or ()), np.full(len(labels), -1, "<i4")
  texts = {label for label in found if isinstance(label, str)}
  if texts and len(texts) < len(found):
    raise UserError(f"{where}: labels are numbers and names: {few(sorted(map(str, found)))}")
  if texts:
    known = tuple(names or sorted(texts))
    if unknown := sorted(texts - {*known}):
      raise UserError(f"{where}: labels that are no classes: {few(unknown)}")
    numbers = {name: i for i, name in enumerate(known)}
  else:
    smallest, largest = min(found), max(found)
    if smallest < 0 or largest >= (len(names) if names else MOST_CLASSES):
      classes = f"the {len(names)} classes" if names else "classes from 0"
      raise UserError(f"{where}: its labels, {smallest} to {largest}, do not number {classes}")
    known = tuple(names or map(str, range(largest + 1)))
    numbers = {i: i for i in range(len(known))}
  return known, np.array([numbers.get(label, -1) for label in labels], "<i4")
