"""What an ablation measures of every tokenizer."""

import functools

import numpy as np
from jaxtyping import Float, UInt8

from coda_jax.arrays import jit_module
from coda_jax.data import sources
from coda_jax.data.pipeline import normalize
from coda_jax.evaluation.evaluator import in_batches, outputs
from coda_jax.evaluation.features import vgg_features
from coda_jax.evaluation.image_quality import Quality, to_uint8
from coda_jax.evaluation.kernel import kernel_distance
from coda_jax.evaluation.metrics import QuantizationError, Results
from coda_jax.evaluation.reconstruction import (
  Batch,
  BatchResult,
  lpips_from,
  reconstruct_batch,
  through_vae,
)
from coda_jax.evaluation.runs import count_usage
from coda_jax.models.lpips import LPIPS
from coda_jax.models.tokenizer import Tokenizer
from coda_jax.models.vae import AutoencoderKL


class Images:
  """Held-out images, and what tokenizers are measured against.

  Args:
    source: where they come from.
    images: uint8 [N, S, S, 3], all or some of the source.
    lpips: without it LPIPS and VGG-KD are left out.
    resize_ratio: of the crops on which codes are counted, as in `pipeline.train_batches`.
    batch_size: images at a time.
  """

  def __init__(
    self,
    source: sources.ImageSource,
    images: UInt8[np.ndarray, "n h w 3"],
    lpips: LPIPS | None,
    resize_ratio: float,
    batch_size: int,
  ):
    self.source, self.images, self.lpips = source, images, lpips
    self.resize_ratio, self.batch_size = resize_ratio, batch_size
    self._features = None if lpips is None else vgg_features(lpips)
    self._real = self._pooled(images)

  def _pooled(self, images: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n d"] | None:
    """VGG features of images."""
    if self._features is None:
      return None
    batches = in_batches(images, self.batch_size)
    return np.concatenate([x for _, x in outputs(self._features, batches)])

  def _vgg_kd(self, made: list[UInt8[np.ndarray, "_ h w 3"]]) -> dict[str, float]:
    ours = self._pooled(np.concatenate(made))
    if ours is None or self._real is None or len(ours) < 2:
      return {}
    return {"vgg_kd": kernel_distance(ours, self._real)}

  def measure_vae(self, vae: AutoencoderKL) -> dict[str, float]:
    """PSNR, SSIM, LPIPS and VGG-KD of the continuous VAE, by the posterior's mean."""
    through = through_vae(vae)

    def reconstruct(x: np.ndarray) -> BatchResult:
      x = normalize(x)
      made = through(x)
      return BatchResult(made, lpips_from(self.lpips, x)(made))

    qualities, made = [], []
    for batch, result in outputs(reconstruct, in_batches(self.images, self.batch_size)):
      qualities.append(Quality.of(Batch(batch["image"], result)))
      made.append(to_uint8(result.images, "nearest"))
    return functools.reduce(Quality.merge, qualities).summary() | self._vgg_kd(made)

  def measure(self, tokenizer: Tokenizer, tokens_per_code: float) -> dict[str, float]:
    """Scalars of a tokenizer by name.

    Beside those of the trainers' evaluations:
      relative_error: quantization error / the latents' variance, in %; `/level_1` and so on.
      codes_used: of the codebook in %, on random crops with `tokens_per_code` tokens a code.
      vgg_kd: kernel distance of VGG features of reconstructions and originals.
      tokens, bits_per_pixel: of an image.
    """
    encode = jit_module(reconstruct_batch)(tokenizer)
    total, made = None, []

    def reconstruct(x: np.ndarray) -> BatchResult:
      x = normalize(x)
      result = encode(x)
      return result.replace(lpips=lpips_from(self.lpips, x)(result.images))

    for batch, result in outputs(reconstruct, in_batches(self.images, self.batch_size)):
      found = Results.of(Batch(batch["image"], result))
      total = found if total is None else total.merge(found)
      made.append(to_uint8(result.images, "nearest"))
    assert total is not None, "there are images"
    usage, _ = count_usage(
      tokenizer,
      self.source,
      tokens_per_code=tokens_per_code,
      every_level=False,
      resize_ratio=self.resize_ratio,
      batch_size=self.batch_size,
    )
    config = tokenizer.config
    relative = total[QuantizationError].relative * 100
    tokens = config.quantizer.tokens
    return {
      **total.summary(),
      **self._vgg_kd(made),
      "codes_used": usage.utilization * 100,
      "codes_perplexity": usage.perplexity,
      "relative_error": float(relative[-1]),
      "tokens": tokens,
      "bits_per_pixel": config.quantizer.bits / config.image_size**2,
      **{f"relative_error/level_{i}": float(x) for i, x in enumerate(relative, 1)},
    }
