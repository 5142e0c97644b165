"""Makes assets/photos and assets/ATTRIBUTION.md from photos that come in public packages.

  apt-get download lomiri-wallpapers-16.04=20.04.0-2 gcompris-qt-data=3.1-2
  pip download --no-deps scikit-image==0.26.0 scikit-learn==1.9.1
  python -m tools.make_photos --packages FOLDER_WITH_THE_FOUR_FILES

With `--whole FOLDER` it writes the photos whole into FOLDER/train and FOLDER/val instead, those
whose shorter side is over `--short` scaled down to it: a folder to train on larger crops.

Captions were written by hand, three a file, and stand in `metadata.csv` of each split.
`tools/photos.csv` says which photos are taken, under which licence, and into which split: all of
a photo's crops are in one split. Of gcompris's photos only those are listed whose licence its own
source tree states file by file (`README` beside the photos); Debian's copyright file describes
older photos of the same names.
"""

import argparse
import csv
import dataclasses
import io
import pathlib
import shutil
import struct
import subprocess
import tempfile
import zipfile
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]
PHOTOS = ROOT / "assets" / "photos"
ATTRIBUTION = ROOT / "assets" / "ATTRIBUTION.md"
TABLE = pathlib.Path(__file__).with_name("photos.csv")

CROP = 128
# Shorter sides that a photo is scaled down to before its crops are cut: the whole scene, then
# closer looks. Each step must shrink the photo, so that a crop shows structure and not blur.
WHOLE, CLOSER = 140, (260, 400, 330, 520)
CLOSE_LOOKS = {"lomiri-wallpapers-16.04": 4, "gcompris-qt-data": 2}
LICENCES = {
  "public domain": "",
  "CC0 1.0": "https://creativecommons.org/publicdomain/zero/1.0/",
  "CC BY 2.0": "https://creativecommons.org/licenses/by/2.0/",
  "CC BY 3.0": "https://creativecommons.org/licenses/by/3.0/",
  "CC BY 4.0": "https://creativecommons.org/licenses/by/4.0/",
}


@dataclasses.dataclass(frozen=True)
class Photo:
  """A row of photos.csv. `path` is inside the package; `archive.rcc:path` inside a Qt archive."""

  photo: str
  subject: str
  split: str
  author: str
  licence: str
  package: str
  path: str
  title: str


def read_table() -> list[Photo]:
  """All photos, in the table's order."""
  with TABLE.open(encoding="utf-8", newline="") as f:
    return [Photo(**row) for row in csv.DictReader(f)]


def qt_archive(data: bytes) -> dict[str, bytes]:
  """Files of a Qt resource archive (.rcc, versions 1 to 3) by path.

  Layout: 'qres', then big-endian version and offsets of tree, data and names; a tree node is
  (name offset, flags, then children or data offset).
  """
  magic, version, tree, blobs, names = struct.unpack_from(">4s4I", data)
  if magic != b"qres":
    raise ValueError("not a Qt resource archive")
  node_size = 22 if version >= 2 else 14
  files = {}

  def walk(node: int, parent: str) -> None:
    name_at, flags, a, b = struct.unpack_from(">IHII", data, tree + node * node_size)
    length = struct.unpack_from(">H", data, names + name_at)[0] if node else 0
    path = parent + data[names + name_at + 6 :][: 2 * length].decode("utf-16-be")
    if flags & 2:  # a directory: count and index of children
      for child in range(b, b + a):
        walk(child, path + "/" if path else "")
      return
    size = struct.unpack_from(">I", data, blobs + b)[0]
    blob = data[blobs + b + 4 :][:size]
    files[path] = zlib.decompress(blob[4:]) if flags & 1 else blob

  walk(0, "")
  return files


def load_photos(packages: pathlib.Path, photos: list[Photo]) -> Iterator[tuple[Photo, Image.Image]]:
  """Every photo, decoded to RGB, out of the packages' files in the folder `packages`."""
  for package in dict.fromkeys(p.package for p in photos):
    read = _reader(packages, package)
    for photo in photos:
      if photo.package == package:
        yield photo, Image.open(io.BytesIO(read(photo.path))).convert("RGB")


def _reader(packages: pathlib.Path, package: str):
  """A function from a path inside the package to the file's bytes."""
  found = [*packages.glob(f"{package}_*.deb"), *packages.glob(f"{package.replace('-', '_')}-*.whl")]
  if len(found) != 1:
    raise SystemExit(f"{packages} must hold one file of {package}, found {len(found)}")
  if found[0].suffix == ".whl":
    return zipfile.ZipFile(found[0]).read
  with tempfile.TemporaryDirectory() as folder:
    subprocess.run(["dpkg-deb", "-x", found[0], folder], check=True)
    share = pathlib.Path(folder) / "usr" / "share"
    files = {f.name: f.read_bytes() for f in (share / "backgrounds").glob("*.jpg")}
    for archive in (share / "gcompris-qt" / "rcc").glob("*.rcc"):
      if any(p.path.startswith(archive.name + ":") for p in read_table()):
        files |= {f"{archive.name}:{k}": v for k, v in qt_archive(archive.read_bytes()).items()}
  return files.__getitem__


