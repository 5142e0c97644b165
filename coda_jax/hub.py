"""Saved directories on the Hugging Face Hub: `hf://OWNER/NAME[@REVISION]`.

The repository holds the files of a saved directory. huggingface_hub keeps what it fetched, so a
second load works without a network (its environment variables `HF_HOME`, `HF_HUB_OFFLINE` and
`HF_ENDPOINT` hold).
"""

import os
import pathlib
import re
import tempfile
from typing import Any

from coda_jax import weights
from coda_jax.errors import UserError, describe
from coda_jax.models.tokenizer import Tokenizer
from coda_jax.models.vae import AutoencoderKL

_SCHEME = "hf://"
_FILES = ["*config.json", "*model.safetensors", "README.md"]  # tokenizer/ of a generator too


def local(path: str | os.PathLike) -> str | os.PathLike:
  """The folder of a repository on this machine, fetched if need be; other paths as they are.

  Raises:
    UserError: huggingface_hub is missing, or there is no such repository, revision or network.
  """
  if not os.fspath(path).startswith(_SCHEME):
    return path
  name, revision = _parse(os.fspath(path))
  hub = _library()
  try:
    folder = hub.snapshot_download(name, revision=revision, allow_patterns=_FILES)
    return pathlib.Path(str(folder))
  except Exception as e:  # the library's, requests', httpx's
    raise UserError(f"{path} cannot be fetched: {_reason(e)}") from e


def push(
  model: Any, path: str, *, private: bool = False, message: str = "Upload with coda_jax"
) -> str:
  """Uploads a saved directory, or a VAE or tokenizer, and returns its address.

  Args:
    model: a directory that training, `convert` or `save_*` wrote, or a loaded model.
    path: `hf://OWNER/NAME[@REVISION]`; the repository is made if it is not there.
    private: whether others may not see a new repository.
    message: of the commit.

  Raises:
    UserError: nothing to upload, no rights (`hf auth login`), or no network.
  """
  if not path.startswith(_SCHEME):
    raise UserError(f"{path!r} is no address on the Hub; hf://OWNER/NAME is")
  name, revision = _parse(path)
  hub = _library()
  with tempfile.TemporaryDirectory() as folder:
    source = pathlib.Path(folder) / "model"
    if isinstance(model, (str, os.PathLike)):
      source = pathlib.Path(model).expanduser()
      weights.kind_of(source)
    else:
      _save(model, source)
    api = hub.HfApi()
    try:
      api.create_repo(name, private=private, exist_ok=True)
      options = {"revision": revision, "allow_patterns": _FILES, "commit_message": message}
      return str(api.upload_folder(repo_id=name, folder_path=source, **options))
    except Exception as e:
      raise UserError(f"{path} cannot be uploaded: {_reason(e)}") from e


def _save(model, path: pathlib.Path) -> None:
  if isinstance(model, Tokenizer):
    weights.save_tokenizer(model, path)
  elif isinstance(model, AutoencoderKL):
    weights.save_vae(model, path)
  else:
    raise UserError(
      f"{type(model).__name__}: no VAE and no tokenizer; of a generator, give its directory"
    )


def _parse(path: str) -> tuple[str, str | None]:
  """(OWNER/NAME, revision)."""
  found = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", path)
  if not found:
    raise UserError(f"{path!r} is no address on the Hub; hf://OWNER/NAME[@REVISION] is")
  return found[1], found[2]


def _library():
  try:
    import huggingface_hub
  except ImportError as e:
    raise UserError("hf:// needs huggingface_hub: pip install 'coda_jax[hub]'") from e
  return huggingface_hub


def _reason(e: Exception) -> str:
  return describe(e).splitlines()[0]
