"""Files and directories that commands write: complete or not there.

Both are written aside, under another name in the same directory, and renamed when they are whole.
"""

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from coda_jax.errors import UserError


def check_output(path: pathlib.Path, overwrite: bool) -> None:
  """Raises UserError if `path` holds something that would be replaced."""
  if path.is_dir():
    if any(path.iterdir()) and not overwrite:
      raise UserError(f"{path} exists and is not empty; --overwrite replaces it")
  elif path.exists():
    raise UserError(f"{path} exists and is no directory")


@contextlib.contextmanager
def written_aside(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A new directory that takes the place of `path` when the block ends well, else disappears."""
  path = path.absolute()
  path.parent.mkdir(parents=True, exist_ok=True)
  aside = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
  try:
    yield aside
    aside.chmod(0o755)
    if path.exists():
      old = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
      os.rename(path, old / path.name)
      os.rename(aside, path)
      shutil.rmtree(old)
    else:
      os.rename(aside, path)
  except BaseException:
    shutil.rmtree(aside, ignore_errors=True)
    raise


@contextlib.contextmanager
def replaced(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """The path of a new file that takes the place of `path` when the block ends well.

  The block writes and closes the file, `path` with `.partial` after its name. A block that fails
  leaves `path` as it was. A process that is killed leaves the partial file, which the next one
  overwrites.
  """
  aside = path.with_name(f"{path.name}.partial")
  try:
    yield aside
    os.replace(aside, path)
  except BaseException:
    aside.unlink(missing_ok=True)
    raise


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a file whole: `path` holds its old content or `text`, never a part."""
  with replaced(path) as aside:
    aside.write_text(text)
