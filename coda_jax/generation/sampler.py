r"""Samples the masked tokens of images with a MaskGIT, in few steps (arXiv 2202.04200).

Every step runs the transformer on all tokens, draws a code for each masked one, and keeps those
that it is surest of. With w the step's guidance, u_n uniform and g_n Gumbel noise:

  s = logits(condition) + w (logits(condition) − logits(null))
  code_n by the inverse of the cumulative softmax(s_n / temperature), after top-k and top-p, at u_n
  confidence_n = log softmax(s_n)[code_n] + choice_temperature · (1 − progress) · g_n

Logits exist for a chunk of tokens at a time, and only for tokens that this step may reveal. All
random numbers of an image come from the key folded with its global index: the batch that the image
is part of, and the devices, change rounding alone.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer, PRNGKeyArray

from coda_jax.arrays import jit_module
from coda_jax.errors import UserError
from coda_jax.generation.masking import ORDERS, SCHEDULES, masked_counts
from coda_jax.models.maskgit import MaskGIT, MaskGITConfig

RAMPS = ("linear", "constant", "cosine")
_BLOCK = 128  # codes of which the cumulative sum is taken at a time
# Logits of a chunk on each device. Every chunk reads the output table, so accelerators, whose
# memory is slow beside their products, want long chunks. A CPU is at most 10% slower than at 2**22.
_ELEMENTS = 2**25


class Steps(NamedTuple):
  """What each step needs: float32 [steps], but for the first two."""

  number: np.ndarray  # uint32 [steps], from 0
  left: np.ndarray  # int32 [steps, B], tokens still masked after the step
  temperature: np.ndarray
  top_p: np.ndarray
  noise: np.ndarray  # factor of the confidence's noise
  guidance: np.ndarray


@dataclasses.dataclass(frozen=True)
class SamplerSettings:
  """How tokens are sampled. The paper's Table 3 has 8 and 32 steps and does not tell the rest.

  Attributes:
    steps: runs of the transformer (twice the work with guidance).
    schedule: of the tokens that stay masked: "cosine", "arccos" or "linear".
    order: "uniform" reveals the surest tokens of all levels; "coarse_to_fine" reveals no token as
      long as one of a coarser level is masked. The schedule counts the tokens of both alike, so a
      step may finish a level, or several, and go on with the next.
    temperature: of the codes that are drawn.
    choice_temperature: of the noise on the confidence; it falls to 0 with the last step.
    top_k: draw from the k likeliest codes (and those as likely as the last of them).
    top_p: draw from the likeliest codes that together have this probability. Of a model with
      embedding "factors" both are of each factor's codes.
    guidance: w above; 0 is without, and needs no run of the null condition.
    guidance_ramp: w grows over the steps from 0 to `guidance` ("linear", "cosine") or is
      "constant".
  """

  steps: int = 8
  schedule: str = "cosine"
  order: str = "uniform"
  temperature: float | int = 1.0
  choice_temperature: float | int = 4.5
  top_k: int | None = None
  top_p: float | int | None = None
  guidance: float | int = 2.0
  guidance_ramp: str = "linear"

  def __post_init__(self):
    for name, known in (("schedule", SCHEDULES), ("order", ORDERS), ("guidance_ramp", RAMPS)):
      if getattr(self, name) not in known:
        raise UserError(f"{name} is {getattr(self, name)!r}; it is one of {', '.join(known)}")
    if self.steps < 1:
      raise UserError(f"steps is {self.steps}; it must be at least 1")
    if not self.temperature > 0:
      raise UserError(f"temperature is {self.temperature}; it must be above 0 (or take top_k=1)")
    if not self.choice_temperature >= 0 or not self.guidance >= 0:
      raise UserError("choice_temperature and guidance must be at least 0")
    if self.top_k is not None and self.top_k < 1:
      raise UserError(f"top_k is {self.top_k}; it must be at least 1")
    if self.top_p is not None and not 0 < self.top_p <= 1:
      raise UserError(f"top_p is {self.top_p}; it must be above 0 and at most 1")

  def check(self, tokens: int) -> None:
    """Raises UserError if there are more steps than `tokens`."""
    if self.steps > tokens:
      raise UserError(f"steps is {self.steps}, but an image has {tokens} tokens: one step each")

  def guidance_scales(self) -> np.ndarray:
    """w of every step, float32 [steps]; of a single step it is `guidance`."""
    t = np.linspace(0, 1, self.steps) if self.steps > 1 else np.ones(1)
    shape = {"linear": t, "constant": np.ones_like(t), "cosine": (1 - np.cos(np.pi * t)) / 2}
    return (self.guidance * shape[self.guidance_ramp]).astype(np.float32)

  def per_step(self, masked: Int[np.ndarray, "b"]) -> Steps:
    """The numbers of every step, of images with so many masked tokens each."""
    ones = np.ones(self.steps, np.float32)
    progress = np.arange(1, self.steps + 1, dtype=np.float32) / self.steps
    return Steps(
      number=np.arange(self.steps, dtype=np.uint32),
      left=masked_counts(self.schedule, self.steps, masked),
      temperature=self.temperature * ones,
      top_p=(1 if self.top_p is None else self.top_p) * ones,
      noise=np.float32(self.choice_temperature) * (1 - progress),
      guidance=self.guidance_scales(),
    )


class Sampled(NamedTuple):
  """Ids [B, N] without masks, and those after each step [steps, B, N] if they were asked for."""

  ids: jax.Array
  history: jax.Array | None


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Form:
  """What decides the compiled loop besides shapes; `chunk` counts tokens of an image."""

  coarse_to_fine: bool
  top_k: int | None
  nucleus: bool
  guided: bool
  keep_steps: bool
  chunk: int


def form_of(
  settings: SamplerSettings,
  config: MaskGITConfig,
  batch: int,
  devices: int = 1,
  keep_steps: bool = False,
  chunk_size: int | None = None,
) -> Form:
  """The form of the loop for a batch that is split over `devices`; see `sample`."""
  if chunk_size is None:
    chunk_size = _ELEMENTS * devices // (batch * config.outputs)
  return Form(
    coarse_to_fine=settings.order == "coarse_to_fine",
    top_k=settings.top_k,
    nucleus=settings.top_p is not None,
    guided=settings.guidance > 0,
    keep_steps=keep_steps,
    chunk=min(max(1, chunk_size), config.tokens),
  )


def sample(
  model: MaskGIT,
  ids: Int[Array | np.ndarray, "b n"],
  condition: Array | np.ndarray,
  key: PRNGKeyArray,
  settings: SamplerSettings,
  *,
  negative: Array | np.ndarray | None = None,
  index: Int[np.ndarray, "b"] | None = None,
  keep_steps: bool = False,
  chunk_size: int | None = None,
) -> Sampled:
  """Replaces the masked ids; all others stay as they are.

  Compiled once per model structure, shapes, number of steps and the settings that change the
  computation's form; temperatures, guidance, schedule and seeds compile nothing.

  Args:
    ids: codes; `model.config.mask_id` where one is to be sampled.
    condition: what `model.condition` takes: classes, `model.config.null_class` for none, or
      embeddings of texts [B, T, D].
    negative: stands in the place of the null condition, for each image.
    index: the global index of each image, which with `key` decides its random numbers; 0 to B − 1
      by default.
    keep_steps: return the ids after each step too.
    chunk_size: tokens of an image whose logits exist at a time; None chooses by the codes.

  Raises:
    UserError: more steps than tokens.
  """
  how = {"index": index, "keep_steps": keep_steps, "chunk_size": chunk_size}
  return bind(model)(ids, condition, key, settings, negative=negative, **how)


def bind(model: MaskGIT, devices: int = 1) -> Callable[..., Sampled]:
  """`sample` for many calls with one model, whose parameters are taken as they are now.

  Args:
    devices: over which the caller splits the batch; chunks of tokens are sized for its part.
  """
  config, run = model.config, _compiled(model)

  def bound(ids, condition, key, settings, *, negative=None, index=None, **how):
    settings.check(config.tokens)
    form = form_of(settings, config, len(ids), devices, **how)
    masked = np.sum(np.asarray(ids) == config.mask_id, 1)
    return run(
      jnp.asarray(ids, jnp.int32),
      jnp.asarray(condition),
      None if negative is None else jnp.asarray(negative),
      jnp.asarray(np.arange(len(ids)) if index is None else index, jnp.uint32),
      key,
      settings.per_step(masked),
      form,
    )

  return bound


def loop(
  model: MaskGIT,
  ids: Int[Array, "b n"],
  condition: Array,
  negative: Array | None,
  index: Integer[Array, "b"],
  key: PRNGKeyArray,
  steps: Steps,
  form: Form,
) -> Sampled:
  """`sample`, traceable: the same program for every platform."""
  config = model.config
  table, bias = model.output_table()  # once: of embedding "codes" it costs as much as many tokens
  keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
  levels = jnp.asarray(config.levels)
  last = jnp.int32(len(config.patch_sizes))
  if form.guided:
    null = model.condition.null(condition) if negative is None else negative
    condition = jnp.stack([condition, null], 1).reshape(-1, *condition.shape[1:])

  def run(ids, guidance):
    if not form.guided:
      return model(ids, condition)
    # Neighbours, not halves: on many devices each has both runs of its images.
    twice = jnp.stack([ids, ids], 1).reshape(-1, ids.shape[1])
    both = model(twice, condition)
    wanted, without = jnp.moveaxis(both.reshape(len(ids), 2, *both.shape[1:]), 1, 0)
    # Logits are linear in the hidden states: guide these and make logits once.
    guided = wanted + guidance * (wanted - without).astype(jnp.float32)
    return guided.astype(both.dtype)

  def draw(x, hidden, uniform, level):
    s = jnp.matmul(hidden.astype(table.dtype), table.T, preferred_element_type=jnp.float32) + bias
    if config.factors is not None:
      drawn = [
        draw_of(x, logits, uniform[..., k])
        for k, logits in enumerate(config.factors.logits(s, level))
      ]
      digits, log_p = zip(*drawn, strict=True)
      return config.factors.ids([*digits], level), functools.reduce(jnp.add, log_p)
    if config.level_codes:  # those of other levels do not exist here
      s = jnp.where(level[..., None] == config.level_of_code, s, -jnp.inf)
    return draw_of(x, s, uniform[..., 0])

  def draw_of(x, s, uniform):
    filtered = _filtered(s / x.temperature, form.top_k, x.top_p if form.nucleus else None)
    codes = _draw(filtered, uniform)
    chosen = jnp.take_along_axis(s, codes[..., None], -1)[..., 0]
    return codes, chosen - jax.nn.logsumexp(s, -1)

  def step(ids, x):
    masked = ids == config.mask_id
    count = jnp.sum(masked, 1) - x.left
    group = jnp.where(masked, levels if form.coarse_to_fine else 0, last)
    # The level at which this step ends: of finer ones nothing can be revealed.
    end = jnp.take_along_axis(jnp.sort(group, 1), jnp.maximum(count - 1, 0)[:, None], 1)
    wanted = masked & (group <= end) & (count > 0)[:, None]
    step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, x.number)
    numbers = 1 if config.factors is None else config.factors.count  # of a token
    uniform, gumbel = jax.vmap(lambda k: _noise(k, ids.shape[1], numbers))(step_keys)
    hidden = run(ids, x.guidance)
    level = jnp.broadcast_to(levels, ids.shape)
    codes, confidence = _over_wanted(
      functools.partial(draw, x), (hidden, uniform, level), wanted, form.chunk
    )
    confidence += x.noise * gumbel
    order = jnp.lexsort((-confidence, jnp.where(wanted, group, last)), axis=-1)
    rank = jnp.argsort(order, -1)
    ids = jnp.where(wanted & (rank < count[:, None]), codes, ids)
    return ids, ids if form.keep_steps else None

  return Sampled(*jax.lax.scan(step, ids, steps))


_compiled = jit_module(loop)


def _noise(key, n: int, numbers: int):
  uniform, gumbel = jax.random.split(key)
  return jax.random.uniform(uniform, (n, numbers)), jax.random.gumbel(gumbel, (n,))


def _over_wanted(draw, inputs, wanted, chunk: int):
  """`draw(*inputs)` of the wanted tokens [B, N], a chunk at a time; others are undefined.

  Wanted tokens are moved to the front, and the loop ends with the last of them.
  """
  b, n = wanted.shape
  position = jnp.argsort(~wanted, 1, stable=True)
  padded = jnp.pad(position, ((0, 0), (0, -n % chunk)), mode="edge")

  def body(i, found):
    at = jax.lax.dynamic_slice_in_dim(padded, i * chunk, chunk, 1)
    take = lambda x: jnp.take_along_axis(x, at.reshape(*at.shape, *[1] * (x.ndim - 2)), 1)
    new = draw(*map(take, inputs))
    return jax.tree.map(
      lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, i * chunk, 1), found, new
    )

  empty = jnp.zeros(padded.shape, jnp.int32), jnp.zeros(padded.shape, jnp.float32)
  chunks = (jnp.max(jnp.sum(wanted, 1)) + chunk - 1) // chunk
  found = jax.lax.fori_loop(0, chunks, body, empty)
  back = jnp.argsort(position, 1)
  return jax.tree.map(lambda x: jnp.take_along_axis(x, back, 1), found)


def _filtered(s: Float[Array, "*b v"], top_k, top_p) -> Float[Array, "*b v"]:
  """Logits with those outside of top-k and then top-p at −inf; None leaves all."""
  if top_k is not None:
    least = jax.lax.top_k(s, min(top_k, s.shape[-1]))[0][..., -1:]
    s = jnp.where(s >= least, s, -jnp.inf)
  if top_p is not None:
    p = jax.nn.softmax(s, -1)
    down = -jnp.sort(-p, -1)
    kept = jnp.sum(jnp.cumsum(down, -1) - down < top_p, -1, keepdims=True)
    least = jnp.take_along_axis(down, jnp.maximum(kept - 1, 0), -1)
    s = jnp.where(p >= least, s, -jnp.inf)
  return s


def _draw(s: Float[Array, "*b v"], uniform: Float[Array, "*b"]) -> Int[Array, "*b"]:
  """Codes of logits by inverting the cumulative softmax at `uniform`, in [0, 1).

  One random number a token instead of one a code; blocks first, then codes within one, because a
  running sum over 65,536 float32 numbers loses the small ones.
  """
  p = jnp.exp(s - jnp.max(s, -1, keepdims=True))
  p = jnp.pad(p, [(0, 0)] * (p.ndim - 1) + [(0, -p.shape[-1] % _BLOCK)])
  p = p.reshape(*p.shape[:-1], -1, _BLOCK)
  sums = jnp.sum(p, -1)
  ends = jnp.cumsum(sums, -1)
  target = uniform * ends[..., -1]
  block = _first_above(ends, target, sums)
  before = jnp.take_along_axis(ends - sums, block[..., None], -1)[..., 0]
  inside = jnp.take_along_axis(p, block[..., None, None], -2)[..., 0, :]
  return block * _BLOCK + _first_above(jnp.cumsum(inside, -1), target - before, inside)


def _first_above(ends, target, parts):
  """The first entry whose end is above target; where rounding leaves none, the largest part."""
  above = ends > jnp.maximum(target, 0)[..., None]
  return jnp.where(above[..., -1], jnp.argmax(above, -1), jnp.argmax(parts, -1)).astype(jnp.int32)
