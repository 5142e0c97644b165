"""`python -m coda_jax.serve`: a web page on which a tokenizer, and a generator, can be tried.

Drop an image and see it at every level of tokens, with PSNR, bits and the tokens themselves; beside
a second tokenizer if one is given. With a generator, make images of classes and paint over parts of
a picture. A generator of texts takes a prompt instead of a class. `pip install 'coda_jax[serve]'`
brings Gradio. Nothing is fetched from elsewhere.
"""

import argparse
import functools
import importlib
import math
import os
import pathlib
import tempfile

import jax
import numpy as np
from PIL import Image

from coda_jax import api, arrays, cli
from coda_jax.data import decode
from coda_jax.errors import UserError
from coda_jax.evaluation import figures
from coda_jax.evaluation.image_quality import psnr, to_uint8
from coda_jax.evaluation.reconstruction import decode_latents, encode_levels

_STEPS = (1, 2, 4, 8, 16, 32)  # each compiles once
_COUNT = 4  # images that are generated at a time
_LARGEST_FILE, _LARGEST_IMAGE = "20mb", 64 * 2**20  # bytes; pixels
_LONGEST_PROMPT = 500  # characters
_WAITING = 100  # requests that may wait; later ones are told to come back
_KEPT = 600  # seconds that a picture stays on the server's disk


def parser() -> argparse.ArgumentParser:
  p = cli.Parser(
    prog="python -m coda_jax.serve",
    description="A web page on which a tokenizer, and a generator, can be tried.",
    epilog="example: python -m coda_jax.serve --tokenizer assets/demo_tokenizer",
  )
  p.add_argument("--tokenizer", required=True, metavar="DIR", help="the tokenizer")
  p.add_argument("--compare", metavar="DIR", help="a second tokenizer, shown beside it")
  p.add_argument("--generator", metavar="DIR", help="a generator, for samples and painting")
  p.add_argument("--text-encoder", metavar="DIR", help="of a generator that does not hold its own")
  p.add_argument("--host", default="127.0.0.1", help="0.0.0.0 opens it to the network (127.0.0.1)")
  p.add_argument("--port", type=cli.integer(1, 65535), default=7860, help="(7860)")
  return p


def read_picture(file: str | None, size: int) -> np.ndarray:
  """The centre of an uploaded picture, uint8 [size, size, 3].

  Raises:
    UserError: nothing was uploaded, no image, or one with too many pixels.
  """
  if file is None:
    raise UserError("no picture yet: drop one, or choose a file")
  try:
    with Image.open(file) as image:  # reads the header alone
      if math.prod(image.size) > _LARGEST_IMAGE:
        raise UserError(f"{image.width} x {image.height} pixels are too many; make it smaller")
    picture = decode.decode_image(pathlib.Path(file).read_bytes())
    return decode.resize_and_crop(picture, size, resize_ratio=1.0)
  except (decode.UnreadableImage, OSError, Image.DecompressionBombError) as e:
    raise UserError("this is no picture that can be read (JPEG, PNG, WebP, ...)") from e


class Levels:
  """A tokenizer's view of one picture, at every level at once; one compiled call a picture."""

  def __init__(self, tokenizer: api.Tokenizer):
    self.tokenizer, self.size = tokenizer, tokenizer.config.image_size
    self._run = _every_level(tokenizer)
    values = np.asarray(arrays.jit_module(lambda q: q.values())(tokenizer.quantizer)())
    self._colours = code_colours(values)

  def __call__(self, picture: np.ndarray) -> tuple[list[np.ndarray], Image.Image, list[list]]:
    """(the picture from 1, 2, ... levels, the tokens as a picture, a row of numbers a level)."""
    ids, made = self._run(api.as_images(picture))
    made = to_uint8(made, "nearest")
    rows, bits, choices = [], 0.0, self.tokenizer.config.quantizer.codes_by_level
    for level, (grid, image) in enumerate(zip(ids, made, strict=True), 1):
      bits += grid.size * math.log2(choices[level - 1])
      h, w = grid.shape[1:]
      quality = float(psnr(picture[None], image[None])[0])
      codes = len(np.unique(grid))
      rows.append([level, f"{h} x {w}", codes, round(bits), f"{bits / picture[..., 0].size:.2f}"])
      rows[-1].append(f"{quality:.2f}")
    tiles = [self._colours[np.asarray(grid[0])] for grid in ids]
    return list(made), _tiled(tiles), rows


