"""The drawn shapes: captions, splits, drawings, and what judges them."""

import io
import json
import sys

import numpy as np
import pytest
from PIL import Image, ImageFilter

from coda_jax.data import sources, text
from coda_jax.errors import UserError
from tools import check_shapes, draw_shapes
from tools.draw_shapes import Group, Scene


def scenes_and_images(count, size=64):
  found = []
  for i in range(count):
    rng = np.random.default_rng(i)
    scene = draw_shapes.random_scene(rng, unseen=i % 2 == 1)
    found.append((scene, draw_shapes.draw(scene, size, rng)))
  return tuple(zip(*found, strict=True))


@pytest.fixture(scope="module")
def drawn():
  return scenes_and_images(30)


def test_a_caption_says_what_the_scene_is(drawn):
  scene = Scene(Group(2, "red", "circle"), "left of", Group(1, "blue", "cross"))
  assert scene.captions() == [
    "two red circles left of a blue cross",
    "a drawing of two red circles left of a blue cross",
    "a blue cross right of two red circles",
  ]
  turned = Scene(Group(1, "blue", "cross"), "right of", Group(2, "red", "circle"))
  for scene in drawn[0]:
    assert [draw_shapes.parse(c).groups() for c in scene.captions()[:2]] == [scene.groups()] * 2
    assert sorted(map(str, draw_shapes.parse(scene.captions()[2]).groups())) == sorted(
      map(str, scene.groups())
    )
  assert draw_shapes.parse("a blue cross right of two red circles") == turned
  with pytest.raises(
    UserError, match="'a pink circle' is no caption of drawn shapes, such as 'two"
  ):
    draw_shapes.parse("a pink circle")


def test_train_lacks_combinations_alone():
  """Every colour, shape and count stands in train with four relations, unseen with the fifth."""
  counts = {}
  for i in range(2500):
    rng, unseen = np.random.default_rng(i), i % 6 == 0
    scene = draw_shapes.random_scene(rng, unseen=unseen)
    for group, relation in scene.groups():
      counts.setdefault((group, relation), set()).add(unseen)
  train = {c for c, splits in counts.items() if False in splits}
  assert len(train) == 6 * 4 * 3 * 4
  held_out = {c for c in counts if c not in train}
  assert len(held_out) == 6 * 4 * 3
  assert {group for group, _ in train} == {group for group, _ in held_out}


def test_drawings_have_what_their_scenes_say(drawn):
  scenes, images = drawn
  for scene, image in zip(scenes, images, strict=True):
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    found = check_shapes.find(image)
    wanted = [(g.colour, g.shape) for g, _ in scene.groups() for _ in range(g.count)]
    assert sorted((f.colour, f.shape) for f in found) == sorted(wanted)
  assert set(check_shapes.accuracy(images, scenes).values()) == {1.0}


@pytest.mark.parametrize("how", ["blur", "noise", "jpeg", "half the size"])
def test_the_judge_bears_what_a_tokenizer_does(drawn, how):
  scenes, images = drawn
  rng, worse = np.random.default_rng(0), []
  for image in images:
    picture = Image.fromarray(image)
    if how == "blur":
      picture = picture.filter(ImageFilter.GaussianBlur(1))  # 26 dB
    elif how == "noise":
      picture = Image.fromarray(
        (image + rng.normal(0, 20, image.shape)).clip(0, 255).astype(np.uint8)
      )
    elif how == "jpeg":
      buffer = io.BytesIO()
      picture.save(buffer, "jpeg", quality=30)
      picture = Image.open(buffer)
    else:
      picture = picture.resize((32, 32), Image.Resampling.BOX).resize((64, 64))
    worse.append(np.asarray(picture))
  assert min(check_shapes.accuracy(worse, scenes).values()) > 0.95


def test_what_is_wrong_is_seen():
  def judged(drawn, said):
    image = draw_shapes.draw(draw_shapes.parse(drawn), 64, np.random.default_rng(0))
    right = check_shapes.judge(image, draw_shapes.parse(said))
    return {measure for measure, value in right.items() if value is False}

  drawn = "two red circles left of a blue square"
  assert judged(drawn, "a blue square right of two red circles") == set()
  assert judged(drawn, "two red circles right of a blue square") == {"place", "all"}
  assert judged(drawn, "two red circles above a blue square") == {"place", "all"}
  assert judged(drawn, "two red crosses left of a blue square") == {"shape", "all"}
  assert judged(drawn, "two red circles left of two blue squares") == {"count", "all"}
  assert judged(drawn, "two red squares left of a blue circle") == {"shape", "all"}, "binding"
  assert judged(drawn, "two black circles left of a blue square") == {*check_shapes.MEASURES}
  assert judged("a red circle", "a red circle") == set()
  assert judged("a red circle", "two red circles and nothing else") == {"count", "all"}
  blank = np.full((64, 64, 3), draw_shapes.BACKGROUND, np.uint8)
  assert check_shapes.find(blank) == []
  assert not any(check_shapes.judge(blank, draw_shapes.parse(drawn)).values())


def test_the_commands(tmp_path, monkeypatch, capsys):
  out = tmp_path / "shapes"
  words = ["draw_shapes", "--output", str(out), "--train", "12", "--unseen", "5", "--size", "48"]
  monkeypatch.setattr(sys, "argv", words)
  draw_shapes.main()
  for split, count in (("train", 12), ("unseen", 5)):
    spec = f"folder:{out}@{split}"
    source = sources.open_source(spec)
    captions = text.open_captions(source, spec)
    assert len(source) == count and {captions.count(i) for i in range(count)} == {3}
    scenes = [draw_shapes.parse(captions[i][0]) for i in range(count)]
    assert {scene.unseen() for scene in scenes} == {split == "unseen"}
    with Image.open(source.name(0)) as image:
      assert image.size == (48, 48)
    for more in ([], ["--captions", str(out / "unseen.txt")] if split == "unseen" else []):
      monkeypatch.setattr(sys, "argv", ["check_shapes", str(out / split), *more])
      check_shapes.main()
      found = json.loads(capsys.readouterr().out)
      assert found["images"] == count and found["all"] == found["place"] == 1.0
  with pytest.raises(SystemExit, match="exists and is not empty"):
    monkeypatch.setattr(sys, "argv", words)
    draw_shapes.main()
  monkeypatch.setattr(
    sys, "argv", ["check_shapes", str(out / "train"), "--captions", str(out / "unseen.txt")]
  )
  with pytest.raises(SystemExit, match="12 images in .*train, but 5 captions"):
    check_shapes.main()
