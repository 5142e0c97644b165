"""The stream of images is a pure function of (seed, global index), whoever reads it."""

import itertools
import logging
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from coda_jax.data import decode, pipeline, rng, sources
from coda_jax.data.image_stream import source_row
from coda_jax.errors import UserError
from tests.data.images import encode, photo, write_folder

OPTIONS = {"image_size": 32, "batch_size": 6, "seed": 5}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  return sources.FolderSource(write_folder(tmp_path_factory.mktemp("photos"), 20, classes="abc"))


def take(batches: pipeline.Batches, count: int) -> list[dict]:
  with batches:
    return list(itertools.islice(batches, count))


def joined(batches: list[dict]) -> dict:
  return {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}


def assert_equal(ours: list[dict], others: list[dict]):
  assert len(ours) == len(others)
  for a, b in zip(ours, others, strict=True):
    assert a.keys() == b.keys()
    for k in a:
      assert a[k].dtype == b[k].dtype
      np.testing.assert_array_equal(a[k], b[k])


@pytest.fixture(scope="module")
def stream(source):
  """The first ten batches: three epochs of 20 images."""
  return take(pipeline.train_batches(source, **OPTIONS, flip=True), 10)


def test_batches_have_one_form(stream):
  for batch in stream:
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
      "image": ((6, 32, 32, 3), "uint8"),
      "label": ((6,), "int32"),
      "index": ((6,), "int64"),
    }


def test_labels_and_pixels_belong_to_the_row(source, stream):
  rows = joined(stream)
  for i, image in enumerate(rows["image"]):
    data, label = source[int(rows["index"][i])]
    assert rows["label"][i] == label
    words = rng.words(5, rng.Stream.CROP, i)
    crop = decode.resize_and_crop(
      decode.decode_image(data),
      32,
      resize_ratio=1.125,
      position=(words[0], words[1]),
      flip=words[2] % 2 == 1,
    )
    np.testing.assert_array_equal(image, crop)


def test_every_epoch_is_another_permutation(stream):
  index = joined(stream)["index"].reshape(3, 20)
  assert (np.sort(index) == np.arange(20)).all()
  assert len({tuple(epoch) for epoch in index}) == 3


def test_the_order_is_that_of_the_first_release():
  # A run that is resumed after an upgrade must go on in the same order.
  rows = [source_row(0, g, 1_281_167) for g in (0, 1, 5_000_000)]
  assert rows == [240984, 1142230, 1047745]
  assert source_row(0, 3, 10, attempt=1) == 2
  assert rng.words(1, rng.Stream.REPLACEMENT, 3)[0] == 12997252459554536576


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64])
def test_permutations_of_any_size(n):
  for epoch in range(3):
    rows = [source_row(9, epoch * n + i, n) for i in range(n)]
    assert sorted(rows) == list(range(n))


def test_seeds_give_unrelated_streams(source):
  orders = {
    tuple(source_row(seed, e * 20 + i, 20) for i in range(20))
    for seed in range(4)
    for e in range(4)
  }
  assert len(orders) == 16


def test_crops_and_flips_cover_their_range():
  words = np.array([rng.words(0, rng.Stream.CROP, g) for g in range(2000)], np.uint64)
  for column, choices in ((0, 5), (1, 5), (2, 2)):
    counts = np.bincount((words[:, column] % np.uint64(choices)).astype(int))
    assert len(counts) == choices and counts.min() > 0.85 * 2000 / choices
  both = np.bincount(((words[:, 0] % 5) * 5 + words[:, 1] % 5).astype(int))
  assert len(both) == 25 and both.min() > 40


@pytest.mark.parametrize("start", [6, 24, 37])
def test_resume_gives_the_same_images(source, stream, start):
  batches = pipeline.train_batches(source, **OPTIONS, flip=True, start=start)
  rest = joined(take(batches, 3))
  assert batches.consumed == start + 18
  for k, v in joined(stream).items():
    np.testing.assert_array_equal(rest[k], v[start : start + 18])


@pytest.mark.parametrize("process_count", [2, 3])
def test_any_number_of_processes_makes_the_same_global_batch(source, stream, process_count):
  parts = [
    take(
      pipeline.train_batches(
        source, **OPTIONS, flip=True, process_index=p, process_count=process_count
      ),
      4,
    )
    for p in range(process_count)
  ]
  assert_equal([joined(list(batch)) for batch in zip(*parts, strict=True)], stream[:4])


def test_resize_ratio_none_crops_the_stored_image(source):
  (batch,) = take(pipeline.train_batches(source, **OPTIONS, resize_ratio=None), 1)
  for image, row in zip(batch["image"], batch["index"], strict=True):
    stored = np.asarray(decode.decode_image(source[int(row)][0]))
    windows = np.lib.stride_tricks.sliding_window_view(stored, (32, 32, 3))
    assert (windows[..., 0, :, :, :] == image).all((-3, -2, -1)).any()


