import numpy as np
import pytest

from coda_jax.errors import UserError
from coda_jax.generation.editing import box_mask, paste, touched_tokens

SIZES = (1, 2, 3, 8)  # 16 x 16 pixels, stride 2


def levels(touched):
  ends = np.cumsum([p * p for p in SIZES])[:-1]
  return [x.reshape(p, p) for x, p in zip(np.split(touched, ends), SIZES, strict=True)]


def test_one_pixel():
  mask = np.zeros((16, 16), bool)
  mask[5, 4] = True  # latent (2, 2)
  one, two, three, eight = levels(touched_tokens(mask, SIZES, 2))
  assert one.all()
  np.testing.assert_array_equal(np.argwhere(two), [[0, 0]])
  # Bins of 3 over 8 latents: 0-2, 2-5, 5-7: latent 2 is in two of them.
  np.testing.assert_array_equal(np.argwhere(three), [[0, 0], [0, 1], [1, 0], [1, 1]])
  np.testing.assert_array_equal(np.argwhere(eight), [[2, 2]])


def test_least_keeps_what_is_mostly_outside():
  mask = box_mask((8, 0, 16, 16), 16)  # the right half
  one, two, three, eight = levels(touched_tokens(mask, SIZES, 2, least=0.5))
  assert not one.any()  # exactly a half
  np.testing.assert_array_equal(two, [[False, True]] * 2)
  np.testing.assert_array_equal(three, [[False, False, True]] * 3)
  np.testing.assert_array_equal(eight, np.tile(np.arange(8) >= 4, (8, 1)))


def test_all_and_nothing():
  assert touched_tokens(np.ones((16, 16), bool), SIZES, 2).all()
  with pytest.raises(UserError, match="nothing would change"):
    touched_tokens(np.zeros((16, 16), bool), SIZES, 2)


def test_errors():
  with pytest.raises(UserError, match="8 x 16 pixels.*16 x 16"):
    touched_tokens(np.ones((16, 8), bool), SIZES, 2)
  with pytest.raises(UserError, match="least is 1"):
    touched_tokens(np.ones((16, 16), bool), SIZES, 2, least=1.0)
  for box in ((0, 0, 17, 16), (4, 0, 4, 16), (-1, 0, 3, 3)):
    with pytest.raises(UserError, match="left,top,right,bottom"):
      box_mask(box, 16)


def test_paste():
  mask = box_mask((1, 0, 2, 1), 2)
  out = paste(np.zeros((1, 2, 2, 3)), np.ones((1, 2, 2, 3)), mask)
  np.testing.assert_array_equal(out[0, ..., 0], [[0, 1], [0, 0]])
