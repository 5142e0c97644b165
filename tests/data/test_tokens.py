"""Token files: the bytes of a record, and an order that is a pure function of (seed, index)."""

import json

import numpy as np
import pytest

from coda_jax.data import records, tokens
from coda_jax.errors import UserError

pytest.importorskip("array_record.python", reason="array-record exists for Linux alone")

SHARDS = (300, 0, 70, 130)  # images: 8 records, the last of a shard not full
IMAGES = sum(SHARDS)


def write(path, *, shards=SHARDS, kind=np.uint16, **changes):
  """Tokens of images 0, 1, 2, ...: those of image i are (i, 2 i), its label is -i."""
  path.mkdir(exist_ok=True)
  numbers = np.arange(sum(shards))
  ids, labels = np.stack([numbers, 2 * numbers], 1).astype(kind), -numbers
  entries, start = [], 0
  for i, images in enumerate(shards):
    file = f"tokens-{i:05}-of-{len(shards):05}.array_record"
    parts = [
      slice(a, min(a + tokens.RECORD_IMAGES, start + images))
      for a in range(start, start + images, tokens.RECORD_IMAGES)
    ]
    records.write(path / file, [tokens.pack(ids[p], labels[p]) for p in parts])
    entries.append({"file": file, "images": images})
    start += images
  manifest = {"format": tokens.FORMAT, "complete": True, "patch_sizes": [1, 1], "class_names": []}
  (path / tokens.MANIFEST).write_text(json.dumps(manifest | {"shards": entries} | changes))
  return path


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  return tokens.TokenSource(write(tmp_path_factory.mktemp("tokens") / "all"))


def take(source, count, *, batch_size=50, seed=3, **options):
  """The numbers of the images in some batches."""
  batches = tokens.TokenBatches(source, batch_size=batch_size, seed=seed, **options)
  found = [next(batches) for _ in range(count)]
  batches.close()
  for batch in found:
    np.testing.assert_array_equal(batch["ids"][:, 1], 2 * batch["ids"][:, 0])
    np.testing.assert_array_equal(batch["condition"], -batch["ids"][:, 0].astype(int))
  return [batch["ids"][:, 0] for batch in found]


@pytest.mark.parametrize(("codes", "kind"), [(2**16, np.uint16), (2**16 + 1, np.int32)])
def test_ids_take_two_bytes_where_they_fit(codes, kind):
  assert tokens.id_type(codes) is kind
  ids = np.array([[0, 1, codes - 1], [2, 3, 4]], kind)
  found, labels = tokens.unpack(tokens.pack(ids, np.array([7, -1])))
  assert found.dtype == kind and labels.dtype == np.int32
  np.testing.assert_array_equal(found, ids)
  np.testing.assert_array_equal(labels, [7, -1])


def test_the_bytes_of_a_record():
  ids = np.array([[1, 2], [3, 4], [5, 65535]], np.uint16)
  record = tokens.pack(ids, np.array([-1, 0, 258]))
  header = b"CJT1\x02\x00\x00\x00\x03\x00\x00\x00\x02\x00\x00\x00"
  labels = b"\xff\xff\xff\xff\x00\x00\x00\x00\x02\x01\x00\x00"
  assert record == header + labels + b"\x01\x00\x02\x00\x03\x00\x04\x00\x05\x00\xff\xff"
  transposed = np.array([[1, 3, 5], [2, 4, 65535]], np.uint16).T
  assert tokens.pack(transposed, np.array([-1, 0, 258])) == record


def test_a_record_with_texts():
  ids, labels = np.array([[1, 2], [3, 4]], np.uint16), np.array([[-1, 0, 5], [7, 5, 1]])
  record = tokens.pack(ids, labels)
  assert record[:8] == b"CJT1\x02\x00\x02\x00" and len(record) == 16 + 24 + 8
  for found, expected in zip(tokens.unpack(record), (ids, labels), strict=True):
    np.testing.assert_array_equal(found, expected)
  with pytest.raises(ValueError, match="not a record"):
    tokens.unpack(record[:-4])


def test_what_is_no_record_is_refused():
  record = tokens.pack(np.zeros((3, 2), np.uint16), np.zeros(3))
  odd = record[:4] + b"\x03" + record[5:]  # ids of three bytes
  for damaged in (b"", record[:10], record[:-1], record + b"\0", b"CJI1" + record[4:], odd):
    with pytest.raises(ValueError, match="not a record of tokens"):
      tokens.unpack(damaged)


def test_the_source(source):
  assert len(source) == IMAGES and source.tokens == 2 and source.class_names == ()
  assert source.sizes.tolist() == [64, 64, 64, 64, 44, 64, 6, 64, 64, 2]
  ids, labels = source.records([6, 0])
  np.testing.assert_array_equal(ids[:, 0], [*range(364, 370), *range(64)])
  np.testing.assert_array_equal(labels, -ids[:, 0].astype(int))


