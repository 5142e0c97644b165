"""The reconstruction term of the objective (paper, Eq. 9)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from coda_jax.config import LossSettings
from coda_jax.models.lpips import LPIPS


def reconstruction_loss(
  reconstruction: Float[Array, "b h w 3"],
  images: Float[Array, "b h w 3"],
  weights: LossSettings,
  lpips: LPIPS | None,
) -> tuple[Float[Array, ""], dict[str, jax.Array]]:
  """nll = l1·mean|x − x̂| + mse·mean(x − x̂)² + perceptual·LPIPS(x, x̂), and its terms by name.

  The terms are without their weights; `lpips` may be None if its weight is 0.
  """
  error = reconstruction - images
  terms = {"l1": jnp.abs(error).mean(), "mse": jnp.square(error).mean()}
  nll = weights.l1 * terms["l1"] + weights.mse * terms["mse"]
  if weights.perceptual:
    assert lpips is not None
    real = jax.lax.stop_gradient(lpips.features(images))
    terms["lpips"] = lpips.distance(real, lpips.features(reconstruction)).mean()
    nll += weights.perceptual * terms["lpips"]
  return nll, terms | {"nll": nll}
