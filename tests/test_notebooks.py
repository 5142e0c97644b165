"""The notebooks: what they name exists, their outputs are clean, and each runs top to bottom.

Only the slow test runs them, at small size, as programs of this interpreter.
"""

import ast
import copy
import glob
import importlib
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import nbclient
import nbformat
import pytest

from coda_jax import cli
from coda_jax.planning import chips
from convert.__main__ import _parser as convert_parser

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / "notebooks").glob("*.ipynb"))
NOTEBOOKS = {f.stem: nbformat.read(f, 4) for f in FILES}
CONFIGS = ("demo.py", "demo.py:thumbnails", "maskgit.py:demo", "mar.py", "flux.py")
MACHINE = re.compile(r"(?<![\w~./])/(root|home|Users|work|tmp|opt|private|content|kaggle)\b")


@pytest.fixture(params=NOTEBOOKS)
def notebook(request):
  return NOTEBOOKS[request.param]


def code(notebook, kind: str = "code") -> dict[str, str]:
  return {c.id: c.source for c in notebook.cells if c.cell_type == kind}


def printed(notebook) -> str:
  outputs = [o for c in notebook.cells for o in c.get("outputs", [])]
  return "".join(o.get("text", "") for o in outputs)


def constants(notebook) -> set[str]:
  """Strings of the code, of f-strings what comes before the first value."""
  sources = [re.sub(r"\A%%.*\n", "\n", source) for source in code(notebook).values()]
  nodes = [n for source in sources for n in ast.walk(ast.parse(source))]
  return {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}


def test_there_are_four():
  assert set(NOTEBOOKS) == {"reconstruct", "adapt", "generate", "tpu_pod"}


def test_valid_with_links_that_exist(notebook):
  nbformat.validate(notebook)
  for text in code(notebook, "markdown").values():
    for link in re.findall(r"\]\(((?!https:)[^)]+)\)", text):
      assert (ROOT / "notebooks" / link).is_file(), link


def test_the_setup_is_one_text():
  first = {code(n)["setup"] for n in NOTEBOOKS.values()}
  assert len(first) == 1
  for notebook in NOTEBOOKS.values():
    assert next(iter(code(notebook))) == "setup"
  texts = [code(n, "markdown")["title"].partition("**Setup.**") for n in NOTEBOOKS.values()]
  assert len({words for *_, words in texts}) == 1 and texts[0][1]


def test_outputs_are_a_clean_run(notebook):
  cells = [c for c in notebook.cells if c.cell_type == "code"]
  assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
  outputs = [o for c in cells for o in c.outputs]
  assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
  for text in (*code(notebook).values(), printed(notebook)):
    assert not MACHINE.search(text)
  size = len(nbformat.writes(notebook))
  assert size < 2_000_000, "an image is too large for the repository"


def parsers() -> dict:
  modules = "train reconstruct visualize tokenize_dataset generate compile_check".split()
  found = {f"coda_jax.{m}": importlib.import_module(f"coda_jax.{m}").parser() for m in modules}
  return found | {"convert": convert_parser()}


def test_commands_that_ran_are_understood(notebook):
  """The lines `$ python -m ...` of the outputs parse, and their config keys exist."""
  known = parsers()
  commands = re.findall(r"^\$ python -m (\S+) (.*)", printed(notebook), re.MULTILINE)
  for module, line in commands:
    words = shlex.split(line)
    overrides = [w for w in words if w.startswith("--config")]
    known[module].parse_args([w for w in words if w not in overrides])
    if overrides:
      spec = next(w for w in overrides if w.startswith("--config="))
      cli.load_config(str(ROOT / spec.partition("=")[2]), [w for w in overrides if w != spec])
  assert commands


def options(parser) -> set[str]:
  out = set(parser._option_string_actions)
  for action in parser._actions:
    for sub in (getattr(action, "choices", None) or {}).values() if action.nargs == "A..." else ():
      out |= options(sub)
  return out


def test_options_and_keys_of_the_code_exist(notebook):
  """Those of branches that did not run too."""
  known = set().union(*map(options, parsers().values())) | {"--config", "--"}
  known |= set(re.findall(r"--[a-z-]+", (ROOT / "launch_tpu.sh").read_text()))
  known |= {"--depth", "--python", "--disable-pip-version-check"}  # git's, uv's and pip's
  configs = [cli.load_config(str(ROOT / "configs" / c)) for c in CONFIGS]
  for text in constants(notebook):
    option = text.partition("=")[0]
    if option.startswith("--config."):
      keys = option.removeprefix("--config.").split(".")
      assert any(has(config, keys) for config in configs), option
    elif option.startswith("--"):
      assert option in known, option
    if text.startswith(("--config=configs/", "configs/", "assets/")) and "{" not in text:
      assert list((ROOT / text.removeprefix("--config=").partition(":")[0]).parent.iterdir())


