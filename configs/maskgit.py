"""MaskGIT on CODA tokens: `configs/maskgit.py:mar_l`, `mar_s`, `flux_l`, `flux_s` or `demo`.

Of texts: `coco_s` (the paper's Table 5) or `text_demo`.
"""

import dataclasses

from coda_jax import config as c
from coda_jax.errors import UserError

SIZES = {
  "l": c.MaskGITSettings(width=768, depth=24, heads=8),
  "s": c.MaskGITSettings(width=512, depth=12, heads=8),
}


def get_config(arg: str = "mar_l"):
  named = {"demo": demo, "coco_s": coco, "text_demo": text_demo}
  if arg in named:
    return c.config_dict(named[arg]())
  vae, _, size = arg.partition("_")
  if vae not in ("mar", "flux") or size not in SIZES:
    known = ", ".join(["mar_l", "mar_s", "flux_l", "flux_s", *named])
    raise UserError(f"config argument {arg!r} is none of {known}")
  data = c.TokenDataSettings(tokenizer=f"runs/{vae}/tokenizer", train=f"tokens/{vae}/train")
  return c.config_dict(c.MaskGITTrainConfig(data=data, model=SIZES[size]))


def demo() -> c.MaskGITTrainConfig:
  """A small model on 32x32 tokens of six classes of the embedded photos: half an hour of two cores.

  `docs/generation.md` has the commands that make the tokens.
  """
  return c.MaskGITTrainConfig(
    data=c.TokenDataSettings(
      tokenizer="runs/demo_tokenizer/tokenizer",
      train="demo/tokens/train",
      eval="demo/tokens/val",
      batch_size=16,
    ),
    model=c.MaskGITSettings(width=128, depth=6, heads=4, embedding="table"),
    # So few updates teach more if they need not cover every mix of levels, and if the few coarse
    # tokens count.
    masking=c.MaskingSettings(ratio="cosine", order="coarse_to_fine", level_balance=0.5),
    label_smoothing=0.0,
    steps=3_000,
    dtype="float32",
    optimizer=c.OptimizerSettings(
      learning_rate=2e-3,
      b1=0.9,
      b2=0.99,
      weight_decay=((r"\.kernel$", 0.03),),
      clip=1.0,
      warmup_steps=100,
    ),
    ema=c.EMASettings(decay=0.999, start_epoch=0),
    eval=c.EvalSettings(every=500, images=120, batch_size=8, lpips=False),
    checkpoint=c.CheckpointSettings(every=250, best_metric="-loss"),
    logging=c.LoggingSettings(every=20),
  )


def coco() -> c.MaskGITTrainConfig:
  """MaskGIT-S on COCO's captions, as U-ViT trains (arXiv 2209.12152): the paper's Table 5.

  `docs/text_to_image.md` has the commands that make the tokens.
  """
  config = c.MaskGITTrainConfig(
    data=c.TokenDataSettings(
      tokenizer="runs/mar/tokenizer",
      train="tokens/coco/train",
      batch_size=256,
      text_encoder="checkpoints/clip",
    ),
    model=SIZES["s"],
    steps=1_000_000,
    class_dropout=0.1,
  )
  return c.changed(config, optimizer__learning_rate=2e-4)


def text_demo() -> c.MaskGITTrainConfig:
  """A small model on 64x64 drawn shapes and their captions, for two cores.

  `docs/text_to_image.md` has the commands that draw them and make the tokens.
  """
  return dataclasses.replace(
    demo(),
    data=c.TokenDataSettings(
      tokenizer="demo/shapes_tokenizer",
      train="tokens/shapes/train",
      eval="tokens/shapes/unseen",
      batch_size=32,
      text_encoder="demo/text_encoder",
    ),
    steps=4_000,
    class_dropout=0.1,
  )
