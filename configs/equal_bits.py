"""Look-ups and starts at equal bits, for `python -m coda_jax.ablate`: docs/equal_bits.md.

64x64 photos, one budget a row, at 6800 bits an image (the demo's 680 tokens of 10 bits) and at
3400 (340 of them: four levels). The rows `free_*` start from what `coda_jax.discretize` made of the
same VAE with `--output demo/free_6800` and `demo/free_3400`; their codes stay as they are.
`--config.base.KEY=...` changes every row, as `--config.base.steps=1500`.
"""

import pathlib

from coda_jax import cli
from coda_jax import config as c
from coda_jax.config import Line, Table
from coda_jax.errors import UserError

LEVELS = {6800: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 3400: (2, 4, 8, 16)}
LOOKUPS = {
  "attention": {},
  "euclidean": {"lookup": "euclidean"},
  "rotation": {"lookup": "euclidean", "gradient": "rotation"},
  "product": {"lookup": "product"},
  "ibq": {"lookup": "ibq"},
  "fsq": {"lookup": "fsq", "codebook_size": 1000},
  "lfq": {"lookup": "lfq"},
  "bsq": {"lookup": "bsq"},
}
NAMES = {
  "attention": "attention (CODA)",
  "euclidean": "Euclidean (VQ)",
  "rotation": "Euclidean, rotation trick",
  "product": "product VQ",
  "ibq": "IBQ",
  "fsq": "FSQ",
  "lfq": "LFQ",
  "bsq": "BSQ",
}
COLUMNS = ("psnr", "ssim", "lpips", "vgg_kd", "relative_error", "codes_used")


def rows_at(bits: int) -> dict[str, dict]:
  """The rows at these bits an image."""
  rows = {}
  for name, changes in LOOKUPS.items():
    changes = {"beta": None} | changes if name != "attention" else changes
    changes = {"patch_sizes": LEVELS[bits], **changes}
    changes = {f"tokenizer__quantizer__{key}": value for key, value in changes.items()}
    rows[f"{name}_{bits}"] = changes | {"tokenizer__lora": None}
    rows[f"{name}_lora_{bits}"] = changes
  start = {"tokenizer__start": f"demo/free_{bits}"}
  for name, half in (("decoder_", "decoder"), ("", "")):
    rows[f"free_{name}lora_{bits}"] = start | {"trainable": (("LoRAParam", half),)}
  return rows


def table_at(bits: int) -> Table:
  """The table of `rows_at`."""
  lines = [Line("continuous VAE")]
  for name in LOOKUPS:
    lines.append(Line(NAMES[name], f"{name}_{bits}"))
    lines.append(Line(f"{NAMES[name]}, LoRA", f"{name}_lora_{bits}"))
  lines.append(Line("training-free, LoRA on the decoder", f"free_decoder_lora_{bits}"))
  lines.append(Line("training-free, LoRA", f"free_lora_{bits}"))
  return Table(f"{bits} bits an image", tuple((x, "") for x in COLUMNS), tuple(lines))


def get_config(arg: str = ""):
  if arg:
    raise UserError(f"config argument {arg!r}: there is none")
  base = cli.load_config(str(pathlib.Path(__file__).with_name("demo.py")))
  base.update({"eval": {"every": 0}})
  rows = {name: row for bits in LEVELS for name, row in rows_at(bits).items()}
  return c.config_dict(c.AblationConfig(base, rows, {str(b): table_at(b) for b in LEVELS}))
