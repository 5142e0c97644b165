"""Which runs may be in a folder, and what the folder protects."""

import pytest

from coda_jax import config as c
from coda_jax.data.inventory import Inventory
from coda_jax.errors import UserError
from coda_jax.models.quantizer import QuantizerConfig
from coda_jax.training import workdir

QUANTIZER = QuantizerConfig(codebook_size=8, patch_sizes=(1, 2), code_dim=4, attn_dim=4)


def settings(**changes):
  data = c.DataSettings(train="embedded@train", eval="embedded@val", batch_size=2)
  return c.TrainConfig(tokenizer=c.TokenizerSettings("vae", QUANTIZER), data=data, **changes)


def check(folder, ours, message=None):
  before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
  if message is None:
    workdir.check(folder, ours, "tokenizer")
  else:
    with pytest.raises(UserError, match=message):
      workdir.check(folder, ours, "tokenizer")
  assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


@pytest.fixture
def run(tmp_path):
  """A run that has saved nothing yet."""
  check(tmp_path, settings())
  workdir.claim(tmp_path, c.to_json(settings()), {})
  return tmp_path


def save(folder):
  (folder / "checkpoints" / "4").mkdir()


def export(folder):
  (folder / "tokenizer").mkdir()
  (folder / "tokenizer" / "config.json").write_text('{"kind": "tokenizer"}')
  (folder / "tokenizer" / "model.safetensors").write_text("")


def test_a_first_try_that_failed_protects_nothing(run):
  check(run, settings(seed=5))
  (run / "config.json").write_text("")  # the disk was full
  (run / "metrics.jsonl").write_text("")
  check(run, settings(seed=5))


@pytest.mark.parametrize("made", [save, export])
def test_what_was_made_is_continued_by_its_own_config_alone(run, made):
  made(run)
  check(run, settings())
  check(run, settings(remat="blocks"))
  check(run, settings(seed=5), r"another config: seed \(there 0, here 5\); take a new --workdir")


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"format_version": 1}'])
def test_a_lost_config_is_found_beside_the_checkpoints(run, text):
  save(run)
  file, copy = run / "config.json", run / "checkpoints" / "config.json"
  file.unlink() if text is None else file.write_text(text)
  check(run, settings())
  check(run, settings(seed=5), "another config")
  copy.unlink()
  check(run, settings(), f"{file} is missing or damaged.*restore it, or remove {copy.parent}")
  copy.parent.rename(run / "old")
  if text:
    check(run, settings(), f"take a new --workdir, or remove {file}")
    file.unlink()
  check(run, settings(), f"remove {run / 'data.json'}")
  (run / "data.json").unlink()
  check(run, settings())


def test_changed_data(run):
  then, now = (Inventory("folder:x", n, 2, {}, str(n)) for n in (5, 6))
  workdir.claim(run, c.to_json(settings()), {"data.train": then})
  workdir.check_data(run, {"data.train": now}, accept=False)  # nothing was trained on them
  save(run)
  workdir.check_data(run, {"data.train": then}, accept=False)
  with pytest.raises(UserError, match="5 images then and 6 now.*--accept-changed-data"):
    workdir.check_data(run, {"data.train": now}, accept=False)
  workdir.check_data(run, {"data.train": now}, accept=True)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "parameters.txt", "data.json"])
def test_a_folder_of_something_else(tmp_path, name):
  (tmp_path / name).write_text('{"epochs": 3}')
  check(tmp_path, settings(), f"holds {name} but is the folder of no run")


def test_a_folder_of_weights(tmp_path):
  export(tmp_path)
  check(tmp_path, settings(), "holds tokenizer but is the folder of no run")
  check(tmp_path / "tokenizer", settings(), "holds config.json but is the folder of no run")


def test_the_result_takes_the_place_of_nothing_else(run):
  export(run)
  (run / "tokenizer" / "README.md").write_text("a model card")
  check(run, settings(), "holds README.md, which 'tokenizer' did not write")
