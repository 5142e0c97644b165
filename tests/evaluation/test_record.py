import dataclasses
import json

import coda_jax
from coda_jax.evaluation.conventions import convention
from coda_jax.evaluation.record import Side, lines, preprocessing, record, same_preprocessing

SAMPLES = Side("runs/flux/tokenizer", 50, "a" * 64, **preprocessing(256, 1.125))
FILE = Side("ref.npz", None, "b" * 64)


def test_a_record_says_everything_and_is_json():
  found = record(
    SAMPLES,
    dataclasses.replace(SAMPLES, name="folder:imagenet@val"),
    convention("coda"),
    posterior="mean",
    averaged_weights=True,
    weights={"tokenizer": "c" * 64, "inception": "d" * 64},
    bits_per_image=35840.0,
    bits_per_pixel=35840 / 65536,
  )
  assert json.loads(json.dumps(found)) == found
  assert found["version"] == coda_jax.__version__ and found["same_preprocessing"] is True
  text = "\n".join(lines(found))
  for fact in (
    "50 images",
    "centre 256 x 256; Lanczos, shorter edge to 288; SHA-256 aaaaaaaaaaaa",
    "cut and resized alike",
    "convention coda: floats in [0, 1], clamped; bilinear to 299, half-pixel",
    "posterior: mean",
    "averaged; tokenizer cccccccccccc, inception dddddddddddd",
    "bits: 35840 an image, 0.547 a pixel",
  ):
    assert fact in text, text


def test_what_a_file_does_not_say_is_not_stated():
  found = record(SAMPLES, FILE, convention("adm"), sampler={"steps": 8, "seed": 0})
  assert found["same_preprocessing"] is None
  text = "\n".join(lines(found))
  assert "reference: ref.npz; number of images not stated; crop not stated" in text
  assert "both sides: not stated" in text and "sampler: steps 8, seed 0" in text


def test_another_filter_is_another_preprocessing():
  other = dataclasses.replace(SAMPLES, **preprocessing(256, 1.0))
  assert same_preprocessing(SAMPLES, other) is False
  assert preprocessing(64, None) == {"crop": "centre 64 x 64", "resize": "as stored"}
