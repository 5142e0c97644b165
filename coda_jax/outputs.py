"""Files and directories that commands write: complete or not there, and nothing else is lost.

Both are written aside, under another name, and renamed when they are whole. A directory takes the
place of another only if a command of the same kind wrote that one and it holds nothing else.

In an object store nothing can be renamed. A file is written here and uploaded: it appears whole. A
directory is made here and uploaded file by file. The one without which it is incomplete comes last:
`config.json` of weights, and `MARKER` of all else, which says "complete": false until then. A lock
is an object that its holder renews.
"""

import contextlib
import json
import logging
import os
import pathlib
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator

from etils import epath

from coda_jax import cards, storage
from coda_jax.errors import UserError, one_line

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
  path: storage.Path,
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
  place = storage.resolved(path)
  for given in filter(None, inputs):
    if storage.resolved(storage.path(given)).is_relative_to(place):
      raise UserError(f"{path} holds the input {given}, which would be lost; name another output")
  foreign = _foreign(place, kind)
  if foreign:
    raise UserError(
      f"{path} holds {foreign}, which {kind!r} did not write and which would be lost; "
      "name another output"
    )
  if storage.files(place) and not overwrite:
    raise UserError(f"{path} exists and is not empty; --overwrite replaces it")


def _written_by(folder: storage.Path, kind: str) -> set[str]:
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
  copies = ("tokenizer", "text_encoder") if kind == "generator" else ()
  inner = {os.path.join(copy, name) for copy in copies for name in WEIGHTS}
  with contextlib.suppress(OSError, ValueError):
    if cards.MARK in (folder / cards.FILE).read_text():
      inner.add(cards.FILE)
  return {*WEIGHTS, *inner}


def _foreign(folder: storage.Path, kind: str, besides: str = "") -> str | None:
  """The first file below a folder that a command of `kind` did not write there."""
  own = _written_by(folder, kind)
  for name in storage.files(folder):
    top, known = name.split(os.sep)[0], name in own or os.path.basename(name) in _OF_DESKTOPS
    if not known and top != besides:
      return name
  return None


@contextlib.contextmanager
def written_aside(path: storage.Path, kind: str, *, marker: bool = True) -> Iterator[pathlib.Path]:
  """A new directory that takes the place of `path` when the block ends well, else disappears.

  Args:
    path, kind: as for `check_output`.
    marker: list the files in `MARKER`, by which a later command knows them.

  Raises:
    UserError: what is at `path` by then would be lost. The new directory stays where it was made.
  """
  if not isinstance(path, pathlib.Path):
    with _uploaded(path, kind, marker) as aside:
      yield aside
    return
  path = path.expanduser().resolve()
  path.parent.mkdir(parents=True, exist_ok=True)
  # A mount point and the shell's own folder stay: their contents are replaced.
  fixed = path.is_dir() and (os.path.ismount(path) or path.samefile(os.curdir))
  where = {"prefix": f".{path.name}.", "dir": path if fixed else path.parent}
  aside = pathlib.Path(tempfile.mkdtemp(**where))
  try:
    yield aside
    if marker:
      fields = {"kind": kind, "files": storage.files(aside)}
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
def _uploaded(path: epath.Path, kind: str, marker: bool) -> Iterator[pathlib.Path]:
  """`written_aside` for an object store.

  A process that is killed leaves a directory that is incomplete. Its `MARKER` lists the files of
  the old directory and of the new one, so that the next one may replace them.
  """

  def mark(names: Iterable[str], **fields: bool) -> None:
    write_text(path / MARKER, json.dumps({"kind": kind, "files": sorted(names)} | fields) + "\n")

  aside = pathlib.Path(tempfile.mkdtemp(prefix=f"{path.name}."))
  try:
    yield aside
  except BaseException:
    shutil.rmtree(aside, ignore_errors=True)
    raise
  made, there = set(storage.files(aside)), set(storage.files(path))
  if foreign := _foreign(path, kind):
    raise UserError(f"{path} holds {foreign}, which would be lost; what was made is in {aside}")
  try:
    mark((made | there) - {MARKER}, complete=False)
    last = set() if marker else {WEIGHTS[0]}
    for name in (there & last) or ():
      (path / name).unlink()
    for name in sorted(made - last):
      storage.upload(aside / name, path / name)
    for name in sorted(there - made - last - {MARKER}):
      (path / name).unlink(missing_ok=True)
    for name in last:
      storage.upload(aside / name, path / name)
    if marker:
      mark(made)
    else:
      (path / MARKER).unlink()
  except Exception as e:
    what = f"{path} is incomplete; what was made is in {aside}"
    raise UserError(f"{what}: {one_line(e) or type(e).__name__}") from e
  shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def replaced(path: storage.Path) -> Iterator[pathlib.Path]:
  """The path of a new file that takes the place of `path` when the block ends well.

  The block writes and closes the file, `path` with `.partial` after its name. A block that fails
  leaves `path` as it was. A process that is killed leaves the partial file, which the next one
  overwrites. To an object store the file is uploaded from this disk.
  """
  if not isinstance(path, pathlib.Path):
    with tempfile.TemporaryDirectory() as folder:
      aside = pathlib.Path(folder, path.name)
      yield aside
      storage.upload(aside, path)
    return
  aside = path.with_name(f"{path.name}.partial")
  try:
    yield aside
    os.replace(aside, path)
  except BaseException:
    aside.unlink(missing_ok=True)
    raise


