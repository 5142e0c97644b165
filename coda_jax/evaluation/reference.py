"""Statistics files of reference sets, those of other tools and ours.

pytorch-fid and clean-fid keep `mu` and `sigma` (clean-fid's for KID: `feats`), ADM keeps `mu`,
`sigma`, `mu_s`, `sigma_s` and some of the images, `arr_0`. Ours are ADM's with one more entry,
`coda_jax`: JSON that says how they were made, which other tools do not read.
"""

import dataclasses
import json
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from coda_jax import outputs
from coda_jax.errors import UserError
from coda_jax.evaluation.frechet import FeatureStatistics, Moments
from coda_jax.evaluation.image_files import KEY, ImageFile, readable, sha256
from coda_jax.models.inception import POOL3, SPATIAL

_FORMS = "statistics (mu, sigma) of pytorch-fid, ADM or clean-fid"
_WIDTHS = {"mu": POOL3, "mu_s": SPATIAL}


@dataclasses.dataclass(frozen=True)
class Reference:
  """A reference set as a file tells it.

  Attributes:
    path: the file.
    hash: its SHA-256.
    pool3, spatial: moments for FID and sFID, or None.
    features: [N, 2048] for KID (clean-fid's `feats`), or None.
    images: ADM's images, for what needs features of single images, or None.
    fields: what our own files say of themselves: `convention`, `images`, ...; others say nothing.
  """

  path: pathlib.Path
  hash: str
  pool3: Moments | None
  spatial: Moments | None
  features: np.ndarray | None
  images: ImageFile | None
  fields: Mapping[str, Any]

  @property
  def count(self) -> int | None:
    """Images that the moments are of, if the file says so."""
    return self.fields.get("images")

  def check_convention(self, name: str) -> None:
    """Raises UserError if the moments were made by another convention."""
    theirs = self.fields.get("convention", name)
    if theirs != name:
      raise UserError(
        f"{self.path} holds statistics of convention {theirs!r}, not {name!r}; take "
        f"--convention {theirs}, or make statistics anew"
      )


def read_reference(path: pathlib.Path) -> Reference:
  """The statistics of an `.npz` file.

  Raises:
    UserError: missing, damaged, without statistics or images, of another dimension, or not finite.
  """
  wanted = ("mu", "sigma", "mu_s", "sigma_s", "feats", "coda_jax")
  with readable(path, f"an .npz file with {_FORMS}"), path.open("rb") as raw:
    if not zipfile.is_zipfile(raw):
      raise ValueError("no archive of arrays")
    raw.seek(0)
    with np.load(raw, allow_pickle=False) as f:
      names = set(f.files)
      found = {k: f[k] for k in wanted if k in names}
  if not {"mu", "feats", KEY} & names:
    there = ", ".join(sorted(names)) or "nothing"
    raise UserError(f"{path} holds no {_FORMS}; it has {there}")
  fields = json.loads(str(found["coda_jax"])) if "coda_jax" in found else {}
  images = ImageFile(path) if KEY in names else None
  if not {"mu", "feats"} & names and images is not None:
    fields = {"images": len(images)}
  features = found.get("feats")
  if features is not None and (features.ndim != 2 or features.shape[1] != POOL3):
    raise UserError(
      f"{path}: feats has shape {list(features.shape)}; Inception's features are [N, {POOL3}]"
    )
  return Reference(
    path=path,
    hash=sha256(path),
    pool3=_moments(found, "mu", "sigma", path),
    spatial=_moments(found, "mu_s", "sigma_s", path),
    features=features,
    images=images,
    fields=fields,
  )


def _moments(found: Mapping[str, np.ndarray], mu: str, sigma: str, path) -> Moments | None:
  if mu not in found and sigma not in found:
    return None
  if mu not in found or sigma not in found:
    raise UserError(f"{path} holds {mu if mu in found else sigma} without the other of its pair")
  mean, covariance = np.atleast_1d(found[mu]), np.atleast_2d(found[sigma])
  n = _WIDTHS[mu]
  if mean.shape != (n,) or covariance.shape != (n, n):
    raise UserError(
      f"{path}: {mu} and {sigma} have shapes {list(mean.shape)} and {list(covariance.shape)}, "
      f"expected [{n}] and [{n}, {n}]: they are of another network or readout"
    )
  if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
    raise UserError(f"{path}: {mu} or {sigma} holds NaN or infinity: the file is damaged")
  return Moments(mean.astype(np.float64), covariance.astype(np.float64))


def write_statistics(
  path: pathlib.Path,
  pool3: FeatureStatistics | Moments,
  spatial: FeatureStatistics | Moments | None,
  fields: Mapping[str, Any],
) -> None:
  """Writes `mu`, `sigma`, `mu_s`, `sigma_s`, which pytorch-fid, ADM and clean-fid read.

  Args:
    path: the `.npz` file, which appears only when it is whole.
    spatial: sFID's, or None.
    fields: what is to be known of them, `convention` and `images` among it.
  """
  arrays: dict[str, Any] = {"mu": pool3.mean, "sigma": pool3.covariance}
  if spatial is not None:
    arrays |= {"mu_s": spatial.mean, "sigma_s": spatial.covariance}
  arrays["coda_jax"] = np.array(json.dumps(fields))
  with outputs.replaced(path) as aside, aside.open("wb") as f:
    np.savez(f, **arrays)
