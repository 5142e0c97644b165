"""Object stores: what is written is whole, nothing else is lost, two do not write one folder."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from etils.epath import backend
from fsspec.registry import _registry

from coda_jax import cli, outputs, storage, weights
from coda_jax.config import LoggingSettings
from coda_jax.data import records, sources
from coda_jax.errors import UserError
from coda_jax.training import logging, workdir
from tests import stores, test_train
from tests.training import runs

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def bucket(monkeypatch):
  """gs://bucket of a store in memory."""
  for name in ("gs", "gcs"):
    monkeypatch.setitem(_registry, name, stores.MemoryStore)
  backend.fsspec_backend._get_filesystem.cache_clear()
  stores.MemoryStore.store.clear()
  monkeypatch.setattr(storage, "SETTLED", 0.05)
  monkeypatch.setattr(storage, "EXPIRED", 0.3)
  yield storage.path("gs://bucket")
  backend.fsspec_backend._get_filesystem.cache_clear()


def make(path, content="new", names=("images/a.png",), **options):
  with outputs.written_aside(path, "reconstruct", **options) as aside:
    for name in names:
      (aside / name).parent.mkdir(exist_ok=True)
      (aside / name).write_text(content)


def tree(folder):
  return {name: (folder / name).read_text() for name in storage.files(folder)}


def test_what_a_path_is(bucket, monkeypatch):
  assert storage.path("~/a") == pathlib.Path.home() / "a"
  assert str(storage.path("gs://bucket/a/")) == "gs://bucket/a" == str(storage.path(bucket / "a"))
  assert storage.resolved(bucket) == storage.absolute(bucket) == bucket
  for text, message in (
    ("ftp://a/b", "ftp:// is not supported; name a folder, or one of gs://, s3://"),
    ("gs://", "names no bucket"),
  ):
    with pytest.raises(UserError, match=message):
      storage.path(text)
  monkeypatch.setitem(sys.modules, "s3fs", None)
  with pytest.raises(UserError, match="needs a package: pip install 's3fs'"):
    storage.path("s3://bucket/a")


def test_what_only_a_disk_or_google_has_is_refused(bucket, monkeypatch):
  for scheme in ("folder", "parquet", "webdataset"):
    with pytest.raises(UserError, match="images are read from a disk alone; mount the bucket"):
      sources.open_source(f"{scheme}:gs://bucket/images")
  monkeypatch.setitem(_registry, "s3", stores.MemoryStore)
  other = cli.path("s3://bucket/run")
  with pytest.raises(UserError, match="s3://bucket/run: checkpoints are written to a disk or"):
    workdir.check(other, None, "tokenizer")
  with pytest.raises(UserError, match="ArrayRecord files are read from a disk or from gs://"):
    records.read([other / "a"], 1, other / "index", mend="")


def test_a_directory_is_replaced_by_the_same_command_alone(bucket):
  out = bucket / "out"
  outputs.check_output(out, "reconstruct", overwrite=False)
  make(out, "old", ["images/a.png", "images/b.png"])
  with pytest.raises(UserError, match="--overwrite replaces it"):
    outputs.check_output(out, "reconstruct", overwrite=False)
  outputs.check_output(out, "reconstruct", overwrite=True)
  make(out)
  assert tree(out)["images/a.png"] == "new"
  assert json.loads((out / outputs.MARKER).read_text())["files"] == ["images/a.png"]
  assert set(tree(out)) == {outputs.MARKER, "images/a.png"}
  (out / "images" / "mine.txt").write_text("notes")
  before = tree(out)
  for kind, foreign in (("reconstruct", "images/mine.txt"), ("generate", outputs.MARKER)):
    with pytest.raises(UserError, match=f"holds {foreign}"):
      outputs.check_output(out, kind, overwrite=True)
  with pytest.raises(UserError, match="would be lost; what was made is in /"):
    make(out, "newer")
  assert tree(out) == before
  with pytest.raises(UserError, match="holds the input gs://bucket/out/images"):
    outputs.check_output(out, "reconstruct", overwrite=True, inputs=["gs://bucket/out/images"])


