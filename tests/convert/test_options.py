"""Options of the converter: out of range, and paths from home."""

import pathlib

import pytest

import convert
from coda_jax.errors import UserError
from tests.convert.test_convert import checkpoint, command


def test_home_is_expanded(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  checkpoint(tmp_path / "source")
  options = {"patch_sizes": (8,), "image_size": 16}
  convert.convert("coda-mar", ["~/source"], "~/out", **options)
  convert.to_torch("~/out", pathlib.Path("~/torch"))
  assert (tmp_path / "torch" / "vae_ema.pth").is_file()
  with pytest.raises(UserError, match=f"{tmp_path}/out exists and is not empty"):
    convert.convert("coda-mar", ["~/source"], "~/out", **options)


@pytest.mark.parametrize(
  ("words", "code", "message"),
  [
    (("--scale", "nan"), 1, "scale is nan"),
    (("--scale=-inf",), 1, "scale is -inf"),
    (("--scale", "0"), 1, "scale is 0"),
    (("--scale", "1e-50"), 1, "scale is 1e-50"),
    (("--shift", "nan"), 1, "shift is nan"),
    (("--norm-groups", "0"), 1, "norm_groups is 0; it must be at least 1"),
    (("--norm-groups", "-32"), 1, "norm_groups is -32; it must be at least 1"),
    (("--norm-groups", "7"), 1, "vae.ch is 32, not a multiple of norm_groups=7"),
    (("--patch-sizes", ""), 2, "'' is no whole number"),
    (("--patch-sizes", "1,,8"), 2, "'' is no whole number"),
    (("--patch-sizes", "0,8"), 2, "0 is not from 1 to"),
    (("--patch-sizes", "-1,8"), 2, "expected one argument"),
    (("--patch-sizes=-1,8",), 2, "-1 is not from 1 to"),
    (("--patch-sizes", "2,1,8"), 1, "none smaller than the one before"),
    (("--patch-sizes", "1,9"), 1, "must end with 8"),
    (("--image-size", "0"), 1, "image size is 0"),
    (("--image-size", "-16"), 1, "image size is -16"),
    (("--image-size", "17"), 1, "17x17 is not a multiple"),
  ],
)
def test_options_out_of_range(tmp_path, monkeypatch, capsys, words, code, message):
  folder = checkpoint(tmp_path / "source")
  usual = [] if "--patch-sizes" in words[0] else ["--patch-sizes", "1,8"]
  usual += [] if words[0] == "--image-size" else ["--image-size", "16"]
  all_words = ("coda-mar", folder, "--output", tmp_path / "out", *usual, *words)
  found, line = command(monkeypatch, capsys, *all_words)
  assert (found, message in line) == (code, True), line
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sizes", [(), (1.5, 8), "1,8", (1, None)])
def test_patch_sizes_from_python(tmp_path, sizes):
  folder = checkpoint(tmp_path / "source")
  with pytest.raises(UserError, match="the patch sizes are"):
    convert.convert("coda-mar", [folder], tmp_path / "out", patch_sizes=sizes)
