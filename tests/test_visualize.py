import contextlib
import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from coda_jax import arrays, cli, pretrained, visualize, weights
from coda_jax.config import CheckpointSettings
from coda_jax.errors import UserError
from coda_jax.evaluation import runs
from coda_jax.models.lpips import LPIPS
from coda_jax.training.checkpoints import Checkpoints
from tests import tiny


class MeanSquare(LPIPS):
  """Stands in for the network, whose weights and compile time a test does not need."""

  def __init__(self):
    pass

  def features(self, images):
    return (images,)

  def distance(self, a, b):
    return jnp.square(a[0] - b[0]).mean((1, 2, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("visualize")
  for name, seed in {"one": 0, "two": 1}.items():
    weights.save_tokenizer(tiny.tokenizer(seed=seed), path / name / "tokenizer")
  records = [{"kind": "train", "step": s, "loss": 1 / s} for s in (1, 2)]
  (path / "one" / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
  (path / "one" / "config.json").write_text(json.dumps({"data": {"resize_ratio": 1.25}}))
  quantizer = arrays.of(tiny.tokenizer().quantizer)
  with contextlib.closing(Checkpoints(path / "one" / "checkpoints", CheckpointSettings())) as saved:
    for step in (1, 2):
      codes = {"quantizer.codebook": quantizer["codebook"] * step, "vae.x": jnp.zeros(2)}
      saved.save(step, {"ema": codes})
  (path / "images").mkdir()
  rng = np.random.default_rng(0)
  for i in range(3):
    image = rng.integers(0, 256, (20, 24, 3), np.uint8)
    Image.fromarray(image).save(path / "images" / f"{i}.png")
  return path


def run(folder, output, *words):
  args = ["--tokenizer", folder / "one" / "tokenizer", "--data", f"folder:{folder / 'images'}"]
  args += ["--output", output, *words]
  visualize.run(visualize.parser().parse_args(list(map(str, args))))


@pytest.mark.slow
def test_report_of_two_tokenizers(folder, tmp_path, monkeypatch):
  monkeypatch.setattr(pretrained, "find_lpips", lambda path: (MeanSquare(), ""))
  measured = []
  write = visualize.write_report
  monkeypatch.setattr(
    visualize, "write_report", lambda *args: (measured.append(args), write(*args))[1]
  )
  out = tmp_path / "out"
  other = f"other={folder / 'two' / 'tokenizer'}"
  run(folder, out, "--compare", other, "--tokens-per-code", 1, "--every-level", "--batch-size", 2)
  _, _, (one, two), reference = measured[0]
  assert (one.name, two.name) == ("tokenizer", "other")
  assert len(one.history) == 2 and two.history == []
  # Codes of the checkpoints with the projections, which did not train here, of the tokenizer.
  assert list(one.movement) == [1, 2] and not two.movement
  np.testing.assert_allclose(one.movement[1], one.latents.values, rtol=1e-5, atol=1e-6)
  bias = tiny.tokenizer().quantizer.to_v.bias[...]
  np.testing.assert_allclose(one.movement[2] - bias, 2 * (one.movement[1] - bias), atol=1e-4)
  assert one.images == 3 and len(one.level_quality) == 4
  # One token for each of 64 codes, one token an image at the first level.
  assert one.usage.level_tokens_per_code[0] == 1 and "64 random crops" in one.usage_source
  np.testing.assert_array_equal(one.level_quality[-1].psnr, one.quality.psnr)
  assert "shorter edge was brought to 20" in reference.data  # 1.25 x 16, as in training

  # What the report shows is what the tokenizer makes of the centre crops.
  original = np.asarray(Image.open(folder / "images" / "0.png"))[2:18, 4:20]
  np.testing.assert_array_equal(reference.originals[0], original)
  x = original / np.float32(127.5) - 1
  encoded = runs._encode(tiny.tokenizer())(np.stack([x, x]))
  made = np.clip(runs._decode(tiny.tokenizer())(encoded.quantized[:, 2]), -1, 1)
  shown = one.pictures[0, 2].astype(np.float32) / 127.5 - 1
  assert np.abs(made[0] - shown).mean() < 0.01
  assert one.level_quality[2].lpips[0] == pytest.approx(np.square(made[0] - x).mean(), rel=0.01)

  text = (out / "report.html").read_text()
  assert "<h2>Training</h2>" in text and "other" in text
  for name in ("grid", "levels", "usage", "pca", "curves"):
    Image.open(out / f"{name}.png").verify()


def test_wrong_usage(folder, tmp_path):
  one = folder / "one" / "tokenizer"
  for words in (["--compare", "x"], ["--compare", f"tokenizer={one}"], ["--max-images", "0"]):
    with pytest.raises((cli.UsageError, SystemExit)):
      run(folder, tmp_path / "out", *words)
  with pytest.raises(UserError, match=r"no metrics.jsonl"):
    run(folder, tmp_path / "out", "--workdir", folder / "two")
  assert list(tmp_path.iterdir()) == []