def test_what_fails_while_it_is_made_changes_nothing(bucket):
  make(bucket / "out")
  outputs.write_text(bucket / "file", "old")
  before = tree(bucket)
  with pytest.raises(KeyError), outputs.written_aside(bucket / "out", "reconstruct") as aside:
    (aside / "a").write_text("")
    raise KeyError
  with pytest.raises(KeyError), outputs.replaced(bucket / "file") as aside:
    aside.write_text("a part")
    raise KeyError
  assert tree(bucket) == before


def save(path, value):
  flat = {"a": np.full(3, value, np.float32)}
  weights.write_directory(path, "tokenizer", {"image_size": 16}, flat)


@pytest.mark.parametrize("uploads", [0, 1, 2])
def test_an_upload_cut_short_is_incomplete_and_can_be_repeated(bucket, monkeypatch, uploads):
  """As if the process were killed after so many objects."""
  out = bucket / "tokenizer"
  save(out, 1)
  left, upload = [uploads], storage.upload

  def cut_short(file, to):
    if not left[0]:
      raise ConnectionError("no network")
    left[0] -= 1
    upload(file, to)

  with monkeypatch.context() as patch, pytest.raises(UserError, match="incomplete.*: no network"):
    patch.setattr(storage, "upload", cut_short)
    save(out, 2)
  if uploads:
    with pytest.raises(UserError, match="no config.json"):
      weights.read_config(out, "tokenizer")
    assert not json.loads((out / outputs.MARKER).read_text())["complete"]
  else:
    assert weights.read_config(out, "tokenizer") and weights.read_arrays(out)["a"][0] == 1
  outputs.check_output(out, "tokenizer", overwrite=True)
  save(out, 2)
  assert set(storage.files(out)) == {*outputs.WEIGHTS, "README.md"}
  assert weights.read_config(out, "tokenizer") and weights.read_arrays(out)["a"][0] == 2


def test_a_folder_is_held_by_one_process(bucket, monkeypatch):
  monkeypatch.setattr(storage, "RENEWED", 0.02)
  with outputs.locked(bucket, "--workdir"):
    with pytest.raises(UserError, match=f"gs://bucket is in use by process {os.getpid()} on"):
      with outputs.locked(bucket):
        pass
  assert storage.files(bucket) == []
  ended = threading.Timer(0.2, (bucket / outputs.LOCK).unlink)
  lock = {"holder": "process 1 on other", "key": "a", "renewed": time.time()}
  outputs.write_text(bucket / outputs.LOCK, json.dumps(lock))
  ended.start()
  with outputs.locked(bucket):
    ended.join()
  # A killed process renews it no more.
  outputs.write_text(bucket / outputs.LOCK, json.dumps(lock | {"renewed": time.time()}))
  began = time.monotonic()
  with outputs.locked(bucket):
    assert time.monotonic() - began > 0.2
  lock["renewed"] = 0.0  # it expired long ago
  outputs.write_text(bucket / outputs.LOCK, json.dumps(lock))
  with outputs.held(bucket / outputs.LOCK) as holder:
    assert holder is None
  assert storage.files(bucket) == []


def test_who_lost_a_folder_stops(bucket, monkeypatch, caplog):
  monkeypatch.setattr(storage, "RENEWED", 0.02)
  stopped = threading.Event()
  before = signal.signal(signal.SIGTERM, lambda *_: stopped.set())
  lock = json.dumps({"holder": "process 1 on other", "key": "a", "renewed": time.time()})
  try:
    with outputs.locked(bucket):
      outputs.write_text(bucket / outputs.LOCK, lock)
      assert stopped.wait(10)
  finally:
    signal.signal(signal.SIGTERM, before)
  assert "gs://bucket/.lock was taken by process 1 on other" in caplog.text
  assert (bucket / outputs.LOCK).read_text() == lock


