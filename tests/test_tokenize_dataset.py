"""Token files: what is in them, and that a kill loses and doubles nothing."""

import io
import json
import logging
import shutil
import subprocess
import sys
import tarfile

import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax import outputs, tokenize_dataset, weights
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


def tokenize(folder, output, *options, tokenizer="tokenizer", data="folder:{}/images@train"):
  words = ["--tokenizer", folder / tokenizer, "--data", data.format(folder)]
  words += ["--output", output, "--batch-size", "16", "--shards", "3", *options]
  tokenize_dataset.run(tokenize_dataset.parser().parse_args([str(w) for w in words]))
  return tokens.TokenSource(output)


@pytest.fixture(scope="module")
def flipped(folder):
  return tokenize(folder, folder / "flipped", "--flip")


def everything(source):
  return source.records(range(len(source.sizes)))


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_the_same_tokens_from_shards(folder, flipped, kind):
  images = sources.open_source(f"folder:{folder}/images@train")
  if kind == "parquet":
    pa = pytest.importorskip("pyarrow", reason="an optional extra: 'coda_jax[parquet]'")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"image": {"bytes": data}, "label": label} for data, label in images]
    parquet.write_table(pa.Table.from_pylist(rows), folder / "train.parquet", row_group_size=5)
  else:
    with tarfile.open(folder / "train.tar", "w") as tar:
      for i in range(len(images)):
        for ending, data in (("png", images[i][0]), ("cls", str(images[i][1]).encode())):
          member = tarfile.TarInfo(f"{i:03}.{ending}")
          member.size = len(data)
          tar.addfile(member, io.BytesIO(data))
  made = tokenize(folder, folder / kind, "--flip", data=kind + ":{}@train")
  for ours, theirs in zip(everything(made), everything(flipped), strict=True):
    np.testing.assert_array_equal(ours, theirs)


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
    return write(*args)

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
  with pytest.raises(UserError, match="old is unfinished, and .* in another order; remove"):
    tokenize(folder, old, "--flip")
  assert sorted(p.name for p in old.iterdir()) == before


@pytest.mark.slow
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


@pytest.fixture
def images(folder, tmp_path):
  """Images of the test's own, two of which cannot be read, and the bytes that the two should be."""
  runs.make_inputs(tmp_path)
  (tmp_path / "tokenizer").symlink_to(folder / "tokenizer")
  bad = [tmp_path / f"images/train/one/{i}.png" for i in (3, 4)]
  good = [file.read_bytes() for file in bad]
  for file in bad:
    file.write_bytes(b"no image")
  return tmp_path, dict(zip(bad, good, strict=True))


@pytest.mark.slow
def test_unreadable_images_are_left_out_and_too_many_are_an_error(images):
  folder, bad = images
  with pytest.raises(UserError, match=r"2 of 24 images .* 1%: .*/3.png, .*/4.png; restore them"):
    tokenize(folder, folder / "out")
  source = tokenize(folder, folder / "out", "--max-unreadable", "0.5")
  assert len(source) == 22 and source.manifest["unreadable"] == 2
  first, *_ = bad
  first.write_bytes(bad[first])
  assert len(tokenize(folder, folder / "out")) == 22, "what is complete stays"
  assert len(tokenize(folder, folder / "one")) == 23, "one may be unreadable"
  with pytest.raises(UserError, match="1 of 24 images"):
    tokenize(folder, folder / "none", "--max-unreadable", "0")


@pytest.mark.slow
def test_shards_that_lack_a_repaired_image_are_made_again(images, monkeypatch):
  folder, bad = images
  with pytest.raises(UserError, match="2 of 24"):
    tokenize(folder, folder / "out")
  times = {f: f.stat().st_mtime_ns for f in folder.glob("out/*.array_record")}
  with pytest.raises(UserError, match="2 of 24"):
    tokenize(folder, folder / "out")
  assert times == {f: f.stat().st_mtime_ns for f in times}, "nothing is repaired"
  for file, data in bad.items():
    file.write_bytes(data)
  source = tokenize(folder, folder / "out")
  assert len(source) == 24 and source.manifest["unreadable"] == 0
  assert any(times[f] == f.stat().st_mtime_ns for f in times), "whole shards are kept"
  whole = tokenize(folder, folder / "whole")
  for ours, expected in zip(everything(source), everything(whole), strict=True):
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.slow
def test_shards_of_an_older_version_that_lack_images_are_made_again(images):
  folder, bad = images
  with pytest.raises(UserError, match="2 of 24"):
    tokenize(folder, folder / "out")
  for file in folder.glob("out/*.array_record.json"):
    counts = json.loads(file.read_text())
    del counts["unreadable_rows"]
    file.write_text(json.dumps(counts))
  for file, data in bad.items():
    file.write_bytes(data)
  assert len(tokenize(folder, folder / "out")) == 24


