r"""One update of a tokenizer: time, peak memory, and FLOPs beside the least that it takes.

    python benchmarks/train_step.py [--cases mar mar_last flux] [--steps 3] [--no-parts]

The trainer's own update with the settings of `configs/mar.py` and `configs/flux.py` (LPIPS, DINO's
discriminator, both optimizers, the average) on one 256x256 image, float32, on the CPU, random
weights. `mar` has the official adaptive layer, `mar_last` the decoder's last convolution with an
adapter, which FLUX's official one is. Each case has a process of its own: seconds are the median
of `--steps` updates after a first one; the peak is the process's largest resident size while they
ran, with Python, jax, weights and moments in it, but without what only the compiler held (on
Linux). CPU seconds show whether other processes took part of the time: two cores spend two of them
a second. The parts follow, each compiled by itself, in another process: forward, and forward +
backward, with the temporaries of each.

FLOPs are two for every multiplication in a convolution or matrix product, taken from the update's
jaxpr without what nothing uses; products with the zeros of padding and dilation do not count, a
scan counts its length, a branch the dearest way. The minimum never looks at a backward pass: it
walks the jaxprs of the networks' forward passes, where an operation costs once forward and once
backward for each operand that depends on what the gradient is for. Frozen kernels have none.

  encoder, quantizer, decoder up to the adaptive layer    forward, backward to the trained
  the decoder above it                                    forward, twice backward
  LPIPS                                                   two images forward, one backward
  DINO                                                    three views forward, one backward
  heads                                                   three times forward; once backward to the
                                                          features, twice to their own parameters

The look-up's minimum is what it takes with all logits kept: q kᵀ forward; g vᵀ, dq and dk backward.
The last line is JSON.
"""

import argparse
import ctypes
import dataclasses
import functools
import importlib
import json
import math
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from unittest import mock

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from flax import nnx

from coda_jax import config as c
from coda_jax import sharding, weights
from coda_jax.config import REMAT
from coda_jax.losses.adversarial import generator_loss
from coda_jax.losses.reconstruction import reconstruction_loss
from coda_jax.models import lora
from coda_jax.models.dino import DINO
from coda_jax.models.lpips import LPIPS
from coda_jax.models.vae import FLUX_VAE, MAR_VAE, AutoencoderKL
from coda_jax.training.tokenizer_trainer import TokenizerTrainer

CASES = {"mar": ("mar", MAR_VAE), "mar_last": ("mar", MAR_VAE), "flux": ("flux", FLUX_VAE)}
KEYS = (
  *("seconds_mar", "seconds_mar_last", "seconds_flux", "peak_gb_mar", "peak_gb_flux"),
  *("flops_ratio_mar", "flops_ratio_mar_last", "flops_ratio_flux"),
)


# Counting.


def _conv_flops(eqn) -> int:
  """Of `conv_general_dilated`, without the products with zeros of padding and dilation."""
  (lhs, rhs), out = (v.aval.shape for v in eqn.invars), eqn.outvars[0].aval.shape
  p = eqn.params
  numbers = p["dimension_numbers"]
  dims = zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:], strict=True)
  flops = 2 * out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * rhs[numbers.rhs_spec[1]]
  for i, (a, b, o) in enumerate(dims):
    at = np.arange(out[o])[:, None] * p["window_strides"][i] - p["padding"][i][0]
    at = at + np.arange(rhs[b]) * p["rhs_dilation"][i]
    dilation = p["lhs_dilation"][i]
    flops *= int(((at >= 0) & (at <= (lhs[a] - 1) * dilation) & (at % dilation == 0)).sum())
  return flops


def _dot_flops(eqn) -> int:
  (_, contracted), (_, batch) = eqn.params["dimension_numbers"]
  a, b = (v.aval.shape for v in eqn.invars)
  free = [n for i, n in enumerate(b) if i not in (*contracted, *batch)]
  return 2 * math.prod(a) * math.prod(free)


_COSTS = {"conv_general_dilated": _conv_flops, "dot_general": _dot_flops}


