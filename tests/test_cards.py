"""Model cards: what is on them, and whose they are."""

import dataclasses

import numpy as np
import pytest

from coda_jax import cards, weights
from coda_jax.errors import UserError
from tests import tiny


def test_a_tokenizers_card(tmp_path):
  weights.save_tokenizer(tiny.tokenizer(), tmp_path / "t", {"trained on": "`folder:a|b@train`"})
  text = (tmp_path / "t" / "README.md").read_text()
  fingerprint = weights.read_config(tmp_path / "t", "tokenizer")["fingerprint"]
  assert text.startswith("---\nlicense: unknown\nlibrary_name: coda_jax\n")
  for row in (
    "| images | 16 x 16 |",
    "| tokens of an image | 78 in 4 levels, 468 bits |",
    "| codes | 64, attention look-up |",
    "| adapters | LoRA of rank 4 |",
    "| VAE | 2x downsampling, 16 channels |",
    "| trained on | `folder:a b@train` |",
    f"| fingerprint | `{fingerprint}` |",
    "model = coda_jax.load_tokenizer(DIRECTORY)",
  ):
    assert row in text, row


def test_every_kind_has_a_card():
  config = {"fingerprint": "x", "vae": dataclasses.asdict(tiny.VAE)}
  assert "coda_jax.load_vae" in cards.card("vae", config, 3, {})
  assert (
    "coda_jax" not in cards.card("lpips", {"fingerprint": "x"}, 3, {}).split("# Lpips")[1][:120]
  )


def test_a_generator_of_texts():
  model = {"width": 8, "depth": 2, "heads": 2, "num_classes": 0}
  config = {"fingerprint": "x", "tokenizer_fingerprint": "y", "text_encoder_fingerprint": "z"}
  config["maskgit"] = model | {"text": {"tokens": 77, "width": 768}}
  found = cards.card("generator", config, 3, {})
  assert "| texts | 77 vectors of 768 numbers stand for a prompt |" in found
  assert "| text encoder | `z`, in `text_encoder/` or apart |" in found and "classes" not in found
  config["maskgit"] = model | {"num_classes": 7, "text": None}
  assert "| classes | 7 |" in cards.card("generator", config, 3, {})


def test_a_card_of_ones_own_is_not_lost(tmp_path):
  weights.save_tokenizer(tiny.tokenizer(), tmp_path / "t")
  weights.save_tokenizer(tiny.tokenizer(seed=1), tmp_path / "t")  # replaces what it wrote
  card = tmp_path / "t" / "README.md"
  card.write_text("My tokenizer. Licence: MIT.")
  with pytest.raises(UserError, match="holds README.md, which 'tokenizer' did not write"):
    weights.save_tokenizer(tiny.tokenizer(), tmp_path / "t")
  assert card.read_text() == "My tokenizer. Licence: MIT."
  kept = weights.read_arrays(tmp_path / "t")["quantizer.codebook"]
  np.testing.assert_array_equal(kept, tiny.tokenizer_params(seed=1)["quantizer.codebook"])
