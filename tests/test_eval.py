"""The command, with small random models; features are mean colours, which need no network."""

import functools
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from coda_jax import cli, eval, weights
from coda_jax.data.pipeline import normalize
from coda_jax.errors import UserError
from coda_jax.evaluation import comparison, conventions, entries, parts
from coda_jax.evaluation.features import Networks
from coda_jax.evaluation.image_quality import psnr, to_uint8
from coda_jax.evaluation.kernel import kernel_distance
from tests import tiny
from tests.generation import test_generator

MODULE = """
import numpy as np
codebook_size = 4
def encode(images):
  return ((images.mean((1, 2), keepdims=True) + 1) * 1.9).astype(np.int32)
def decode(ids):
  return np.ones((1, 16, 16, 1), np.float32) * (ids / 1.9 - 1)
"""


class Colours(Networks):
  """Mean colours stand for VGG's features; there is no Inception."""

  @classmethod
  def find(cls, inception, lpips):
    return cls(None, None, ("FID is left out: a test",), {"vgg": "colours"})

  def features(self, convention):
    def run(images):
      pixels = images if images.dtype == np.uint8 else to_uint8(images, "nearest")
      return {"vgg": normalize(pixels).mean((1, 2))}

    return run


_load, _frozen = functools.cache(weights.load_tokenizer), functools.cache(entries.frozen_vae)


