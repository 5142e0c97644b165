"""What a figure was measured on and how: the record that every result carries.

Nothing in it is guessed: what a file does not say is null, and `same_preprocessing` is null where
one side does not say how its images were cut.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import coda_jax
from coda_jax.evaluation.conventions import Convention


@dataclasses.dataclass(frozen=True)
class Side:
  """One side of a comparison.

  Attributes:
    name: a data spec, a file or a model.
    images: how many; None where a statistics file does not say.
    hash: SHA-256 of a file, or of the list of images of a data spec.
    crop, resize: how images were cut and by which filter they were brought to their size.
  """

  name: str
  images: int | None
  hash: str | None = None
  crop: str | None = None
  resize: str | None = None


def preprocessing(image_size: int, resize_ratio: float | None, crop: str = "centre") -> dict:
  """`crop` and `resize` of a `Side` whose images `data.pipeline` cut."""
  cut = f"{crop} {image_size} x {image_size}"
  if resize_ratio is None:
    return {"crop": cut, "resize": "as stored"}
  return {"crop": cut, "resize": f"Lanczos, shorter edge to {round(resize_ratio * image_size)}"}


def same_preprocessing(a: Side, b: Side) -> bool | None:
  """Whether both sides were cut and resized alike; None if one of them does not say."""
  if None in (a.crop, a.resize, b.crop, b.resize):
    return None
  return (a.crop, a.resize) == (b.crop, b.resize)


def record(
  samples: Side,
  reference: Side,
  convention: Convention,
  *,
  posterior: str | None = None,
  averaged_weights: bool | None = None,
  weights: Mapping[str, str] | None = None,
  sampler: Mapping[str, Any] | None = None,
  bits_per_image: float | None = None,
  bits_per_pixel: float | None = None,
) -> dict[str, Any]:
  """The record of a result, for JSON.

  Args:
    posterior: "mean" or "sample" of the VAE's posterior; None where no image is encoded.
    averaged_weights: whether the model's weights are a moving average; None if it does not say.
    weights: fingerprints of the model and of the networks that measure, by name.
    sampler: a generator's settings, seed among them.
    bits_per_image: tokens times log2 of the codes; None for a model without tokens.
    bits_per_pixel: the same by pixel.
  """
  return {
    "version": coda_jax.__version__,
    "samples": dataclasses.asdict(samples),
    "reference": dataclasses.asdict(reference),
    "same_preprocessing": same_preprocessing(samples, reference),
    **convention.describe(),
    "posterior": posterior,
    "averaged_weights": averaged_weights,
    "weights": dict(weights or {}),
    "sampler": None if sampler is None else dict(sampler),
    "bits_per_image": bits_per_image,
    "bits_per_pixel": bits_per_pixel,
  }


def lines(found: Mapping[str, Any]) -> list[str]:
  """The record in words, a line for each fact, as it is printed beside figures."""

  def side(x: Mapping[str, Any]) -> str:
    parts = [x["name"], f"{x['images']} images" if x["images"] else "number of images not stated"]
    parts += [x["crop"] or "crop not stated", x["resize"] or "resize not stated"]
    return "; ".join(parts + ([f"SHA-256 {x['hash'][:12]}"] if x["hash"] else []))

  alike = {True: "cut and resized alike", False: "cut or resized differently", None: "not stated"}
  out = [
    f"samples: {side(found['samples'])}",
    f"reference: {side(found['reference'])}",
    f"both sides: {alike[found['same_preprocessing']]}",
    f"convention {found['convention']}: {found['input']}; {found['resize']}; "
    f"{found['normalisation']}",
  ]
  if found["posterior"]:
    out.append(f"posterior: {found['posterior']}")
  averaged = {True: "averaged", False: "not averaged", None: "averaged or not: not stated"}
  short = lambda v: v[:12] if re.fullmatch("[0-9a-f]{64}", v) else v
  hashes = ", ".join(f"{k} {short(v)}" for k, v in found["weights"].items())
  out.append(f"weights: {averaged[found['averaged_weights']]}{'; ' if hashes else ''}{hashes}")
  if found["sampler"] is not None:
    out.append("sampler: " + ", ".join(f"{k} {v}" for k, v in found["sampler"].items()))
  if found["bits_per_image"] is not None:
    bits = found["bits_per_image"]
    out.append(f"bits: {bits:.0f} an image, {found['bits_per_pixel']:.3f} a pixel")
  return out