def shrink(image: Image.Image, short: int) -> Image.Image:
  """The photo with its shorter side scaled to `short`, by averaging over Lanczos windows."""
  scale = short / min(image.size)
  return image.resize([max(short, round(s * scale)) for s in image.size], Image.Resampling.LANCZOS)


def detail(pixels: np.ndarray) -> np.ndarray:
  """Edge strength [h, w]: what makes a crop worth having."""
  grey = pixels.astype(np.float32).mean(-1)
  gy, gx = np.gradient(grey)
  return np.minimum(np.hypot(gx, gy), 40.0)


def crops(image: Image.Image, close_looks: int) -> list[Image.Image]:
  """One crop of the whole scene and up to `close_looks` closer ones, each where detail is richest.

  A closer look shares at most a third of its area with one before.
  """
  out, taken = [], []
  for short in (WHOLE, *CLOSER[:close_looks]):
    if short > 0.9 * min(image.size):
      continue
    scaled = shrink(image, short)
    strength = detail(np.asarray(scaled))
    total = np.pad(strength.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    ys, xs = np.mgrid[0 : strength.shape[0] - CROP + 1 : 4, 0 : strength.shape[1] - CROP + 1 : 4]
    ys, xs = ys.ravel(), xs.ravel()
    y2s, x2s = ys + CROP, xs + CROP
    energy = total[y2s, x2s] - total[ys, x2s] - total[y2s, xs] + total[ys, xs]
    middle = (np.array(strength.shape) - CROP) / 2
    off_centre = np.hypot(ys - middle[0], xs - middle[1]) / short
    boxes = np.stack([ys, xs, y2s, x2s], 1)[np.argsort(-energy * (1 - 0.6 * off_centre))]
    free = (b for b in boxes if all(_overlap(b / short, other) < 1 / 3 for other in taken))
    best = next(free, None)
    if best is None:
      continue
    y, x, y2, x2 = map(int, best)
    out.append(scaled.crop((x, y, x2, y2)))
    if short != WHOLE:
      taken.append(best / short)
  return out


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
  """Shared part of the smaller of two boxes (y, x, y2, x2)."""
  sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
  smaller = min(np.prod(a[2:] - a[:2]), np.prod(b[2:] - b[:2]))
  return float(np.prod(np.maximum(sides, 0)) / smaller)


def attribution(photos: list[Photo]) -> str:
  """The attribution file's text."""
  lines = [
    "# Photos in assets/photos",
    "",
    "Each file is a crop, scaled down, of the photo that its name begins with"
    " (`<photo>_<number>.webp`); nothing else was changed. The photos come from the named packages"
    f" ({', '.join(f'`{p}`' for p in dict.fromkeys(p.package for p in photos))}), under the named"
    " licences; their authors do not endorse this project. The weights in assets/demo_vae were"
    " trained on the photos of the train split.",
    "",
    "| photo | title or source | author | licence | package | split |",
    "| --- | --- | --- | --- | --- | --- |",
  ]
  for p in photos:
    url = LICENCES[p.licence]
    licence = f"[{p.licence}]({url})" if url else p.licence
    title = f"<{p.title}>" if p.title.startswith("http") else p.title
    cells = (f"`{p.subject}/{p.photo}`", title, p.author, licence, p.package, p.split)
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


def write_whole(packages: pathlib.Path, output: pathlib.Path, short: int) -> int:
  """Writes OUTPUT/SPLIT/SUBJECT/PHOTO.webp of every photo; returns how many there are."""
  photos = read_table()
  for photo, image in load_photos(packages, photos):
    folder = output / photo.split / photo.subject
    folder.mkdir(parents=True, exist_ok=True)
    scaled = shrink(image, short) if min(image.size) > short else image
    scaled.save(folder / f"{photo.photo}.webp", lossless=True, quality=50, method=2)
  return len(photos)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--packages", type=pathlib.Path, required=True)
  parser.add_argument("--whole", type=pathlib.Path, metavar="FOLDER", help="write whole photos")
  parser.add_argument("--short", type=int, default=512, help="of --whole (512 pixels)")
  args = parser.parse_args()
  packages = args.packages
  if args.whole:
    print(f"{write_whole(packages, args.whole, args.short)} photos in {args.whole}")
    return
  photos = read_table()
  for folder in PHOTOS.glob("*/*"):  # captions stay: `metadata.csv` of each split
    if folder.is_dir():
      shutil.rmtree(folder)
  count = size = 0
  for photo, image in load_photos(packages, photos):
    folder = PHOTOS / photo.split / photo.subject
    folder.mkdir(parents=True, exist_ok=True)
    for i, crop in enumerate(crops(image, CLOSE_LOOKS.get(photo.package, 3))):
      path = folder / f"{photo.photo}_{i}.webp"
      crop.save(path, lossless=True, quality=80, method=5)
      count, size = count + 1, size + path.stat().st_size
  ATTRIBUTION.write_text(attribution(photos), encoding="utf-8")
  print(f"{count} crops, {size / 2**20:.2f} MiB")


if __name__ == "__main__":
  main()
