"""Images of prepared TFDS datasets."""

import functools
import hashlib
import importlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from coda_jax.data.decode import UnreadableImage
from coda_jax.data.records import first_line
from coda_jax.errors import UserError

log = logging.getLogger("coda_jax")

_MOST_CLASSES = 1_000_000  # what is above numbers no classes


class TfdsSource:
  """A prepared TFDS dataset with the features `image` and, for labels, `label`.

  Read through `tfds.data_source`, without TensorFlow; images come encoded, as stored. Classes
  without names are called by their numbers: all labels of the dataset are read once to know the
  largest.

  Raises:
    UserError: tensorflow-datasets is not installed, unknown dataset or split, not prepared as
      array_record, no images in it, or labels that number no classes.
  """

  skipped: Mapping[str, int] = {}

  def __init__(self, name: str, split: str):
    try:
      tfds = importlib.import_module("tensorflow_datasets")
    except ImportError as e:
      raise UserError(
        "tfds: needs tensorflow-datasets, the extra 'tfds': pip install 'coda_jax[tfds]'"
      ) from e
    name = os.path.expanduser(name)
    options = {"decoders": {"image": tfds.decode.SkipDecoding()}}
    try:
      if os.path.isfile(os.path.join(name, "dataset_info.json")):
        read = functools.partial(tfds.builder_from_directory(name).as_data_source, **options)
      else:
        read = functools.partial(tfds.data_source, name, download=False, **options)
      self._examples = read(split=split)
    except Exception as e:  # tfds raises all sorts
      raise UserError(
        f"cannot open tfds:{name}@{split}: {first_line(e)} (prepare it with `tfds build"
        f" {name} --file_format=array_record`; TFDS_DATA_DIR says where datasets lie)"
      ) from e
    features = self._examples.dataset_info.features
    if "image" not in features:
      raise UserError(f"tfds:{name} has no feature 'image', only {', '.join(features)}")
    if not len(self._examples):
      raise UserError(f"tfds:{name}@{split} holds no images")
    self._where, self._split = f"tfds:{name}@{split}", split
    self.class_names = self._class_names(read)

  def _class_names(self, read: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the labels; none if there are no labels or they are no whole numbers.

    Args:
      read: opens a split.
    """
    info = self._examples.dataset_info
    feature = info.features["label"] if "label" in info.features else None
    if feature is None or feature.shape != () or np.dtype(feature.np_dtype).kind not in "iub":
      return ()
    if names := getattr(feature, "names", None):
      return tuple(names)
    log.info("%s: its labels have no names; reading them all", self._where)
    smallest, largest = 0, -1
    for split in (name for name, its in info.splits.items() if its.num_examples):
      try:
        labels = [int(example["label"]) for example in read(split=split)]
      except Exception as e:  # a damaged record, or a split that is not whole
        raise UserError(f"{self._where}: labels of {split} cannot be read: {first_line(e)}") from e
      smallest, largest = min([smallest, *labels]), max([largest, *labels])
    if smallest < 0 or largest >= _MOST_CLASSES:
      raise UserError(
        f"{self._where}: its labels, {smallest} to {largest}, do not number classes from 0"
      )
    return tuple(str(i) for i in range(largest + 1))

  def __len__(self) -> int:
    return len(self._examples)

  def __getitem__(self, row: int) -> tuple[bytes, int]:
    try:
      example = self._examples[row]
    except Exception as e:
      raise UnreadableImage(first_line(e)) from e
    return example["image"], int(example["label"]) if self.class_names else -1

  def name(self, row: int) -> str:
    try:
      file = self._examples[row]["file_name"]
    except Exception:  # the record is damaged, or the dataset does not keep names
      return f"{self._where} row {row}"
    return f"{self._where} row {row} ({file.decode(errors='replace')})"

  def fingerprint(self) -> str:
    """SHA-256 of the dataset's name, config and version, the split, its size and the classes."""
    dataset = self._examples.dataset_info.full_name
    found = [dataset, self._split, len(self), self.class_names]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()
