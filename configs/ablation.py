"""The paper's ablations, for `python -m coda_jax.ablate`.

`configs/ablation.py:mar`: Tables 1, 4a, 4b, 4c and Figure 4 at the paper's size, V = 65536.
`configs/ablation.py`: the same at the demo's size. 64x64 photos, the paper's ten levels and one
budget a row, with 1024 codes, and in Table 4b 64 to 4096 in the place of 1024 to 65536.
`--config.base.KEY=...` changes every row.
"""

import pathlib

from coda_jax import cli
from coda_jax import config as c
from coda_jax.config import Line, Table
from coda_jax.errors import UserError
from coda_jax.models.quantizer import MAR_PATCH_SIZES

EUCLIDEAN = {
  "tokenizer__lora": None,
  "tokenizer__quantizer__lookup": "euclidean",
  "tokenizer__quantizer__beta": None,
}
ROWS = {
  "vq": EUCLIDEAN | {"tokenizer__quantizer__patch_sizes": MAR_PATCH_SIZES[-1:]},
  "rq": EUCLIDEAN,
  "attention": {"tokenizer__lora": None},
  "full": {},
  "encoder": {"tokenizer__lora__decoder": False},
  "decoder": {"tokenizer__lora__encoder": False},
  "layer_norm": {"tokenizer__quantizer__norm": "layer"},
  "no_norm": {"tokenizer__quantizer__norm": "none"},
  # With the finest levels: (13, 16), then (8, 10, 13, 16), ...
  "rq_2_levels": EUCLIDEAN | {"tokenizer__quantizer__patch_sizes": MAR_PATCH_SIZES[-2:]},
  "rq_4_levels": EUCLIDEAN | {"tokenizer__quantizer__patch_sizes": MAR_PATCH_SIZES[-4:]},
  "rq_7_levels": EUCLIDEAN | {"tokenizer__quantizer__patch_sizes": MAR_PATCH_SIZES[-7:]},
}


def paper(rfid, psnr, ssim, error=None, used=None) -> dict[str, float]:
  """Published figures; the codes used in percent."""
  found = {"rfid": rfid, "psnr": psnr, "ssim": ssim, "error": error, "used": used}
  return {k: float(x) for k, x in found.items() if x is not None}


# A measure of ours and the paper's figure that it is beside.
IMAGES = (("vgg_kd", "rfid"), ("lpips", "rfid"), ("psnr", "psnr"), ("ssim", "ssim"))
LATENTS = (("relative_error", "error"), ("codes_used", "used"))
VQ, RQ = paper(41.52, 18.9, 0.461, 0.181, 49), paper(14.23, 20.6, 0.533, 0.094, 51)
TABLES = {
  "1": Table(
    "Table 1: from vector quantization to CODA",
    IMAGES + LATENTS,
    (
      Line("continuous VAE", paper=paper(0.69, 24.9, 0.716)),
      Line("vector quantization", "vq", VQ),
      Line("+ residual levels", "rq", RQ),
      Line("+ attention look-up", "attention", paper(7.06, 21.4, 0.571, 0.065, 100)),
      Line("+ adapted VAE", "full", paper(1.34, 22.2, 0.602, 0.001, 100)),
    ),
  ),
  "4a": Table(
    "Table 4a: the adapted half of the VAE",
    IMAGES + LATENTS,
    (
      Line("neither", "attention", paper(7.06, 21.4, 0.571)),
      Line("encoder", "encoder", paper(5.75, 21.3, 0.551)),
      Line("decoder", "decoder", paper(1.59, 22.1, 0.604)),
      Line("both", "full", paper(1.34, 22.2, 0.602)),
    ),
  ),
  "4c": Table(
    "Table 4c: norm of queries and keys",
    IMAGES + LATENTS,
    (
      Line("none", "no_norm", paper(1.87, 21.51, 0.570)),
      Line("LayerNorm", "layer_norm", paper(1.37, 22.1, 0.600)),
      Line("RMSNorm", "full", paper(1.34, 22.2, 0.602)),
    ),
  ),
  # The paper prints the figures of both ends alone.
  "figure_4": Table(
    "Figure 4: levels of residual quantization",
    LATENTS[:1] + IMAGES + LATENTS[1:],
    (
      Line("1", "vq", VQ, 1.0),
      Line("2", "rq_2_levels", x=2.0),
      Line("4", "rq_4_levels", x=4.0),
      Line("7", "rq_7_levels", x=7.0),
      Line("10", "rq", RQ, 10.0),
    ),
    axis="levels",
  ),
}


# Codes of Table 4b and what the paper reports.
SIZES = {
  1024: paper(2.07, 21.2, 0.561),
  4096: paper(1.76, 21.7, 0.582),
  16384: paper(1.43, 22.0, 0.594),
  65536: paper(1.34, 22.2, 0.602),
}


def sizes_table(scale: int, codes: int) -> tuple[dict[str, dict], Table]:
  """Rows and table of the codebook's size: the paper's / `scale`; the base has `codes`."""
  rows, lines = {}, []
  for published, figures in SIZES.items():
    ours = published // scale
    row = "full" if ours == codes else f"codes_{ours}"
    rows[row] = {} if ours == codes else {"tokenizer__quantizer__codebook_size": ours}
    label = f"{ours} (paper: {published})" if scale > 1 else str(ours)
    lines.append(Line(label, row, figures, float(ours)))
  axis = f"codes (paper: x {scale})" if scale > 1 else "codes"
  return rows, Table("Table 4b: codebook size", IMAGES + LATENTS, tuple(lines), axis)


def get_config(arg: str = "demo"):
  if arg not in ("demo", "mar"):
    raise UserError(f"config argument {arg!r} is none of demo, mar")
  base = cli.load_config(str(pathlib.Path(__file__).with_name(f"{arg}.py")))
  base.update({"checkpoint": {"keep": 8}})  # for pictures of how the codes move
  if arg == "demo":
    base.update({"steps": 120, "eval": {"every": 0}, "checkpoint": {"every": 20}})
    rows, sizes = sizes_table(16, 1024)
  else:
    base.update({"tokenizer": {"quantizer": {"codebook_size": 65536}}})
    rows, sizes = sizes_table(1, 65536)
  return c.config_dict(c.AblationConfig(base, ROWS | rows, TABLES | {"4b": sizes}))
