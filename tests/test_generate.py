"""The command, with small random models."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from coda_jax import cli, generate
from coda_jax.errors import UserError
from coda_jax.outputs import MARKER
from tests.generation import test_generator


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("generate")
  test_generator.save(path)
  rng = np.random.default_rng(0)
  (path / "real").mkdir()
  for i in range(5):
    image = rng.integers(0, 256, (24, 20, 3), np.uint8)
    Image.fromarray(image).save(path / "real" / f"{i}.png")
  mask = np.zeros((24, 20), np.uint8)
  mask[:, 10:] = 255
  Image.fromarray(mask).save(path / "mask.png")
  return path


def run(folder, output, *words):
  args = ["--model", folder / "generator", "--output", output, "--batch-size", 2, "--steps", 4]
  generate.run(generate.parser().parse_args([*map(str, args), *map(str, words)]))


def picture(path):
  return np.asarray(Image.open(path))


def test_images_npz_and_filmstrip(folder, tmp_path):
  out = tmp_path / "out"
  words = ["--classes", "dog,2", "--count", 2, "--npz", "--filmstrip", "--seed", 3]
  run(folder, out, *words)
  names = ["0_dog.png", "1_dog.png", "2_7up.png", "3_7up.png"]
  assert sorted(p.name for p in (out / "images").iterdir()) == names
  found = {p.name for p in out.iterdir() if p.name != MARKER}
  assert found == {"images", "grid.png", "settings.json", "samples.npz", "filmstrip.png"}
  with np.load(out / "samples.npz") as file:
    assert file.files == ["arr_0"] and file["arr_0"].dtype == np.uint8
    np.testing.assert_array_equal(file["arr_0"], [picture(out / "images" / n) for n in names])
  settings = json.loads((out / "settings.json").read_text())
  assert settings["sampler"]["steps"] == 4 and settings["sampler"]["guidance"] == 2.0

  # Each image has its own random numbers, whatever the batch.
  run(folder, tmp_path / "three", "--classes", "dog", "--count", 3, "--seed", 3)
  for i in range(2):
    one, other = picture(out / "images" / names[i]), picture(tmp_path / f"three/images/{i}_dog.png")
    assert np.abs(one.astype(int) - other).max() <= 1
  with pytest.raises(UserError, match="--overwrite"):
    run(folder, out)


@pytest.mark.slow
def test_edits(folder, tmp_path):
  image, out = folder / "real/0.png", tmp_path / "out"
  original = generate._read(str(image), 16)
  run(folder, out, "--classes", "cat", "--count", 2, "--inpaint", image, "--mask", "8,0,16,16")
  made = picture(out / "images/0_cat.png")
  np.testing.assert_array_equal(made[:, :8], original[:, :8])
  assert (made[:, 8:] != original[:, 8:]).any()
  words = ["--mask", folder / "mask.png", "--outside", "--overwrite", "--classes", "cat"]
  run(folder, out, "--count", 2, "--inpaint", image, *words)
  made = picture(out / "images/0_cat.png")
  np.testing.assert_array_equal(made[:, 9:], original[:, 9:])
  assert json.loads((out / "settings.json").read_text())["edit"]["outside"] is True
  words = ["--change-class", image, "--classes", "dog", "--count", 2, "--overwrite"]
  run(folder, out, *words, "--keep-levels", 2)
  assert (picture(out / "images/0_dog.png") != original).any()


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["--classes", "3"], "class 3 is out of range"),
    (["--classes", "dog,bird"], "no class 'bird'"),
    (["--steps", "79"], "steps is 79.*78 tokens"),
    (["--inpaint", "nowhere.png", "--mask", "0,0,4,4"], "nowhere.png"),
    (["--inpaint", "mask.png", "--mask", "0,0,40,4"], "left,top,right,bottom"),
  ],
)
def test_bad_input_writes_nothing(folder, tmp_path, monkeypatch, words, message):
  monkeypatch.chdir(folder)
  with pytest.raises((UserError, OSError), match=message):
    run(folder, tmp_path / "out", *words)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  "words",
  [
    ["--count", "0"],
    ["--seed", "-1"],
    ["--inpaint", "x.png"],
    ["--filmstrip", "--change-class", "x.png"],
  ],
)
def test_wrong_usage(folder, tmp_path, words):
  with pytest.raises((cli.UsageError, SystemExit)):
    run(folder, tmp_path / "out", *words)


@pytest.mark.parametrize("option", ["--evaluate", "--sweep", "--real", "--lpips"])
def test_options_of_evaluation_name_the_command_that_has_them(folder, tmp_path, option):
  with pytest.raises(cli.UsageError, match=f"{option} moved: python -m coda_jax.eval --generator"):
    run(folder, tmp_path / "out", option, "x")


def test_overwrite_removes_nothing_that_is_not_its_own(folder, tmp_path, monkeypatch):
  shutil.copytree(folder, tmp_path / "run")
  (tmp_path / "x").mkdir()
  shutil.copy(folder / "mask.png", tmp_path / "x" / "photo.png")
  monkeypatch.chdir(tmp_path)
  before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
  for output, words in (
    ("run", []),
    ("run/generator", []),
    (".", []),
    ("x", ["--inpaint", "x/photo.png", "--mask", "0,0,4,4"]),
    ("x", ["--change-class", "x/photo.png"]),
    ("x", ["--inpaint", "run/mask.png", "--mask", "x/photo.png"]),
  ):
    with pytest.raises(UserError, match="would be lost"):
      run(tmp_path / "run", output, "--overwrite", *words)
  assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
