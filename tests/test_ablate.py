"""The command: rows train once, what is there stays, rows that fail are named; bad input."""

import dataclasses
import itertools
import json
import math
import pathlib
import shutil

import pytest

from coda_jax import ablate, cli, config
from coda_jax.config import AblationConfig
from coda_jax.errors import UserError
from coda_jax.evaluation.ablation_tables import check_columns
from coda_jax.models.quantizer import QuantizerConfig
from coda_jax.models.tokenizer import TokenizerConfig
from coda_jax.models.vae import VAEConfig
from coda_jax.training import registry
from tests.training import runs

CONFIG = """
from coda_jax import config as c
from tests.training import runs
import pathlib

COLUMNS = (("psnr", "psnr"), ("codes_used", ""))
ROWS = {{
  "rq": {{"tokenizer__quantizer__patch_sizes": (2, 16)}},
  "more": {{"tokenizer__quantizer__codebook_size": 128}},
}}
TABLES = {{
  "levels": c.Table("Levels", COLUMNS, (c.Line("VAE"), c.Line("two", "rq", {{"psnr": 19.0}}))),
  "one": c.Table("One", COLUMNS, (c.Line("two", "rq"),)),
  "sizes": c.Table("Sizes", COLUMNS, (c.Line("64", "rq"), c.Line("128", "more"))),
}}

def get_config():
  changes = {{"tokenizer__lora": None, "tokenizer__quantizer__lookup": "euclidean"}}
  base = runs.config(pathlib.Path({folder!r}), steps=2, **changes)
  return c.config_dict(c.AblationConfig(c.config_dict(base), ROWS, TABLES, (0,), 1.0))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("ablate")
  runs.make_inputs(folder)
  (folder / "config.py").write_text(CONFIG.format(folder=str(folder)))
  return folder


@pytest.fixture(autouse=True)
def as_found(monkeypatch, caplog):
  """Logging and the cache of compiled programs are the process's, which other tests share."""
  monkeypatch.setattr(cli, "quiet", lambda: None)
  monkeypatch.setattr(cli, "keep_compiled", lambda: None)
  caplog.set_level("INFO", "coda_jax")


def call(folder, capsys, *argv) -> tuple[int, str]:
  """(exit code, stderr) of the command."""
  with pytest.raises(SystemExit) as e:
    ablate.main([f"--config={folder}/config.py", *argv])
  return e.value.code, capsys.readouterr().err


def read(workdir: pathlib.Path) -> dict:
  return json.loads((workdir / "tables.json").read_text())


@pytest.mark.slow
def test_rows_train_once_and_tables_show_what_is_there(
  folder, tmp_path, capsys, caplog, monkeypatch
):
  workdir, trained = tmp_path / "run", []

  def train(settings, place, preemption):
    trained.append(place.relative_to(workdir / "rows").as_posix())
    if settings.tokenizer.quantizer.codebook_size == 128:
      raise UserError("step 1: loss not finite")
    return real(settings, place, preemption)

  real = ablate.train
  monkeypatch.setattr(ablate, "train", train)
  code, _ = call(folder, capsys, f"--workdir={workdir}", "--tables=levels,one")
  assert code == 0 and trained == ["rq/seed_0"]
  found = read(workdir)
  assert found["missing"] == {"more": [0]} and set(found["continuous_vae"]) == {"psnr", "ssim"}
  psnr = found["rows"]["rq"]["runs"]["0"]["psnr"]
  assert f"| two | {psnr:.2f} | " in (workdir / "tables.md").read_text()
  assert {p.name for p in workdir.glob("*.png")} == {"levels.png", "one.png", "sizes.png"}

  code, err = call(folder, capsys, f"--workdir={workdir}")
  assert code == 1 and trained == ["rq/seed_0", "more/seed_0"]
  assert err.splitlines()[-1] == "error: 1 of 2 runs failed: row more, seed 0"
  assert "row more, seed 0 failed and is left out: step 1: loss not finite" in caplog.text

  before = (workdir / "tables.md").read_text()
  (workdir / "tables.md").unlink()
  code, _ = call(folder, capsys, f"--workdir={workdir}", "--no-training")
  assert code == 0 and len(trained) == 2 and (workdir / "tables.md").read_text() == before
  # Runs of other settings are not those that the config asks for.
  code, _ = call(folder, capsys, f"--workdir={workdir}", "--no-training", "--config.base.steps=3")
  assert code == 0 and read(workdir)["missing"] == {"more": [0], "rq": [0]}

  # A row without training measures what it starts from.
  start = workdir / "rows/rq/seed_0/tokenizer"
  old = '"tokenizer__quantizer__codebook_size": 128'
  assert old in CONFIG
  text = CONFIG.replace(old, f'"tokenizer__start": "{start}", "trainable": ()')
  (tmp_path / "again").mkdir()
  (tmp_path / "again" / "config.py").write_text(text.format(folder=str(folder)))
  code, err = call(tmp_path / "again", capsys, f"--workdir={workdir}", "--tables=sizes")
  assert (code, trained[2:]) == (0, []), err
  rows = read(workdir)["rows"]
  assert rows["more"]["runs"]["0"]["psnr"] == pytest.approx(psnr, rel=1e-5)
  assert not (workdir / "rows/more/seed_0/checkpoints").exists()

  # Such a row may be the first of a workdir.
  only = text.replace('c.Line("64", "rq"), c.Line("128", "more")', 'c.Line("128", "more"),')
  (tmp_path / "again" / "config.py").write_text(only.format(folder=str(folder)))
  code, err = call(tmp_path / "again", capsys, f"--workdir={tmp_path}/fresh", "--tables=sizes")
  assert (code, trained[2:]) == (0, []), err

  # A start that is not there is missing in the tables, and an error only of who asks for the row.
  shutil.rmtree(start)
  for argv, wanted in ((["--tables=one"], 0), (["--no-training"], 0), (["--tables=sizes"], 1)):
    code, err = call(tmp_path / "again", capsys, f"--workdir={workdir}", *argv)
    assert code == wanted and (f"row more: config.tokenizer.start: {start}" in err) == wanted
    assert read(workdir)["missing"]["more"] == [0]


