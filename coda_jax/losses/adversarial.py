"""Adversarial losses, functions of a discriminator's logits, and the weight of their term."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar

Logits = Float[Array, "b n"]


def generator_loss(fake: Logits) -> Float[Scalar, ""]:
  """-mean(D(reconstruction)), whatever the discriminator's own loss."""
  return -jnp.mean(fake)


def hinge_loss(real: Logits, fake: Logits) -> Float[Scalar, ""]:
  """0.5 (mean relu(1 - real) + mean relu(1 + fake))."""
  return 0.5 * (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake)))


def vanilla_loss(real: Logits, fake: Logits) -> Float[Scalar, ""]:
  """0.5 (mean softplus(-real) + mean softplus(fake)): binary cross-entropy."""
  return 0.5 * (jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(fake)))


DISCRIMINATOR_LOSSES = {"hinge": hinge_loss, "vanilla": vanilla_loss}


def adaptive_weight(nll_gradient: Array, g_gradient: Array) -> Float[Scalar, ""]:
  """clip(|∇nll| / (|∇g| + 1e-6), 0, 1e4), Euclidean norms (VQGAN, arXiv 2012.09841, Eq. 7)."""
  norms = [jnp.linalg.norm(x.astype(jnp.float32).ravel()) for x in (nll_gradient, g_gradient)]
  return jnp.clip(norms[0] / (norms[1] + 1e-6), 0.0, 1e4)
