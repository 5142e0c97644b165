"""Metrics of a tokenizer's reconstructions: `METRICS` lists them, `Results` holds their values.

A further metric is a class with the methods of `Metric` and an entry in `METRICS`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np
from flax import struct
from jaxtyping import Float

from coda_jax.evaluation.codebook import CodebookUsage
from coda_jax.evaluation.image_quality import Quality
from coda_jax.evaluation.reconstruction import Batch


@runtime_checkable
class Metric(Protocol):
  """A measurement of some images; a `flax.struct.dataclass` of NumPy arrays."""

  @classmethod
  def of(cls, batch: Batch) -> "Metric":
    """The metric of one batch of N >= 0 images."""
    ...

  def merge(self, other: Any) -> "Metric":
    """The metric of the images of both; `other` is of the same class."""
    ...

  def summary(self) -> dict[str, float]:
    """Scalars by name; a scalar of one level is `NAME/level_1` and so on."""
    ...


M = TypeVar("M", bound=Metric)


@struct.dataclass
class QuantizationError:
  """Error of the quantized latents of N images.

  Attributes:
    levels: [N, L] mean squared error after each level.
    latent_mean: [N, C], latent_power: [N], mean and mean square of the continuous latents.
  """

  levels: Float[np.ndarray, "n levels"]
  latent_mean: Float[np.ndarray, "n c"]
  latent_power: Float[np.ndarray, "n"]

  @classmethod
  def of(cls, batch: Batch) -> "QuantizationError":
    result = batch.result
    assert result.level_errors is not None, "a VAE without tokens quantizes nothing"
    values = result.level_errors, result.latent_mean, result.latent_power
    return cls(*map(np.asarray, values))

  def merge(self, other: "QuantizationError") -> "QuantizationError":
    return jax.tree.map(lambda a, b: np.concatenate([a, b]), self, other)

  @property
  def latent_variance(self) -> float:
    """Variance of the continuous latents, mean over channels: the error of no quantizer at all."""
    means = np.mean(self.latent_mean, axis=0, dtype=np.float64)
    return float(np.mean(self.latent_power, dtype=np.float64) - np.mean(np.square(means)))

  @property
  def relative(self) -> Float[np.ndarray, "levels"]:
    """Error after each level as a fraction of the latents' variance."""
    return self.levels.mean(axis=0, dtype=np.float64) / self.latent_variance

  def summary(self) -> dict[str, float]:
    """The error after all levels, and after each level."""
    errors = self.levels.mean(axis=0)
    by_level = {f"quantization_error/level_{i}": float(x) for i, x in enumerate(errors, 1)}
    return {"quantization_error": float(errors[-1])} | by_level


METRICS: tuple[type[Metric], ...] = (Quality, QuantizationError, CodebookUsage)


@struct.dataclass
class Results:
  """Metrics of the same images. `results[Quality]` is the one of that class."""

  metrics: tuple[Metric, ...]

  @classmethod
  def of(cls, batch: Batch, metrics: Sequence[type[Metric]] = METRICS) -> "Results":
    return cls(tuple(metric.of(batch) for metric in metrics))

  def merge(self, other: "Results") -> "Results":
    pairs = zip(self.metrics, other.metrics, strict=True)
    return Results(tuple(ours.merge(theirs) for ours, theirs in pairs))

  def __getitem__(self, kind: type[M]) -> M:
    for metric in self.metrics:
      if isinstance(metric, kind):
        return metric
    raise KeyError(kind.__name__)

  def summary(self) -> dict[str, float]:
    """Scalars of all metrics by name, those of single levels last. Trainers log them."""
    values = {name: x for metric in self.metrics for name, x in metric.summary().items()}
    return {name: values[name] for name in sorted(values, key=lambda name: "/" in name)}


# The scalars of a terminal's line: name -> label and format.
_SHOWN = {
  "loss": ("loss", ".4g"),
  "accuracy": ("accuracy", ".1%"),
  "psnr": ("PSNR", ".2f"),
  "ssim": ("SSIM", ".3f"),
  "lpips": ("LPIPS", ".3f"),
  "quantization_error": ("quantization error", ".2g"),
  "codebook_utilization": ("codes used", ".1%"),
}


def short_line(values: Mapping[str, float | int]) -> str:
  """At most five scalars of an evaluation in one line for a terminal; "" if none is known.

  `PSNR 23.92  SSIM 0.740  LPIPS 0.260  quantization error 0.17  codes used 99.0%` for a tokenizer,
  `loss 5.213  accuracy 4.1%` for a generator.
  """
  shown = [(label, form, values[k]) for k, (label, form) in _SHOWN.items() if k in values]
  return "  ".join(
    f"{label} {x:{form}}" if math.isfinite(x) else f"{label} –" for label, form, x in shown[:5]
  )
