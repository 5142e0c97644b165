"""Draws a captioned set of coloured shapes, to see whether a text-to-image model follows its text.

  python -m tools.draw_shapes --output shapes

An image holds one or two groups of equal shapes: "two red circles left of a blue square". A group
is a combination of colour, shape, count and relation. A fifth of the combinations never occurs in
`train`; every image of `unseen` has one of them. Each colour, shape and count occurs in train with
four of the five relations, so that what is unseen is the combination alone.

OUTPUT holds `train` and `unseen`, folders of PNGs with `metadata.jsonl` (three captions an image),
and `unseen.txt`, a caption of each unseen image. `tools.check_shapes` judges images by captions.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import pathlib
import re

import numpy as np
from PIL import Image

from coda_jax import outputs
from coda_jax.errors import UserError

COLOURS = {
  "red": (214, 39, 40),
  "green": (44, 160, 44),
  "blue": (31, 80, 200),
  "yellow": (240, 200, 30),
  "purple": (140, 50, 170),
  "black": (25, 25, 25),
}
BACKGROUND = (236, 236, 236)
SHAPES = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
COUNTS = ("a", "two", "three")
RELATIONS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SHAPE_EDGE = 0.25  # of the image's edge
_CELLS = 3  # an image is a grid of 3 x 3 places
_SPLITS = ("train", "unseen")
_GROUP = rf"({'|'.join(COUNTS)}) ({'|'.join(COLOURS)}) ({'|'.join((*SHAPES.values(), *SHAPES))})"
_CAPTION = rf"(?:a drawing of )?{_GROUP}(?: ({'|'.join(RELATIONS)}) {_GROUP}| and nothing else)?"


@dataclasses.dataclass(frozen=True)
class Group:
  """Equal shapes."""

  count: int
  colour: str
  shape: str

  def __str__(self) -> str:
    shape = self.shape if self.count == 1 else SHAPES[self.shape]
    return f"{COUNTS[self.count - 1]} {self.colour} {shape}"


@dataclasses.dataclass(frozen=True)
class Scene:
  """One group alone, or two of different colours, with the relation of the first to the second."""

  first: Group
  relation: str | None = None
  second: Group | None = None

  def groups(self) -> list[tuple[Group, str | None]]:
    """Every group with its relation to the other one."""
    if self.relation is None or self.second is None:
      return [(self.first, None)]
    return [(self.first, self.relation), (self.second, RELATIONS[self.relation])]

  def captions(self) -> list[str]:
    """Three texts that say the same."""
    if self.relation is None:
      return [f"{self.first}", f"a drawing of {self.first}", f"{self.first} and nothing else"]
    text = f"{self.first} {self.relation} {self.second}"
    return [text, f"a drawing of {text}", f"{self.second} {RELATIONS[self.relation]} {self.first}"]

  def unseen(self) -> bool:
    """Whether train lacks the combination of its first group, or of its second one."""
    return any(_held_out(*group) for group in self.groups())


def _held_out(group: Group, relation: str | None) -> bool:
  numbers = (
    [*COLOURS].index(group.colour),
    [*SHAPES].index(group.shape),
    group.count,
    [None, *RELATIONS].index(relation),
  )
  return sum(numbers) % 5 == 0


def parse(caption: str) -> Scene:
  """The scene of a caption. Raises UserError if it is none of this set's."""
  match = re.fullmatch(_CAPTION, caption.strip())
  if match is None:
    raise UserError(f"{caption!r} is no caption of drawn shapes, such as '{_EXAMPLE}'")
  singular = {plural: name for name, plural in SHAPES.items()}
  parts = match.groups()

  def group(count: str, colour: str, shape: str) -> Group:
    return Group(COUNTS.index(count) + 1, colour, singular.get(shape, shape))

  return Scene(group(*parts[:3]), parts[3], group(*parts[4:]) if parts[3] else None)


_EXAMPLE = Scene(Group(2, "red", "circle"), "left of", Group(1, "blue", "square")).captions()[0]


def random_scene(rng: np.random.Generator, unseen: bool) -> Scene:
  """A scene of train, or one that is unseen."""
  while True:
    colours = rng.permutation([*COLOURS])[:2]
    groups = [Group(int(rng.integers(1, 4)), str(c), str(rng.choice([*SHAPES]))) for c in colours]
    relation = [None, *RELATIONS][rng.integers(len(RELATIONS) + 1)]
    scene = Scene(groups[0], relation, groups[1] if relation else None)
    if scene.unseen() == unseen:
      return scene