def _open(jaxpr):
  return getattr(jaxpr, "jaxpr", jaxpr)


def _inner(eqn):
  """The jaxpr of an equation that only calls it with all of its operands, or None."""
  for value in eqn.params.values():
    inner = _open(value)
    if hasattr(inner, "eqns") and len(inner.invars) == len(eqn.invars):
      return inner
  return None


def _is_var(x) -> bool:
  return not isinstance(x, jax.extend.core.Literal)


def _spent(jaxpr, used: list[bool]) -> tuple[int, list[bool]]:
  """(FLOPs that the used outputs take, which inputs they take)."""
  live = {v for v, u in zip(jaxpr.outvars, used, strict=True) if u and _is_var(v)}
  total = 0
  for eqn in reversed(jaxpr.eqns):
    wanted = [v in live for v in eqn.outvars]
    if not any(wanted) and not eqn.effects:
      continue
    name, needed = eqn.primitive.name, [True] * len(eqn.invars)
    if name in _COSTS:
      total += _COSTS[name](eqn)
    elif name == "cond":
      branches = [_spent(_open(b), wanted) for b in eqn.params["branches"]]
      total += max(flops for flops, _ in branches)
      needed = [True] + [any(n) for n in zip(*(n for _, n in branches), strict=True)]
    elif name in ("scan", "while"):
      inner = _open(eqn.params["jaxpr" if name == "scan" else "body_jaxpr"])
      total += eqn.params.get("length", 1) * _spent(inner, [True] * len(inner.outvars))[0]
    elif (inner := _inner(eqn)) is not None:
      flops, needed = _spent(inner, wanted)
      total += flops
    live |= {v for v, n in zip(eqn.invars, needed, strict=True) if n and _is_var(v)}
  return total, [v in live for v in jaxpr.invars]


def flops(function, *args) -> int:
  """FLOPs of convolutions and matrix products that `function(*args)` takes."""
  jaxpr = jax.make_jaxpr(function)(*args).jaxpr
  return _spent(jaxpr, [True] * len(jaxpr.outvars))[0]


def _least(jaxpr, depends: list[bool]) -> tuple[int, int, list[bool]]:
  """(forward, backward FLOPs, which outputs depend on the inputs of the gradient)."""
  reached = {v for v, d in zip(jaxpr.invars, depends, strict=True) if d}
  forward = backward = 0
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    ins = [_is_var(v) and v in reached for v in eqn.invars]
    outs = [any(ins)] * len(eqn.outvars)
    if name in _COSTS:
      cost = _COSTS[name](eqn)
      forward, backward = forward + cost, backward + sum(ins) * cost
    elif name == "stop_gradient":
      outs = [False] * len(outs)
    elif name == "custom_vjp_call" or name in ("scan", "while", "cond"):
      pass  # only look-ups are such; they have a formula
    elif (inner := _inner(eqn)) is not None:
      f, b, outs = _least(inner, ins)
      forward, backward = forward + f, backward + b
    reached |= {v for v, d in zip(eqn.outvars, outs, strict=True) if d}
  return forward, backward, [_is_var(v) and v in reached for v in jaxpr.outvars]


def least(function, wrt, *args) -> np.ndarray:
  """Least FLOPs [forward, backward] of `function(wrt, *args)` and its gradient for `wrt`.

  Look-ups, loops and branches in it are not counted.
  """
  jaxpr = jax.make_jaxpr(function)(wrt, *args).jaxpr
  n = len(jax.tree.leaves(wrt))
  return np.array(_least(jaxpr, [i < n for i in range(len(jaxpr.invars))])[:2])


# The case.


