import jax
import jax.numpy as jnp

from coda_jax.models.vgg import STAGES, VGG16


def test_thirteen_convolutions_and_five_maps():
  net = VGG16(dtype=jnp.bfloat16)
  assert net.conv5_3.kernel.shape == (3, 3, 512, 512)
  maps = jax.eval_shape(lambda x: net(x), jax.ShapeDtypeStruct((1, 32, 48, 3), jnp.float32))
  assert [m.shape[-1] for m in maps] == [widths[-1] for widths in STAGES]
  assert {m.dtype for m in maps} == {jnp.dtype(jnp.bfloat16)}
