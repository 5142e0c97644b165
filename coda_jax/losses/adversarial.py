"""Adversarial losses: functions of a discriminator's logits."""

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