def _random_arrays(make) -> dict[str, np.ndarray]:
  """Random weights that keep activations near 1; norms are the identity."""
  rng, out = np.random.default_rng(0), {}
  for name, shape in weights.expected_shapes(make).items():
    x = rng.standard_normal(shape, np.float32)
    if name.endswith("bias"):
      x *= 0.01
    elif name.endswith("scale"):
      x = np.ones_like(x)
    elif "heads." in name:  # of LPIPS, which are not negative
      x = np.abs(x) / 10
    else:
      x *= np.float32(1.5 / max(1, x.size // shape[-1]) ** 0.5)
    out[name] = x
  return out


def make_trainer(case: str, folder: pathlib.Path, **changes) -> TokenizerTrainer:
  """The trainer of a case with batches of one image; its frozen networks go to `folder`.

  Args:
    changes: to the config's settings.
  """
  name, vae = CASES[case]
  make = lambda: AutoencoderKL(vae, rngs=nnx.Rngs(0))
  weights.write_directory(
    folder / "vae", "vae", {"vae": dataclasses.asdict(vae)}, _random_arrays(make)
  )
  weights.write_directory(folder / "dino", "dino", {}, _random_arrays(DINO))
  weights.write_directory(folder / "lpips", "lpips", {}, _random_arrays(LPIPS))
  settings = c.freeze(c.TrainConfig, importlib.import_module(f"configs.{name}").get_config())
  layer = "last" if case.endswith("_last") else settings.adversarial.adaptive_layer
  settings = dataclasses.replace(
    settings,
    tokenizer=dataclasses.replace(settings.tokenizer, vae=str(folder / "vae")),
    data=c.DataSettings(train="embedded@train", eval="embedded@val", batch_size=1),
    steps=1000,
    adversarial=dataclasses.replace(
      settings.adversarial, dino_weights=str(folder / "dino"), adaptive_layer=layer
    ),
    losses=dataclasses.replace(settings.losses, perceptual_weights=str(folder / "lpips")),
    eval=dataclasses.replace(settings.eval, batch_size=1),
    **changes,
  )
  return TokenizerTrainer(settings, sharding.make_mesh(settings.mesh, jax.devices()[:1]))


class Pieces:
  """The networks of an update as functions of plain arrays, and arguments for them."""

  def __init__(self, trainer: TokenizerTrainer, state):
    frozen, adversary = trainer._frozen, trainer._adversary
    self.losses = trainer.config.losses
    tokenizer = lambda params: trainer._tokenizer.module(frozen["tokenizer"], params)
    lpips = trainer._lpips.module(frozen["lpips"])
    size, vae = trainer.config.tokenizer.image_size, trainer.tokenizer_config.vae
    cut, _ = adaptive_layer(trainer._tokenizer, trainer.config.adversarial.adaptive_layer)
    self.params, disc = state.params, state.discriminator
    self.disc_params = disc.params
    self.images = jax.random.uniform(jax.random.key(0), (1, size, size, 3), minval=-1)
    self.latents = jax.random.normal(
      jax.random.key(1), (1, *vae.latent_size(size, size), vae.z_channels)
    )

    def module(params):
      return adversary.structure.module(params, disc.variables, frozen["discriminator"])

    def encode(params, images):
      return tokenizer(params).vae.encode(images).sample(noise=self.latents)

    def quantize(params_latents):
      out = tokenizer(params_latents[0]).quantizer(params_latents[1])
      return out.latents, out.vq_loss, out.entropy_loss

    def below(params_latents):
      model = tokenizer(params_latents[0]).vae
      return model.decoder.run(model.decoder_input(params_latents[1]), 0, cut + 1)

    def above(params_carry):
      return tokenizer(params_carry[0]).vae.decoder.run(params_carry[1], cut + 1)

    self.encode, self.quantize, self.below, self.above = encode, quantize, below, above
    self.decode = lambda params_latents: tokenizer(params_latents[0]).vae.decode(params_latents[1])
    self.vgg = lpips.features
    self.reconstruction_loss = lambda image, images: reconstruction_loss(
      image, images, self.losses, lpips
    )[0]
    self.dino = lambda images: module(self.disc_params).features(images, jax.random.key(2))
    self.heads = lambda params, features: module(params).logits(features, train=True)

    def g(image):
      return generator_loss(self.heads(self.disc_params, self.dino(image)))

    self.g = g


def minimum(trainer: TokenizerTrainer, state) -> dict[str, float]:
  """Least FLOPs of an update, by part; see the top of this file."""
  x = Pieces(trainer, state)
  quantizer = trainer.config.tokenizer.quantizer
  trained = lambda part: {k: v for k, v in x.params.items() if part in k}
  rest = lambda part: {k: v for k, v in x.params.items() if part not in k}

  def of(function, part, *inputs):
    """Gradients for the parameters of a part and for its input."""
    merged = lambda wrt, rest: function((rest | wrt[0], *wrt[1:]))
    return least(merged, (trained(part), *inputs), rest(part))

  encoder = least(
    lambda wrt, rest: x.encode(rest | wrt, x.images), trained("encoder"), rest("encoder")
  )
  dim, logits = quantizer.code_dim + 1, quantizer.tokens * quantizer.codebook_size
  lookup = 2 * logits * np.array([dim, 2 * dim + quantizer.code_dim])
  carry = jax.eval_shape(x.below, (x.params, x.latents))
  vgg = least(x.vgg, x.images)
  dino = least(x.dino, x.images)
  features = jax.eval_shape(x.dino, x.images)
  to_features = least(lambda f, p: x.heads(p, f), features, x.disc_params)
  to_params = least(x.heads, x.disc_params, features)
  return {
    "encoder": encoder.sum(),
    "quantizer": of(x.quantize, "quantizer", x.latents).sum() + lookup.sum(),
    "decoder to the adaptive layer": of(x.below, "decoder", x.latents).sum(),
    "decoder above it": of(x.above, "decoder", carry) @ (1, 2),
    "LPIPS": vgg @ (2, 1),
    "DINO": dino @ (3, 1),
    "heads": to_features @ (1, 1) + to_params @ (2, 2),
  }


# Measuring.


def peak() -> float:
  """Largest resident size of this process so far, or since `forget_peak`, in GB."""
  status = pathlib.Path("/proc/self/status")
  if status.exists():
    line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def forget_peak() -> None:
  """Hands memory that only the compiler used back and starts the peak anew, where Linux can."""
  try:
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # see proc(5)
  except OSError:
    pass


def measure_step(trainer: TokenizerTrainer, plain: Callable, steps: int) -> dict:
  """Seconds and peak of the update, FLOPs and their minimum, of the trainer that `plain` makes."""
  size = trainer.config.tokenizer.image_size
  images = np.random.default_rng(0).integers(0, 256, (1, 1, size, size, 3), np.uint8)
  images = jax.device_put(images, sharding.batch_sharding(trainer.mesh, leading=1))
  state = jax.block_until_ready(trainer.initial_state())
  result = {"gb_before": peak()}
  step = trainer.compile_step(state, images)
  result["gb_compiled"], times, cpu = peak(), [], []
  result["gb_temporaries"] = step.memory_analysis().temp_size_in_bytes / 1e9
  forget_peak()
  result["gb_start"] = peak()
  for _ in range(steps + 1):
    start, start_cpu = time.perf_counter(), time.process_time()
    state, metrics = jax.block_until_ready(step(state, trainer._frozen, images))
    times.append(time.perf_counter() - start)
    cpu.append(time.process_time() - start_cpu)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(metrics)), metrics
  result |= {"seconds": statistics.median(times[1:]), "all_seconds": times, "peak_gb": peak()}
  result["cpu_seconds"] = statistics.median(cpu[1:])
  result["flops"] = flops(trainer._update, state, trainer._frozen, images)
  # Of the plain form: adapters beside their convolutions, nothing computed again.
  tpu = mock.Mock(return_value="tpu")
  with mock.patch.object(lora, "platform", tpu), mock.patch.object(vgg, "platform", tpu):
    result["minimum"] = {k: float(v) for k, v in minimum(plain(), state).items()}
  return result


def measure_parts(trainer: TokenizerTrainer) -> dict[str, list[float]]:
  """[seconds forward, seconds forward + backward, GB of temporaries of both] by part."""
  state = trainer.initial_state()
  x = Pieces(trainer, state)

  def total(function):  # every output gets a cotangent
    return lambda *args: sum(jnp.square(y).mean() for y in jax.tree.leaves(function(*args)))

  cases = {
    "encoder": (x.encode, (x.params, x.images)),
    "quantizer": (x.quantize, ((x.params, x.latents),)),
    "decoder": (x.decode, ((x.params, x.latents),)),
    "nll with LPIPS": (x.reconstruction_loss, (x.images, 0.9 * x.images)),
    "DINO and heads": (x.g, (x.images,)),
  }
  result = {}
  for name, (function, args) in cases.items():
    row, temporaries = [], []
    for f in (total(function), jax.value_and_grad(total(function))):
      f = jax.jit(f).lower(*args).compile()
      temporaries.append(f.memory_analysis().temp_size_in_bytes / 1e9)
      times = []
      for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(f(*args))
        times.append(time.perf_counter() - start)
      row.append(min(times[1:]))
    result[name] = row + temporaries
    print(name, result[name], file=sys.stderr, flush=True)
  return result


def measure(case: str, what: str, steps: int, **settings) -> dict:
  with tempfile.TemporaryDirectory() as folder:
    make = functools.partial(make_trainer, case, pathlib.Path(folder))
    trainer, plain = make(**settings), functools.partial(make, fold=False, remat="none")
    with jax.set_mesh(trainer.mesh):
      return measure_step(trainer, plain, steps) if what == "step" else measure_parts(trainer)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
  parser.add_argument("--steps", type=int, default=3, help="updates that are timed")
  parser.add_argument("--remat", choices=REMAT, help="instead of the config's")
  parser.add_argument("--fold", action=argparse.BooleanOptionalAction, help="the same")
  parser.add_argument("--no-parts", action="store_true", help="the update alone")
  parser.add_argument("--measure", nargs=2, metavar=("CASE", "WHAT"), help=argparse.SUPPRESS)
  args = parser.parse_args()
  settings = {"remat": args.remat, "fold": args.fold}
  settings = {k: v for k, v in settings.items() if v is not None}
  if args.measure:
    print(json.dumps(measure(*args.measure, args.steps, **settings)))
    return
  root = str(pathlib.Path(__file__).parents[1])  # where configs/ is
  path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}

  def run(case, what):
    words = [sys.executable, __file__, "--measure", case, what, "--steps", str(args.steps)]
    words += ["--remat", args.remat] if args.remat else []
    words += [] if args.fold is None else ["--fold" if args.fold else "--no-fold"]
    out = subprocess.run(words, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(out.stdout.splitlines()[-1])

  result = dict.fromkeys(KEYS)
  for case in args.cases:
    x = run(case, "step")
    least = sum(x["minimum"].values())
    ratio = x["flops"] / least
    print(
      f"{case}: {x['seconds']:.2f} s (of {', '.join(f'{t:.2f}' for t in x['all_seconds'])}; "
      f"{x['cpu_seconds']:.1f} s of CPU)\n  peak {x['peak_gb']:.2f} GB: {x['gb_start']:.2f} before "
      f"and {x['gb_temporaries']:.2f} of temporaries; compiling took {x['gb_compiled']:.2f}"
    )
    print(f"  {x['flops'] / 1e9:.0f} GFLOP, {ratio:.3f} of the least {least / 1e9:.0f}:")
    for name, value in x["minimum"].items():
      print(f"    {name}: {value / 1e9:.0f}", flush=True)
    found = {"seconds": x["seconds"], "peak_gb": x["peak_gb"], "flops_ratio": ratio}
    result |= {f"{k}_{case}": round(v, 3) for k, v in found.items() if f"{k}_{case}" in KEYS}
    if not args.no_parts and not case.endswith("_last"):
      for name, (forward, both, gb, gb_both) in run(case, "parts").items():
        print(
          f"  {name}: forward {forward:.2f} s ({gb:.2f} GB of temporaries), "
          f"forward + backward {both:.2f} s ({gb_both:.2f} GB)",
          flush=True,
        )
  print(json.dumps(result))


if __name__ == "__main__":
  main()
