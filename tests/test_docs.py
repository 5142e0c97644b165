"""README and docs: links lead to files, and every command in them is one that its parser takes."""

import importlib
import pathlib
import re
import shlex

import pytest

from coda_jax import __main__ as commands
from coda_jax import cli

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```|((?:^    [^\n]*\n)+)", re.MULTILINE | re.DOTALL)


def command_lines(page: pathlib.Path) -> list[list[str]]:
  """The words of every command of ours in the page's blocks of shell."""
  found = []
  for language, fenced, indented in _BLOCK.findall(page.read_text()):
    if language not in ("", "sh", "bash"):
      continue
    for line in (fenced or indented).replace("\\\n", " ").splitlines():
      if not re.search(r"coda-jax \w|-m (coda_jax\.\w|convert\b)", line) or "..." in line:
        continue
      words = shlex.split(line, comments=True)
      for i, word in enumerate(words):
        module = words[i + 1] if word == "-m" and i + 1 < len(words) else ""
        if word == "coda-jax":
          found.append(words[i + 1 :])
        elif module == "convert" or module.startswith("coda_jax."):
          found.append([module.removeprefix("coda_jax."), *words[i + 2 :]])
  return [[w for w in words if w not in ("&", "&&", "|")] for words in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files(page):
  for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
    if not re.match(r"\w+:", link):
      assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_are_taken_by_their_parsers(page):
  for name, *words in command_lines(page):
    if name == "convert":
      parser = importlib.import_module("convert.__main__")._parser()
    else:
      assert name in commands.COMMANDS, name
      parser = importlib.import_module(f"coda_jax.{name}").parser()
    configs = [w.removeprefix("--config=") for w in words if w.startswith("--config=")]
    rest = [w for w in words if not w.startswith("--config=")]
    if configs:
      overrides = [w for w in rest if w.startswith("--config.")]
      cli.load_config(configs[0], overrides)
      rest = [w for w in rest if w not in overrides]
    if rest != ["--help"]:
      parser.parse_args(rest)


def test_commands_are_found_in_the_pages():
  names = {words[0] for page in PAGES for words in command_lines(page)}
  assert names == set(commands.COMMANDS), "a command that no page shows, or that is none"
