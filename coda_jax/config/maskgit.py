"""Settings of a generator's training run."""

import dataclasses

from coda_jax.config.engine import ranged
from coda_jax.config.schema import (
  DTYPES,
  CheckpointSettings,
  DistributedSettings,
  EMASettings,
  EvalSettings,
  LoggingSettings,
  MeshSettings,
  OptimizerSettings,
  check_batch_size,
  check_choice,
)
from coda_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class MaskGITSettings:
  """A generator; classes or texts, levels and codes are those of the tokens.

  Attributes:
    width, depth, heads, mlp_ratio, embedding, attention: see `models.maskgit.MaskGITConfig`.
    num_classes: 0 takes the classes of the tokens; another number must be theirs.
  """

  width: int = ranged(768, least=1)
  depth: int = 24
  heads: int = ranged(8, least=1)
  mlp_ratio: float = ranged(4.0, above=0)
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
    text_encoder: directory that `python -m convert clip-text` wrote, of tokens with texts. Captions
      need it: the update runs it. Of embeddings it may be empty. What is named is copied into the
      generator.
  """

  tokenizer: str
  train: str
  eval: str = ""
  batch_size: int = 2048
  accumulation: int = 1
  text_encoder: str = ""

  def __post_init__(self):
    check_batch_size(self.batch_size, self.accumulation)


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
  a: float = ranged(12.0, above=0)
  b: float = ranged(3.0, above=0)
  order: str = "uniform"
  level_balance: float = ranged(0.0, most=1)

  def __post_init__(self):
    for key, choices in (("ratio", ("beta", "cosine")), ("order", ("uniform", "coarse_to_fine"))):
      check_choice(f"masking.{key}", getattr(self, key), choices)


@dataclasses.dataclass(frozen=True)
class MaskGITTrainConfig:
  """A generator's training run.

  Attributes:
    kind: "maskgit", by which `coda_jax.train` chooses the trainer.
    seed: decides initial weights, data order, masks, captions and what is dropped.
    dtype: of the transformer's computation; weights, norms, logits and losses are float32 always.
    remat: the backward pass computes the inside of each block again: less memory, a third more
      work.
    class_dropout: part of the images whose class or text is replaced by the null class or the
      empty text.
  """

  data: TokenDataSettings
  kind: str = "maskgit"
  model: MaskGITSettings = MaskGITSettings()
  masking: MaskingSettings = MaskingSettings()
  seed: int = ranged(0, most=2**32 - 1)
  steps: int = ranged(500_000, least=1)
  dtype: str = "bfloat16"
  remat: bool = False
  label_smoothing: float = ranged(0.1, most=1)
  class_dropout: float = ranged(0.15, most=1)
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
  distributed: DistributedSettings = DistributedSettings()
  mesh: MeshSettings = MeshSettings(
    rules=(
      (r"\.kernel$", ("", "fsdp")),
      (r"^embedding\.(codes|embedding)$", ("model", "")),
      (r"^token_embedding$", ("", "fsdp")),
      (r"^bias$", ("model",)),
    )
  )

  def __post_init__(self):
    if self.kind != "maskgit":
      raise UserError(f"config.kind={self.kind!r}; a generator's is 'maskgit'")
    check_choice("dtype", self.dtype, DTYPES)
