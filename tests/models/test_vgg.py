import jax
import jax.numpy as jnp
import numpy as np

from coda_jax.models.vgg import STAGES, VGG16, _max_pool


def test_max_pool_is_the_usual_one():
  x = jax.random.normal(jax.random.key(0), (2, 7, 6, 3))
  expected = jax.lax.reduce_window(
    x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), padding="VALID"
  )
  np.testing.assert_array_equal(_max_pool(x), expected)


def test_thirteen_convolutions_and_five_maps():
  net = VGG16(dtype=jnp.bfloat16)
  assert net.conv5_3.kernel.shape == (3, 3, 512, 512)
  maps = jax.eval_shape(lambda x: net(x), jax.ShapeDtypeStruct((1, 32, 48, 3), jnp.float32))
  assert [m.shape[-1] for m in maps] == [widths[-1] for widths in STAGES]
  assert {m.dtype for m in maps} == {jnp.dtype(jnp.bfloat16)}