def test_normalize():
  out = pipeline.normalize(np.array([0, 51, 255], np.uint8))
  assert out.dtype == np.float32
  np.testing.assert_allclose(out, [-1, -0.6, 1], atol=1e-7)


def test_evaluation_shows_every_image_once(source):
  batches = pipeline.eval_batches(source, image_size=32, batch_size=8)
  assert len(batches) == 3
  rows = joined(list(batches))
  assert rows["image"].shape == (24, 32, 32, 3)
  np.testing.assert_array_equal(rows["valid"], np.arange(24) < 20)
  np.testing.assert_array_equal(rows["index"], [*range(20), -1, -1, -1, -1])
  image = decode.decode_image(source[7][0])
  expected = decode.resize_and_crop(image, 32, resize_ratio=1.125)
  np.testing.assert_array_equal(rows["image"][7], expected)
  assert (rows["label"][20:] == -1).all() and not rows["image"][20:].any()


def test_evaluation_by_several_processes(source):
  whole = list(pipeline.eval_batches(source, image_size=32, batch_size=8))
  parts = [
    list(
      pipeline.eval_batches(source, image_size=32, batch_size=8, process_index=p, process_count=4)
    )
    for p in range(4)
  ]
  assert_equal([joined(list(batch)) for batch in zip(*parts, strict=True)], whole)


def test_evaluation_of_a_part_is_spread_over_the_source(source):
  rows = joined(list(pipeline.eval_batches(source, image_size=32, batch_size=4, limit=5)))
  np.testing.assert_array_equal(rows["index"], [0, 4, 8, 12, 16, -1, -1, -1])
  assert len(pipeline.eval_batches(source, image_size=32, batch_size=4, limit=100)) == 5


def test_official_random_crops_in_evaluation(source):
  def crops(seed):
    options = {"image_size": 32, "batch_size": 20, "crop": "random", "seed": seed}
    return next(iter(pipeline.eval_batches(source, **options)))["image"]

  assert (crops(0) == crops(0)).all() and (crops(0) != crops(1)).any()


def write_damaged(root, count: int, damaged: dict[int, bytes]) -> sources.FolderSource:
  for i in range(count):
    data = damaged.get(i, encode(photo(34, 34, seed=i)))
    root.mkdir(exist_ok=True)
    (root / f"{i:03}.png").write_bytes(data)
  return sources.FolderSource(root)


def test_unreadable_images_are_replaced_counted_and_named_once(tmp_path, caplog):
  bad = write_damaged(tmp_path / "p", 250, {3: b"", 4: encode(photo(34, 34))[:-99]})
  options = {"image_size": 32, "batch_size": 50, "seed": 1}
  with caplog.at_level(logging.WARNING):
    batches = pipeline.train_batches(bad, **options)
    stream = take(batches, 10)  # two epochs
  assert (batches.read, batches.unreadable) == (504, 4)
  for name in ("003.png", "004.png"):
    assert len([r for r in caplog.messages if name in r and "replaced" in r]) == 1
  assert not np.isin(joined(stream)["index"], [3, 4]).any()
  assert joined(stream)["image"].reshape(500, -1).any(1).all()
  # The replacement is part of the pure function.
  assert_equal(take(pipeline.train_batches(bad, **options, start=100), 8), stream[2:])
  by_two = [
    take(pipeline.train_batches(bad, **options, process_index=p, process_count=2), 10)
    for p in range(2)
  ]
  assert_equal([joined(list(b)) for b in zip(*by_two, strict=True)], stream)


def test_evaluation_leaves_unreadable_images_out(tmp_path, caplog):
  bad = write_damaged(tmp_path / "p", 120, {70: b"no image"})
  with caplog.at_level(logging.WARNING):
    batches = pipeline.eval_batches(bad, image_size=32, batch_size=50)
    rows = joined(list(batches))
  assert (batches.read, batches.unreadable) == (120, 1)
  assert np.flatnonzero(~rows["valid"]).tolist() == [70, *range(120, 150)]
  assert "070.png (not an image of a known format): left out" in caplog.text


def test_more_than_one_percent_unreadable_is_an_error(tmp_path):
  bad = write_damaged(tmp_path / "p", 120, dict.fromkeys((5, 50), b""))
  with pytest.raises(UserError, match=r"2 of 120 images .* more than 1%: .*005.png, .*050.png"):
    list(pipeline.eval_batches(bad, image_size=32, batch_size=32))
  with pytest.raises(UserError, match="more than 1%"):
    take(pipeline.train_batches(bad, image_size=32, batch_size=32, seed=0), 5)


