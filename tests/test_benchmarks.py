"""The forms that benchmarks compare must compute the same."""

from benchmarks.lookup import materialised
from coda_jax.ops.codebook_lookup import attention_lookup
from tests.ops.test_codebook_lookup import assert_equal, inputs, value_and_grad


def test_materialised_lookup_is_the_streamed_one():
  x, cotangents = inputs(24, 100)
  theirs, ours = (value_and_grad(f, cotangents)(*x) for f in (materialised, attention_lookup))
  assert_equal(ours, theirs)
