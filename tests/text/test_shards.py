"""`tokenize_dataset --text`: captions and embeddings beside tokens, and the stream of both."""

import json
import logging
import shutil

import numpy as np
import pytest
import safetensors.numpy

import convert
from coda_jax import text, tokenize_dataset
from coda_jax.data import records, rng, tokens
from coda_jax.errors import UserError
from tests.data import images
from tests.models import test_clip_text

pytest.importorskip("array_record.python", reason="array-record exists for Linux alone")

IMAGES = 24


def caption(image: int, i: int) -> str:
  return f"caption {i} of image {image}"


def save_encoder(path, seed=0):
  file = path.with_suffix(".safetensors")
  safetensors.numpy.save_file(test_clip_text.hugging_face(seed), file)
  convert.convert("clip-text", [file], path, heads=2)


@pytest.fixture(scope="module", autouse=True)
def encoder_of_images():
  """Tokens that are the first pixels of an image, because tokenizers take seconds to compile."""
  with pytest.MonkeyPatch.context() as patch:
    ids = lambda images: images.reshape(len(images), -1)[:, :78].astype(np.uint16)
    patch.setattr(tokenize_dataset, "_encoder", lambda *_: ids)
    yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A tokenizer, an encoder, and 24 images; image i has i % 3 + 1 captions."""
  folder = tmp_path_factory.mktemp("texts")
  fields = {"format_version": 1, "kind": "tokenizer", "fingerprint": "f", "image_size": 16}
  fields["quantizer"] = {"patch_sizes": [1, 2, 3, 8], "codebook_size": 64}
  (folder / "tokenizer").mkdir()
  (folder / "tokenizer" / "config.json").write_text(json.dumps(fields))
  images.write_folder(folder / "images" / "train", IMAGES, "a", size=(24, 24))
  save_encoder(folder / "clip")
  write_captions(folder / "images" / "train" / "metadata.jsonl")
  return folder


def write_captions(file, change=""):
  lines = [
    {"file_name": f"a/{i:03}.png", "captions": [caption(i, j) + change for j in range(i % 3 + 1)]}
    for i in range(IMAGES)
  ]
  file.write_text("\n".join(map(json.dumps, lines)))


def tokenize(folder, output, kind, *options):
  words = ["--tokenizer", folder / "tokenizer", "--data", f"folder:{folder}/images@train"]
  words += ["--output", output, "--batch-size", "16", "--shards", "3"]
  words += ["--text", kind] if kind else []
  words += ["--text-encoder", folder / "clip"] if kind == "embeddings" else []
  words += options
  tokenize_dataset.run(tokenize_dataset.parser().parse_args([str(w) for w in words]))
  return tokens.TokenSource(output)


@pytest.fixture(scope="module")
def captions(folder):
  return tokenize(folder, folder / "captions", "captions", "--flip")


@pytest.fixture(scope="module")
def embeddings(folder):
  return tokenize(folder, folder / "embeddings", "embeddings", "--flip")


@pytest.fixture(scope="module")
def plain(folder):
  """ids of every image of the set with flips, as bytes."""
  return tokenize(folder, folder / "plain", None, "--flip")


def everything(source):
  return source.records(range(len(source.sizes)))


def take(source, count, batch_size=10, seed=3, **options):
  """Some batches in one: {"ids", "condition"}."""
  batches = tokens.TokenBatches(source, batch_size=batch_size, seed=seed, **options)
  found = [next(batches) for _ in range(count)]
  batches.close()
  return {k: np.concatenate([b[k] for b in found]) for k in found[0]}


def test_every_image_has_its_own_captions(captions, plain):
  ids, labels = everything(captions)
  same, plain_labels = everything(plain)
  np.testing.assert_array_equal(ids, same)
  np.testing.assert_array_equal(labels[:, 0], plain_labels)
  assert captions.text == {
    "kind": "captions",
    "captions_fingerprint": captions.text["captions_fingerprint"],
  }
  of_image = {}
  for row, (_, first, count) in zip(ids, labels, strict=True):
    texts = captions.texts(range(first, first + count))
    number = int(texts[0].split()[-1])
    assert texts == [caption(number, j) for j in range(number % 3 + 1)]
    of_image.setdefault(number, set()).add(row.tobytes())
  assert sorted(of_image) == [*range(IMAGES)] and all(len(v) == 2 for v in of_image.values())


def test_a_batch_has_one_caption_of_each_image_at_random(captions, plain):
  epochs = take(captions, 48)  # ten epochs
  np.testing.assert_array_equal(epochs["ids"], take(plain, 48)["ids"])
  chosen = [tuple(map(int, (t.split()[1], t.split()[-1]))) for t in epochs["condition"]]
  seen = {image: {i for i, n in chosen if n == image} for image in range(IMAGES)}
  assert all(seen[n] == {*range(n % 3 + 1)} for n in seen), "every caption within ten epochs"
  for g, (i, image) in enumerate(chosen):
    assert i == rng.words(3, rng.Stream.CAPTION, g)[0] % (image % 3 + 1)


@pytest.mark.parametrize("start", [1, 47, 130])
def test_the_stream_goes_on_at_any_count_in_any_number_of_processes(captions, start):
  whole = take(captions, 40)
  parts = [take(captions, 5, start=start, process_index=p, process_count=2) for p in range(2)]
  for key, values in whole.items():
    halves = [part[key].reshape(5, 5, *values.shape[1:]) for part in parts]
    found = np.concatenate(halves, 1).reshape(50, *values.shape[1:])
    np.testing.assert_array_equal(found, values[start : start + 50])


def test_captions_are_turned_to_ids(captions):
  def tokenized(texts):
    return np.array([[len(t), int(t.split()[-1])] for t in texts], np.int32)

  found = take(captions, 3, tokenize=tokenized)["condition"]
  assert found.dtype == np.int32
  np.testing.assert_array_equal(found, tokenized(take(captions, 3)["condition"]))


def test_embeddings_are_those_of_the_captions(folder, captions, embeddings):
  encoder = text.load_text_encoder(folder / "clip")
  assert embeddings.text == embeddings.text | {
    "kind": "embeddings",
    "encoder": {"kind": "clip-text", "fingerprint": encoder.fingerprint},
    "tokens": 77,
    "width": 32,
    "padding": "end",
    "empty": "empty.npy",
  }
  for ours, theirs in zip(everything(embeddings), everything(captions), strict=True):
    np.testing.assert_array_equal(ours, theirs)
  found, words = (source.texts(range(48)) for source in (embeddings, captions))
  assert isinstance(found, np.ndarray) and found.dtype == np.float16
  np.testing.assert_allclose(found, encoder.encode(words), rtol=1e-3, atol=1e-3)
  np.testing.assert_allclose(embeddings.empty(), encoder.encode([""])[0], rtol=1e-3, atol=1e-3)
  assert embeddings.empty().dtype == np.float16
  batch = take(embeddings, 1)
  assert batch["condition"].shape == (10, 77, 32) and batch["condition"].dtype == np.float16


def test_a_batch_reads_its_own_embeddings_alone(embeddings, monkeypatch):
  asked, texts = [], tokens.TokenSource.texts
  monkeypatch.setattr(
    tokens.TokenSource, "texts", lambda self, n: asked.append(len(n)) or texts(self, n)
  )
  take(embeddings, 3)
  assert set(asked) == {10}


def test_long_captions_are_cut_with_one_warning(folder, tmp_path, caplog):
  file = tmp_path / "long.jsonl"
  write_captions(file, " that goes on" * 25)
  with caplog.at_level(logging.WARNING):
    tokenize(folder, tmp_path / "out", "embeddings", "--captions", file)
  lines = [r.message for r in caplog.records if "cut" in r.message]
  assert lines == [f"{tmp_path}/out: 48 captions are longer than 77 tokens and are cut"]


def test_a_killed_run_goes_on(folder, embeddings, tmp_path, monkeypatch):
  write, written = tokenize_dataset._write_shard, []

  def killed_in_the_second(*args):
    if written:
      monkeypatch.setattr(records, "write", lambda *a, **k: 1 / 0)
    written.append(args)
    return write(*args)

  monkeypatch.setattr(tokenize_dataset, "_write_shard", killed_in_the_second)
  with pytest.raises(ZeroDivisionError):
    tokenize(folder, tmp_path / "out", "embeddings", "--flip")
  monkeypatch.undo()
  with pytest.raises(UserError, match="unfinished"):
    tokens.TokenSource(tmp_path / "out")
  (first,) = tmp_path.glob("out/text*.array_record")
  time = first.stat().st_mtime_ns
  source = tokenize(folder, tmp_path / "out", "embeddings", "--flip")
  assert first.stat().st_mtime_ns == time and source.manifest == embeddings.manifest
  for found, expected in zip(take(source, 5).values(), take(embeddings, 5).values(), strict=True):
    np.testing.assert_array_equal(found, expected)
  for lost in (first, tmp_path / "out" / "empty.npy"):
    lost.unlink()
    again = tokenize(folder, tmp_path / "out", "embeddings", "--flip")
    np.testing.assert_array_equal(again.empty(), source.empty())


def test_other_texts_are_refused(folder, captions, embeddings, tmp_path):
  other = tmp_path / "other.jsonl"
  write_captions(other, "!")
  with pytest.raises(UserError, match="captions holds other captions of the images; remove"):
    tokenize(folder, captions.path, "captions", "--flip", "--captions", other)
  with pytest.raises(UserError, match="holds tokens with captions texts, not embeddings"):
    tokenize(folder, captions.path, "embeddings", "--flip")
  with pytest.raises(UserError, match="holds tokens with captions texts, not no"):
    tokenize(folder, captions.path, None, "--flip")
  save_encoder(folder / "other_clip", seed=1)
  with pytest.raises(UserError, match=r"of another text encoder \(clip-text \w{12}, not clip-text"):
    tokenize(
      folder, embeddings.path, "embeddings", "--flip", "--text-encoder", folder / "other_clip"
    )
  assert len(tokenize(folder, captions.path, "captions", "--flip")) == 48, "the same go on"


def test_options_that_do_not_fit(folder, tmp_path):
  for options, message in (
    (("--captions", "x.csv"), "go with --text"),
    (("--text-encoder", folder / "clip"), "go with --text"),
    (("--text", "embeddings"), "needs --text-encoder DIR"),
    (("--text", "captions", "--text-encoder", folder / "clip"), "--text captions takes none"),
  ):
    with pytest.raises(UserError, match=message):
      tokenize(folder, tmp_path, None, *options)


def test_images_that_cannot_be_read_have_no_captions(folder, tmp_path):
  (tmp_path / "tokenizer").symlink_to(folder / "tokenizer")
  shutil.copytree(folder / "images", tmp_path / "images")
  (tmp_path / "images" / "train" / "a" / "002.png").write_bytes(b"no image")
  source = tokenize(tmp_path, tmp_path / "out", "captions", "--ten-crop")
  _, labels = everything(source)
  assert len(source) == 230 and sum(s["captions"] for s in source.manifest["shards"]) == 45
  texts = source.texts([first for _, first, _ in labels])
  assert {t: texts.count(t) for t in texts} == {caption(i, 0): 10 for i in range(IMAGES) if i != 2}


def test_damage_is_named(captions, embeddings, tmp_path):
  out = tmp_path / "out"
  shutil.copytree(captions.path, out)
  file = next(out.glob("text*.array_record"))
  records.write(file, [b"\xff"] * captions.manifest["shards"][0]["captions"])
  with pytest.raises(UserError, match=f"the texts of {out} are damaged"):
    take(tokens.TokenSource(out), 5)
  file.unlink()
  with pytest.raises(UserError, match=f"do not exist: {file}; restore it"):
    tokens.TokenSource(out)
  shutil.copytree(embeddings.path, tmp_path / "two")
  source = tokens.TokenSource(tmp_path / "two")
  (tmp_path / "two" / "empty.npy").write_bytes(b"x")
  with pytest.raises(UserError, match="empty.npy is missing or damaged"):
    source.empty()
