"""Builds the documentation: docs/ and pages made from the code, as a site in build/site.

  make docs          or: python -m tools.docs_site [--serve]

Generated are the settings (fields and docstrings of the config's dataclasses), every command's
`--help`, and the Python interface (mkdocstrings). A warning is an error. Links from docs/ to files
of the repository become links to the address `repo_url` in mkdocs.yml.
"""

import argparse
import dataclasses
import inspect
import os
import pathlib
import re
import shutil
import subprocess
import sys
import typing

import coda_jax
from coda_jax import __main__ as commands
from coda_jax import cli, config
from coda_jax.config.engine import unwrap

ROOT = pathlib.Path(__file__).parents[1]
PAGES = ROOT / "build" / "docs"


def settings(cls: type, prefix: str = "") -> list[str]:
  """Markdown of a config's dataclass and of those in it, by the keys that a command takes."""
  text = inspect.getdoc(cls) or ""
  head, _, rest = text.partition("\nAttributes:\n")
  rest, _, _ = rest.partition("\nRaises:")
  meaning = {}
  for names, said in re.findall(r"^  (\w[\w, ]*): (.*(?:\n    .*)*)", rest, re.MULTILINE):
    for name in names.split(", "):
      meaning[name] = " ".join(said.split())
  rows, inner, hints = [], [], typing.get_type_hints(cls)
  for field in dataclasses.fields(cls):
    kind, key = unwrap(hints[field.name]), f"{prefix}{field.name}"
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
      inner += settings(kind, f"{key}.")
      continue
    default = "" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
    said = meaning.get(field.name, "").replace("|", "\\|")
    rows.append(f"| `{field.name}` | {default} | {said} |")
  title = f"### `{prefix.rstrip('.') or cls.__name__}`"
  table = ["| key | default | |", "|---|---|---|", *rows, ""] if rows else []
  return [title, "", " ".join(head.split()), "", *table, *inner]


def settings_page() -> str:
  return "\n".join(
    [
      "# Settings",
      "",
      "Every key of a config, as `--config.KEY=VALUE` changes it. A key without a default is set",
      "by the files in `configs/`.",
      "",
      "## Training a tokenizer",
      "",
      *settings(config.TrainConfig),
      "## Training a generator",
      "",
      *settings(config.MaskGITTrainConfig),
    ]
  )


def help_of(name: str) -> str:
  """What `coda-jax NAME --help` prints, 100 columns wide."""
  command = [sys.executable, "-m", "coda_jax", *name.split(), "--help"]
  done = subprocess.run(
    command,
    capture_output=True,
    text=True,
    check=True,
    cwd=ROOT,
    env=os.environ | {"COLUMNS": "100"},
  )
  return done.stdout.rstrip()


def commands_page() -> str:
  parts = ["# Commands", "", "`coda-jax NAME ...` is `python -m coda_jax.NAME ...`.", ""]
  for name, what in commands.COMMANDS.items():
    parts += [
      f"## {name}",
      "",
      f"{what[0].upper()}{what[1:]}.",
      "",
      "```text",
      help_of(name),
      "```",
      "",
    ]
  return "\n".join(parts)


def python_page() -> str:
  parts = ["# Reference of the Python interface", ""]
  for name in coda_jax.__all__:
    function = getattr(coda_jax, name)
    parts += [f"::: {function.__module__}.{function.__name__}", ""]
  parts += ["::: coda_jax.api.Tokenizer", "", "::: coda_jax.api.AutoencoderKL", ""]
  parts += ["::: coda_jax.generation.generator.Generator", ""]
  return "\n".join(parts)


def linked(text: str, address: str) -> str:
  """A page with its links to files of the repository made absolute, but for pictures."""
  text = re.sub(r"\]\(\.\./assets/(\w+\.png)\)", r"](assets/\1)", text)
  return re.sub(r"\]\(\.\./", f"]({address}/blob/main/", text)


def write_pages() -> None:
  """The source of the site in build/docs."""
  shutil.rmtree(PAGES, ignore_errors=True)
  shutil.copytree(ROOT / "docs", PAGES)
  address = re.search(r"^repo_url: (\S+)", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
  assert address is not None
  (PAGES / "assets").mkdir()
  for picture in (ROOT / "assets").glob("*.png"):
    shutil.copy(picture, PAGES / "assets")
  for page in PAGES.rglob("*.md"):
    page.write_text(linked(page.read_text(), address[1]))
  reference = PAGES / "reference"
  reference.mkdir()
  for name, page in (
    ("settings", settings_page),
    ("commands", commands_page),
    ("python", python_page),
  ):
    (reference / f"{name}.md").write_text(page() + "\n")


def run(args: argparse.Namespace) -> None:
  write_pages()
  words = ["serve"] if args.serve else ["build", "--strict", "--site-dir", "build/site"]
  quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
  subprocess.run([sys.executable, "-m", "mkdocs", *words], check=True, cwd=ROOT, env=quiet)
  if not args.serve:
    print(ROOT / "build" / "site" / "index.html")


def parser() -> argparse.ArgumentParser:
  p = cli.Parser(prog="python -m tools.docs_site", description=(__doc__ or "").splitlines()[0])
  p.add_argument("--serve", action="store_true", help="show it on localhost, anew at each change")
  return p


if __name__ == "__main__":
  cli.main(run, parser())
