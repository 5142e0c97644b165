import json
import shutil

import numpy as np
import pytest
from PIL import Image

from coda_jax import pretrained, reconstruct, weights
from coda_jax.data.pipeline import normalize
from coda_jax.errors import UserError
from coda_jax.evaluation.image_quality import psnr, to_uint8
from coda_jax.outputs import MARKER
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A tokenizer, pictures of two sizes, and an unreadable one."""
  path = tmp_path_factory.mktemp("reconstruct")
  weights.save_tokenizer(tiny.tokenizer(), path / "tokenizer")
  rng = np.random.default_rng(0)
  (path / "images").mkdir()
  for name, (width, height) in {"a.png": (16, 16), "b.png": (24, 16)}.items():
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(image).save(path / "images" / name)
  (path / "images" / "b.bmp").write_bytes(b"no image")
  Image.fromarray(rng.integers(0, 256, (17, 25, 3), np.uint8)).save(path / "odd.png")
  return path


@pytest.fixture(autouse=True)
def no_lpips(monkeypatch):
  monkeypatch.setattr(pretrained, "find_lpips", lambda path: (None, "LPIPS is left out"))


def run(folder, images, output, *words):
  args = ["--tokenizer", folder / "tokenizer", "--images", images, "--output", output, *words]
  reconstruct.run(reconstruct.parser().parse_args(list(map(str, args))))


@pytest.mark.slow
def test_a_folder_of_several_sizes(folder, tmp_path, capsys):
  out = tmp_path / "out"
  run(folder, folder / "images", out, "--levels", 2)
  found = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file() and p.name != MARKER}
  files = {"a.png": "a.png", "b.png": "b.png.png"}  # b.bmp has the other b.png
  pictures = {f"{what}/{f}" for what in ("tokenizer", "continuous_vae") for f in files.values()}
  assert found == {"grid.png", "metrics.json"} | pictures

  metrics = json.loads((out / "metrics.json").read_text())
  assert [m["name"] for m in metrics["images"]] == list(files)
  through_tokenizer = reconstruct._through_tokenizer(2)(tiny.tokenizer())  # compiled already
  for m in metrics["images"]:
    image = np.asarray(Image.open(folder / "images" / m["name"]))[None]
    ours = np.asarray(through_tokenizer(normalize(image)))
    written = np.asarray(Image.open(out / "tokenizer" / files[m["name"]]))
    np.testing.assert_array_equal(written, to_uint8(ours, "nearest")[0])
    assert m["tokenizer"]["psnr"] == pytest.approx(psnr(image, to_uint8(ours))[0])
  mean = np.mean([m["tokenizer"]["psnr"] for m in metrics["images"]])
  assert metrics["mean"]["tokenizer"]["psnr"] == pytest.approx(mean)
  table = capsys.readouterr().out
  assert "2 images" in table and f"{mean:.2f}" in table and "tokenizer, 2 of 4 levels" in table

  with pytest.raises(UserError, match="--overwrite"):
    run(folder, folder / "images", out)


@pytest.mark.slow
def test_sizes_that_the_stride_does_not_divide(folder, tmp_path):
  out = tmp_path / "out"
  with pytest.raises(UserError, match=r"odd.png.*25 x 17.*stride 2.*--crop.*--image-size"):
    run(folder, folder / "odd.png", out)
  assert list(tmp_path.iterdir()) == []
  run(folder, folder / "odd.png", out, "--crop", "--levels", 2)
  with Image.open(out / "tokenizer" / "odd.png") as image:
    assert image.size == (24, 16)
  run(folder, folder / "odd.png", out, "--image-size", 16, "--overwrite", "--levels", 2)
  with Image.open(out / "tokenizer" / "odd.png") as image:
    assert image.size == (16, 16)


@pytest.mark.parametrize(
  ("images", "words", "message"),
  [
    ("nowhere.png", [], "nowhere.png: no such image file or folder"),
    ("images/b.bmp", [], "b.bmp cannot be read"),
    ("images", ["--levels", 5], "levels 1 to 4"),
    ("images", ["--image-size", 17], "17x17 is not a multiple of the VAE's stride 2"),
  ],
)
def test_bad_input_writes_nothing(folder, tmp_path, images, words, message):
  with pytest.raises(UserError, match=message):
    run(folder, folder / images, tmp_path / "out", *words)
  assert list(tmp_path.iterdir()) == []


def _copy(folder, tmp_path):
  for name in ("images", "tokenizer"):
    shutil.copytree(folder / name, tmp_path / name)
  (tmp_path / "run" / "checkpoints").mkdir(parents=True)
  (tmp_path / "run" / "checkpoints" / "state").touch()
  shutil.copytree(folder / "tokenizer", tmp_path / "run" / "tokenizer")
  (tmp_path / "images" / "notes.txt").touch()
  return tmp_path


@pytest.mark.parametrize(
  ("tokenizer", "images", "output"),
  [
    ("tokenizer", "images", "images"),
    ("tokenizer", "images/a.png", "images"),
    ("tokenizer", "folder:images", "images"),
    ("tokenizer", "images", "."),
    ("run/tokenizer", "images", "run"),
    ("run/tokenizer", "images", "run/tokenizer"),
    ("tokenizer", "embedded@val", "images"),
  ],
)
def test_overwrite_removes_nothing_that_is_not_its_own(
  folder, tmp_path, monkeypatch, tokenizer, images, output
):
  monkeypatch.chdir(_copy(folder, tmp_path))
  before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
  with pytest.raises(UserError, match="would be lost"):
    run(folder, images, output, "--overwrite", "--tokenizer", tokenizer)
  assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
