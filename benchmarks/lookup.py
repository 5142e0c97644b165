"""The streamed look-up against the materialised one: time and memory of the whole quantizer.

    python benchmarks/lookup.py [--rounds 4] [--repeats 3]

One image through MAR's quantizer (680 tokens, V = 16384) and FLUX's (2240 tokens, V = 65536),
forward and forward + backward (gradients of latents and all parameters), float32, on the CPU. Both
forms alternate, each in a process of its own: times are the best of all, peak memory is the
process's largest resident size above what it was before the first call. With libtpu installed
(`pip install -e '.[tpu]'`; no TPU is needed) the compiler's temporaries for 8 FLUX images on one
v5e chip follow. The last line is JSON.
"""

import argparse
import json
import pathlib
import sys
import time
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # where configs/ and benchmarks/ are

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.harness import FORMS, best_of_forms, compile_for_chip, has_libtpu, peak
from coda_jax.models.quantizer import (
  FLUX_PATCH_SIZES,
  MAR_PATCH_SIZES,
  QuantizerConfig,
  ResidualQuantizer,
)
from coda_jax.ops import codebook_lookup

CASES = {
  "mar_16384": (MAR_PATCH_SIZES, 16384),
  "flux_65536": (FLUX_PATCH_SIZES, 65536),
  "flux_262144": (FLUX_PATCH_SIZES, 262144),
}


def materialised(
  q, k, v, *, scale=None, temperature=0.01, chunk_size=None
) -> codebook_lookup.Lookup:
  """`attention_lookup` with every tokens x codes tensor held, gradients by jax.grad."""
  logits = jnp.matmul(q, k.T, precision="highest") * (scale or q.shape[1] ** -0.5)
  soft, sharp = jax.nn.softmax(logits), jax.nn.softmax(logits / temperature)
  ids = jnp.argmax(logits, 1).astype(jnp.int32)
  hard = jax.nn.one_hot(ids, len(k))
  z = jnp.matmul(hard + soft - jax.lax.stop_gradient(soft), v, precision="highest")
  log_sharp = jax.nn.log_softmax(logits / temperature)
  mean = sharp.mean(0)
  entropy_loss = -jnp.mean(jnp.sum(sharp * log_sharp, 1)) + jnp.sum(mean * jnp.log(mean + 1e-5))
  return codebook_lookup.Lookup(ids, z, v[ids], entropy_loss, k, v)


def functions(case: str):
  """(parameters, forward, forward + backward) of a case's quantizer."""
  patch_sizes, codes = CASES[case]
  config = QuantizerConfig(codebook_size=codes, patch_sizes=patch_sizes)
  make = lambda: nnx.split(ResidualQuantizer(config, rngs=nnx.Rngs(0)))
  graphdef = jax.eval_shape(make)[0]

  def forward(params, latents):
    out = nnx.merge(graphdef, params)(latents)
    return jnp.mean(out.latents**2) + out.vq_loss + 0.05 * out.entropy_loss

  return lambda: make()[1], jax.jit(forward), jax.jit(jax.grad(forward, argnums=(0, 1)))


def measure(form: str, case: str, repeats: int) -> dict[str, float]:
  """Seconds of both passes and the GB that they add to the process."""
  side = CASES[case][0][-1]
  latents = jnp.asarray(np.random.default_rng(0).normal(size=(1, side, side, 16)), jnp.float32)
  form = materialised if form == "materialised" else codebook_lookup.attention_lookup
  with mock.patch.object(codebook_lookup, "attention_lookup", form):
    params, *passes = functions(case)
    params, before = jax.block_until_ready(params()), peak()
    best = []
    for f in passes:
      f = f.lower(params, latents).compile()
      times = []
      for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(f(params, latents))
        times.append(time.perf_counter() - start)
      best.append(min(times[1:]))
  return {"forward": best[0], "both": best[1], "peak_gb": peak() - before}


def v5e_temporaries(case: str, images: int = 8) -> float:
  """GB of temporaries of forward + backward, compiled for one v5e chip."""
  params, _, both = functions(case)
  side = CASES[case][0][-1]
  latents = jax.ShapeDtypeStruct((images, side, side, 16), jnp.float32)
  step = compile_for_chip(both, jax.eval_shape(params), latents)
  return step.memory_analysis().temp_size_in_bytes / 1e9


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--rounds", type=int, default=4, help="processes of each form")
  parser.add_argument("--repeats", type=int, default=3, help="calls in each process")
  parser.add_argument("--measure", nargs=2, metavar=("FORM", "CASE"), help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.measure:
    print(json.dumps(measure(*args.measure, args.repeats)))
    return
  result = {}
  for case in ("mar_16384", "flux_65536"):
    best = best_of_forms(__file__, [case, "--repeats", str(args.repeats)], args.rounds)
    for form, x in best.items():
      print(
        f"{case} {form}: forward {x['forward']:.2f} s, forward + backward {x['both']:.2f} s, "
        f"peak {x['peak_gb']:.2f} GB",
        flush=True,
      )
    slow, fast = (best[form] for form in FORMS)
    result[f"speedup_{case}"] = round(slow["both"] / fast["both"], 2)
    result[f"peak_ratio_{case}"] = round(slow["peak_gb"] / fast["peak_gb"], 2)
  for case in ("flux_65536", "flux_262144"):
    key = f"temp_gb_v5e_{case.removeprefix('flux_')}"
    result[key] = None
    if has_libtpu():
      result[key] = round(v5e_temporaries(case), 4)
      print(f"v5e, 8 images, {case}: {result[key]:.3f} GB of temporaries", flush=True)
    else:
      print(f"v5e, {case}: not compiled, libtpu is not installed (pip install -e '.[tpu]')")
  print(json.dumps(result))


if __name__ == "__main__":
  main()
