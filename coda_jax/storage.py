"""Paths on a disk and in object stores. Only this module and `outputs` know which a path is.

`gs://BUCKET/FOLDER` is a path of Google Cloud Storage, `s3://` and `az://` are paths of other
stores. etils' epath reads and writes them through fsspec, without TensorFlow. In a store an
object appears whole or not at all. Nothing is renamed, appended to or locked, and a folder is no
more than the beginning of names.
"""

import concurrent.futures
import contextlib
import datetime
import json
import logging
import os
import pathlib
import re
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator

import fsspec
import fsspec.config
import fsspec.core
from etils import epath

from coda_jax.errors import UserError, one_line

log = logging.getLogger("coda_jax")

Path = pathlib.Path | epath.Path  # on a disk, or in an object store

_PACKAGES = {"gs": "coda_jax[gcs]", "s3": "s3fs", "az": "adlfs"}
RENEWED, EXPIRED, SETTLED = 15.0, 60.0, 1.0  # seconds; see `leased`
_FSSPEC = {"az": "abfs"}  # where fsspec has another name for it

os.environ.setdefault("EPATH_USE_TF", "false")  # it takes TensorFlow where that is installed
for _scheme in _PACKAGES:  # other processes write there too
  _options = fsspec.config.conf.setdefault(_FSSPEC.get(_scheme, _scheme), {})
  _options.setdefault("use_listings_cache", False)


def path(name: str | os.PathLike) -> Path:
  """The path that a text names; `~` is the home folder.

  Raises:
    UserError: no such home folder, or an URL of a store that is not known, or that needs a package
      or a bucket's name.
  """
  text = os.fspath(name)
  match = re.match(r"([a-z][a-z0-9+.-]+)://", text)
  if match is None:
    try:
      return pathlib.Path(text).expanduser()
    except RuntimeError as e:  # no home folder
      raise UserError(f"{text}: {e}") from e
  scheme, rest = match[1], text[match.end() :]
  if scheme not in _PACKAGES:
    known = ", ".join(f"{s}://" for s in _PACKAGES)
    raise UserError(f"{text}: {scheme}:// is not supported; name a folder, or one of {known}")
  if not rest.strip("/"):
    raise UserError(f"{text} names no bucket; write {scheme}://BUCKET/FOLDER")
  try:
    fsspec.get_filesystem_class(_FSSPEC.get(scheme, scheme))
  except ImportError as e:
    raise UserError(f"{text} needs a package: pip install '{_PACKAGES[scheme]}'") from e
  return epath.Path(text)


def cache_folder() -> pathlib.Path | None:
  """Where this user's computer keeps what can be made again; None without a home folder.

  It is `coda_jax` in `$XDG_CACHE_HOME` or `~/.cache`, and may be removed at any time.
  """
  folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
  return folder / "coda_jax" if folder.is_absolute() else None


def on_disk(given: str | os.PathLike, why: str) -> pathlib.Path:
  """The path, which must not be one of an object store.

  Raises:
    UserError: it is; `why` says that this cannot be, and what to do.
  """
  found = path(given)
  if not isinstance(found, pathlib.Path):
    raise UserError(f"{found}: {why}")
  return found


def check_gs(given: Path, why: str) -> None:
  """Raises UserError, with `why`, for a path that is neither on a disk nor on gs://."""
  if not isinstance(given, pathlib.Path) and not str(given).startswith("gs://"):
    raise UserError(f"{given}: {why}")


def absolute(given: Path) -> Path:
  return given.absolute() if isinstance(given, pathlib.Path) else given


def resolved(given: Path) -> Path:
  """The path without links and `..`."""
  return given.resolve() if isinstance(given, pathlib.Path) else given


def size(file: Path) -> int:
  """Bytes of a file."""
  return file.stat().st_size if isinstance(file, pathlib.Path) else file.stat().length


def files(folder: Path) -> list[str]:
  """Relative names of everything below a folder but its own subfolders; links are not followed."""
  found = []
  if not isinstance(folder, pathlib.Path):
    system, top = fsspec.core.url_to_fs(str(folder))
    return sorted(os.path.relpath(name, top) for name in system.find(top))
  for where, folders, names in os.walk(folder):
    links = [f for f in folders if os.path.islink(os.path.join(where, f))]
    found += [os.path.relpath(os.path.join(where, f), folder) for f in names + links]
  return sorted(found)


