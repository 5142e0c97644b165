"""The model card, `README.md`, of a directory of weights: for people, and for a model hub."""

import math
from collections.abc import Mapping
from typing import Any

FILE = "README.md"
MARK = "<!-- written by coda_jax, and again when the weights are; without this line it is kept -->"

_LOADERS = {"vae": "load_vae", "tokenizer": "load_tokenizer", "generator": "load_generator"}


def card(kind: str, config: Mapping[str, Any], parameters: int, made: Mapping[str, Any]) -> str:
  """The text of a card, Markdown with the front matter that model hubs read.

  Args:
    kind: `vae`, `tokenizer`, `generator`, or the name of a frozen network.
    config: the fields of `config.json`.
    parameters: numbers in the weights.
    made: where they come from, by name, in the order in which it is shown.
  """
  rows = {**_shape(config), "parameters": f"{parameters:,}", **made}
  rows["fingerprint"] = f"`{config['fingerprint']}`"
  lines = ["---", "license: unknown", "library_name: coda_jax", "tags: [jax, coda]", "---", ""]
  lines += [f"# {kind[0].upper()}{kind[1:]}", "", "| | |", "|---|---|"]
  lines += [f"| {name} | {str(value).replace('|', ' ')} |" for name, value in rows.items()]
  if kind in _LOADERS:
    code = f"model = coda_jax.{_LOADERS[kind]}(DIRECTORY)  # or hf://OWNER/NAME"
    lines += ["", "```python", "import coda_jax", "", code, "```"]
  lines += ["", "The licence is that of the weights it was made from; name it above.", "", MARK, ""]
  return "\n".join(lines)


def _shape(config: Mapping[str, Any]) -> dict[str, str]:
  """The rows that say what a model with these fields is."""
  rows = {}
  if "quantizer" in config:
    q, lora = config["quantizer"], config["lora"]
    tokens = sum(p * p for p in q["patch_sizes"])
    codes = q.get("level_codes") or [q["codebook_size"]] * len(q["patch_sizes"])
    bits = sum(p * p * math.log2(n) for p, n in zip(q["patch_sizes"], codes, strict=True))
    rows["images"] = f"{config['image_size']} x {config['image_size']}"
    rows["tokens of an image"] = f"{tokens:,} in {len(q['patch_sizes'])} levels, {bits:,.0f} bits"
    rows["codes"] = f"{q['codebook_size']:,}, {q['lookup']} look-up"
    rows["adapters"] = f"LoRA of rank {lora['rank']}" if lora else "none"
  if "vae" in config:
    vae = config["vae"]
    down = 2 ** (len(vae["ch_mult"]) - 1)
    rows["VAE"] = f"{down}x downsampling, {vae['z_channels']} channels"
  if "maskgit" in config:
    m = config["maskgit"]
    if text := m.get("text"):
      rows["texts"] = f"{text['tokens']} vectors of {text['width']} numbers stand for a prompt"
      rows["text encoder"] = f"`{config['text_encoder_fingerprint']}`, in `text_encoder/` or apart"
    else:
      rows["classes"] = f"{m['num_classes']:,}"
    rows["transformer"] = f"{m['width']} wide, {m['depth'] + 1} blocks, {m['heads']} heads"
    rows["tokenizer"] = f"`{config['tokenizer_fingerprint']}`, in `tokenizer/`"
  return rows
