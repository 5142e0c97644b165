"""Files that torch wrote are read, foreign code in them is not run, and ours come back."""

import builtins
import collections
import os
import pathlib
import pickle as python_pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from coda_jax.errors import UserError
from convert import pickle

DATA = pathlib.Path(__file__).parent / "data"
KINDS = ("zip", "legacy")


def torch_values():
  a = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
  bf16 = ml_dtypes.bfloat16
  return {
    "float32": a,
    "view": a[:, 1:, ::2],
    "transposed": a.transpose(2, 0, 1),
    "half": (a / 7).astype(np.float16),
    "bfloat16": (a / 7).astype(bf16),
    "float64": a.astype(np.float64) / 3,
    "int64": np.array(5),
    "bool": np.array([True, False]),
    "uint8": np.arange(4, dtype=np.uint8),
    "tail": np.arange(4, 10, dtype=np.float32),
    "head": np.arange(4, dtype=np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "expanded": np.ones((2, 3), np.float32),
    "parameter": np.full((2, 2), 0.5, np.float32),
  }


def assert_same(found, expected):
  assert list(found) == list(expected)
  for key, value in expected.items():
    assert found[key].dtype == value.dtype, key
    np.testing.assert_array_equal(found[key], value, err_msg=key)


@pytest.mark.parametrize("kind", KINDS)
def test_reads_what_torch_wrote(kind):
  assert_same(pickle.load(DATA / f"plain_{kind}.pth"), torch_values())


@pytest.mark.parametrize("kind", KINDS)
def test_reads_containers_around_the_tensors(kind):
  found = pickle.load(DATA / f"wrapped_{kind}.pth")
  assert_same(found.pop("model"), torch_values())
  rest = {"epoch": 3, "lr": 1e-3, "note": "text", "betas": (0.5, 0.9), "steps": [1, 2, None, True]}
  assert found == rest


@pytest.mark.parametrize("kind", KINDS)
def test_reads_a_modules_state_dict(kind):
  found = pickle.load(DATA / f"module_{kind}.pth")
  assert list(found)[:2] == ["0.weight", "0.bias"]
  np.testing.assert_array_equal(found["0.weight"].ravel(), np.arange(54))
  assert found["1.num_batches_tracked"] == 0


@pytest.mark.parametrize("protocol", range(6))
def test_reads_pickled_numpy_arrays(tmp_path, protocol):
  arrays = {
    "a": {"c": np.arange(6.0, dtype=np.float32).reshape(2, 3), "f": np.ones((2, 3), order="F")},
    "list": [np.arange(3, dtype=">i4"), (np.float32(2.5), {1, 2}, b"bytes")],
    "empty": np.zeros((0, 2), np.float16),
  }
  path = tmp_path / "a.ckpt"
  path.write_bytes(python_pickle.dumps(arrays, protocol))
  found = pickle.load(path)
  np.testing.assert_array_equal(found["a"]["c"], arrays["a"]["c"])
  np.testing.assert_array_equal(found["a"]["f"], arrays["a"]["f"])
  np.testing.assert_array_equal(found["list"][0], arrays["list"][0])
  assert found["list"][1] == (2.5, {1, 2}, b"bytes")
  assert found["empty"].shape == (0, 2)


class Evil:
  """An object whose pickle calls `function(*args)` when it is loaded."""

  def __init__(self, function, *args):
    self.call = function, args

  def __reduce__(self):
    return self.call


def as_zip(path, pickled):
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/data.pkl", pickled)
    archive.writestr("archive/version", "3\n")


def as_legacy(path, pickled):
  header = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True, "protocol_version": 1001})
  parts = [python_pickle.dumps(part, 2) for part in header]
  path.write_bytes(b"".join(parts) + pickled + python_pickle.dumps([], 2))


def as_pickle(path, pickled):
  path.write_bytes(pickled)


FORMS = {"zip": as_zip, "legacy": as_legacy, "pickle": as_pickle}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("attack", ["os.system", "builtins.eval", "builtins.exec"])
def test_runs_nothing(tmp_path, form, attack):
  sentinel = tmp_path / "ran"
  evil = {
    "os.system": Evil(os.system, f"touch {sentinel}"),
    "builtins.eval": Evil(eval, f"open({str(sentinel)!r}, 'w')"),
    "builtins.exec": Evil(exec, f"open({str(sentinel)!r}, 'w').close()"),
  }[attack]
  pickled = python_pickle.dumps({"weight": np.zeros(3), "extra": evil}, 2)
  python_pickle.loads(pickled)
  assert sentinel.exists(), "the attack works where it is not refused"
  sentinel.unlink()
  path = tmp_path / "model.pth"
  FORMS[form](path, pickled)
  with pytest.raises(UserError) as e:
    pickle.load(path)
  message = str(e.value)
  assert str(path) in message and "\n" not in message
  assert attack.replace("os.", f"{os.system.__module__}.") in message.replace(
    "__builtin__", "builtins"
  )
  assert not sentinel.exists()


