"""CLIP's text encoder against Hugging Face's, in every layout that it is published in."""

import json
import logging

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import convert
from coda_jax import pretrained, text, weights
from coda_jax.errors import UserError
from coda_jax.models.clip_text import CLIPText, CLIPTextConfig
from coda_jax.text import bpe
from tests.conftest import assert_close

SMALL = CLIPTextConfig(width=32, layers=1, heads=2, hidden=48)


@pytest.mark.usefixtures("optimized")
@pytest.mark.parity("clip_text")
def test_the_last_hidden_state(golden):
  state = {k: v for name in golden["keys"] for k, v in golden.state_dict(name).items()}
  config, flat = convert.to_flat("clip-text", state, heads=golden["heads"])
  assert (config.width, config.layers) == (golden["width"], golden["layers"])
  assert config.activation == golden["activation"]
  model = weights.build(lambda: CLIPText(config, rngs=nnx.Rngs(0)), flat, golden.name)
  out = golden.outputs()
  found = nnx.jit(lambda m, ids: m(ids))(model, jnp.asarray(out["ids"], jnp.int32))
  assert_close(found, out["hidden"], 1e-4)


def hugging_face(seed=0):
  """Made-up weights with Hugging Face's keys."""
  rng, c = np.random.default_rng(seed), SMALL
  shapes = {"embeddings.token_embedding.weight": (c.vocabulary, c.width)}
  shapes["embeddings.position_embedding.weight"] = (c.context, c.width)
  layer = "encoder.layers.0."
  for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
    shapes[f"{layer}self_attn.{name}"] = (c.width, c.width)
  shapes |= {f"{layer}mlp.fc1": (c.hidden, c.width), f"{layer}mlp.fc2": (c.width, c.hidden)}
  for name in (f"{layer}layer_norm1", f"{layer}layer_norm2", "final_layer_norm"):
    shapes[name] = (c.width,)
  out = {}
  for name, shape in shapes.items():
    whole = name.endswith("weight")
    out[name if whole else f"{name}.weight"] = rng.standard_normal(shape, np.float32)
    if not whole:
      out[f"{name}.bias"] = rng.standard_normal(shape[:1], np.float32)
  return {f"text_model.{k}": v for k, v in out.items()}


def openai(state):
  """The same weights with OpenAI's keys: queries, keys and values in one array."""
  names = (
    ("embeddings.token_embedding.weight", "token_embedding.weight"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("encoder.layers", "transformer.resblocks"),
    ("self_attn", "attn"),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("fc1", "c_fc"),
    ("fc2", "c_proj"),
    ("final_layer_norm", "ln_final"),
    ("text_model.", ""),
  )
  out = {}
  for key, value in state.items():
    for theirs, ours in names:
      key = key.replace(theirs, ours)
    out[key] = value
  for what in ("weight", "bias"):
    parts = [out.pop(f"transformer.resblocks.0.attn.{n}_proj.{what}") for n in "qkv"]
    out[f"transformer.resblocks.0.attn.in_proj_{what}"] = np.concatenate(parts)
  return out


def test_every_layout_becomes_the_same():
  state = hugging_face()
  config, expected = convert.to_flat("clip-text", state, heads=2)
  assert config == SMALL
  ids = np.arange(77)[None]
  vision = {"vision_model.post_layernorm.weight": np.ones(3, np.float32)}
  beside = {"text_projection.weight": np.ones((3, 3), np.float32), "logit_scale": np.float32(1)}
  both = state | vision | beside | {"text_model.embeddings.position_ids": ids}
  theirs = openai(state)
  half = {k: v.astype(np.float16) for k, v in state.items()}
  for other in (
    both,
    {k.removeprefix("text_model."): v for k, v in state.items()},
    theirs | {"visual.proj": np.ones((3, 3), np.float32), "text_projection": np.ones((3, 3))},
    {"state_dict": {f"module.{k}": v for k, v in theirs.items()}},
    {f"text.{k}": v for k, v in theirs.items()} | {"visual.trunk.a": np.ones(3, np.float32)},
    half,
  ):
    found, flat = convert.to_flat("clip-text", other, heads=2)
    assert found == SMALL and flat.keys() == expected.keys()
    for key, value in expected.items():
      exact = np.float16(value) if other is half else value
      np.testing.assert_array_equal(flat[key], exact, key)


def test_a_folder_is_converted_and_encodes(tmp_path, caplog):
  folder = tmp_path / "text_encoder"
  folder.mkdir()
  safetensors.numpy.save_file(hugging_face(), folder / "model.safetensors")
  (folder / "config.json").write_text(json.dumps({"num_attention_heads": 2, "hidden_act": "gelu"}))
  convert.convert("clip-text", [folder], tmp_path / "clip")
  encoder = text.load_text_encoder(tmp_path / "clip")
  fields = weights.read_config(tmp_path / "clip", "clip-text")
  assert fields["clip_text"]["heads"] == 2 and fields["clip_text"]["activation"] == "gelu"
  assert (encoder.tokens, encoder.width) == (77, 32)
  assert encoder.fingerprint == fields["fingerprint"]
  with caplog.at_level(logging.WARNING):
    found = encoder.encode(["a red bird", "", "word " * 100])
  assert found.shape == (3, 77, 32) and np.isfinite(found).all()
  assert caplog.text.count("1 of 3 texts are longer than 75 tokens and are cut: 'word word") == 1
  model, _ = pretrained.load_clip_text(tmp_path / "clip")
  alone = nnx.jit(lambda m, x: m(x))(model, bpe.encode(["a red bird"])[0])
  assert_close(found[:1], alone, 1e-5)


def test_errors_are_one_line(tmp_path):
  state = hugging_face()
  with pytest.raises(UserError, match=r"missing encoder\.layers\.0\.mlp\.fc1\.bias"):
    convert.to_flat("clip-text", {k: v for k, v in state.items() if "fc1.bias" not in k}, heads=2)
  with pytest.raises(UserError, match="a width of 32 does not divide into 5 heads"):
    convert.to_flat("clip-text", state, heads=5)
  with pytest.raises(UserError, match="does not have the keys of CLIP's text encoder"):
    convert.to_flat("clip-text", {"a.weight": np.ones(3, np.float32)})
  with pytest.raises(UserError, match="no readable config.json; give .*convert clip-text`"):
    text.load_text_encoder(tmp_path)
