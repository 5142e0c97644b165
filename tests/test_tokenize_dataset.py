"""Token files: what is in them, and that a kill loses and doubles nothing."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax import tokenize_dataset, weights
from coda_jax.data import decode, pipeline, sources, tokens
from coda_jax.errors import UserError
from tests import tiny
from tests.training import runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tokens")
  runs.make_inputs(folder)
  weights.save_tokenizer(tiny.tokenizer(), folder / "tokenizer")
  return folder


def tokenize(folder, output, *options, tokenizer="tokenizer"):
  words = ["--tokenizer", folder / tokenizer, "--data", f"folder:{folder}/images@train"]
  words += ["--output", output, "--batch-size", "16", "--shards", "3", *options]
  tokenize_dataset.run(tokenize_dataset.parser().parse_args([str(w) for w in words]))
  return tokens.TokenSource(output)


@pytest.fixture(scope="module")
def flipped(folder):
  return tokenize(folder, folder / "flipped", "--flip")


def everything(source):
  return source.records(range(len(source.sizes)))


def test_the_tokens_are_those_of_the_centre_crops(folder, flipped):
  ids, labels = everything(flipped)
  assert ids.shape == (48, 78) and ids.dtype == np.uint16 and set(labels) == {0}
  assert flipped.class_names == ("one",)
  source = sources.open_source(f"folder:{folder}/images@train")
  crops = [
    decode.resize_and_crop(decode.decode_image(source[i][0]), 16, resize_ratio=1.125, flip=flip)
    for i in range(24)
    for flip in (False, True)
  ]
  found = [
    tiny.tokens(tiny.tokenizer(), pipeline.normalize(jnp.asarray(np.stack(part))))
    for part in (crops[:16], crops[16:32], crops[32:])
  ]
  expected = np.concatenate(
    [np.concatenate([np.asarray(level).reshape(16, -1) for level in x], 1) for x in found]
  )
  assert sorted(map(tuple, ids)) == sorted(map(tuple, expected))


def test_continues_after_a_kill(folder, flipped, tmp_path, monkeypatch):
  write, written = tokenize_dataset._write_shard, []

  def killed_in_the_second(*args):
    if written:
      raise KeyboardInterrupt
    written.append(args)
    write(*args)

  monkeypatch.setattr(tokenize_dataset, "_write_shard", killed_in_the_second)
  with pytest.raises(KeyboardInterrupt):
    tokenize(folder, tmp_path / "out", "--flip")
  with pytest.raises(UserError, match="unfinished"):
    tokens.TokenSource(tmp_path / "out")
  monkeypatch.setattr(tokenize_dataset, "_write_shard", write)
  first = next(tmp_path.glob("out/*.array_record")).stat().st_mtime_ns
  source = tokenize(folder, tmp_path / "out", "--flip")
  assert min(f.stat().st_mtime_ns for f in tmp_path.glob("out/*.array_record")) == first
  for ours, expected in zip(everything(source), everything(flipped), strict=True):
    np.testing.assert_array_equal(ours, expected)


def test_what_an_older_version_left_is_refused_if_unfinished(folder, flipped, tmp_path):
  # Its shards hold other images: to go on would lose some and double others.
  old = tmp_path / "old"
  shutil.copytree(flipped.path, old)
  file = old / tokens.MANIFEST
  manifest = json.loads(file.read_text())
  del manifest["order"]
  file.write_text(json.dumps(manifest))
  assert len(tokenize(folder, old, "--flip")) == 48  # complete
  file.write_text(json.dumps(manifest | {"complete": False}))
  (old / manifest["shards"][1]["file"]).unlink()
  before = sorted(p.name for p in old.iterdir())
  with pytest.raises(UserError, match="old is unfinished, and the version .* another order; take"):
    tokenize(folder, old, "--flip")
  assert sorted(p.name for p in old.iterdir()) == before


def test_ten_crop_and_random_crops_count(folder, flipped, tmp_path):
  ten = tokenize(folder, tmp_path / "ten", "--ten-crop")
  assert len(ten) == 240 and ten.manifest["images"] == 240 and len(ten.sizes) > 3
  assert {*map(tuple, everything(flipped)[0])} < {*map(tuple, everything(ten)[0])}
  assert len(tokenize(folder, tmp_path / "random", "--random-crops", "2", "--flip")) == 96


def test_other_tokenizers_and_settings_are_refused(folder, flipped):
  weights.save_tokenizer(tiny.tokenizer(seed=1), folder / "other")
  with pytest.raises(UserError, match="holds tokens with tokenizer"):
    tokenize(folder, flipped.path, "--flip", tokenizer="other")
  with pytest.raises(UserError, match="holds tokens with flip True, not False"):
    tokenize(folder, flipped.path)
  with pytest.raises(UserError, match="not empty"):
    tokenize(folder, folder / "images")


def test_an_unreadable_image_is_left_out_and_too_many_are_an_error(folder, tmp_path, monkeypatch):
  runs.make_inputs(tmp_path)
  (tmp_path / "images/train/one/3.png").write_bytes(b"no image")
  (tmp_path / "tokenizer").symlink_to(folder / "tokenizer")
  with pytest.raises(UserError, match="1 of 24 images"):
    tokenize(tmp_path, tmp_path / "out")
  monkeypatch.setattr(pipeline, "MAX_UNREADABLE", 0.5)
  source = tokenize(tmp_path, tmp_path / "out")
  assert len(source) == 23 and source.manifest["unreadable"] == 1
