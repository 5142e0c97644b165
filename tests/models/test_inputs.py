"""What users hand to models by mistake.

Run in a process of its own, because the tests' shape checks would speak first.
"""

import json
import subprocess
import sys

import pytest

CODE = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from coda_jax.errors import UserError
from flax import nnx
from tests import tiny

tok = tiny.tokenizer()
side = tok.config.image_size
x = np.zeros((2, side, side, 3), np.float32)
nan, large = x.copy(), x.copy()
nan[1, 2, 3, 0], large[0, 0, 0, 0] = np.nan, 255
ids = tiny.tokens(tok, x)
z = nnx.jit(lambda t, x: t.latents(x))(tok, x)
bad_ids = lambda v: [ids[0] * 0 + v, *ids[1:]]
tries = {
  "uint8": lambda: tok.encode(x.astype(np.uint8)),
  "one": lambda: tok.encode(x[0]),
  "nchw": lambda: tok.encode(x.transpose(0, 3, 1, 2)),
  "rgba": lambda: tok.encode(np.zeros((2, side, side, 4), np.float32)),
  "grey": lambda: tok.encode(x[..., :1]),
  "none": lambda: tok.encode(x[:0]),
  "list": lambda: tok.encode(x.tolist()),
  "nan": lambda: tok.encode(nan),
  "device nan": lambda: tok.vae.encode(jnp.asarray(nan)),
  "bytes as floats": lambda: tok.reconstruct(large),
  "size": lambda: tok.encode(x[:, :-1]),
  "levels": lambda: tok.reconstruct(x, 99),
  "no levels": lambda: tok.reconstruct(x, 0),
  "low": lambda: tok.decode(bad_ids(-1)),
  "high": lambda: tok.decode(bad_ids(tok.config.quantizer.codebook_size)),
  "ids float": lambda: tok.decode([i.astype(np.float32) for i in ids]),
  "ids array": lambda: tok.decode(ids[0]),
  "ids flat": lambda: tok.decode([i.reshape(2, -1) for i in ids]),
  "ids empty": lambda: tok.decode([i[:0] for i in ids]),
  "ids none": lambda: tok.decode([]),
  "ids mixed": lambda: tok.decode([ids[0][:1], *ids[1:]]),
  "latents nan": lambda: tok.quantizer(z.at[0, 0, 0, 0].set(jnp.inf)),
  "latents nchw": lambda: tok.quantizer(z.transpose(0, 3, 1, 2)),
  "raw latents": lambda: tok.vae.decode(np.zeros((2, 4, 4, 99), np.float32)),
  "jit uint8": lambda: tiny.tokens(tok, x.astype(np.uint8)),
}
out = {}
for name, call in tries.items():
  try:
    call()
    out[name] = None
  except UserError as e:
    out[name] = str(e)
tiny.tokens(tok, nan)  # values are not known while a function is traced
print(json.dumps(out))
"""

SAYS = {
  "uint8": "uint8, not floats in [-1, 1]; bytes become x / 127.5 - 1",
  "one": "one image is x[None]",
  "nchw": "x.transpose(0, 2, 3, 1)",
  "rgba": "RGBA",
  "grey": "not [B, H, W, 3]",
  "none": "there are none",
  "list": "a list was given",
  "nan": "NaN",
  "device nan": "NaN",
  "bytes as floats": "values up to 255",
  "size": "not a multiple of the VAE's stride",
  "levels": "levels is 99",
  "no levels": "levels is 0",
  "low": "ids of level 1 go from -1",
  "high": "the codebook has 0 to",
  "ids float": "not integers",
  "ids array": "a list with an array a level",
  "ids flat": "not integers [B, ph, pw]",
  "ids empty": "there are none",
  "ids none": "0 levels of ids",
  "ids mixed": "ids of [1, 2] images",
  "latents nan": "NaN",
  "latents nchw": "latents are of shape",
  "raw latents": "raw latents are of shape",
  "jit uint8": "uint8, not floats",
}


@pytest.mark.slow
def test_one_line_for_every_mistake():
  done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  assert set(found) == set(SAYS)
  for name, text in SAYS.items():
    assert text in (found[name] or "nothing was said") and "\n" not in found[name], (
      name,
      found[name],
    )