def write_text(path: storage.Path, text: str) -> None:
  """Writes a file whole: `path` holds its old content or `text`, never a part."""
  with replaced(path) as aside:
    aside.write_text(text)


@contextlib.contextmanager
def held(file: storage.Path) -> Iterator[str | None]:
  """Holds a lock file while the block runs, unless another process holds it.

  The lock is the operating system's (`flock`): it ends with its process, however that ends, and
  network file systems pass it on to other machines. For an object store see `storage.leased`.

  Args:
    file: in a folder that exists; it is there as long as somebody holds it.

  Yields:
    None, or which process of which machine holds the file, if that is another one.

  Raises:
    OSError: the file cannot be written. A store raises what it likes.
  """
  if not isinstance(file, pathlib.Path):
    with storage.leased(file) as holder:
      yield holder
    return
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
    handle.write(f"{storage.this_process()}\n")
    handle.flush()
    yield None
  finally:
    file.unlink(missing_ok=True)  # before the lock ends, so that nobody else's is removed
    handle.close()


@contextlib.contextmanager
def locked(
  folder: storage.Path, option: str = "the folder", *, wait: float = 0.0
) -> Iterator[None]:
  """Makes a folder and holds it, by its file `LOCK`, for this process alone while the block runs.

  Args:
    option: what named the folder, for the message.
    wait: seconds to wait for another process that holds it. In an object store it is no less than
      a killed process may seem to hold it.

  Raises:
    UserError: the folder cannot be written, or another process holds it; the message says which,
      on which machine.
  """
  pause, told = 0.1, not wait and isinstance(folder, pathlib.Path)
  if not isinstance(folder, pathlib.Path):
    wait, pause = max(wait, storage.EXPIRED + 2 * storage.SETTLED), storage.SETTLED
  end = time.monotonic() + wait
  with contextlib.ExitStack() as stack:
    try:
      if isinstance(folder, pathlib.Path):
        folder.mkdir(parents=True, exist_ok=True)
      while holder := stack.enter_context(held(folder / LOCK)):
        if time.monotonic() >= end:
          raise UserError(f"{folder} is in use by {holder}; wait until it ends, or stop it")
        if not told:
          log.info("%s: waiting for %s, which uses it or was killed", folder, holder)
        told = True
        time.sleep(pause)
    except UserError:
      raise
    except Exception as e:
      reason = getattr(e, "strerror", None) or one_line(e) or type(e).__name__
      raise UserError(f"{option}={folder} cannot be written: {reason}") from e
    yield


def shared(
  folder: storage.Path, tasks: Iterable[int], do: Callable[[int], None], name: str
) -> None:
  """Runs `do(i)` for every task, each while no other process of the folder runs it.

  Processes that run the same tasks share them: each takes what no other one holds (a lock file a
  task), and what a process that was killed held. `do` is called for every task here too, so it
  first looks whether the task's result is there. All processes end when the last task is done.

  Args:
    folder: exists; it holds the lock files.
    tasks: numbers, in the order in which this process takes them.
    name: of the tasks, for the line that says that this process waits.
  """
  left, told = list(tasks), False
  while left:
    others = []
    for i in left:
      with held(folder / f"{LOCK}-{i}") as holder:
        if holder:
          others.append(i)
        else:
          do(i)
    if others and len(others) == len(left):
      if not told:
        log.info("%s: waiting for %d %s of other processes", folder, len(others), name)
      told = True
      time.sleep(0.2)
    left = others


@contextlib.contextmanager
def present(folder: storage.Path) -> Iterator[None]:
  """Lists this process among the `writers` of a folder while the block runs."""
  with held(folder / f"{LOCK}-{socket.gethostname()}-{os.getpid()}"):
    yield


def writers(folder: storage.Path) -> list[str]:
  """The processes that hold a task or are `present`. Removes the lock files of killed ones."""
  found = []
  for file in folder.glob(f"{LOCK}-*"):
    with held(file) as holder:
      found += [holder] if holder else []
  return found