def has(config, keys) -> bool:
  for key in keys:
    if not hasattr(config, "keys") or key not in config:
      return False
    config = config[key]
  return True


@pytest.mark.parametrize(
  ("device", "extras"),
  [
    ("/dev/accel0", "perceptual,tpu"),
    ("/dev/vfio/0", "perceptual,tpu"),
    ("nvidia-smi", "perceptual,cuda12"),
    ("/dev/accel/accel0", "perceptual"),  # not a TPU
    ("/dev/vfio/vfio", "perceptual"),
  ],
)
def test_the_setup_installs_for_the_device(device, extras, tmp_path, monkeypatch):
  """It clones, makes the environment and installs, and leaves Colab's own settings out."""
  calls = []

  def record(words, **options):
    calls.append((words, options.get("env", {})))
    return subprocess.CompletedProcess(words, 0, stdout=b"a GPU")

  class Process:
    stdout, returncode = ("jax\n",), 0
    wait = lambda self, seconds=None: 0

  find = glob.glob
  for name, value in {
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "UV_CONSTRAINT": "/backend-container/containers/requirements.constraints",
    "UV_SYSTEM_PYTHON": "true",
    "TPU_PROCESS_ADDRESSES": "local",
  }.items():
    monkeypatch.setenv(name, value)
  for name in ("CODA_JAX_PYTHON", "JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.chdir(tmp_path)
  (tmp_path / "coda_jax").mkdir()  # the clone, from here on
  monkeypatch.setattr(subprocess, "run", record)
  monkeypatch.setattr(subprocess, "Popen", lambda words, **options: Process())
  monkeypatch.setattr(shutil, "which", lambda name: name if name == device else None)
  monkeypatch.setattr(glob, "glob", lambda p: [device] * (pathlib.PurePath(device).match(p)))
  space = {"get_ipython": lambda: None}
  source = code(NOTEBOOKS["adapt"])["setup"]
  decorator = "from IPython.core.magic import register_cell_magic\n"
  assert decorator in source  # it needs a kernel
  exec(source.replace(decorator, "register_cell_magic = lambda f: f\n"), space)
  monkeypatch.setattr(glob, "glob", find)

  (venv, environment), (install, _) = calls[-2:]
  python = space["PYTHON"]
  assert venv[-4:] == ["-q", "--python", sys.executable, str(tmp_path / "coda_jax/notebooks/.venv")]
  assert install[-4:] == ["--python", python, "-e", f"{tmp_path / 'coda_jax'}[{extras}]"]
  assert environment["PYTHONPATH"] == str(tmp_path / "coda_jax")
  assert not {"MPLBACKEND", "UV_CONSTRAINT", "UV_SYSTEM_PYTHON"} & set(environment)
  assert environment["TPU_PROCESS_ADDRESSES"] == "local"
  assert ("TPU_SKIP_MDS_QUERY" in environment) == ("tpu" not in extras)
  assert environment.get("JAX_PLATFORMS") == ("cpu" if extras == "perceptual" else None)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of Jupyter's packages
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_runs_top_to_bottom(name, tmp_path, monkeypatch):
  if name == "tpu_pod" and not chips.has_libtpu():
    pytest.skip("libtpu is not installed (extra `tpu`)")
  for part in ("assets", "configs", "convert", "coda_jax", "tools", "launch_tpu.sh"):
    (tmp_path / part).symlink_to(ROOT / part)
  (tmp_path / "notebooks").mkdir()
  monkeypatch.setenv("CODA_JAX_PYTHON", sys.executable)
  monkeypatch.setenv("CODA_JAX_SMALL", "1")
  monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
  monkeypatch.setenv("XLA_FLAGS", "")  # one device
  notebook = copy.deepcopy(NOTEBOOKS[name])
  check = "import sys; assert not {'jax', 'coda_jax'} & set(sys.modules)"
  notebook.cells.append(nbformat.v4.new_code_cell(check))
  resources = {"metadata": {"path": str(tmp_path / "notebooks")}}
  nbclient.NotebookClient(notebook, timeout=3000, resources=resources).execute()
  written = {
    "reconstruct": ["runs/levels/5_level_3.png", "runs/reconstructed/metrics.json"],
    "adapt": ["runs/my_tokenizer.zip", "runs/torch/vae_ema.pth", "runs/report/report.html"],
    "generate": ["runs/samples/filmstrip.png", "runs/inpainted/grid.png", "runs/steps_1_1.png"],
    "tpu_pod": [],
  }
  for file in written[name]:
    assert (tmp_path / file).stat().st_size, file
  assert "+ gcloud" in printed(notebook) or name != "tpu_pod"
