"""Files that torch wrote are read, foreign code in them is not run, and ours come back."""

import builtins
import collections
import copyreg
import os
import pathlib
import pickle as python_pickle
import struct
import tracemalloc
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
    "builtins.eval": Evil(eval, f"open({str(sentinel)!r}, 'w').close()"),
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


def test_a_registered_extension_is_refused_even_from_the_cache(tmp_path):
  copyreg.add_extension("os", "system", 0xF0)
  try:
    assert python_pickle.loads(b"\x80\x02\x82\xf0.") is os.system  # it is in the cache now
    path = tmp_path / "model.pth"
    path.write_bytes(b"\x80\x02\x82\xf0.")
    with pytest.raises(UserError, match="nothing is executed"):
      pickle.load(path)
  finally:
    copyreg.remove_extension("os", "system", 0xF0)
    copyreg.clear_extension_cache()


HUGE = struct.pack("<Q", 2**40)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
  "instructions",
  [
    b"B\xff\xff\xff\xffab",  # BINBYTES
    b"X\xff\xff\xff\xffab",  # BINUNICODE
    b"\x8b\xff\xff\xff\x7fab",  # LONG4
    b"\x8e" + HUGE + b"ab",  # BINBYTES8
    b"\x8d" + HUGE + b"ab",  # BINUNICODE8
    b"\x96" + HUGE + b"ab",  # BYTEARRAY8
    b"\x95" + HUGE + b"ab",  # FRAME
    b"Nr\xff\xff\xff\x7f}",  # LONG_BINPUT
    b"NpI9999999999999\n}",  # PUT
  ],
)
def test_sizes_that_a_file_only_claims_take_no_memory(tmp_path, form, instructions):
  path = tmp_path / "model.pth"
  FORMS[form](path, b"\x80\x04" + instructions + b".")
  tracemalloc.start()
  try:
    pickle.load(path)
  except UserError:
    pass
  finally:
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
  assert peak < 2**20


ARRAY = python_pickle.dumps(np.arange(4.0), 2)[:-1]  # leaves an array on the stack
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"


@pytest.mark.parametrize(
  "instructions",
  [
    b"}N}U\x09__class__cnumpy\nndarray\ns\x86b",  # state for the attributes of a dict ...
    b"ccollections\nOrderedDict\n)RN}U\x05itemscbuiltins\nset\ns\x86b",  # ... with attributes
    ARRAY + b"(K\x01K\x04\x85cnumpy\ndtype\nU\x02i1\x85R\x89C\x04abcdtb",  # a second state
    ARRAY + b"K\x00K\x01s",  # an element is set
    ARRAY + b")R",  # calls of what is no name
    b"])R",
    b"U\x04textK\x01\x85R",
    b"])\x81",
    b"cnumpy\nndarray\n)\x81",
    b"cbuiltins\nset\n)}\x92",
    b"cbuiltins\nset\nK\x01a",  # a name is no list
    b"cbuiltins\nset\nK\x01K\x02s",
    b"\x96\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00(K\x01e",  # BYTEARRAY8, APPENDS
    b"Pstorage\n",  # persistent ids that are no tuples
    b"K\x01Q",
    b"]Q",
    b"(lp0\nh\x00a",  # a list in itself
    b"\x97",
    b"\x8c\x0acollectionsK\x01\x93",
  ],
)
def test_misused_instructions_do_nothing(tmp_path, instructions):
  path = tmp_path / "model.pth"
  for form in FORMS.values():
    form(path, b"\x80\x04" + instructions + b".")
    try:
      found = pickle.load(path)
    except UserError as e:
      assert "\n" not in str(e)
    else:  # plain values, and no attribute where there was none
      assert type(found) in (dict, list, collections.OrderedDict, bytearray)
      assert not getattr(found, "__dict__", None)


def test_programs_of_random_instructions_do_nothing(tmp_path):
  names = b"os system,torch FloatStorage,torch Size,torch._utils _rebuild_tensor_v2,numpy dtype,"
  names += b"numpy ndarray,numpy.core.multiarray _reconstruct,numpy.core.multiarray scalar,"
  names += b"numpy.core.numeric _frombuffer,collections OrderedDict,builtins set,_codecs encode"
  pieces = [b"c" + n.replace(b" ", b"\n") + b"\n" for n in names.split(b",")]
  pieces += [b"K\x00", b"K\x02", b"U\x01b", b"C\x02ab", b"U\x02f4", b"U\x07storage", ARRAY]
  pieces += [bytes([op]) for op in b"(N}])\x8f\x88012\x94tld\x91\x85\x86\x87aesu\x90"]
  pieces += [b"q\x00", b"h\x00"]
  pieces += 4 * [b"R", b"b", b"\x81", b"Q", b"o", b"\x85R", b"\x86R", b")R"]
  rng = np.random.RandomState(0)
  path = tmp_path / "model.pth"
  outcomes = collections.Counter()
  for _ in range(600):
    program = b"".join(pieces[i] for i in rng.randint(0, len(pieces), rng.randint(2, 30)))
    path.write_bytes(b"\x80\x02" + program + b".")
    try:
      pickle.load(path)
      outcomes["read"] += 1
    except UserError as e:
      outcomes["refused" if "nothing is executed" in str(e) else "damaged"] += 1
  assert len(outcomes) == 3, outcomes


def test_a_tensor_lies_in_a_contiguous_storage_alone(tmp_path):
  # An array that is not, as storage, would move the view's beginning or its bound.
  shape = python_pickle.dumps(np.zeros((2, 1000)), 2)[:-1]
  tensor = b"K\x01M\xcf\x07\x85K\x01\x85tR."  # offset 1, size 1999, stride 1
  path = tmp_path / "model.pth"
  path.write_bytes(b"\x80\x02" + TENSOR + b"(" + shape.removeprefix(b"\x80\x02") + tensor)
  with pytest.raises(UserError, match="a tensor without storage"):
    pickle.load(path)


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