@pytest.mark.parametrize("damage", ["shard", "counts", "no counts"])
def test_what_is_missing_of_a_directory_is_made_again(folder, flipped, tmp_path, damage):
  out = tmp_path / "out"
  shutil.copytree(flipped.path, out)
  shard = out / flipped.manifest["shards"][1]["file"]
  if damage == "shard":  # the directory is complete
    shard.unlink()
  else:
    counts = tokenize_dataset._counts_file(shard)
    counts.unlink() if damage == "no counts" else counts.write_text("[")
    (out / tokens.MANIFEST).write_text(json.dumps(flipped.manifest | {"complete": False}))
  source = tokenize(folder, out, "--flip")
  assert source.manifest == flipped.manifest
  for ours, expected in zip(everything(source), everything(flipped), strict=True):
    np.testing.assert_array_equal(ours, expected)


def test_other_images_are_refused(images, caplog):
  folder, bad = images
  for file, data in bad.items():
    file.write_bytes(data)
  with caplog.at_level(logging.INFO):
    source = tokenize(folder, folder / "out")
  assert f"--data folder:{folder}/images@train: 24 images in 1 class" in caplog.text
  first, second = bad
  first.rename(first.with_name("x.png"))
  with pytest.raises(UserError, match="holds tokens of other images of .*: 24 then, 24 now; rest"):
    tokenize(folder, folder / "out")
  old = {k: v for k, v in source.manifest.items() if k != "source_fingerprint"}
  (folder / "out" / tokens.MANIFEST).write_text(json.dumps(old))
  assert len(tokenize(folder, folder / "out")) == 24, "an older version noted none"


def test_a_first_try_that_made_nothing_protects_nothing(folder, tmp_path, monkeypatch):
  monkeypatch.setattr(tokenize_dataset, "_encoder", lambda *_: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    tokenize(folder, tmp_path / "out", "--seed", 5)
  monkeypatch.undo()
  tokenize(folder, tmp_path / "out")
  with pytest.raises(UserError, match="seed 0, not 5"):
    tokenize(folder, tmp_path / "out", "--seed", 5)


def test_other_settings_are_refused_while_a_process_writes_its_first_shard(folder, tmp_path):
  def other(settings):
    with pytest.raises(UserError, match="seed 0, not 5"):
      tokenize(folder, tmp_path / "out", "--seed", 5)
    return encoder(settings, 16)

  encoder = tokenize_dataset._encoder
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(tokenize_dataset, "_encoder", lambda path, _: other(path))
    tokenize(folder, tmp_path / "out")


def test_a_folder_that_another_process_holds_is_waited_for(folder, tmp_path, monkeypatch):
  monkeypatch.setattr(tokenize_dataset, "_WAIT", 0.3)
  with outputs.locked(tmp_path), pytest.raises(UserError, match="in use by process"):
    tokenize(folder, tmp_path)
  tokenize(folder, tmp_path)


@pytest.mark.slow
def test_processes_share_the_shards_and_take_those_of_a_killed_one(folder, flipped, tmp_path):
  """Three processes on 12 shards; one stops for good in a shard, and is killed."""
  code = (
    "import sys, time; from coda_jax import tokenize_dataset as t; write = t._write_shard\n"
    "def slow(*args):\n"
    "  print(args[-2].name, flush=True); time.sleep(float(sys.argv.pop(1)) if stuck else 0.1)\n"
    "  return write(*args)\n"
    "stuck = sys.argv[1] != '0'; t._write_shard = slow\n"
    "t.main(sys.argv[2:])"
  )
  words = [f"--tokenizer={folder}/tokenizer", f"--data=folder:{folder}/images@train", "--flip"]
  words += [f"--output={tmp_path}/out", "--batch-size=16", "--shards=12"]

  def start(seconds):
    command = [sys.executable, "-c", code, str(seconds), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

  def shard(process):
    assert process.stdout is not None
    return process.stdout.readline().strip()

  stuck = start(1000)
  first = shard(stuck)
  with stuck, start(0) as one, start(0) as two:
    taken = [shard(one), shard(two)]
    stuck.kill()
    taken += one.communicate()[0].split() + two.communicate()[0].split()
  assert (one.returncode, two.returncode) == (0, 0)
  assert len(taken) == len(set(taken)) == 12 and first in taken
  assert not list(tmp_path.glob("out/.lock*"))
  found = everything(tokens.TokenSource(tmp_path / "out"))
  assert sorted(map(tuple, found[0])) == sorted(map(tuple, everything(flipped)[0]))
