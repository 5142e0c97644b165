"""Look-ups and starts at equal bits, for `python -m coda_jax.ablate`: docs/equal_bits.md.

64x64 photos, one budget a row, at 6800 bits an image (the demo's 680 tokens of 10 bits) and at
3400 (340 of them: four levels). The rows `vq_*`, `free_*` and `data_*` start from what
`coda_jax.discretize` made of the same VAE: demo/vq_6800 and demo/vq_3400 (`--images 4000`), with
`--method lloyd-max` demo/free_6800 and demo/free_3400, and with `--method coda` demo/data_6800 and
demo/data_3400 (`--patch-sizes 2,4,8,16`).
`--config.base.KEY=...` changes every row, as `--config.base.steps=1500`.

`configs/equal_bits.py:photos` has the rows that matter there at as many bits a pixel, on 256x256
crops of the whole photos that `python -m tools.make_photos --packages FOLDER --whole demo/whole`
writes. The starts are demo/vq_108800, demo/free_108800, demo/data_108800 (`--patch-sizes
4,8,12,16,20,24,32,40,52,64`) and those of 54400 (`--patch-sizes 8,16,32,64`).
"""

import dataclasses
import pathlib
import re

from coda_jax import cli
from coda_jax import config as c
from coda_jax.config import Line, Table
from coda_jax.errors import UserError
from coda_jax.models.quantizer import MAR_PATCH_SIZES

LEVELS = {6800: MAR_PATCH_SIZES, 3400: (2, 4, 8, 16)}
# 16 times the bits for 16 times the pixels.
LEVELS |= {16 * bits: tuple(4 * p for p in sides) for bits, sides in LEVELS.items()}
# Label and changes to the quantizer.
LOOKUPS = {
  "attention": ("attention (CODA)", {}),
  "euclidean": ("Euclidean (VQ)", {"lookup": "euclidean"}),
  "rotation": ("Euclidean, rotation trick", {"lookup": "euclidean", "gradient": "rotation"}),
  "product": ("product VQ", {"lookup": "product"}),
  "ibq": ("IBQ", {"lookup": "ibq"}),
  "fsq": ("FSQ", {"lookup": "fsq", "codebook_size": 1000}),
  "lfq": ("LFQ", {"lookup": "lfq"}),
  "bsq": ("BSQ", {"lookup": "bsq"}),
}
# The start has a quantizer of its own; of a Euclidean one it takes how the gradient passes.
ROTATION = {
  "tokenizer__quantizer__lookup": "euclidean",
  "tokenizer__quantizer__gradient": "rotation",
}
# Learning rates / that of the config: codes that come from data need small steps.
FROM_DATA = ((r"^vae\.", 0.3), (r"^quantizer\.", 0.1))
# Changes to the demo's config for 256x256 crops.
PHOTOS = {
  "tokenizer": {"image_size": 256},
  "data": {
    "train": "folder:demo/whole@train",
    "eval": "folder:demo/whole@val",
    "batch_size": 1,
    "resize_ratio": 1.125,
  },
  "eval": {"batch_size": 2},
}
COLUMNS = ("psnr", "ssim", "lpips", "vgg_kd", "relative_error", "codes_used")


def rows_at(bits: int) -> dict[str, dict]:
  """The rows at these bits an image."""
  rows = {}
  for name, (_, quantizer) in LOOKUPS.items():
    quantizer = {"patch_sizes": LEVELS[bits], **quantizer}
    changes = {f"tokenizer__quantizer__{key}": value for key, value in quantizer.items()}
    rows[f"{name}_{bits}"] = changes | {"tokenizer__lora": None}
    rows[f"{name}_lora_{bits}"] = changes
  vq, free, data = ({"tokenizer__start": f"demo/{name}_{bits}"} for name in ("vq", "free", "data"))
  for name, start in (("vq", vq), ("free", free)):
    rows[f"{name}_{bits}"] = start | {"trainable": ()}
    rows[f"{name}_decoder_lora_{bits}"] = start | {"trainable": (("LoRAParam", "decoder"),)}
  rows[f"free_lora_{bits}"] = free | {"trainable": (("LoRAParam", ""),)}
  rows[f"free_rotation_lora_{bits}"] = rows[f"free_lora_{bits}"] | ROTATION
  rows[f"free_all_{bits}"] = free | {"optimizer__rates": FROM_DATA}
  rows[f"data_{bits}"] = data | {"trainable": ()}
  rows[f"data_lora_{bits}"] = data | {"optimizer__rates": FROM_DATA}
  return rows


def table_at(bits: int) -> Table:
  """The table of `rows_at`."""
  lines = [Line("continuous VAE")]
  for name, (label, _) in LOOKUPS.items():
    lines.append(Line(label, f"{name}_{bits}"))
    lines.append(Line(f"{label}, LoRA", f"{name}_lora_{bits}"))
  lines.append(Line("attention (CODA) from data, not trained", f"data_{bits}"))
  lines.append(Line("attention (CODA) from data, LoRA", f"data_lora_{bits}"))
  for label, name in (("VQ", "vq"), ("Lloyd-Max", "free")):
    lines.append(Line(f"training-free, {label}", f"{name}_{bits}"))
    lines.append(
      Line(f"training-free, {label}, LoRA on the decoder", f"{name}_decoder_lora_{bits}")
    )
  lines.append(Line("training-free, Lloyd-Max, LoRA", f"free_lora_{bits}"))
  lines.append(Line("training-free, Lloyd-Max, LoRA, rotation trick", f"free_rotation_lora_{bits}"))
  lines.append(Line("training-free, Lloyd-Max, LoRA and its codes", f"free_all_{bits}"))
  return Table(f"{bits} bits an image", tuple((x, "") for x in COLUMNS), tuple(lines))


def get_config(arg: str = ""):
  if arg not in ("", "photos"):
    raise UserError(f"config argument {arg!r} is not photos")
  base = cli.load_config(str(pathlib.Path(__file__).with_name("demo.py")))
  base.update({"eval": {"every": 0}})
  bits = (6800, 3400)
  if arg == "photos":
    bits = (108_800, 54_400)
    base.update(PHOTOS)
  rows = {name: row for b in bits for name, row in rows_at(b).items()}
  tables = {str(b): table_at(b) for b in bits}
  if arg == "photos":
    # The rows that lead at 64x64, and the continuous VAE, whose row is "".
    kept = re.compile(r"(attention_lora|rotation_lora|data|data_lora|vq|vq_.*|free|free_.*)_\d+|")
    rows = {name: row for name, row in rows.items() if kept.fullmatch(name)}
    tables = {
      name: dataclasses.replace(t, lines=tuple(x for x in t.lines if kept.fullmatch(x.row)))
      for name, t in tables.items()
    }
  return c.config_dict(c.AblationConfig(base, rows, tables))
