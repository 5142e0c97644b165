"""What docs/equal_bits.md found best, on FLUX's VAE: untrained codes, then a decoder for them.

Make the tokenizer first, of the bits of 2240 tokens of 65,536 codes or of half as many:

  python -m coda_jax.discretize --vae checkpoints/flux_vae --data tfds:imagenet2012@train \\
    --images 4000 --codes 65536 --bits 35840 --output checkpoints/flux_free
  python -m coda_jax.discretize ... --bits 17920 --output checkpoints/flux_free_half
  python -m coda_jax.discretize ... --bits 35840 --method coda --output checkpoints/flux_data

`configs/best_flux.py` adapts the decoder to the first, `:half` to the second; their tokens stay as
they are. `:data` trains the third, the paper's quantizer from data, and its VAE's adapters.

A token of the first two is a pair of codes of 256 each. A generator on them takes
`configs/maskgit.py` with `--config.model.embedding=factors`: a table of all codes of all levels
would have millions of rows.
"""

from coda_jax import config as c
from configs import flux


def get_config(arg: str = ""):
  return c.best(flux.get_config(), "checkpoints/flux", arg)