def test_a_store_that_cannot_be_written_is_named(bucket, monkeypatch):
  def refused(*_):
    raise PermissionError("Forbidden: 403")

  monkeypatch.setattr(stores.MemoryStore, "pipe_file", refused)
  with pytest.raises(UserError, match="--workdir=gs://bucket cannot be written: Forbidden: 403"):
    with outputs.locked(bucket, "--workdir"):
      pass


def test_records_are_kept_here_and_uploaded(bucket, monkeypatch, caplog):
  run = bucket / "run"
  settings = LoggingSettings(every=1)
  with contextlib.closing(logging.Metrics(run, settings, 0, {})) as metrics:
    metrics.write("train", 1, {"loss": 2.0})
    metrics.write("train", 2, {"loss": 1.0})
  assert [r["step"] for r in logging.read_metrics(run)] == [1, 2]
  with contextlib.closing(logging.Metrics(run, settings, 1, {})) as metrics:
    metrics.write("train", 2, {"loss": 0.5})
    folder = metrics._spool.folder
  assert [r["loss"] for r in logging.read_metrics(run)] == [2.0, 0.5]
  assert any(name.startswith("tensorboard/events") for name in storage.files(run))
  assert not folder.exists()

  def refused(*_):
    raise ConnectionError("no network")

  monkeypatch.setattr(storage, "upload", refused)
  with contextlib.closing(logging.Metrics(run, settings, 2, {})) as metrics:
    metrics.write("train", 3, {"loss": 0.4})
    folder = metrics._spool.folder
  assert f"gs://bucket/run: records wait in {folder}: no network" in caplog.text
  assert [r["step"] for r in logging.read_metrics(folder)] == [1, 2, 3]


@pytest.fixture(scope="module")
def gcs(tmp_path_factory):
  with stores.fake_gcs(tmp_path_factory.mktemp("gcs")) as variables:
    yield os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)} | variables


def python(code, environment, *args):
  """The lines that a program prints."""
  command = [sys.executable, "-c", code, *args]
  done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr
  return done.stdout.splitlines()


CHECKPOINTS = f"""
import gcsfs.retry, jax, numpy as np
gcsfs.retry.min = lambda *_: 0.01  # seconds between tries to move objects, which the server cannot
from coda_jax import config, storage
from coda_jax.training import checkpoints

state = {{"a": jax.numpy.arange(8.0), "b": {{"c": jax.numpy.ones((2, 3))}}}}
folder = storage.path("gs://{stores.BUCKET}/checkpoints")
settings = config.CheckpointSettings(keep=2, keep_best=0)
saver = checkpoints.Checkpoints(folder, settings)
for step in (1, 2, 3):
  saver.save(step, jax.tree.map(lambda x: step * x, state))
saver.close()
(folder / "3" / "state" / "manifest.ocdbt").write_bytes(b"damaged")
saver = checkpoints.Checkpoints(folder, settings)
print(saver.steps)
shardings = jax.tree.map(lambda x: x.sharding, state)
step, found = saver.restore(checkpoints.abstract(state, shardings))
print(step, np.array(found["a"]).tolist() == (2 * np.arange(8.0)).tolist())
print(saver.steps)
saver.save(3, state)
saver.close()
print(sorted(p.name for p in folder.iterdir()))
"""


@pytest.mark.slow
def test_checkpoints_in_a_bucket(gcs):
  """The last ones are kept; a damaged one is set aside and its step is saved again."""
  assert python(CHECKPOINTS, gcs) == ["[2, 3]", "2 True", "[2]", "['2', '3', '3.damaged']"]


IMAGES = f"""
import numpy as np
from coda_jax.data import sources, tokens, records

class Source:
  class_names = ("a", "b")
  def __len__(self): return 30
  def __getitem__(self, i): return bytes([i]) * 100, i % 2
  def name(self, i): return f"{{i}}.png"

where = "gs://{stores.BUCKET}/images"
sources.write_arrayrecord(Source(), where, "train", files=2)
found = sources.open_source(f"arrayrecord:{{where}}@train")
print(len(found), found[17] == (bytes([17]) * 100, 1), found.name(29), found.fingerprint()[:3] > "")
"""