def _shown(image: np.ndarray) -> Image.Image:
  """A picture for the page: small ones enlarged, pixel by pixel."""
  return Image.fromarray(figures.thumbnail(image))


def _tiled(images: list[np.ndarray], side: int = 128, gap: int = 8) -> Image.Image:
  """Small pictures in two rows, each brought to side x side pixels."""
  columns = math.ceil(len(images) / 2)
  step = side + gap
  sheet = Image.new("RGB", (columns * step - gap, 2 * step - gap), "white")
  for i, image in enumerate(images):
    tile = Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)
    sheet.paste(tile, (i % columns * step, i // columns * step))
  return sheet


@arrays.jit_module
def _every_level(tokenizer, images):
  """(ids of one image, the image from 1, 2, ... levels)."""
  encoded = encode_levels(tokenizer, images)
  return encoded.ids, decode_latents(tokenizer, encoded.quantized[0])


def code_colours(values: np.ndarray) -> np.ndarray:
  """A colour, uint8 [V, 3], for each code's value [V, C]: its place along three principal axes."""
  centred = values - values.mean(0)
  axes = np.linalg.svd(centred, full_matrices=False)[2][:3]
  places = centred @ axes.T
  ranks = places.argsort(0).argsort(0) / max(1, len(values) - 1)
  return np.pad(np.rint(ranks * 255), ((0, 0), (0, 3 - ranks.shape[1]))).astype(np.uint8)


def page(tokenizers: dict[str, api.Tokenizer], generator: api.Generator | None):
  """The Gradio page."""
  os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
  try:
    gr = importlib.import_module("gradio")
  except ImportError as e:
    raise UserError("the page needs Gradio: pip install 'coda_jax[serve]'") from e

  def answered(function):
    """An error of ours becomes a message on the page."""

    @functools.wraps(function)
    def call(*args):
      try:
        return function(*args)
      except UserError as e:
        raise gr.Error(str(e), print_exception=False) from e

    return call

  names = list(tokenizers)
  views = {name: Levels(tokenizer) for name, tokenizer in tokenizers.items()}
  deepest = max(len(t.token_shape) for t in tokenizers.values())

  @answered
  def look(file, level):
    pictures = {size: read_picture(file, size) for size in {v.size for v in views.values()}}
    found = {n: view(pictures[view.size]) for n, view in views.items()}
    original = _shown(pictures[views[names[0]].size])
    kept = {n: made for n, (made, *_) in found.items()}
    rest = [x for n in names for x in found[n][1:]]
    return [kept, original, *at_level(kept, level), *rest]

  def at_level(kept, level):
    if not kept:
      return [None] * len(names)
    return [_shown(kept[n][min(int(level), len(kept[n])) - 1]) for n in names]

  with gr.Blocks(title="coda_jax", delete_cache=(_KEPT, _KEPT), analytics_enabled=False) as blocks:
    gr.Markdown(
      "# Images as tokens\n" + "  \n".join(f"**{n}**: {t}" for n, t in tokenizers.items())
    )
    with gr.Tab("Levels"):
      kept = gr.State()
      with gr.Row():
        with gr.Column():
          file = gr.Image(type="filepath", sources=["upload"], label="your picture", height=320)
          level = gr.Slider(1, deepest, value=deepest, step=1, label="levels, coarse to fine")
        original = gr.Image(label="as the tokenizer sees it", interactive=False, height=320)
        shown = [gr.Image(label=n, interactive=False, height=320, format="png") for n in names]
      details = []
      for n in names:
        with gr.Row():
          tiles = gr.Image(
            label=f"tokens of each level, {n}: like colours are like codes", interactive=False
          )
          table = gr.Dataframe(
            headers=["level", "tokens", "codes", "bits so far", "bits a pixel", "PSNR"],
            label=f"{n}: numbers of a level, and of all up to it",
            interactive=False,
          )
          details += [tiles, table]
      outputs = [kept, original, *shown, *details]
      file.upload(look, [file, level], outputs, api_name="look")
      only = lambda kept, level: at_level(kept, level)[0]  # Gradio takes no list of one
      change = only if len(names) == 1 else at_level
      level.change(change, [kept, level], shown, show_progress="hidden", api_visibility="private")
    if generator is not None:
      _generator_tabs(gr, generator, answered)
  return blocks.queue(max_size=_WAITING, default_concurrency_limit=1)


def _generator_tabs(gr, generator: api.Generator, answered) -> None:
  names = [generator.label(c) for c in range(generator.config.num_classes)]
  size, texts = generator.image_size, bool(generator.config.text)

  def asked(wanted, count):
    if texts:
      return {"prompts": [wanted or ""] * count}
    return {"classes": [names.index(wanted)] * count}

  def controls():
    return [
      gr.Textbox(label="prompt", max_length=_LONGEST_PROMPT)
      if texts
      else gr.Dropdown(names, value=names[0], label="class"),
      gr.Radio([str(s) for s in _STEPS], value="8", label="steps"),
      gr.Slider(0.1, 8, value=2, step=0.1, label="guidance"),
      gr.Number(0, precision=0, minimum=0, maximum=2**32 - 1, label="seed"),
    ]

  @answered
  def make(wanted, steps, guidance, seed):
    options = {"steps": int(steps), "guidance": float(guidance), **asked(wanted, _COUNT)}
    return api.to_pil(generator.generate(key=jax.random.key(int(seed)), **options))

  @answered
  def paint(drawn, wanted, steps, guidance, seed):
    if drawn is None or drawn["background"] is None or not drawn["layers"]:
      raise UserError("drop a picture and paint over the part that is to change")
    picture = Image.fromarray(drawn["background"]).convert("RGB")
    layers = np.max([layer[..., 3] for layer in drawn["layers"]], axis=0) > 0
    if not layers.any():
      raise UserError("paint over the part of the picture that is to change")
    crop = lambda x: decode.resize_and_crop(x, size, resize_ratio=1.0)
    mask = crop(Image.fromarray(np.repeat(layers[..., None], 3, 2).astype(np.uint8) * 255))[..., 0]
    made = generator.inpaint(
      crop(picture),
      mask > 127,
      steps=int(steps),
      key=jax.random.key(int(seed)),
      guidance=float(guidance),
      **asked(wanted, 1),
    )
    return api.to_pil(made)[0]

  with gr.Tab("Generate"):
    with gr.Row():
      with gr.Column():
        inputs = controls()
        button = gr.Button("generate", variant="primary")
      images = gr.Gallery(label="samples", columns=2, format="png", height=640)
    button.click(make, inputs, images, api_name="generate")
  with gr.Tab("Paint over"):
    with gr.Row():
      with gr.Column():
        drawn = gr.ImageMask(label="drop a picture, paint over a part", type="numpy", layers=False)
        inputs = controls()
        button = gr.Button("change it", variant="primary")
      result = gr.Image(label="result", interactive=False, format="png", height=520)
    button.click(paint, [drawn, *inputs], result, api_name="paint")


def run(args: argparse.Namespace) -> None:
  tokenizers = {"tokenizer": api.load_tokenizer(args.tokenizer)}
  if args.compare:
    tokenizers["compared"] = api.load_tokenizer(args.compare)
  generator = None
  if args.generator:
    generator = api.load_generator(args.generator, text_encoder=args.text_encoder)
  # Gradio keeps uploads here; a folder of its own, gone with the process.
  with tempfile.TemporaryDirectory(prefix="coda_jax_serve_") as folder:
    os.environ["GRADIO_TEMP_DIR"] = folder
    blocks = page(tokenizers, generator)
    theme = importlib.import_module("gradio.themes").Default

    print(f"http://{args.host}:{args.port}   (Ctrl-C ends it)", flush=True)
    try:
      blocks.launch(
        server_name=args.host,
        server_port=args.port,
        share=False,
        quiet=True,
        ssr_mode=False,
        max_file_size=_LARGEST_FILE,
        theme=theme(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
      )
    except OSError as e:
      raise UserError(f"port {args.port} of {args.host} is taken; --port names another") from e


if __name__ == "__main__":
  cli.main(run, parser())
