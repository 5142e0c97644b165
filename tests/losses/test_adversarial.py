import jax.numpy as jnp
import numpy as np

from coda_jax.losses.adversarial import generator_loss, hinge_loss, vanilla_loss


def test_losses_by_hand():
  real, fake = jnp.array([[2.0, 0.5]]), jnp.array([[-3.0, 1.0]])
  assert generator_loss(fake) == 1.0
  assert hinge_loss(real, fake) == 0.5 * (0.25 + 1.0)
  cross_entropy = 0.5 * (np.log1p(np.exp([-2, -0.5])).mean() + np.log1p(np.exp([-3, 1])).mean())
  np.testing.assert_allclose(vanilla_loss(real, fake), cross_entropy, rtol=1e-6)