def test_images_in_a_bucket(gcs):
  where = f"gs://{stores.BUCKET}/images@train record 29 (29.png)"
  assert python(IMAGES, gcs) == [f"30 True {where} True"]


TOKENS = f"""
import numpy as np, sys
import coda_jax
from coda_jax import storage
from coda_jax.data import sources, tokens
from PIL import Image

where = "gs://{stores.BUCKET}/run/tokenizer"
images = np.asarray(Image.open(sys.argv[1]).resize((16, 16)), np.float32)[None] / 127.5 - 1
tokenizer = coda_jax.load_tokenizer(where)
print([x.shape for x in tokenizer.encode(images)])
found = tokens.TokenSource("gs://{stores.BUCKET}/tokens")
ids, labels = found.records([0])
print(len(found), ids.shape, labels.tolist())
print(*storage.files(storage.path("gs://{stores.BUCKET}/out")))
"""


@pytest.mark.slow
def test_a_run_in_a_bucket(gcs, tmp_path, monkeypatch):
  """Killed, stopped and continued it equals a run on a disk; its product is used from there."""
  runs.make_inputs(tmp_path)
  (tmp_path / "config.py").write_text(test_train.CONFIG.format(folder=str(tmp_path)))
  whole = test_train.run_whole(tmp_path)
  for name in set(gcs) - set(os.environ):
    monkeypatch.setenv(name, gcs[name])
  workdir, read = f"gs://{stores.BUCKET}/run", lambda name: stores.request(gcs, f"run/{name}")

  def run_until(step, send):
    process = test_train.start(tmp_path, workdir)
    saved = f"checkpoints/{step - step % 4}/commit_success.txt" if step else ""
    while step and (
      f'"step": {step},' not in (read("metrics.jsonl") or b"").decode() or read(saved) is None
    ):
      assert process.poll() is None, process.communicate()[1]
      time.sleep(0.02)
    if send:
      process.send_signal(send)
    _, errors = process.communicate(timeout=600)
    return process.returncode, errors

  run_until(7, signal.SIGKILL)
  stores.request(gcs, "run/.lock", "DELETE")  # or wait until it expires
  code, errors = run_until(9, signal.SIGTERM)
  assert code == 75 and "continuing gs://bucket/run from step" in errors, errors
  assert read("tokenizer/config.json") is None and read(".lock") is None
  code, errors = run_until(None, None)
  assert code == 0 and "done: gs://bucket/run/tokenizer" in errors, errors
  for name in outputs.WEIGHTS:
    assert read(f"tokenizer/{name}") == (whole / "tokenizer" / name).read_bytes()
  ours = [json.loads(line) for line in read("metrics.jsonl").splitlines()]
  theirs = logging.read_metrics(whole)
  assert sorted((r["kind"], r["step"]) for r in ours) == sorted(
    (r["kind"], r["step"]) for r in theirs
  )
  images = tmp_path / "images"
  for command, *options in (
    ("tokenize_dataset", "--data", f"folder:{images}@val", "--output", "gs://bucket/tokens"),
    ("reconstruct", "--images", f"{images}/val", "--output", "gs://bucket/out"),
  ):
    words = ["-m", f"coda_jax.{command}", "--tokenizer", f"{workdir}/tokenizer", *options]
    done = subprocess.run([sys.executable, *words], env=gcs, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
  shown = python(TOKENS, gcs, str(images / "val" / "one" / "0.png"))
  assert shown[0] == "[(1, 4, 4), (1, 16, 16)]" and shown[1] == "6 (6, 272) [0, 0, 0, 0, 0, 0]"
  assert {".coda_jax.json", "metrics.json", "grid.png"} < set(shown[2].split())