@pytest.mark.parametrize(
  ("pickled", "named"),
  [
    (b"\x80\x02(S'x'\nios\nsystem\n.", "os.system"),  # INST
    (b"\x80\x02ctorch.storage\n_load_from_bytes\nU\x01x\x85R.", "torch.storage._load_from_bytes"),
    (python_pickle.dumps(builtins.getattr), "builtins.getattr"),
    (python_pickle.dumps(pathlib.PurePosixPath("a")), "pathlib"),
    (python_pickle.dumps(np.array([object], dtype=object)), "O8"),
    (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}(X\x01\x00\x00\x00aK\x01ub.", "state for _Name"),
    (b"\x80\x02ctorch\nFloatStorage\n)R.", "a call of torch.FloatStorage"),
    (b"\x80\x02\x82\x01.", "EXT1"),
  ],
)
def test_refuses_everything_else_by_name(tmp_path, pickled, named):
  path = tmp_path / "model.pth"
  for form in FORMS.values():
    form(path, pickled)
    with pytest.raises(UserError, match="nothing is executed") as e:
      pickle.load(path)
    assert named in str(e.value)


def test_refuses_a_tensor_beyond_its_storage(tmp_path):
  path = tmp_path / "model.pth"
  pickle.save(path, [("a", lambda: np.zeros((2, 2), np.float32))])
  raw = path.read_bytes()
  sizes = b"(" + b"J" + struct.pack("<i", 2)
  assert raw.count(sizes) == 2  # size, then stride
  path.write_bytes(raw.replace(sizes, b"(J" + struct.pack("<i", 3000)))
  with zipfile.ZipFile(path) as old:  # with checksums that fit again
    content = {n: _unchecked(old, n) for n in old.namelist()}
  with zipfile.ZipFile(path, "w") as new:
    for name, data in content.items():
      new.writestr(name, data)
  with pytest.raises(UserError, match="beyond its storage"):
    pickle.load(path)


def _unchecked(archive, name):
  with archive.open(name) as f:
    f._expected_crc = None
    return f.read()


@pytest.mark.parametrize("name", ["plain_zip.pth", "plain_legacy.pth"])
def test_truncated_or_flipped_files_are_refused_or_read(tmp_path, name):
  raw = (DATA / name).read_bytes()
  path = tmp_path / name
  for end in range(0, len(raw) - 1, 211):
    path.write_bytes(raw[:end])
    with pytest.raises(UserError, match=str(path)):
      pickle.load(path)
  rng = np.random.RandomState(0)
  for _ in range(60):  # nothing but UserError comes out, whatever is in the file
    bad = bytearray(raw)
    for i in rng.randint(0, len(raw), 3):
      bad[i] = rng.randint(256)
    path.write_bytes(bad)
    try:
      pickle.load(path)
    except UserError:
      pass


def test_what_is_saved_is_read_again(tmp_path):
  rng = np.random.RandomState(0)
  arrays = collections.OrderedDict(
    (f"layer.{i}.weight", rng.standard_normal(shape).astype(np.float32))
    for i, shape in enumerate([(4, 3, 3, 3), (4,), (), (0, 2), (300, 5)])
  )
  arrays["transposed"] = arrays["layer.4.weight"].T
  path = tmp_path / "out.pth"
  pickle.save(path, [(k, lambda v=v: v) for k, v in arrays.items()])
  assert_same(pickle.load(path), arrays)
  with zipfile.ZipFile(path) as archive:
    assert archive.testzip() is None
    for entry in archive.infolist():
      assert entry.compress_type == zipfile.ZIP_STORED
      with path.open("rb") as f:
        f.seek(entry.header_offset + 26)
        name, extra = struct.unpack("<HH", f.read(4))
      assert (entry.header_offset + 30 + name + extra) % 64 == 0  # torch maps aligned storages
  pickle.save(tmp_path / "again.pth", [(k, lambda v=v: v) for k, v in arrays.items()])
  assert (tmp_path / "again.pth").read_bytes() == path.read_bytes()