def test_a_stopped_run_is_to_be_called_again(folder, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(ablate, "train", lambda *args: False)
  code, _ = call(folder, capsys, f"--workdir={tmp_path}")
  assert code == 75 and not any(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("argv", "code", "message"),
  [
    (["--tables=levels,nine"], 2, "no table 'nine'; there are levels, one, sizes"),
    (["--seeds=0,x"], 2, "'x' is no whole number"),
    (["--seeds="], 2, "'' is no whole number"),
    (["--no-training"], 1, "no such folder"),
    (["--config.base.lr=1"], 2, "no config key 'lr'"),
    (["--config.base.trainable=()"], 1, "there must be a tokenizer.start to measure"),
    (["--config.base.kind=maskgit"], 1, "row more: unknown key config."),
    (["--config.base.data.eval=folder:/nowhere"], 1, "/nowhere does not exist"),
  ],
)
def test_bad_options(folder, tmp_path, capsys, argv, code, message):
  found, err = call(folder, capsys, f"--workdir={tmp_path}/new", *argv)
  assert found == code and message in err.splitlines()[-1]
  assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize(
  ("old", "new", "message"),
  [
    ("patch_sizes", "sizes", "row rq: unknown key config.tokenizer.quantizer.sizes"),
    (
      "tokenizer__quantizer__codebook",
      "tokens__codebook",
      "row more: config.base has no group tok",
    ),
    ('"128", "more"', '"128", "most"', "config.tables.sizes: there is no row 'most'; rows: "),
    ('("psnr", "psnr")', '("psnr2", "psnr")', "config.tables.levels: no measure 'psnr2'"),
  ],
)
def test_bad_config(tmp_path, capsys, old, new, message):
  assert old in CONFIG
  (tmp_path / "config.py").write_text(CONFIG.replace(old, new).format(folder=str(tmp_path)))
  code, err = call(tmp_path, capsys, f"--workdir={tmp_path}/new")
  assert code == 1 and message in err and err.count("\n") == 1
  assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("arg", "codes"), [("demo", 1024), ("mar", 65536)])
def test_the_papers_ablations(arg, codes):
  ablation = config.freeze(AblationConfig, cli.load_config(f"configs/ablation.py:{arg}"))
  check_columns(ablation)
  settings = {row: ablate._settings(ablation, row, 3).tokenizer for row in ablation.rows}
  assert settings["full"].quantizer.codebook_size == codes and settings["full"].lora
  assert len(settings) == len(set(settings.values())) == 14
  shown = {line.row for table in ablation.tables.values() for line in table.lines}
  assert shown == {"", *settings}
  for name in ("vq", "rq", "attention"):  # Table 1 as the config of the run has it
    run = registry.resolve(cli.load_config(f"configs/{arg}.py:{name},codebook_size={codes}"))
    assert run.tokenizer == settings[name]
  with pytest.raises(UserError, match="'flux' is none of demo, mar"):
    cli.load_config("configs/ablation.py:flux")


@pytest.mark.parametrize(
  ("arg", "every_bits", "size"), [("", (6800, 3400), 64), (":photos", (108_800, 54_400), 256)]
)
def test_equal_bits(tmp_path, monkeypatch, arg, every_bits, size):
  values = cli.load_config(f"configs/equal_bits.py{arg}")
  monkeypatch.chdir(tmp_path)
  vae, quantizer = VAEConfig(ch_mult=(1, 1, 2)), QuantizerConfig(1024, (1, size // 4))
  shape = dataclasses.asdict(TokenizerConfig(vae, quantizer, image_size=size))
  for start, bits in itertools.product(("vq", "free", "data"), every_bits):
    name = f"{start}_{bits}"
    (tmp_path / "demo" / name).mkdir(parents=True)
    fields = {"format_version": 1, "kind": "tokenizer", "fingerprint": "", **shape}
    (tmp_path / "demo" / name / "config.json").write_text(json.dumps(fields))
  ablation = config.freeze(AblationConfig, values)
  check_columns(ablation)
  settings = {row: ablate._settings(ablation, row, 3).tokenizer for row in ablation.rows}
  assert {line.row for table in ablation.tables.values() for line in table.lines} == {"", *settings}
  for row, tokenizer in settings.items():
    assert tokenizer.image_size == size
    bits = int(row.rpartition("_")[2])
    if (start := row.partition("_")[0]) in ("vq", "free", "data"):
      assert tokenizer.start == f"demo/{start}_{bits}" and tokenizer.lora
    else:
      wanted = bits / 10 * math.log2(1000) if row.startswith("fsq") else bits
      assert tokenizer.quantizer.bits == pytest.approx(wanted)
      assert (tokenizer.lora is not None) == ("_lora_" in row)
