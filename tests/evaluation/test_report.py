import re

import numpy as np
import pytest
from PIL import Image

from coda_jax.evaluation import figures, report
from coda_jax.evaluation.codebook import CodebookUsage
from coda_jax.evaluation.reconstruction import Quality, ReconstructionMetrics
from tests import tiny

LEVELS, CODES, IMAGES = 4, 64, 5


def quality(level: int, count: int, lpips: bool) -> Quality:
  psnr = 20.0 + level + np.arange(count)
  return Quality(
    psnr, 0.8 + 0.01 * psnr / 100, np.full(count, 0.5 - 0.1 * level) if lpips else None
  )


def run(name: str, *, offset: int = 0, lpips: bool = True, history=()) -> report.Run:
  rng = np.random.default_rng(offset)
  usage = CodebookUsage(rng.integers(0, 3, (LEVELS, CODES)))
  errors = np.tile([0.8, 0.4, 0.2, 0.1], (IMAGES, 1))
  metrics = ReconstructionMetrics(
    quality(3 + offset, IMAGES, lpips), errors, np.zeros((IMAGES, 16)), np.ones(IMAGES), usage
  )
  vectors = rng.normal(size=(64, 16)).astype(np.float32)
  latents = report.Latents(
    vectors, np.stack([vectors] * LEVELS), [vectors[: p * p] for p in (1, 2, 3, 8)],
    rng.normal(size=(CODES, 16)).astype(np.float32), usage.counts,
  )  # fmt: skip
  return report.Run(
    name,
    tiny.TOKENIZER,
    metrics,
    usage,
    "the 5 images",
    [quality(k + offset, IMAGES, lpips) for k in range(LEVELS)],
    rng.integers(0, 256, (2, LEVELS, 16, 16, 3), np.uint8),
    latents,
    history,
  )


def reference(lpips: bool = True) -> report.Reference:
  images = np.zeros((2, 16, 16, 3), np.uint8)
  vae = quality(9, IMAGES, lpips)
  note = "" if lpips else "LPIPS is left out: no weights"
  return report.Reference("5 of folder:x", vae, vae, images, images, note)


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
  names = "curves grid level_curves levels pca pca_2 pca_codes pca_codes_2 usage".split()
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


def test_training_curves():
  curves = report.training_curves({"a": HISTORY, "b": HISTORY[:2]})
  assert list(curves) == [
    "eval: psnr",
    "eval: error by level",
    "train: loss",
    "train: usage by level",
  ]
  assert curves["eval: psnr"] == {"a": ([10, 20], [20.0, 21.0]), "b": ([10], [20.0])}
  assert curves["train: loss"]["a"] == ([10, 30], [2.0, 1.0])  # not finite at 20
  assert curves["train: usage by level"] == {0: ([10, 20], [0.1, 0.3]), 1: ([10, 20], [0.2, 0.4])}
  assert curves["eval: error by level"] == {1: ([10, 20], [0.5, 0.4])}


def test_grid_keeps_pixels_and_fits_its_text():
  image = np.random.default_rng(0).integers(0, 256, (20, 40, 3), np.uint8)
  large = np.zeros((600, 1200, 3), np.uint8)
  np.testing.assert_array_equal(figures.thumbnail(image)[::4, ::4], image)  # 4 x 40 is 160
  assert figures.thumbnail(large).shape == (256, 512, 3)
  page = np.asarray(
    figures.image_grid([[image, image], [large, large]], ["a", "b " * 99], [["x", "y"], ["", "z"]])
  )
  assert page.shape[1] == 2 * 512 + 3 * 8  # narrower than a page: nothing is zoomed
  side_by_side = figures.image_grid([[image]] * 3, ["a"], blocks=2)
  assert side_by_side.width == 2 * 160 + 5 * 8 and side_by_side.height < 3 * 80 + 8 * 4
  enlarged = figures.thumbnail(image)
  rows = np.flatnonzero((page[:, 8:168] == enlarged[0]).all((1, 2)))
  assert rows.size and (page[rows[0] : rows[0] + 80, 8:168] == enlarged).all()


def test_uniform_utilization_by_simulation():
  draws = np.random.default_rng(0).integers(0, 50, (2000, 70))
  seen = np.mean([len(np.unique(d)) for d in draws]) / 50
  assert figures.uniform_utilization(70, 50) == pytest.approx(seen, abs=0.005)
  assert figures.uniform_utilization(0, 50) == 0


def test_principal_axes_of_a_flat_cloud():
  rng = np.random.default_rng(0)
  plane = np.linalg.qr(rng.normal(size=(6, 2)))[0]
  x = (rng.normal(size=(500, 2)) * [3, 1]) @ plane.T + 5
  mean, axes, inside = figures.principal_axes(x.astype(np.float32))
  np.testing.assert_allclose(mean, x.mean(0), atol=1e-4)
  assert inside == pytest.approx(1, abs=1e-5)
  np.testing.assert_allclose(axes @ axes.T, plane @ plane.T, atol=1e-3)
  assert abs(axes[:, 0] @ plane[:, 0]) > 0.99
