"""Measurements of tokenizers and of the continuous VAE, for the report."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np
import tqdm
from jaxtyping import Int, UInt8

from coda_jax.arrays import jit_module
from coda_jax.data import pipeline, sources
from coda_jax.data.pipeline import normalize
from coda_jax.evaluation.codebook import CodebookUsage
from coda_jax.evaluation.evaluator import evaluate, in_batches, outputs
from coda_jax.evaluation.image_quality import Quality, to_uint8
from coda_jax.evaluation.metrics import QuantizationError, Results
from coda_jax.evaluation.reconstruction import (
  Batch,
  BatchResult,
  Encoded,
  decode_latents,
  encode_levels,
  lpips_from,
  through_vae,
)
from coda_jax.models.lpips import LPIPS
from coda_jax.models.tokenizer import Tokenizer, TokenizerConfig
from coda_jax.models.vae import AutoencoderKL

_VECTORS, _LIKELIEST = 16, 50  # vectors whose codes are compared, and codes (paper, Figure 5)
_CODES = 2**16  # codes that are drawn, at most
_SAMPLE, _PICTURES = 32, 8  # images whose levels are decoded one by one; those that are shown

# Measurements of one tokenizer, and tokenizers of one structure, share these compiled parts.
_encode = jit_module(encode_levels)
_ids = jit_module(Tokenizer.encode)
_decode = jit_module(decode_latents)
_batch_result = jax.jit(BatchResult.of)
_level_inputs = jax.jit(Encoded.level_inputs)


@dataclasses.dataclass(frozen=True)
class Latents:
  """Vectors for the pictures of latent space, of a few images.

  Attributes:
    continuous: [N, C] latents.
    quantized: [L, N, C] the latents quantized by the first 1 to L levels.
    level_inputs: [n, C] per level, the vectors that it looks up.
    codes: [v] ids of the codes that are drawn, all or evenly spread; values: [v, C] their vectors.
    usage: uses of the codes by the same images.
    confidence: [n, k] of n vectors that the last level looks up, the k likeliest codes' weights or
      distances, likeliest first; `confidence_label` says which.
  """

  continuous: np.ndarray
  quantized: np.ndarray
  level_inputs: Sequence[np.ndarray]
  codes: np.ndarray
  values: np.ndarray
  usage: CodebookUsage
  confidence: np.ndarray
  confidence_label: str


@dataclasses.dataclass(frozen=True)
class Run:
  """Measurements of one tokenizer.

  Attributes:
    name: as the report calls it.
    config: the tokenizer's.
    results: metrics of every image.
    usage: counts of the codes; `usage_source` names the images that they were counted on.
    level_quality: likeness with 1 to L levels, on a sample of the images.
    pictures: uint8 [n, L, H, W, 3] the first n images of the sample with 1 to L levels.
    latents: for the pictures of latent space.
    history: records of `metrics.jsonl`, or none.
    movement: [V, C] the vector of each code at steps of its training, or none.
  """

  name: str
  config: TokenizerConfig
  results: Results
  usage: CodebookUsage
  usage_source: str
  level_quality: Sequence[Quality]
  pictures: np.ndarray
  latents: Latents
  history: Sequence[Mapping] = ()
  movement: Mapping[int, np.ndarray] = dataclasses.field(default_factory=dict)

  @property
  def quality(self) -> Quality:
    """Likeness with all levels, on every image."""
    return self.results[Quality]

  @property
  def error(self) -> QuantizationError:
    """Quantization error of every image."""
    return self.results[QuantizationError]

  @property
  def images(self) -> int:
    """Number of images measured."""
    return len(self.quality.psnr)

  @property
  def tokens(self) -> int:
    """Tokens of an image of the training size."""
    return self.config.quantizer.tokens

  @property
  def bits_per_pixel(self) -> float:
    return self.config.quantizer.bits / self.config.image_size**2


@dataclasses.dataclass(frozen=True)
class Reference:
  """The continuous VAE, which all runs are compared with.

  Attributes:
    data: where the images come from and how they were cut, in words.
    quality: likeness of the continuous VAE's reconstructions, on every image.
    sample_quality: the same on the sample for which single levels are looked at.
    originals, continuous: uint8 [n, H, W, 3] the first n images of the sample, to be shown, and
      the VAE's reconstructions of them.
    lpips_note: why there is no LPIPS, or "".
  """

  data: str
  quality: Quality
  sample_quality: Quality
  originals: np.ndarray
  continuous: np.ndarray
  lpips_note: str = ""


def measure_vae(
  vae: AutoencoderKL,
  images: UInt8[np.ndarray, "n h w 3"],
  lpips: LPIPS | None,
  *,
  batch_size: int,
  data: str,
  lpips_note: str = "",
) -> Reference:
  """The continuous VAE on all images; `data` and `lpips_note` as in `Reference`."""
  through = through_vae(vae)

  def reconstruct(x: np.ndarray) -> BatchResult:
    x = normalize(x)
    made = through(x)
    return BatchResult(made, lpips_from(lpips, x)(made))

  qualities, pictures = [], []
  for batch, result in outputs(reconstruct, _batches(images, batch_size, "continuous VAE")):
    qualities.append(Quality.of(Batch(batch["image"], result)))
    pictures.append(to_uint8(result.images, "nearest"))
  quality, sample = functools.reduce(Quality.merge, qualities), _sample(len(images))
  shown = sample[:_PICTURES]
  continuous = np.concatenate(pictures)[shown]
  return Reference(data, quality, quality.take(sample), images[shown], continuous, lpips_note)


def measure_tokenizer(
  name: str,
  tokenizer: Tokenizer,
  images: UInt8[np.ndarray, "n h w 3"],
  lpips: LPIPS | None,
  *,
  batch_size: int,
) -> Run:
  """A tokenizer on all images, and level by level on the sample; codes are counted on the images.

  Args:
    name: what the report calls it.
    images: of the training size.
    lpips: without it LPIPS is left out.
    batch_size: images at a time.
  """
  encode, decode = _encode(tokenizer), _decode(tokenizer)
  levels = range(len(tokenizer.config.quantizer.patch_sizes))

  def with_all_levels(x: np.ndarray) -> BatchResult:
    x = normalize(x)
    encoded = encode(x)
    made = decode(encoded.quantized[:, -1])
    return _batch_result(encoded, made, lpips_from(lpips, x)(made))

  def by_level(x: np.ndarray) -> tuple[Encoded, list[BatchResult]]:
    x = normalize(x)
    encoded, distance = encode(x), lpips_from(lpips, x)
    made = [decode(encoded.quantized[:, k]) for k in levels]
    return encoded, [BatchResult(m, distance(m)) for m in made]

  results = evaluate(with_all_levels, _batches(images, batch_size, name))
  encodings, qualities, pictures = [], [], []
  sample = _batches(images[_sample(len(images))], batch_size, f"{name}, level by level")
  for batch, (encoded, made) in outputs(by_level, sample):
    encodings.append(encoded)
    qualities.append([Quality.of(Batch(batch["image"], result)) for result in made])
    pictures.append(np.stack([to_uint8(result.images, "nearest") for result in made], axis=1))
  return Run(
    name=name,
    config=tokenizer.config,
    results=results,
    usage=results[CodebookUsage],
    usage_source=f"the {len(images)} images",
    level_quality=[functools.reduce(Quality.merge, q) for q in zip(*qualities, strict=True)],
    pictures=np.concatenate(pictures)[:_PICTURES],
    latents=_latents(tokenizer, jax.tree.map(lambda *x: np.concatenate(x), *encodings)),
  )


def _latents(tokenizer: Tokenizer, encoded: Encoded) -> Latents:
  vectors = tokenizer.quantizer.vectors
  encoded = dataclasses.replace(
    encoded, latents=vectors(encoded.latents), quantized=vectors(encoded.quantized)
  )
  channels, levels = encoded.latents.shape[-1], len(encoded.ids)
  level_inputs = [np.asarray(x) for x in _level_inputs(encoded)]
  lookup, codes = tokenizer.quantizer, _spread(encoded.codebook_size, _CODES)
  sure = np.asarray(lookup.confidence(level_inputs[-1][_spread(len(level_inputs[-1]), _VECTORS)]))
  likeliest = np.argsort(-sure, axis=1)[:, :_LIKELIEST]
  return Latents(
    continuous=np.asarray(encoded.latents).reshape(-1, channels),
    quantized=np.moveaxis(np.asarray(encoded.quantized), 1, 0).reshape(levels, -1, channels),
    level_inputs=level_inputs,
    codes=codes,
    values=np.asarray(lookup.values_of(codes)),
    usage=CodebookUsage.count(encoded.ids, encoded.codebook_size, encoded.level_codes),
    confidence=np.abs(np.take_along_axis(sure, likeliest, axis=1)),
    confidence_label=lookup.confidence_label,
  )


def count_usage(
  tokenizer: Tokenizer,
  source: sources.ImageSource,
  *,
  tokens_per_code: float,
  every_level: bool,
  resize_ratio: float | None,
  batch_size: int,
) -> tuple[CodebookUsage, str]:
  """Usage of codes by random crops, always the same ones, and the crops in words.

  Args:
    tokens_per_code: the least number of tokens per code, over all levels or, with `every_level`,
      at every level.
    resize_ratio: as in `pipeline.train_batches`.
  """
  config, encode = tokenizer.config.quantizer, _ids(tokenizer)
  level_codes, codes_per_token = config.codes_by_level, config.codebook_size / config.tokens
  if every_level:
    levels = zip(level_codes, config.patch_sizes, strict=True)
    codes_per_token = max(codes / (p * p) for codes, p in levels)
  count = math.ceil(math.ceil(tokens_per_code * codes_per_token) / batch_size)
  usage = CodebookUsage.empty(config.codebook_size, level_codes)
  batches = pipeline.train_batches(
    source,
    image_size=tokenizer.config.image_size,
    batch_size=batch_size,
    seed=0,
    resize_ratio=resize_ratio,
    flip=True,
  )
  with batches:
    for _ in tqdm.trange(count, desc="counting codes", unit="batch", disable=None):
      ids = encode(normalize(next(batches)["image"]))
      usage = usage.merge(CodebookUsage.count(ids, config.codebook_size, level_codes))
  crops = f"{count * batch_size:,} random crops, half of them mirrored, of {len(source)} images"
  return usage, crops


def _batches(images: np.ndarray, size: int, what: str) -> Iterable[dict[str, np.ndarray]]:
  """`in_batches` with a progress bar named `what` on a terminal."""
  return tqdm.tqdm(in_batches(images, size), desc=what, unit="batch", disable=None)


def _sample(count: int) -> Int[np.ndarray, "m"]:
  """Rows of the images whose levels are decoded: evenly spread, those to be shown first."""
  rows = _spread(count, _SAMPLE)
  shown = rows[_spread(len(rows), _PICTURES)]
  return np.concatenate([shown, np.setdiff1d(rows, shown)])


def _spread(count: int, at_most: int) -> Int[np.ndarray, "m"]:
  """Up to `at_most` evenly spread rows of `count`."""
  n = min(count, at_most)
  return np.arange(n) * count // n