def test_a_small_source_is_judged_at_the_end_of_an_evaluation(tmp_path):
  bad = write_damaged(tmp_path / "p", 5, dict.fromkeys((0, 2), b""))
  with pytest.raises(UserError, match="2 of 5 images .*2.png; restore or remove them"):
    list(pipeline.eval_batches(bad, image_size=32, batch_size=2))
  list(pipeline.eval_batches(bad, image_size=32, batch_size=2, max_unreadable=0.4))


def test_one_of_a_few_images_may_be_unreadable(tmp_path):
  bad = write_damaged(tmp_path / "p", 5, {2: b""})
  batches = pipeline.eval_batches(bad, image_size=32, batch_size=2)
  assert joined(list(batches))["valid"].sum() == 4 and batches.unreadable == 1
  batches = pipeline.train_batches(bad, image_size=32, batch_size=10, seed=0)
  take(batches, 30)
  assert batches.unreadable > 1  # the one file, again and again
  options = {"image_size": 32, "batch_size": 5, "max_unreadable": 0.0}
  with pytest.raises(UserError, match="1 of 5 images could not be read, more than 0%"):
    list(pipeline.eval_batches(bad, **options))
  with pytest.raises(UserError, match="could not be read, more than 0%: .*002.png"):
    take(pipeline.train_batches(bad, **options, seed=0), 2)
  alone = write_damaged(tmp_path / "alone", 1, {0: b""})
  with pytest.raises(UserError, match="1 of 1 images"):
    list(pipeline.eval_batches(alone, image_size=32, batch_size=1))


@pytest.mark.parametrize(
  ("images", "limit", "most"),
  [(5, 0.01, 1), (1, 0.5, 0), (100, 0.29, 29), (250, 0.01, 2), (9, 0.0, 0)],
)
def test_how_many_may_be_unreadable(images, limit, most):
  assert not pipeline.too_many_unreadable(most, images, limit)
  assert pipeline.too_many_unreadable(most + 1, images, limit)


def test_nothing_readable_ends_at_once(tmp_path):
  bad = write_damaged(tmp_path / "p", 3, dict.fromkeys(range(3), b"x"))
  with pytest.raises(UserError, match="16 images in a row .*png .*not an image"):
    take(pipeline.train_batches(bad, image_size=32, batch_size=2, seed=0), 1)


def test_files_that_vanish_are_unreadable(tmp_path):
  vanishing = write_damaged(tmp_path / "p", 3, {})
  os.remove(vanishing.name(1))
  os.remove(vanishing.name(2))
  with pytest.raises(UserError, match="2 of 3 images could not be read.*001.png"):
    list(pipeline.eval_batches(vanishing, image_size=32, batch_size=2))


@pytest.mark.parametrize("size,count", [(0, 1), (7, 2), (-4, 1)])
def test_bad_batch_size(source, size, count):
  with pytest.raises(UserError, match=f"batch size {size} "):
    pipeline.train_batches(source, image_size=32, batch_size=size, seed=0, process_count=count)


def test_shared_memory_too_small_for_the_workers(source):
  with pytest.raises(UserError, match="shm-size"):
    pipeline.train_batches(source, image_size=2**18, batch_size=64, seed=0, workers=2)


def test_worker_processes_change_nothing(tmp_path, caplog):
  """Pixels, counts, warnings and errors are those of the run without workers."""
  bad = write_damaged(tmp_path / "p", 110, {9: b"", 60: b"x"})
  options = {"image_size": 32, "batch_size": 12, "seed": 3}
  with_none = pipeline.train_batches(bad, **options)
  alone = take(with_none, 8)
  with caplog.at_level(logging.WARNING):
    caplog.clear()
    with_two = pipeline.train_batches(bad, **options, workers=2)
    assert_equal(list(itertools.islice(with_two, 8)), alone)
    assert (with_two.read, with_two.unreadable) == (with_none.read, with_none.unreadable)
    with pytest.raises(UserError, match="more than 1%"):
      list(itertools.islice(with_two, 3))
    with_two.close()
  assert all(name in caplog.text for name in ("009.png", "060.png"))


@pytest.mark.slow
def test_workers_end_with_a_killed_parent(source):
  program = f"""
import multiprocessing
from coda_jax.data import pipeline
batches = pipeline.train_batches({"folder:" + source.root!r}, image_size=32, batch_size=8, seed=0,
                                 workers=2)
next(batches)
print(*(p.pid for p in multiprocessing.active_children()), flush=True)
input()
"""
  pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
  with subprocess.Popen([sys.executable, "-c", program], **pipes) as parent:
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2
    parent.kill()

  def alive(pid: int) -> bool:
    stat = pathlib.Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"

  deadline = time.monotonic() + 30
  while any(map(alive, workers)):
    assert time.monotonic() < deadline, "workers outlive their parent"
    time.sleep(0.2)
