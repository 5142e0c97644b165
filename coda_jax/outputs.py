"""Files and directories that commands write: complete or not there, and nothing else is lost.

Both are written aside, under another name, and renamed when they are whole. A directory takes the
place of another only if a command of the same kind wrote that one and it holds nothing else.
"""

import contextlib
import datetime
import json
import logging
import os
import pathlib
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator

from coda_jax.errors import UserError

try:
  import fcntl
except ImportError:  # Windows
  fcntl = None

log = logging.getLogger("coda_jax")
MARKER = ".coda_jax.json"  # says which command wrote a directory, and lists its files
LOCK = ".lock"
WEIGHTS = ("config.json", "model.safetensors")  # a directory of weights is its own marker
_OF_DESKTOPS = (".DS_Store", "Thumbs.db", "desktop.ini")


def check_output(
  path: pathlib.Path,
  kind: str,
  *,
  overwrite: bool,
  inputs: Iterable[str | os.PathLike | None] = (),
) -> None:
  """Checks, before any work, that a directory may be written to `path`.

  Args:
    path: the directory; it need not exist.
    kind: the command that writes it, or the kind of the weights.
    overwrite: what a command of the same kind wrote there may be replaced.
    inputs: files and folders that the command reads; None stands for none.

  Raises:
    UserError: something that is there would be lost.
  """
  if not path.is_dir():
    if path.exists():
      raise UserError(f"{path} exists and is no directory; name another output")
    return
  place = path.resolve()
  for given in filter(None, inputs):
    if pathlib.Path(given).expanduser().resolve().is_relative_to(place):
      raise UserError(f"{path} holds the input {given}, which would be lost; name another output")
  foreign = _foreign(place, kind)
  if foreign:
    raise UserError(
      f"{path} holds {foreign}, which {kind!r} did not write and which would be lost; "
      "name another output"
    )
  if _files(place) and not overwrite:
    raise UserError(f"{path} exists and is not empty; --overwrite replaces it")


def _files(folder: pathlib.Path) -> list[str]:
  """Relative names of everything below a folder but its own subfolders; links are not followed."""
  found = []
  for where, folders, files in os.walk(folder):
    links = [f for f in folders if os.path.islink(os.path.join(where, f))]
    found += [os.path.relpath(os.path.join(where, f), folder) for f in files + links]
  return sorted(found)


def _written_by(folder: pathlib.Path, kind: str) -> set[str]:
  """Relative names of the files that a command of `kind` wrote to a directory."""
  try:
    marker = json.loads((folder / MARKER).read_text())
    return {MARKER, *marker["files"]} if marker["kind"] == kind else set()
  except (OSError, ValueError, KeyError, TypeError):
    pass
  try:
    if json.loads((folder / WEIGHTS[0]).read_text())["kind"] != kind:
      return set()
  except (OSError, ValueError, KeyError, TypeError):
    return set()
  inner = {os.path.join("tokenizer", name) for name in WEIGHTS} if kind == "generator" else set()
  return {*WEIGHTS, *inner}


def _foreign(folder: pathlib.Path, kind: str, besides: str = "") -> str | None:
  """The first file below a folder that a command of `kind` did not write there."""
  own = _written_by(folder, kind)
  for name in _files(folder):
    top, known = name.split(os.sep)[0], name in own or os.path.basename(name) in _OF_DESKTOPS
    if not known and top != besides:
      return name
  return None


@contextlib.contextmanager
def written_aside(path: pathlib.Path, kind: str, *, marker: bool = True) -> Iterator[pathlib.Path]:
  """A new directory that takes the place of `path` when the block ends well, else disappears.

  Args:
    path, kind: as for `check_output`.
    marker: list the files in `MARKER`, by which a later command knows them.

  Raises:
    UserError: what is at `path` by then would be lost. The new directory stays where it was made.
  """
  path = path.expanduser().resolve()
  path.parent.mkdir(parents=True, exist_ok=True)
  # A mount point and the shell's own folder stay: their contents are replaced.
  fixed = path.is_dir() and (os.path.ismount(path) or path.samefile(os.curdir))
  where = {"prefix": f".{path.name}.", "dir": path if fixed else path.parent}
  aside = pathlib.Path(tempfile.mkdtemp(**where))
  try:
    yield aside
    if marker:
      fields = {"kind": kind, "files": _files(aside)}
      (aside / MARKER).write_text(json.dumps(fields, indent=1) + "\n")
    aside.chmod(0o755)
  except BaseException:
    shutil.rmtree(aside, ignore_errors=True)
    raise
  if path.is_dir() and (foreign := _foreign(path, kind, besides=aside.name)):
    raise UserError(f"{path} holds {foreign}, which would be lost; what was made is in {aside}")
  if fixed:
    for child in path.iterdir():
      if child.is_dir() and not child.is_symlink():
        if child != aside:
          shutil.rmtree(child)
      else:
        child.unlink()
    for child in aside.iterdir():
      child.rename(path / child.name)
    aside.rmdir()
  elif path.exists():
    old = pathlib.Path(tempfile.mkdtemp(**where))
    path.rename(old / path.name)
    aside.rename(path)
    shutil.rmtree(old)
  else:
    aside.rename(path)


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


@contextlib.contextmanager
def held(file: pathlib.Path) -> Iterator[str | None]:
  """Holds a lock file while the block runs, unless another process holds it.

  The lock is the operating system's (`flock`): it ends with its process, however that ends, and
  network file systems pass it on to other machines.

  Args:
    file: in a folder that exists; it is there as long as somebody holds it.

  Yields:
    None, or which process of which machine holds the file, if that is another one.

  Raises:
    OSError: the file cannot be written.
  """
  while True:
    handle = file.open("a+")
    try:
      if fcntl is not None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      handle.seek(0)
      holder = handle.read().strip() or "another process"
      handle.close()
      yield holder
      return
    except OSError as e:
      log.warning("%s: no lock (%s); see to it that no second process uses it", file, e.strerror)
    with contextlib.suppress(FileNotFoundError):
      if os.path.samestat(os.fstat(handle.fileno()), file.stat()):
        break
    handle.close()  # its holder ended and removed it meanwhile
  try:
    handle.truncate(0)
    started = datetime.datetime.now().astimezone().isoformat(" ", "minutes")
    handle.write(f"process {os.getpid()} on {socket.gethostname()} since {started}\n")
    handle.flush()
    yield None
  finally:
    file.unlink(missing_ok=True)  # before the lock ends, so that nobody else's is removed
    handle.close()


@contextlib.contextmanager
def locked(
  folder: pathlib.Path, option: str = "the folder", *, wait: float = 0.0
) -> Iterator[None]:
  """Makes a folder and holds it, by its file `LOCK`, for this process alone while the block runs.

  Args:
    option: what named the folder, for the message.
    wait: seconds to wait for another process that holds it.

  Raises:
    UserError: the folder cannot be written, or another process holds it; the message says which,
      on which machine.
  """
  end = time.monotonic() + wait
  with contextlib.ExitStack() as stack:
    try:
      folder.mkdir(parents=True, exist_ok=True)
      while holder := stack.enter_context(held(folder / LOCK)):
        if time.monotonic() >= end:
          raise UserError(f"{folder} is in use by {holder}; wait until it ends, or stop it")
        time.sleep(0.1)
    except OSError as e:
      raise UserError(f"{option}={folder} cannot be written: {e.strerror}") from e
    yield