def _stand_ins(patch):
  """Colours for features; models are built once, which takes most of a run's time here."""
  patch.setattr(eval, "Networks", Colours)
  patch.setattr(weights, "load_tokenizer", _load)
  patch.setattr(entries, "frozen_vae", _frozen)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
  _stand_ins(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("eval")
  test_generator.save(path)
  weights.save_tokenizer(tiny.tokenizer(seed=1), path / "other", averaged=True)
  rng = np.random.default_rng(0)
  (path / "real").mkdir()
  for i in range(7):
    image = rng.integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(image).save(path / "real" / f"{i}.png")
  (path / "grey.py").write_text(MODULE)
  records = [{"kind": "eval", "step": i, "level_loss/level_1": 6.0 - i} for i in range(2)]
  (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
  return path


def run(folder, output, *words, data=True):
  args = ["--output", output, "--batch-size", 2, "--part", 3, "--resize-ratio", "none", *words]
  args += ["--data", f"folder:{folder}/real"] if data else []
  eval.run(eval.parser().parse_args([*map(str, args)]))
  return json.loads((output / "results.json").read_text())


def tokenizers(folder):
  words = ["--tokenizer", folder / "tokenizer", "--compare", f"other={folder}/other"]
  return [*words, "--compare", f"grey={folder}/grey.py", "--continuous"]


@pytest.fixture(scope="module")
def compared(folder):
  with pytest.MonkeyPatch.context() as patch:
    _stand_ins(patch)
    return run(folder, folder / "compared", *tokenizers(folder))


def pictures(folder):
  return np.stack([np.asarray(Image.open(folder / "real" / f"{i}.png")) for i in range(7)])


def through(tokenizer, images):
  x = normalize(images)
  parts = [x[i : i + 2] for i in (0, 2, 4, 5)]
  made = [np.asarray(tiny.pixels(tokenizer, tiny.tokens(tokenizer, p), None)) for p in parts]
  return np.concatenate([*made[:3], made[3][1:]])


def test_reconstructions_beside_each_other(folder, compared):
  images = pictures(folder)
  ours, theirs = (through(tiny.tokenizer(seed=s), images) for s in (0, 1))
  a, b = (psnr(images, to_uint8(x)) for x in (ours, theirs))
  found = compared["entries"]
  assert list(found) == ["tokenizer", "other", "grey", "continuous VAE"]
  assert found["tokenizer"]["values"]["psnr"] == pytest.approx(a.mean(), rel=1e-4)
  expected = kernel_distance(
    *(normalize(x).mean((1, 2)) for x in (to_uint8(ours, "nearest"), images))
  )
  assert found["tokenizer"]["values"]["vgg_kd"] == pytest.approx(expected, rel=1e-2)

  pair = compared["paired"][0]
  assert (pair["a"], pair["b"]) == ("tokenizer", "other") and len(compared["paired"]) == 3
  d = a - b
  assert pair["differences"]["psnr"] == {
    "mean": pytest.approx(d.mean(), rel=1e-3),
    "standard_error": pytest.approx(d.std(ddof=1) / 7**0.5, rel=1e-3),
    "images": 7,
  }
  codes = found["tokenizer"]["codebook"]
  assert codes["bits_per_image"] == 78 * 6 and len(codes["levels"]) == 4
  ids = [np.asarray(x) for x in tiny.tokens(tiny.tokenizer(), normalize(images[:2]))]
  assert codes["codes_seen"] >= len(np.unique(np.concatenate([x.ravel() for x in ids])))
  assert found["grey"]["codebook"]["tokens_per_image"] == 3
  assert "codebook" not in found["continuous VAE"]


def test_records_say_how(folder, compared):
  found = {name: entry["record"] for name, entry in compared["entries"].items()}
  assert found["tokenizer"]["convention"] == "coda" and found["tokenizer"]["posterior"] == "mean"
  assert found["tokenizer"]["reference"]["images"] == 7
  assert found["tokenizer"]["same_preprocessing"] is True
  averaged = {name: record["averaged_weights"] for name, record in found.items()}
  assert averaged == {"tokenizer": None, "other": True, "grey": None, "continuous VAE": None}
  assert compared["left_out"] == ["FID is left out: a test"]


def test_pages(folder, compared):
  page = (folder / "compared" / "report.html").read_text()
  text = (folder / "compared" / "results.md").read_text()
  for what in ("tokenizer − other", "continuous VAE", "FID is left out: a test"):
    assert what in page and what in text
  for name in ("best", "median", "worst"):
    Image.open(folder / "compared" / f"{name}.png").close()
    assert f"The {name} of 7 images by PSNR" in page


def test_a_killed_run_goes_on_and_ends_with_the_same_numbers(
  folder, compared, tmp_path, monkeypatch
):
  write, written = parts._write, []

  def killed_in_the_sixth(*args):
    if len(written) == 5:
      raise KeyboardInterrupt
    written.append(args[0])
    write(*args)

  out = tmp_path / "out"
  monkeypatch.setattr(parts, "_write", killed_in_the_sixth)
  with pytest.raises(KeyboardInterrupt):
    run(folder, out, *tokenizers(folder))
  assert not (out / "results.json").exists()
  times = {p: p.stat().st_mtime_ns for p in written}
  monkeypatch.setattr(parts, "_write", lambda *args: (written.append(args[0]), write(*args)))
  again = run(folder, out, *tokenizers(folder))
  assert again == compared
  assert times == {p: p.stat().st_mtime_ns for p in times}
  assert len(written) == len(set(written)) == 5 * 3, "no part twice"
  assert not list(out.rglob(".lock*")) and not list(out.rglob(".part.*"))
  assert run(folder, out, *tokenizers(folder)) == compared and len(written) == 15, "complete"


def test_another_evaluation_is_refused_and_what_holds_is_taken_again(
  folder, compared, tmp_path, monkeypatch
):
  out = tmp_path / "out"
  shutil.copytree(folder / "compared", out)
  words = ["--tokenizer", folder / "tokenizer", "--max-images", 7]
  with pytest.raises(UserError, match="holds another evaluation .compare was .* is None.*--over"):
    run(folder, out, *words)
  written = []
  monkeypatch.setattr(parts, "_write", lambda *args: written.append(args))
  found = run(folder, out, *words, "--overwrite")
  assert not written, "all 7 images are the same ones"
  assert found["entries"]["tokenizer"] == compared["entries"]["tokenizer"]
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "results.json").write_text("{}")
  with pytest.raises(UserError, match="mine is not empty and holds no evaluation"):
    run(folder, tmp_path / "mine", *words, "--overwrite")


def test_other_images_at_the_same_place():
  """As two hosts may see them; `tests/test_joined.py` has real ones."""
  ours = {"options": {"data": "folder:x"}, "sets": {"real": {"source": "a", "cut": (1, 2)}}}
  comparison.check_same(ours, json.loads(json.dumps(ours)))
  theirs = {"options": ours["options"], "sets": {"real": {"source": "b", "cut": [1, 2]}}}
  with pytest.raises(UserError, match="not what process 0 measures .its weights or images were"):
    comparison.check_same(ours, theirs)


def test_samples_of_a_folder_and_of_a_file_are_alike(folder, tmp_path):
  images = pictures(folder)[:5] // 2
  np.savez(tmp_path / "samples.npz", images)
  (tmp_path / "made").mkdir()
  for i, image in enumerate(images):
    Image.fromarray(image).save(tmp_path / "made" / f"{i}.png")
  found = [
    run(folder, tmp_path / f"out_{name}", "--samples", tmp_path / name)["entries"]["samples"]
    for name in ("samples.npz", "made")
  ]
  assert found[0]["values"] == found[1]["values"] and found[0]["images"] == 5
  expected = kernel_distance(*(normalize(x).mean((1, 2)) for x in (images, pictures(folder))))
  assert found[0]["values"]["vgg_kd"] == pytest.approx(expected, rel=1e-4)
  assert found[0]["record"]["convention"] == "adm"
  Image.fromarray(images[0, :8]).save(tmp_path / "made" / "9.png")
  with pytest.raises(UserError, match=r"several sizes: 0.png has 16 x 16 pixels, 9.png 16 x 8"):
    run(folder, tmp_path / "mixed", "--samples", tmp_path / "made")


def test_samples_against_the_images_of_a_file(folder, tmp_path):
  np.savez(tmp_path / "reference.npz", pictures(folder))
  words = ["--samples", tmp_path / "reference.npz", "--reference", tmp_path / "reference.npz"]
  entry = run(folder, tmp_path / "out", *words, data=False)["entries"]["samples"]
  assert entry["values"]["vgg_kd"] < 0, "the same images"
  assert entry["record"]["reference"]["hash"] == entry["record"]["samples"]["hash"]


@pytest.mark.slow
def test_a_generator_its_sweep_and_yardsticks(folder, tmp_path):
  out = tmp_path / "out"
  words = ["--generator", folder / "generator", "--count", 2, "--steps", 4, "--seed", 3]
  words += ["--sweep-guidance", "1,2", "--yardsticks"]
  found = run(folder, out, *words)
  samples = found["entries"]["samples"]
  assert samples["images"] == 6 and samples["record"]["sampler"]["steps"] == 4
  assert [x["guidance"] for x in found["sweep"]] == [1, 2]
  assert found["sweep"][1]["values"] == samples["values"], "the samples themselves"
  assert all(x["seconds"] > 0 for x in found["sweep"])
  assert list(found["yardsticks"]) == [
    "other real crops",
    "other real crops, reconstructed",
    "tokens from marginals",
    "random tokens",
  ]
  names = {p.name for p in out.iterdir()}
  assert {"samples.png", "sweep.png", "curves.png", "results.md", "report.html"} <= names
  with pytest.raises(UserError, match="steps is 79.*78 tokens"):
    run(folder, tmp_path / "many", *words, "--sweep-steps", "1,79")


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["--samples", "x", "--reference", "y"], "one of --data SPEC and --reference"),
    (["--samples", "x", "--compare", "a=b"], "--compare and --continuous are of reconstructions"),
    (["--vae", "x", "--continuous"], "--continuous is of a --tokenizer"),
    (["--samples", "x", "--sweep-steps", "1"], "--sweep-steps is of a --generator"),
    (["--tokenizer", "tokenizer", "--compare", "tokenizer=other"], "every name once"),
    (["--module", "grey.py"], "--image-size N says on which images"),
  ],
)
def test_wrong_usage(folder, tmp_path, monkeypatch, words, message):
  monkeypatch.chdir(folder)
  with pytest.raises(cli.UsageError, match=message):
    run(folder, tmp_path / "out", *words)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["--tokenizer", "nowhere"], "nowhere: no config.json"),
    (["--tokenizer", "generator"], "generator holds a 'generator', not a 'tokenizer'"),
    (["--tokenizer", "tokenizer", "--image-size", 17], "17x17 is not a multiple"),
    (["--tokenizer", "tokenizer", "--name", "real"], "two things are called 'real'"),
    (["--samples", "nowhere.npz"], "nowhere.npz: no such file"),
    (["--module", "nowhere.py", "--image-size", 16], "nowhere.py: no such file"),
    (["--tokenizer", "tokenizer", "--save-statistics"], "--save-statistics: FID is left out"),
  ],
)
def test_bad_input_writes_nothing(folder, tmp_path, monkeypatch, words, message):
  monkeypatch.chdir(folder)
  with pytest.raises(UserError, match=message):
    run(folder, tmp_path / "out", *words)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (("def encode", "def other"), "defines no encode"),
    (("import numpy", "import no_such_package"), "cannot be run: ModuleNotFoundError"),
    (("* 1.9).astype(np.int32)", "* 1.9)"), "ids of type float32; ids are whole numbers"),
    (("codebook_size = 4", "codebook_size = 1"), "ids from 1 to 2, but codebook_size is 1"),
    (("(1, 16, 16, 1)", "(1, 8, 8, 1)"), r"decode gave \[2, 8, 8, 3\], not images \[2, 16, 16, 3"),
  ],
)
def test_somebody_elses_tokenizer_with_errors(folder, tmp_path, change, message):
  (tmp_path / "mine.py").write_text(MODULE.replace(*change))
  with pytest.raises(UserError, match=message):
    run(folder, tmp_path / "out", "--module", tmp_path / "mine.py", "--image-size", 16)


@pytest.mark.slow
def test_a_sample_of_the_posterior_differs_from_its_mean(folder, compared, tmp_path):
  words = ["--tokenizer", folder / "tokenizer", "--posterior", "sample"]
  found = run(folder, tmp_path / "out", *words)["entries"]["tokenizer"]
  assert found["record"]["posterior"] == "sample"
  assert found["values"]["psnr"] != compared["entries"]["tokenizer"]["values"]["psnr"]


def test_features_take_pixels_by_the_convention():
  x = np.linspace(-1, 1, 2 * 8 * 8 * 3, dtype=np.float32).reshape(2, 8, 8, 3)
  c = conventions.convention("adm")
  assert Networks(None, None).features(c)(x) == {}
