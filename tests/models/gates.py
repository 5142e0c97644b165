"""Gradients of piecewise linear networks are compared up to the gates that rounding decides.

A ReLU whose input is zero up to float32 rounding is open in one correct implementation and shut
in another, and takes the gradient of a whole patch with it. Everything else must agree.
"""

import numpy as np


class Recorded:
  """Stands in for an activation: adds an offset to each of its inputs, and keeps them."""

  def __init__(self, activation, offsets):
    self.activation, self.offsets, self.inputs = activation, offsets, []

  def __call__(self, x):
    self.inputs.append(x + self.offsets[len(self.inputs)])
    return self.activation(self.inputs[-1])


def nearest_gradient(evaluate, offsets, golden: np.ndarray, undecided: float) -> np.ndarray:
  """The gradient nearest to `golden`, if gates whose input is that near to zero may switch.

  Args:
    evaluate: offsets -> (gradient, inputs of the activations).
    offsets: zeros of the inputs' shapes.
    golden: the gradient to meet.
    undecided: gates may switch if |input| is below this part of its layer's range.
  """
  offsets = [x.copy() for x in offsets]
  gradient, inputs = evaluate(offsets)
  candidates = []
  for layer, x in enumerate(map(np.asarray, inputs)):
    near = np.abs(x) / np.abs(x).max()
    for unit in map(tuple, np.argwhere(near < undecided)):
      candidates.append((near[unit], layer, unit, x[unit]))
  assert len(candidates) < 1e-4 * sum(x.size for x in inputs)
  distance = np.linalg.norm(gradient - golden)
  for _, layer, unit, x in sorted(candidates):
    if np.abs(gradient - golden).max() <= 5e-5 * np.abs(golden).max():
      break
    offsets[layer][unit] = -2 * x
    switched = evaluate(offsets)[0]
    if np.linalg.norm(switched - golden) < distance:
      gradient, distance = switched, np.linalg.norm(switched - golden)
    else:
      offsets[layer][unit] = 0
  return np.asarray(gradient)