def inside(shape: str, y: np.ndarray, x: np.ndarray) -> np.ndarray:
  """Whether points lie in a shape, whose box is from -1 (top, left) to 1."""
  box = (abs(y) <= 1) & (abs(x) <= 1)
  return (
    box
    & {
      "circle": x**2 + y**2 <= 1,
      "square": box,
      "triangle": abs(x) <= (y + 1) / 2,
      "cross": (abs(x) <= 1 / 3) | (abs(y) <= 1 / 3),
    }[shape]
  )


@functools.cache
def mask(shape: str, edge: int) -> np.ndarray:
  """How much of each pixel a shape of this size covers, float [edge, edge]."""
  fine = 8
  y, x = (np.mgrid[0 : edge * fine, 0 : edge * fine] + 0.5) * 2 / (edge * fine) - 1
  return inside(shape, y, x).reshape(edge, fine, edge, fine).mean((1, 3))


def draw(scene: Scene, size: int, rng: np.random.Generator) -> np.ndarray:
  """An image uint8 [size, size, 3] of a scene."""
  pixels = np.tile(np.array(BACKGROUND, float), (size, size, 1))
  edge, cell = round(SHAPE_EDGE * size), size / _CELLS
  shift = size // 64
  for group, places in zip(
    [group for group, _ in scene.groups()], _places(scene, rng), strict=True
  ):
    covered = mask(group.shape, edge)[..., None]
    for place in places:
      jitter = rng.integers(-shift, shift + 1, 2)
      corner = [round((p + 0.5) * cell - edge / 2) for p in place]
      top, left = (c + int(j) for c, j in zip(corner, jitter, strict=True))
      part = pixels[top : top + edge, left : left + edge]
      part += covered * (np.array(COLOURS[group.colour], float) - part)
  return pixels.round().astype(np.uint8)


def _places(scene: Scene, rng: np.random.Generator) -> list[list[tuple[int, int]]]:
  """Cells (row, column) of the shapes of each group. No second relation is true by chance."""
  if scene.relation is None:
    cells = [*itertools.product(range(_CELLS), repeat=2)]
    return [[cells[i] for i in rng.permutation(len(cells))[: scene.first.count]]]
  lines = rng.permutation(_CELLS)[:2].tolist()  # columns; or rows for above and below
  lines.sort(reverse=scene.relation in ("right of", "below"))
  across: list[list[int]] = []
  while not across or max(across[0]) < min(across[1]) or max(across[1]) < min(across[0]):
    # Again, if two groups beside one another stand above one another as well.
    across = [rng.permutation(_CELLS)[: g.count].tolist() for g, _ in scene.groups()]
  if scene.relation in ("left of", "right of"):
    return [[(i, line) for i in these] for these, line in zip(across, lines, strict=True)]
  return [[(line, i) for i in these] for these, line in zip(across, lines, strict=True)]


def write(output: pathlib.Path, counts: dict[str, int], size: int, seed: int) -> None:
  """Writes the splits, images by split; see the module's docstring."""
  outputs.check_output(output, "draw_shapes", overwrite=False)
  with outputs.written_aside(output, "draw_shapes") as aside:
    for number, split in enumerate(_SPLITS):
      (aside / split).mkdir()
      lines, prompts = [], []
      for i in range(counts[split]):
        rng = np.random.default_rng((seed, number, i))
        scene = random_scene(rng, unseen=split == "unseen")
        name = f"{i:06}.png"
        Image.fromarray(draw(scene, size, rng)).save(aside / split / name)
        prompts.append(scene.captions()[0])
        lines.append(json.dumps({"file_name": name, "captions": scene.captions()}))
      (aside / split / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    (aside / "unseen.txt").write_text("\n".join(prompts) + "\n")


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--output", type=pathlib.Path, required=True)
  parser.add_argument("--train", type=int, default=8000, help="images of train")
  parser.add_argument("--unseen", type=int, default=1000, help="images of unseen")
  parser.add_argument("--size", type=int, default=64, help="their edge in pixels, at least 48")
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args()
  if args.size < 48 or min(args.train, args.unseen) < 1:
    parser.error("--size must be at least 48, and each split needs an image")
  try:
    write(args.output, {"train": args.train, "unseen": args.unseen}, args.size, args.seed)
  except UserError as e:
    raise SystemExit(str(e)) from e


if __name__ == "__main__":
  main()