def test_large_codebooks_have_wide_ids(tmp_path):
  source = tokens.TokenSource(write(tmp_path / "wide", kind=np.int32))
  batches = tokens.TokenBatches(source, batch_size=4, seed=0)
  assert next(batches)["ids"].dtype == np.int32
  batches.close()


def test_every_epoch_is_another_permutation(source):
  epochs = np.concatenate(take(source, 30)).reshape(3, IMAGES)
  assert (np.sort(epochs) == np.arange(IMAGES)).all()
  assert len({tuple(epoch) for epoch in epochs}) == 3
  (other,) = take(source, 1, batch_size=IMAGES, seed=4)
  assert not np.array_equal(other, epochs[0])


def test_the_order_is_that_of_the_first_release(source):
  # A run that is resumed after an upgrade must go on in the same order.
  (first,) = take(source, 1, batch_size=8)
  (later,) = take(source, 1, batch_size=8, start=7 * IMAGES + 123)
  assert first.tolist() == [156, 246, 115, 306, 155, 248, 76, 210]
  assert later.tolist() == [72, 243, 129, 166, 498, 127, 246, 70]


def test_a_window_of_records_is_mixed_image_by_image(source, monkeypatch):
  monkeypatch.setattr(tokens, "_WINDOW", 4)
  epoch = np.concatenate(take(source, 10))
  record = np.searchsorted(np.cumsum(source.sizes), epoch, "right")
  begin = 0
  seen = []
  while begin < IMAGES:  # a window ends where the images of its four records do
    end = begin
    while end < IMAGES and len({*record[begin : end + 1]}) <= 4:
      end += 1
    window = record[begin:end]
    seen += sorted(set(window))
    assert len(window) == source.sizes[sorted(set(window))].sum()
    assert (np.diff(window) != 0).sum() > len(window) / 3, "the records are not one by one"
    begin = end
  assert sorted(seen) == list(range(len(source.sizes)))


@pytest.mark.parametrize("window", [1, 3, 256])
@pytest.mark.parametrize("start", [1, 63, 499, 500, 1234])
def test_a_run_starts_at_any_index(source, monkeypatch, start, window):
  monkeypatch.setattr(tokens, "_WINDOW", window)
  whole = np.concatenate(take(source, 40))
  found = np.concatenate(take(source, 5, batch_size=70, start=start))
  np.testing.assert_array_equal(found, whole[start : start + 350])


def test_a_batch_may_be_larger_than_an_epoch(source):
  (batch,) = take(source, 1, batch_size=1300)
  np.testing.assert_array_equal(batch, np.concatenate(take(source, 26)))


@pytest.mark.parametrize("count", [2, 5])
def test_processes_read_the_parts_of_one_batch(source, count):
  parts = [take(source, 12, process_index=p, process_count=count) for p in range(count)]
  together = [np.concatenate(batch) for batch in zip(*parts, strict=True)]
  np.testing.assert_array_equal(together, take(source, 12))


@pytest.mark.parametrize(("size", "count"), [(0, 1), (7, 2), (-4, 1)])
def test_a_batch_must_divide_among_processes(source, size, count):
  with pytest.raises(UserError, match=f"batch size {size} must be a positive multiple of"):
    tokens.TokenBatches(source, batch_size=size, seed=0, process_count=count)


def error(path) -> str:
  with pytest.raises(UserError) as e:
    tokens.TokenSource(path)
  assert str(path) in str(e.value) and "\n" not in str(e.value)
  return str(e.value)


def test_directories_that_cannot_be_read(tmp_path):
  assert "holds no tokens: no manifest.json" in error(tmp_path)
  (tmp_path / tokens.MANIFEST).write_text("{")
  assert "is no manifest of tokens (Expecting" in error(tmp_path)
  for odd in ("[]", '{"format": "coda_jax tokens 1"}'):
    (tmp_path / tokens.MANIFEST).write_text(odd)
    assert f"restore it, or remove {tmp_path} and run" in error(tmp_path)
  assert "'coda_jax tokens 9'" in error(write(tmp_path, format="coda_jax tokens 9"))
  assert "is unfinished: run the same" in error(write(tmp_path, complete=False))
  assert "holds no images" in error(write(tmp_path, shards=(0, 0)))
  assert "texts as 'speech', which" in error(write(tmp_path, text={"kind": "speech"}))


def test_damaged_and_missing_files_are_named(tmp_path):
  path = write(tmp_path / "tokens")
  file = path / "tokens-00002-of-00004.array_record"
  whole = file.read_bytes()
  file.write_bytes(whole[:100])
  assert "cannot be read" in error(path)
  records.write(file, [b"a record too few"])
  assert "promises 10 records, its files hold 9" in error(path)
  file.unlink()
  assert f"do not exist: {file}; restore it, or remove it and run" in error(path)
  records.write(file, [b"something else", b""])
  source = tokens.TokenSource(path)
  with pytest.raises(UserError, match=f"{file} is damaged .not a record of tokens.; .*remove it"):
    take(source, 10)
