import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from coda_jax import config as c
from coda_jax.training import optimizers


def test_ema_decay():
  settings = c.EMASettings(decay=0.9999, start_epoch=4)
  decay = lambda s: float(optimizers.ema_decay(settings, jnp.asarray(s), 10))
  assert decay(39) == 0  # epoch 3
  assert decay(40) == pytest.approx(21 / 30)
  assert decay(41) == pytest.approx(21 / 30)
  assert decay(10**7) == pytest.approx(0.9999)


def test_optimizer_is_adamw_with_groups():
  settings = c.OptimizerSettings(
    learning_rate=0.1,
    weight_decay=((r"bias$", 0.0), ("", 0.5)),
    clip=1.0,
    b1=0.5,
    b2=0.9,
    rates=(("kernel", 0.25),),
  )
  optimizer, schedule = optimizers.make_optimizer(settings, steps=4)
  params = {"a.kernel": np.float32([1.0, -2.0]), "a.bias": np.float32([3.0])}
  gradients = {"a.kernel": np.float32([3.0, 0.0]), "a.bias": np.float32([-4.0])}
  state = optimizer.init(params)
  m = {k: np.zeros_like(v, np.float64) for k, v in params.items()}
  v = {k: np.zeros_like(x) for k, x in m.items()}
  expected = {k: x.astype(np.float64) for k, x in params.items()}
  for step in range(3):
    rate = 0.1 * 0.5 * (1 + math.cos(math.pi * step / 4))
    assert float(schedule(step)) == pytest.approx(rate)
    updates, state = optimizer.update(gradients, state, params)
    params = optax.apply_updates(params, updates)
    for k in expected:
      g = gradients[k] / 5.0  # the global norm is 5
      m[k] = 0.5 * m[k] + 0.5 * g
      v[k] = 0.9 * v[k] + 0.1 * g**2
      unit = m[k] / (1 - 0.5 ** (step + 1)) / (np.sqrt(v[k] / (1 - 0.9 ** (step + 1))) + 1e-8)
      decay, factor = (0.0, 1.0) if k == "a.bias" else (0.5, 0.25)
      expected[k] = expected[k] - factor * rate * (unit + decay * expected[k])
      np.testing.assert_allclose(params[k], expected[k], rtol=1e-5)


def test_schedule_with_warmup_ends_at_zero():
  settings = c.OptimizerSettings(learning_rate=1.0, warmup_steps=2, schedule_steps=6)
  _, schedule = optimizers.make_optimizer(settings, steps=100)
  rates = [float(schedule(s)) for s in (0, 1, 2, 4, 6, 99)]
  np.testing.assert_allclose(rates, [0, 0.5, 1, 0.5, 0, 0], atol=1e-6)


def test_average():
  average, params = {"a": jnp.array([1.0])}, {"a": jnp.array([3.0])}
  np.testing.assert_allclose(optimizers.averaged(average, params, jnp.float32(0.75))["a"], [1.5])
