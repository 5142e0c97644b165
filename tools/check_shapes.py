"""Judges images by captions of `tools.draw_shapes`: are colour, shape, count and place right?

  python -m tools.check_shapes FOLDER [--captions FILE]

FOLDER holds images; sorted by name they belong to the lines of FILE, a caption each, or to
FOLDER/metadata.jsonl. The answer is JSON: the part of the images that is right.

Shapes are what stands out of the background, connected. A shape's colour is the nearest of the
palette, its form the one that covers most nearly the same pixels. That bears a tokenizer's blur.
"""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from coda_jax.data.folder import FolderSource
from coda_jax.data.text import open_captions
from coda_jax.errors import UserError
from tools.draw_shapes import BACKGROUND, COLOURS, SHAPE_EDGE, SHAPES, Group, Scene, mask, parse

_CONTRAST = 100.0  # from the background; a shape's colour has 209 (yellow) or more
_SMALLEST = 0.2  # of a square shape's area: what is smaller is noise
MEASURES = ("colour", "shape", "count", "place", "all")


@dataclasses.dataclass(frozen=True)
class Found:
  """A shape in an image, with its centre in pixels."""

  colour: str
  shape: str
  y: float
  x: float


def find(image: np.ndarray) -> list[Found]:
  """The shapes in an image uint8 [H, W, 3] of a drawing."""
  pixels = image.astype(float)
  contrast = np.linalg.norm(pixels - BACKGROUND, axis=-1)
  found = []
  for ys, xs in _components(contrast > _CONTRAST):
    if len(ys) < _SMALLEST * (SHAPE_EDGE * len(image)) ** 2:
      continue
    strong = contrast[ys, xs] >= np.median(contrast[ys, xs])  # not the mixed colours of its rim
    mean = pixels[ys[strong], xs[strong]].mean(0)
    colour = min(COLOURS, key=lambda c: np.linalg.norm(mean - COLOURS[c]))
    found.append(Found(colour, _shape(ys, xs), float(ys.mean()), float(xs.mean())))
  return found


def _shape(ys: np.ndarray, xs: np.ndarray) -> str:
  """The shape whose mask, scaled to the same box, has most in common with these pixels."""
  box = np.zeros((np.ptp(ys) + 1, np.ptp(xs) + 1), bool)
  box[ys - ys.min(), xs - xs.min()] = True

  def overlap(shape: str) -> float:
    other = mask(shape, *box.shape) > 0.5
    return (box & other).sum() / (box | other).sum()

  return max(SHAPES, key=overlap)


def _components(wanted: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
  """(rows, columns) of every set of pixels that are connected by their edges."""
  left = {(int(y), int(x)) for y, x in np.argwhere(wanted)}
  found = []
  while left:
    front, members = [left.pop()], []
    while front:
      y, x = front.pop()
      members.append((y, x))
      near = {(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)} & left
      left -= near
      front += near
    found.append(tuple(np.array(members).T))
  return found


def judge(image: np.ndarray, scene: Scene) -> dict[str, bool | None]:
  """What of a scene is right in an image uint8 [H, W, 3].

  Returns:
    colour: the colours in the image are those of the scene. The others look at the shapes of each
      colour: shape: they are there, and all of the right form; count: they are as many; place: all
      of one group stand left of (right of, above, below) all of the other one; None for one group.
      all: all of these, at once.
  """
  shapes = find(image)
  groups = [group for group, _ in scene.groups()]
  mine = [[s for s in shapes if s.colour == group.colour] for group in groups]
  right: dict[str, bool | None] = {
    "colour": {s.colour for s in shapes} == {g.colour for g in groups},
    "shape": all(_all_are(group, these) for group, these in zip(groups, mine, strict=True)),
    "count": all(len(these) == g.count for g, these in zip(groups, mine, strict=True)),
    "place": None if scene.relation is None else _stand(scene.relation, *mine),
  }
  right["all"] = all(value is not False for value in right.values())
  return right


def _all_are(group: Group, shapes: Sequence[Found]) -> bool:
  return bool(shapes) and all(s.shape == group.shape for s in shapes)


def _stand(relation: str, first: Sequence[Found], second: Sequence[Found]) -> bool:
  if not first or not second:
    return False
  if relation in ("right of", "below"):
    first, second = second, first
  place = (lambda s: s.x) if relation in ("left of", "right of") else (lambda s: s.y)
  return max(map(place, first)) < min(map(place, second))


def accuracy(images: Sequence[np.ndarray], scenes: Sequence[Scene]) -> dict[str, float]:
  """The part of the images that is right, by measure; `place` over those with two groups."""
  judged = [judge(image, scene) for image, scene in zip(images, scenes, strict=True)]
  found = {}
  for measure in MEASURES:
    values = [j[measure] for j in judged if j[measure] is not None]
    found[measure] = float(np.mean(values)) if values else float("nan")
  return found


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("folder", type=pathlib.Path)
  parser.add_argument("--captions", type=pathlib.Path, help="a caption a line")
  args = parser.parse_args()
  try:
    source = FolderSource(args.folder)
    if args.captions:
      captions = [line for line in args.captions.read_text().splitlines() if line.strip()]
    else:
      found = open_captions(source, str(args.folder))
      captions = [found[row][0] for row in range(len(source))]
    if len(captions) != len(source):
      raise UserError(f"{len(source)} images in {args.folder}, but {len(captions)} captions")
    scenes = [parse(caption) for caption in captions]
    images = (np.asarray(Image.open(source.name(i)).convert("RGB")) for i in range(len(source)))
    print(json.dumps({"images": len(source), **accuracy([*images], scenes)}))
  except (UserError, OSError) as e:
    raise SystemExit(str(e)) from e


if __name__ == "__main__":
  main()
