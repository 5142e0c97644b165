"""What a function is being traced for."""

import jax


def platform() -> str:
  """One of "cpu", "gpu" and "tpu"; the mesh in use knows, also when compiling ahead of time."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device else jax.default_backend()
