"""The web page: what it computes, and a real browser on it."""

import concurrent.futures
import contextlib
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import urllib.request

import numpy as np
import pytest
from PIL import Image

from coda_jax import api, serve, weights
from coda_jax.errors import UserError
from tests import tiny
from tests.generation import test_generator


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  path = tmp_path_factory.mktemp("serve") / "tokenizer"
  weights.save_tokenizer(tiny.tokenizer(), path)
  return api.load_tokenizer(path)


def test_every_level_of_a_picture(tokenizer):
  picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
  made, tiles, rows = serve.Levels(tokenizer)(picture)
  ids = tokenizer.encode(picture)
  for k, image in enumerate(made, 1):
    expected = np.asarray(api.to_pil(tokenizer.decode(ids[:k], 16))[0])
    np.testing.assert_allclose(image, expected, atol=1)
  assert [row[:4] for row in rows] == [
    [i + 1, f"{p} x {p}", len(np.unique(ids[i])), bits]
    for i, (p, bits) in enumerate(zip((1, 2, 3, 8), (6, 30, 84, 468), strict=True))
  ]
  assert tiles.size == (264, 264)


def test_codes_that_are_alike_have_like_colours():
  values = np.linspace(0, 1, 6)[:, None] * np.array([[1.0, 2.0, 0.0, 0.0]])
  colours = serve.code_colours(values + 1e-9 * np.eye(6, 4)).astype(int)
  assert colours.shape == (6, 3) and sorted(colours[:, 0]) == [0, 51, 102, 153, 204, 255]
  assert set(np.abs(np.diff(colours[:, 0]))) == {51}


def test_what_is_no_picture_is_one_line(tmp_path):
  for name, content, message in (
    ("a.png", b"no image", "no picture that can be read"),
    (None, b"", "no picture yet"),
  ):
    file = tmp_path / name if name else None
    if file:
      file.write_bytes(content)
    with pytest.raises(UserError, match=message):
      serve.read_picture(file and str(file), 16)
  large = tmp_path / "large.png"
  Image.new("1", (9000, 9000)).save(large)
  with pytest.raises(UserError, match="9000 x 9000 pixels are too many"):
    serve.read_picture(str(large), 16)


def test_without_gradio_one_line_says_what_to_install(tokenizer, monkeypatch):
  monkeypatch.setitem(sys.modules, "gradio", None)
  with pytest.raises(UserError, match=r"pip install 'coda_jax\[serve\]'"):
    serve.page({"tokenizer": tokenizer}, None)


@functools.cache
def _chromium() -> str | None:
  return (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
  )


@contextlib.contextmanager
def _served(path, port: int):
  model = test_generator.save(path)
  command = [sys.executable, "-m", "coda_jax.serve", "--tokenizer", path / "tokenizer"]
  command += ["--generator", model, "--port", str(port)]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    try:
      assert process.stdout is not None
      address = process.stdout.readline().split()[0]
      for _ in range(100):
        with contextlib.suppress(OSError):
          urllib.request.urlopen(address, timeout=5).close()
          break
      yield address
    finally:
      process.terminate()


needs_gradio = pytest.mark.skipif(
  importlib.util.find_spec("gradio") is None, reason="Gradio is not installed: '.[serve]'"
)


@pytest.mark.slow
@needs_gradio
@pytest.mark.skipif(
  importlib.util.find_spec("playwright") is None or _chromium() is None,
  reason="needs Chromium and `pip install playwright`",
)
def test_a_browser_uploads_moves_the_slider_and_generates(tmp_path):
  from playwright.sync_api import sync_playwright

  file = tmp_path / "picture.png"
  Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(file)
  with _served(tmp_path, 7873) as address, sync_playwright() as p:
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    page = p.chromium.launch(executable_path=_chromium(), args=flags).new_page()
    page.set_default_timeout(180_000)
    page.goto(address)
    page.set_input_files("input[type=file] >> nth=0", str(file))
    page.get_by_text("8 x 8").wait_for()  # the table of levels

    def shown():
      return page.locator("img").nth(2).get_attribute("src")

    before = shown()
    page.locator("input[type=number]").first.fill("1")
    page.locator("input[type=number]").first.blur()
    page.wait_for_function("src => document.querySelectorAll('img')[2].src != src", arg=before)
    page.get_by_role("tab", name="Generate").click()
    page.get_by_role("button", name="generate").click()
    page.locator("button img").nth(3).wait_for()  # four samples
    file.write_bytes(b"no image")
    page.get_by_role("tab", name="Paint over").click()
    page.get_by_role("button", name="change it").click()
    page.get_by_text("paint over the part").wait_for()


@pytest.mark.slow
@needs_gradio
def test_two_hundred_requests_of_ten_users_are_all_answered(tmp_path):
  from gradio_client import Client

  with _served(tmp_path, 7874) as address:
    client = Client(address, verbose=False)

    def user(number):
      own = Client(address, verbose=False)
      seeds = range(20 * number, 20 * number + 20)
      return [own.predict("cat", "2", 1.0, seed, api_name="/generate") for seed in seeds]

    with concurrent.futures.ThreadPoolExecutor(10) as pool:
      answers = [a for found in pool.map(user, range(10)) for a in found]
    assert len(answers) == 200 and all(len(a) == 4 for a in answers)
    with pytest.raises(Exception, match="no class|not in the list|dog"):
      client.predict("no such class", "2", 1.0, 0, api_name="/generate")
    for path in ("/etc/passwd", os.path.abspath(__file__)):
      with pytest.raises(OSError):
        urllib.request.urlopen(f"{address}/gradio_api/file={path}", timeout=10)