def upload(file: pathlib.Path, to: epath.Path) -> None:
  """Copies a file to an object, which appears when it is whole."""
  system, target = fsspec.core.url_to_fs(str(to))
  system.put_file(str(file), target)


@contextlib.contextmanager
def fetched(file: Path) -> Iterator[pathlib.Path]:
  """A path of a file on this disk while the block runs: its own, or that of a copy.

  Raises:
    FileNotFoundError: there is no such object.
  """
  if isinstance(file, pathlib.Path):
    yield file
    return
  with tempfile.TemporaryDirectory() as folder:
    copy = pathlib.Path(folder, file.name)
    system, source = fsspec.core.url_to_fs(str(file))
    system.get_file(source, str(copy))
    yield copy


class Spool:
  """Files that grow: those of a folder on a disk, or local ones that `push` copies to a store.

  Attributes:
    folder: where to write them.
  """

  def __init__(self, given: Path):
    self._given = given
    self._thread = self._pushing = None
    self._pushed: dict[str, int] = {}  # sizes
    if isinstance(given, pathlib.Path):
      self.folder = given
    else:
      self.folder = pathlib.Path(tempfile.mkdtemp(prefix=f"{given.name}."))
      self._thread = concurrent.futures.ThreadPoolExecutor(1)

  def push(self) -> None:
    """Starts to upload the files that have grown, unless an upload is under way."""
    if self._thread and (self._pushing is None or self._pushing.done()):
      self._pushing = self._thread.submit(self._push)

  def close(self) -> None:
    """Uploads what is left, and removes the local files. A failure is a warning."""
    if self._thread:
      self._thread.shutdown()
      if self._push():
        shutil.rmtree(self.folder, ignore_errors=True)

  def _push(self) -> bool:
    """Whether all is uploaded."""
    assert not isinstance(self._given, pathlib.Path)
    try:
      for name in files(self.folder):
        file = self.folder / name
        if self._pushed.get(name) != (length := size(file)):
          upload(file, self._given / name)
          self._pushed[name] = length
    except Exception as e:  # the run is worth more than its records
      log.warning("%s: records wait in %s: %s", self._given, self.folder, one_line(e))
      return False
    return True


def this_process() -> str:
  """Which process this is, for whom it keeps waiting."""
  started = datetime.datetime.now().astimezone().isoformat(" ", "minutes")
  return f"process {os.getpid()} on {socket.gethostname()} since {started}"


@contextlib.contextmanager
def leased(file: epath.Path) -> Iterator[str | None]:
  """`outputs.held` in a store: an object that its holder writes anew every `RENEWED` seconds.

  A killed process leaves it. It counts no more when it was not renewed for `EXPIRED` seconds. Of
  two that write it at once the later one has it, which both see after `SETTLED` seconds. A holder
  that could not renew it in time and finds another one's stops by SIGTERM.
  """
  key, me = secrets.token_hex(8), this_process()

  def write() -> None:
    text = json.dumps({"holder": me, "key": key, "renewed": time.time()})
    system, target = fsspec.core.url_to_fs(str(file))
    system.pipe_file(target, text.encode())

  def read() -> dict:
    try:
      return json.loads(file.read_text())
    except FileNotFoundError:
      return {}

  there = read()
  if not there or time.time() - there["renewed"] >= EXPIRED:
    write()
    time.sleep(SETTLED)
    there = read()
  if there.get("key") != key:
    yield there.get("holder", "another process")
    return
  ended = threading.Event()

  def renew() -> None:
    while not ended.wait(RENEWED):
      with contextlib.suppress(Exception):  # the next round tries again
        if (there := read()).get("key", key) != key:
          log.error("%s was taken by %s", file, there["holder"])
          os.kill(os.getpid(), signal.SIGTERM)
          return
        write()

  renewing = threading.Thread(target=renew, daemon=True)
  renewing.start()
  try:
    yield None
  finally:
    ended.set()
    renewing.join()
    with contextlib.suppress(Exception):
      if read().get("key") == key:
        file.unlink()
