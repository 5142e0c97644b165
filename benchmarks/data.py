"""Images a second and core: read, decode, Lanczos-resize and crop JPEGs the size of ImageNet's.

    python benchmarks/data.py [--images 640] [--folder PATH]

Without --folder it cuts 48 JPEGs of 500 x 375 pixels from the photos in scikit-image and
scikit-learn (install both). A core's rate is images / CPU seconds of all processes, workers
included (on Linux), so that waiting does not count. The last line is JSON.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import pathlib
import resource
import tempfile
import time

import numpy as np
from PIL import Image

from coda_jax.data import decode, pipeline, sources


def write_jpegs(folder: pathlib.Path, count: int = 48):
  """Random 4:3 cuts of six real photos, 500 x 375, JPEG quality 90."""
  skimage = pathlib.Path(importlib.util.find_spec("skimage").origin).parent / "data"
  sklearn = pathlib.Path(importlib.util.find_spec("sklearn").origin).parent / "datasets/images"
  files = [skimage / f for f in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")]
  photos = [Image.open(f).convert("RGB") for f in [*files, *sorted(sklearn.glob("*.jpg"))]]
  rng = np.random.default_rng(0)
  for i in range(count):
    photo = photos[i % len(photos)]
    w = int(min(photo.width, photo.height * 4 / 3) * rng.uniform(0.7, 1))
    h = w * 3 // 4
    x, y = rng.integers(photo.width - w + 1), rng.integers(photo.height - h + 1)
    cut = photo.resize((500, 375), Image.Resampling.LANCZOS, box=(x, y, x + w, y + h))
    cut.save(folder / f"{i:02}.jpg", quality=90)


def cpu_seconds() -> float:
  """Used by this process and, on Linux, by its running children."""
  usage = resource.getrusage(resource.RUSAGE_SELF)
  total = usage.ru_utime + usage.ru_stime
  for child in multiprocessing.active_children():
    stat = pathlib.Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
    total += sum(map(int, stat[11:13])) / os.sysconf("SC_CLK_TCK")  # utime and stime, see proc(5)
  return total


def measure(source, images: int, workers: int, batch_size: int = 32) -> tuple[float, float]:
  """(images / wall second, images / CPU second) once it runs evenly."""
  with pipeline.train_batches(
    source, image_size=256, batch_size=batch_size, seed=0, workers=workers
  ) as batches:
    for _ in range(4):
      next(batches)
    cpu, wall = cpu_seconds(), time.perf_counter()
    for _ in range(images // batch_size):
      next(batches)
    return images / (time.perf_counter() - wall), images / (cpu_seconds() - cpu)


def stages(source) -> dict[str, float]:
  """CPU milliseconds an image of each stage alone, best of five passes."""
  data = [source[i][0] for i in range(len(source))]
  decoded = [decode.decode_image(d) for d in data]
  steps = {
    "read": (lambda i: source[i], range(len(source))),
    "decode": (decode.decode_image, data),
    "resize and crop": (
      lambda x: decode.resize_and_crop(x, 256, resize_ratio=1.125, position=(3, 5)),
      decoded,
    ),
  }
  result = {}
  for name, (step, inputs) in steps.items():
    times = []
    for _ in range(5):
      t = time.process_time()
      for x in inputs:
        step(x)
      times.append(time.process_time() - t)
    result[name] = 1e3 * min(times) / len(inputs)
  return result


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--images", type=int, default=640)
  parser.add_argument("--folder", help="a flat folder of images to measure on instead")
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as scratch:
    if not args.folder:
      write_jpegs(pathlib.Path(scratch))
    source = sources.open_source(f"folder:{args.folder or scratch}")
    for name, ms in stages(source).items():
      print(f"{name:>16}: {ms:5.2f} ms of CPU an image")
    result = {}
    for workers in (0, 1, 2):
      wall, core = measure(source, args.images, workers)
      print(f"{workers:>8} workers: {wall:6.1f} images/s, {core:6.1f} images/s per core")
      result[f"images_per_second_{workers}_workers"] = round(wall, 1)
      result[f"images_per_second_per_core_{workers}_workers"] = round(core, 1)
    result["images_per_second_per_core"] = result["images_per_second_per_core_0_workers"]
    print(json.dumps(result))


if __name__ == "__main__":
  main()
