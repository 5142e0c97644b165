"""Save and load our directories: `config.json` + `model.safetensors`.

Keys are dotted module paths, arrays are float32 in our layouts (conv HWIO, linear [in, out]).
A directory appears only when it is complete: it is written aside and renamed.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import shutil
import typing
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from jax.typing import DTypeLike

from coda_jax import arrays, cards, outputs, storage
from coda_jax.errors import UserError
from coda_jax.models.maskgit import MaskGIT, MaskGITConfig
from coda_jax.models.tokenizer import Tokenizer, TokenizerConfig
from coda_jax.models.vae import AutoencoderKL, VAEConfig

FORMAT_VERSION = 1
_AVERAGED = "averaged"  # in the metadata of model.safetensors, which decides no fingerprint
Path = str | os.PathLike
Arrays = Mapping[str, np.ndarray | jax.Array]
VAE = typing.TypeVar("VAE", bound=AutoencoderKL)
Tok = typing.TypeVar("Tok", bound=Tokenizer)

# Settings of training or of speed: they decide neither ids nor pixels.
_NOT_IN_FINGERPRINT = ("beta", "entropy_temperature", "chunk_size", "gradient")
# Fields that came later count where they are not what was so before them.
_LATER = {
  "norm_patch": 0,
  "level_codes": [],
  "text": None,
  "fsq_levels": [],
  "product_heads": 2,
  "factor_codes": [],
}


def expected_shapes(make: typing.Callable[[], nnx.Module]) -> dict[str, tuple[int, ...]]:
  """Shape of every parameter of the module that `make` would build; nothing is allocated."""
  return {k: x.shape for k, x in arrays.of(nnx.eval_shape(make)).items()}


def check_entries(
  found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str
) -> None:
  """Raises one UserError that lists every missing, extra and misshapen entry."""
  problems = [f"missing {k}" for k in expected if k not in found]
  problems += [f"extra {k}" for k in found if k not in expected]
  problems += [
    f"{k} has shape {list(found[k])}, expected {list(expected[k])}"
    for k in expected
    if k in found and tuple(found[k]) != tuple(expected[k])
  ]
  if problems:
    shown = "; ".join(problems[:20])
    more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
    raise UserError(f"{where} does not fit the model: {shown}{more}")


def _filled(expected: arrays.Arrays, flat: Arrays, where: str) -> dict[str, jax.Array]:
  """The arrays of `flat`, which must fit `expected` exactly, as JAX arrays of its types."""
  check_entries(
    {k: x.shape for k, x in flat.items()}, {k: x.shape for k, x in expected.items()}, where
  )
  return {k: jnp.asarray(flat[k], x.dtype) for k, x in expected.items()}


def set_params(module: nnx.Module, flat: Arrays, where: str = "weights") -> None:
  """Sets every variable of `module` from `flat`, in place.

  Raises:
    UserError: entries are missing, extra or misshapen (all are listed).
  """
  nnx.update(module, arrays.unflatten(_filled(arrays.of(module), flat, where)))


def build(make: typing.Callable[[], nnx.Module], flat: Arrays, where: str):
  """The module that `make` describes, with the parameters of `flat`; none is initialised first.

  Raises:
    UserError: entries are missing, extra or misshapen (all are listed).
  """
  graphdef, expected = arrays.split(nnx.eval_shape(make))
  return arrays.merge(graphdef, _filled(expected, flat, where))


def config_from_fields(cls: type, fields: Mapping, where: str):
  """A (nested) config dataclass from JSON fields.

  Raises:
    UserError: an unknown or missing field, named.
  """
  known = {f.name: f for f in dataclasses.fields(cls)}
  for name in fields:
    if name not in known:
      raise UserError(f"{where}: unknown field {name!r}; known are {', '.join(known)}")
  hints = typing.get_type_hints(cls)
  values = {}
  for name, value in fields.items():
    kinds = [
      h
      for h in (*typing.get_args(hints[name]), hints[name])
      if isinstance(h, type) and dataclasses.is_dataclass(h)
    ]
    if kinds and isinstance(value, Mapping):  # of several the one that knows most of the fields
      kind = min(kinds, key=lambda k: len(value.keys() - {f.name for f in dataclasses.fields(k)}))
      value = config_from_fields(kind, value, f"{where}: {name}")
    values[name] = tuple(value) if isinstance(value, list) else value
  try:
    return cls(**values)
  except TypeError as e:
    raise UserError(f"{where}: {e}") from e


def fingerprint(fields: Mapping, flat: Arrays) -> str:
  """SHA-256 over the fields and tensors that decide ids and pixels."""

  def relevant(node):
    if isinstance(node, Mapping):
      kept = {k: v for k, v in node.items() if not (k in _LATER and v == _LATER[k])}
      return {k: relevant(v) for k, v in kept.items() if k not in _NOT_IN_FINGERPRINT}
    return node

  digest = hashlib.sha256(json.dumps(relevant(fields), sort_keys=True).encode())
  for key in sorted(flat):
    array = np.ascontiguousarray(flat[key], np.float32)
    digest.update(f"{key}{list(array.shape)}".encode())
    digest.update(array.data)
  return digest.hexdigest()


def write_directory(
  path: Path,
  kind: str,
  fields: Mapping,
  flat: Arrays,
  include: Mapping[str, Path] | None = None,
  made: Mapping[str, typing.Any] | None = None,
  *,
  averaged: bool | None = None,
) -> None:
  """Writes config, weights and a model card; a directory of the same kind is replaced.

  Args:
    path: the directory.
    kind: `vae`, `tokenizer`, `generator`, or the name of a frozen network.
    fields: every model field, JSON-serialisable.
    flat: arrays by dotted path, of any float type and strides; kept as float32. Only one of them
      is copied at a time, so `convert` can hand over views of a mapped file.
    include: directories of weights that are copied into it, by their names there.
    made: where the weights come from, for the card.
    averaged: whether the weights are a moving average of training's, for `is_averaged`.

  Raises:
    UserError: an array is not finite, named, or `path` holds something else, which would be lost;
      nothing is written.
  """
  check_finite(flat, str(path), "nothing is written")
  path = storage.path(path)
  outputs.check_output(path, kind, overwrite=True)
  fields = json.loads(json.dumps(fields))
  config = {"format_version": FORMAT_VERSION, "kind": kind, **fields}
  config["fingerprint"] = fingerprint({"kind": kind, **fields}, flat)
  with outputs.written_aside(path, kind, marker=False) as aside:
    _save_safetensors(flat, aside / "model.safetensors", averaged)
    (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    parameters = sum(math.prod(x.shape) for x in flat.values())
    (aside / cards.FILE).write_text(cards.card(kind, config, parameters, made or {}))
    for name, source in (include or {}).items():
      (aside / name).mkdir()
      for file in outputs.WEIGHTS:
        with storage.fetched(storage.path(source) / file) as read:
          shutil.copyfile(read, aside / name / file)


def _save_safetensors(flat: Arrays, file: pathlib.Path, averaged: bool | None) -> None:
  """`safetensors.numpy.save_file` as float32, which would hold two more copies of everything."""
  header, end = {}, 0
  if averaged is not None:
    header["__metadata__"] = {_AVERAGED: str(averaged).lower()}
  for key in sorted(flat):
    start, end = end, end + 4 * flat[key].size
    shape = list(flat[key].shape)
    header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
  head = json.dumps(header).encode()
  head += b" " * (-len(head) % 8)
  try:
    with file.open("wb") as f:
      f.write(len(head).to_bytes(8, "little") + head)
      for key in sorted(flat):
        f.write(np.ascontiguousarray(flat[key], "<f4").data)
  except OSError as e:  # a failed write does not know its file
    raise OSError(e.errno, e.strerror, str(file)) from e


def is_there(path: Path) -> bool:
  """Whether `path` is a directory of ours, whatever it holds."""
  return (storage.path(path) / "config.json").is_file()


def _saved_config(path: Path) -> dict:
  """What is in the `config.json` of a saved directory. Raises UserError if there is none."""
  file = storage.path(path) / "config.json"
  if not file.is_file():
    where = os.fspath(path) or "an empty path"
    raise UserError(f"{where}: no config.json; give a directory that `convert` or training wrote")
  try:
    return json.loads(file.read_text())
  except ValueError as e:
    raise UserError(f"{file}: not valid JSON ({e})") from e


def kind_of(path: Path) -> str | None:
  """What a saved directory holds: "vae", "tokenizer", ... Raises UserError if it is none."""
  return _saved_config(path).get("kind")


def fingerprint_of(path: Path, kind: str) -> str:
  """The fingerprint of a directory of `kind`. Raises as `read_config`."""
  return read_config(path, kind)["fingerprint"]


def read_config(path: Path, kind: str) -> dict:
  """The fields of a directory of `kind`, `fingerprint` among them.

  Raises:
    UserError: no such directory, another kind or another format version.
  """
  config = _saved_config(path)
  if config.get("kind") != kind:
    raise UserError(f"{path} holds a {config.get('kind')!r}, not a {kind!r}")
  if config.get("format_version") != FORMAT_VERSION:
    raise UserError(
      f"{storage.path(path) / 'config.json'}: format_version {config.get('format_version')}; "
      f"this version reads {FORMAT_VERSION}"
    )
  del config["kind"], config["format_version"]
  return config


def read_arrays(path: Path) -> dict[str, np.ndarray]:
  """The arrays of a directory. Raises UserError if the file is missing, damaged or not finite."""
  file = storage.path(path) / "model.safetensors"
  try:
    with storage.fetched(file) as read:
      flat = safetensors.numpy.load_file(read)
  except FileNotFoundError as e:
    raise UserError(f"{file} is missing") from e
  except safetensors.SafetensorError as e:
    raise UserError(f"{file} is damaged or truncated: {e}") from e
  check_finite(flat, str(file), "the weights are damaged")
  return flat


def is_averaged(path: Path) -> bool | None:
  """Whether a directory's weights are a moving average of training's; None if it does not say."""
  try:
    with (storage.path(path) / "model.safetensors").open("rb") as f:
      header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    found = header.get("__metadata__", {}).get(_AVERAGED)
  except (OSError, ValueError, AttributeError):  # whoever reads the arrays says so
    return None
  return None if found is None else found == "true"


def check_finite(flat: Arrays, where: str, consequence: str) -> None:
  """Raises one UserError that names the first arrays with NaN or infinity."""
  if bad := arrays.not_finite(flat):
    names = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
    raise UserError(
      f"{where}: {names} hold values that are not finite (NaN or infinity): {consequence}"
    )


def save_vae(vae: AutoencoderKL, path: Path) -> None:
  """Saves a VAE; adapters are folded into a copy of its weights."""
  from coda_jax.models.lora import merge_lora  # kept off the import path of `convert`

  vae = nnx.clone(vae)
  merge_lora(vae)
  write_directory(path, "vae", {"vae": dataclasses.asdict(vae.config)}, _numpy(vae))


def load_vae(path: Path, *, dtype: DTypeLike = jnp.float32, cls: type[VAE] = AutoencoderKL) -> VAE:
  """The VAE that `python -m convert mar-vae`, `flux-vae` or alike wrote to `path`.

  Args:
    dtype: of the computation.
    cls: what it becomes.

  Raises:
    UserError: missing, damaged or foreign files.
  """
  fields = read_config(path, "vae")
  config = config_from_fields(VAEConfig, fields["vae"], f"{path}/config.json: vae")
  return build(lambda: cls(config, dtype=dtype, rngs=nnx.Rngs(0)), read_arrays(path), str(path))


def save_tokenizer(
  tokenizer: Tokenizer,
  path: Path,
  made: Mapping[str, typing.Any] | None = None,
  *,
  averaged: bool | None = None,
) -> None:
  """Saves a tokenizer with its adapters as they are.

  Args:
    made: how it came to be, for its card.
    averaged: as in `write_directory`.
  """
  fields = dataclasses.asdict(tokenizer.config)
  write_directory(path, "tokenizer", fields, _numpy(tokenizer), made=made, averaged=averaged)


def read_tokenizer_config(path: Path) -> TokenizerConfig:
  """The shape of the tokenizer in a directory. Raises UserError as `load_tokenizer`."""
  fields = read_config(path, "tokenizer")
  del fields["fingerprint"]
  return config_from_fields(TokenizerConfig, fields, f"{path}/config.json")


def load_tokenizer(
  path: Path, *, dtype: DTypeLike = jnp.float32, cls: type[Tok] = Tokenizer
) -> Tok:
  """The tokenizer that training, `python -m convert coda-mar` or `coda-flux` wrote to `path`.

  Args:
    dtype: of the computation.
    cls: what it becomes.

  Raises:
    UserError: missing, damaged or foreign files.
  """
  config = read_tokenizer_config(path)
  return build(lambda: cls(config, dtype=dtype, rngs=nnx.Rngs(0)), read_arrays(path), str(path))


def save_generator(
  model: MaskGIT,
  tokenizer_dir: Path,
  path: Path,
  class_names: typing.Sequence[str] = (),
  order: str = "uniform",
  made: Mapping[str, typing.Any] | None = None,
  *,
  averaged: bool | None = None,
  text_encoder: str | None = None,
  text_encoder_dir: Path | None = None,
) -> None:
  """Saves a generator with a copy of its tokenizer at `path`/tokenizer.

  Args:
    order: in which training masked the tokens (`config.MaskingSettings`).
    made: how it came to be, for its card.
    averaged: as in `write_directory`.
    text_encoder: fingerprint of the text encoder, of a model of texts.
    text_encoder_dir: that encoder, to be copied to `path`/text_encoder.

  Raises:
    UserError: the tokenizer's levels or codes are not the model's.
  """
  tokenizer = read_config(tokenizer_dir, "tokenizer")
  check_tokens_fit(model.config, tokenizer["quantizer"], "the generator", tokenizer_dir)
  fields = {
    "maskgit": dataclasses.asdict(model.config),
    "class_names": list(class_names),
    "order": order,
    "tokenizer_fingerprint": tokenizer["fingerprint"],
  }
  inner = {"tokenizer": tokenizer_dir}
  if text_encoder:
    fields["text_encoder_fingerprint"] = text_encoder
  if text_encoder_dir:
    inner["text_encoder"] = text_encoder_dir
  write_directory(path, "generator", fields, _numpy(model), inner, made, averaged=averaged)


def load_generator_weights(path: Path, *, dtype: DTypeLike = jnp.float32) -> tuple[MaskGIT, dict]:
  """The transformer of a generator's directory, and the directory's fields.

  Raises:
    UserError: missing, damaged or foreign files, or the tokenizer in it is another one.
  """
  fields = read_config(path, "generator")
  config = config_from_fields(MaskGITConfig, fields["maskgit"], f"{path}/config.json: maskgit")
  tokenizer = storage.path(path) / "tokenizer"
  found = fingerprint_of(tokenizer, "tokenizer")
  if found != fields["tokenizer_fingerprint"]:
    raise UserError(
      f"{tokenizer} is tokenizer {found[:12]}, but {path} was trained on tokens of "
      f"{fields['tokenizer_fingerprint'][:12]}"
    )
  make = lambda: MaskGIT(config, dtype=dtype, rngs=nnx.Rngs(0))
  return build(make, read_arrays(path), str(path)), fields


def check_tokens_fit(ours, theirs: Mapping, name: str, other: Path) -> None:
  """Raises UserError if patch sizes or codebook size of two things with tokens differ.

  Args:
    ours: has the attributes `patch_sizes` and `codebook_size`; `name` says what it is.
    theirs: has them as keys; `other` says where it is from.
  """
  for key, a in (
    ("patch_sizes", list(ours.patch_sizes)),
    ("codebook_size", ours.codebook_size),
  ):
    b = list(theirs[key]) if key == "patch_sizes" else theirs[key]
    if a != b:
      raise UserError(f"{name} has {key} {a}, {other} has {b}")


def _numpy(module: nnx.Module) -> dict[str, np.ndarray]:
  return jax.device_get(arrays.of(module))
