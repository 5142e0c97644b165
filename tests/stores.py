"""Object stores for tests: one in memory, and a fake server of Google Cloud Storage."""

import contextlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

from fsspec.implementations.memory import MemoryFileSystem

BUCKET = "bucket"


class MemoryStore(MemoryFileSystem):
  """What gcsfs gives for gs://, of objects in memory."""

  protocol = ("gs", "gcs")
  store, pseudo_dirs = {}, [""]

  @classmethod
  def _strip_protocol(cls, path):
    return "/" + str(path).partition("://")[2].strip("/") if "://" in str(path) else str(path)


@contextlib.contextmanager
def fake_gcs(folder):
  """A server of one empty bucket; gives the environment in which programs take it for Google's.

  Args:
    folder: for its log.
  """
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  url = f"http://127.0.0.1:{port}"
  command = [sys.executable, "-m", "gcp_storage_emulator", "start", "--host=127.0.0.1"]
  command += [f"--port={port}", "--in-memory", f"--default-bucket={BUCKET}"]
  with (folder / "gcs.log").open("w") as log:
    server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
      for _ in range(300):
        with contextlib.suppress(OSError):
          urllib.request.urlopen(f"{url}/storage/v1/b/{BUCKET}").close()
          break
        time.sleep(0.1)
      yield {
        "STORAGE_EMULATOR_HOST": url,  # gcsfs and google-cloud-storage
        "TENSORSTORE_GCS_HTTP_URL": url,  # orbax's arrays
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "abc",
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,  # array_record
        "GOOGLE_CLOUD_PROJECT": "test",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks a service that the server lacks
        "no_proxy": "127.0.0.1",
      }
    finally:
      server.kill()
      server.wait()


def request(gcs, name, method="GET"):
  """Bytes of an object of the server, or None if there is none.

  Args:
    gcs: the environment that `fake_gcs` gave.
  """
  name = urllib.parse.quote(name, safe="")
  url = f"{gcs['STORAGE_EMULATOR_HOST']}/storage/v1/b/{BUCKET}/o/{name}?alt=media"
  try:
    with urllib.request.urlopen(urllib.request.Request(url, method=method)) as response:
      return response.read()
  except urllib.error.HTTPError as e:
    assert e.code == 404
    return None
