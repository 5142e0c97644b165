"""What docs/equal_bits.md found best, on MAR's VAE: untrained codes, then a decoder for them.

Make the tokenizer first, of the bits of 680 tokens of 65,536 codes or of half as many:

  python -m coda_jax.discretize --vae checkpoints/mar_vae --data tfds:imagenet2012@train \\
    --images 4000 --codes 65536 --bits 10880 --output checkpoints/mar_free
  python -m coda_jax.discretize ... --bits 5440 --output checkpoints/mar_free_half
  python -m coda_jax.discretize ... --bits 10880 --method coda --output checkpoints/mar_data

`configs/best_mar.py` adapts the decoder to the first, `:half` to the second; their tokens stay as
they are. `:data` trains the third, the paper's quantizer from data, and its VAE's adapters.

A token of the first two is a pair of codes of 256 each. A generator on them takes
`configs/maskgit.py` with `--config.model.embedding=factors`: a table of all codes of all levels
would have millions of rows.
"""

from coda_jax import config as c
from configs import mar


def get_config(arg: str = ""):
  return c.best(mar.get_config(), "checkpoints/mar", arg)
