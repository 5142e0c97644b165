import re

import numpy as np
from PIL import Image

from coda_jax.evaluation import report
from coda_jax.evaluation.codebook import CodebookUsage
from coda_jax.evaluation.image_quality import Quality
from coda_jax.evaluation.metrics import QuantizationError, Results
from coda_jax.evaluation.runs import Latents, Reference, Run
from tests import tiny

LEVELS, CODES, IMAGES = 4, 64, 5


def quality(level: int, count: int, lpips: bool) -> Quality:
  psnr = 20.0 + level + np.arange(count)
  return Quality(
    psnr, 0.8 + 0.01 * psnr / 100, np.full(count, 0.5 - 0.1 * level) if lpips else None
  )


def run(name: str, *, offset: int = 0, lpips: bool = True, history=()) -> Run:
  rng = np.random.default_rng(offset)
  usage = CodebookUsage(tuple(rng.integers(0, 3, (LEVELS, CODES))), CODES)
  errors = np.tile(np.float32([0.8, 0.4, 0.2, 0.1]), (IMAGES, 1))
  error = QuantizationError(errors, np.zeros((IMAGES, 16), np.float32), np.ones(IMAGES, np.float32))
  results = Results((quality(3 + offset, IMAGES, lpips), error, usage))
  vectors = rng.normal(size=(64, 16)).astype(np.float32)
  latents = Latents(
    vectors, np.stack([vectors] * LEVELS), [vectors[: p * p] for p in (1, 2, 3, 8)],
    np.arange(CODES), rng.normal(size=(CODES, 16)).astype(np.float32), usage,
    np.sort(rng.uniform(size=(16, 50))), "distance",
  )  # fmt: skip
  movement = {step: latents.values * step for step in (1, 2)} if history else {}
  return Run(
    name,
    tiny.TOKENIZER,
    results,
    usage,
    "the 5 images",
    [quality(k + offset, IMAGES, lpips) for k in range(LEVELS)],
    rng.integers(0, 256, (2, LEVELS, 16, 16, 3), np.uint8),
    latents,
    history,
    movement,
  )


def reference(lpips: bool = True) -> Reference:
  images = np.zeros((2, 16, 16, 3), np.uint8)
  vae = quality(9, IMAGES, lpips)
  note = "" if lpips else "LPIPS is left out: no weights"
  return Reference("5 of folder:x", vae, vae, images, images, note)


HISTORY = [
  {
    "kind": "train",
    "step": 10,
    "loss": 2.0,
    "usage/0": 0.1,
    "usage/1": 0.2,
    "images_per_second": 9,
  },
  {"kind": "eval", "step": 10, "psnr": 20.0, "error/level_1": 0.5},
  {"kind": "train", "step": 20, "loss": None, "usage/0": 0.3, "usage/1": 0.4},
  {"kind": "eval", "step": 20, "psnr": 21.0, "error/level_1": 0.4},
  {"kind": "train", "step": 30, "loss": 1.0, "only_once": 1.0},
]


def test_report_is_one_file_that_needs_nothing(tmp_path):
  runs = [run("LoRA & <friends>", offset=1, history=HISTORY), run("without")]
  files = report.write_report(tmp_path / "report.html", "A <title>", runs, reference())
  names = "confidence curves grid level_curves levels movement usage".split()
  names += "pca pca_2 pca_codes pca_codes_2".split()
  assert {p.name for p in files} == {"report.html", *(f"{n}.png" for n in names)}
  for file in files[1:]:
    Image.open(file).verify()
  text = (tmp_path / "report.html").read_text()
  assert not re.search(r'(src|href)="(?!data:)', text) and "url(" not in text
  assert "<script" not in text and "http" not in text
  assert "LoRA &amp; &lt;friends&gt;" in text and "<friends>" not in text
  assert text.count("data:image/png;base64,") == len(files) - 1
  # Mean PSNR 20 + 4 + 2, against 20 + 3 + 2 of the other run and 20 + 9 + 2 of the VAE.
  assert "26.00 dB" in text and "5.00 dB below the continuous VAE" in text
  assert "PSNR is 1.00 dB (± 0.00) higher, LPIPS 50% lower" in text
  assert "10.0%" in text  # quantization error / variance
  assert "tokens per code" in text


def test_report_without_lpips_and_training(tmp_path):
  files = report.write_report(
    tmp_path / "report.html", "t", [run("one", lpips=False)], reference(lpips=False)
  )
  text = files[0].read_text()
  assert "LPIPS is left out: no weights" in text
  assert "<h2>Training</h2>" not in text and not (tmp_path / "curves.png").exists()
  assert not (tmp_path / "movement.png").exists()
