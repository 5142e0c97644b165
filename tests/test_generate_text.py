"""The commands with a generator of texts: prompts from the command line and from files."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from coda_jax import cli, generate
from coda_jax import eval as evaluate
from coda_jax.errors import UserError
from coda_jax.evaluation.conventions import CONVENTIONS
from coda_jax.evaluation.features import Networks
from coda_jax.generation import options
from coda_jax.generation.generator import load_generator
from tests.generation import test_generator, test_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("prompts")
  test_text.save(path)
  (path / "prompts.txt").write_text("a red bird\n\n  two cars, one of them blue \n", "utf-8")
  (path / "empty.txt").write_text("\n\n")
  (path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
  return path


@pytest.fixture(scope="module")
def generator(folder):
  return load_generator(folder / "generator")


def run(folder, output, *words, model="generator"):
  args = ["--model", folder / model, "--output", output, "--batch-size", 2, "--steps", 2]
  generate.run(generate.parser().parse_args([*map(str, args), *map(str, words)]))


@pytest.mark.slow
def test_prompts_are_in_names_and_settings(folder, tmp_path):
  out = tmp_path / "out"
  run(folder, out, "--prompts", folder / "prompts.txt", "--negative-prompt", "dark")
  names = ["0_a_red_bird.png", "1_two_cars_one_of_them_blue.png"]
  assert sorted(p.name for p in (out / "images").iterdir()) == names
  settings = json.loads((out / "settings.json").read_text())
  assert settings["prompts"] == str(folder / "prompts.txt") and settings["count"] == 1
  assert settings["negative_prompt"] == "dark" and "classes" not in settings
  again = tmp_path / "again"
  words = ["--prompt", "a red bird", "--prompt", "x" * 99, "--negative-prompt", "dark"]
  run(folder, again, *words, "--count", 2)
  one, other = (np.asarray(Image.open(o / "images" / names[0])) for o in (out, again))
  assert np.abs(one.astype(int) - other).max() <= 1
  assert len(list((again / "images").glob(f"?_{'x' * 60}.png"))) == 2
  assert json.loads((again / "settings.json").read_text())["prompts"] == ["a red bird", "x" * 99]


@pytest.mark.parametrize(
  ("words", "message"),
  [
    ([], "trained on texts: --prompt TEXT or --prompts FILE"),
    (["--classes", "0"], "trained on texts, not on classes"),
    (["--prompts", "empty.txt"], "empty.txt holds no prompts; write one a line"),
    (["--prompts", "bytes.txt"], "bytes.txt is no UTF-8 text"),
    (["--prompts", "nowhere.txt"], "nowhere.txt"),
    (["--prompt", "a", "--negative-prompt", "b", "--guidance", "0"], "nothing with --guidance 0"),
  ],
)
def test_prompts_that_cannot_be_had(folder, generator, monkeypatch, words, message):
  monkeypatch.chdir(folder)
  args = generate.parser().parse_args(["--model", "generator", "--output", "out", *words])
  with pytest.raises((UserError, OSError), match=message):
    options.wanted_of(args, generator)


def test_bad_input_writes_nothing(folder, tmp_path):
  words = ["--prompt", "a", "--text-encoder", folder / "tokenizer"]
  with pytest.raises(UserError, match="holds a 'tokenizer'; give the directory"):
    run(folder, tmp_path / "out", *words)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_filmstrip_of_a_prompt(folder, tmp_path):
  run(folder, tmp_path / "out", "--prompt", "a bird", "--negative-prompt", "dark", "--filmstrip")
  assert (tmp_path / "out" / "filmstrip.png").is_file()


def test_prompts_are_not_of_classes():
  for words in (["--prompt", "a bird"], ["--negative-prompt", "dark"]):
    args = generate.parser().parse_args(["--model", "x", "--output", "out", *words])
    with pytest.raises(UserError, match="trained on classes, not on texts: --classes"):
      options.wanted_of(args, test_generator.generator())
  args = generate.parser().parse_args(
    ["--model", "x", "--output", "out", "--prompt", "a bird", "--classes", "0"]
  )
  with pytest.raises(cli.UsageError, match="one of the three says what to make"):
    generate.run(args)


def evaluation(folder, output, *words):
  given = ["--generator", folder / "generator", "--prompts", folder / "prompts.txt", "--count", 2]
  given += ["--steps", 2, "--batch-size", 2, "--output", output, *words]
  return evaluate.parser().parse_args([*map(str, given)])


def test_image_i_of_an_evaluation_is_of_caption_i(folder, tmp_path, generator):
  args = evaluation(folder, tmp_path, "--data", "x", "--seed", 3)
  convention = CONVENTIONS["adm"]
  networks, size, mine = evaluate._generated(args, "samples", Networks(None, None), convention)
  assert size == 16 and mine["samples"][0].count == 4
  assert networks.notes[-1] == "CLIP score is left out: CLIP's image half is not converted"
  sampler = mine["models"]["samples"]["sampler"]
  assert sampler["prompts"] == str(folder / "prompts.txt") and len(sampler["prompts_sha256"]) == 64
  assert sampler["assignment"] == "image i is of prompt i mod 2, random numbers of (seed, i)"
  made = mine["samples"][0]._make([2, 3], options.SamplerSettings(steps=2))
  prompts = ["a red bird", "two cars, one of them blue"]
  expected = generator.generate(prompts=prompts, steps=2, key=jax.random.key(3), first=2)
  np.testing.assert_allclose(made, expected, atol=1e-4)


@pytest.mark.slow
def test_evaluation_takes_a_list_of_captions(folder, tmp_path):
  rng = np.random.default_rng(0)
  np.savez(tmp_path / "reference.npz", rng.integers(0, 256, (4, 16, 16, 3), np.uint8))
  evaluate.run(evaluation(folder, tmp_path / "out", "--reference", tmp_path / "reference.npz"))
  found = json.loads((tmp_path / "out" / "results.json").read_text())
  samples = found["entries"]["samples"]
  assert samples["images"] == 4
  assert samples["record"]["sampler"]["negative_prompt"] is None
  assert any("CLIP score is left out" in line for line in found["left_out"])


def test_prompts_are_of_a_generator(tmp_path):
  words = ["--samples", "x", "--data", "y", "--output", str(tmp_path / "out"), "--prompt", "a"]
  with pytest.raises(cli.UsageError, match="--prompt is of a --generator"):
    evaluate.run(evaluate.parser().parse_args(words))
