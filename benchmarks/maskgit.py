"""MaskGIT L on MAR's 680 tokens: training, sampling, cross-entropy, memory on a v5e chip.

    python benchmarks/maskgit.py [--size l] [--steps 3] [--sample-steps 2] [--dtype float32]

On the CPU, batches of 1 and 4: the trainer's whole update (optimizer and average included), and the
sampler with guidance. FLOPs are those of the model's products, counted once forward and twice
backward (recomputed logits do not count), and are compared with products of the shapes of the
model's MLP that run between the updates. Then the streamed cross-entropy (loss and gradients)
against the materialised one, both alternating, each in a process of its own: times are the best of
all, peak memory is the process's largest resident size above what it was before the first call.
With libtpu installed (`pip install -e '.[tpu]'`; no TPU is needed) what an update of 32 images
needs on one v5e chip follows. The last line is JSON.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # where configs/ and benchmarks/ are

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.harness import FORMS, V5E_GB, best_of_forms, compile_for_chip, has_libtpu, peak
from coda_jax import config as c
from coda_jax import sharding, tokenize_dataset, weights
from coda_jax.generation import sampler
from coda_jax.models.maskgit import MaskGIT, MaskGITConfig
from coda_jax.models.quantizer import FLUX_PATCH_SIZES, MAR_PATCH_SIZES, QuantizerConfig
from coda_jax.models.tokenizer import Tokenizer, TokenizerConfig
from coda_jax.models.vae import VAEConfig
from coda_jax.ops import cross_entropy
from coda_jax.training.maskgit_trainer import MaskGITTrainer
from configs.maskgit import SIZES

CASES = {"mar_16384": (MAR_PATCH_SIZES, 16384), "flux_65536": (FLUX_PATCH_SIZES, 65536)}


def model_config(size: str, case: str) -> MaskGITConfig:
  """With ImageNet's classes."""
  s = SIZES[size]
  patch_sizes, codes = CASES[case]
  return MaskGITConfig(s.width, s.depth, s.heads, 1000, patch_sizes, codes)


def forward_flops(m: MaskGITConfig, batch: int, logits: int) -> float:
  """Of the products of one forward pass with the logits of so many tokens."""
  t, w = m.tokens + 1, m.width
  block = t * 2 * w * w * (4 + 2 * m.mlp_ratio) + 4 * t * t * w
  blocks = (m.depth + 1) * block + m.depth // 2 * t * 2 * 2 * w * w
  head = 8 * m.tokens * w * w
  embedding = 2 * m.tokens * m.code_dim * w
  table = 2 * m.codebook_size * (m.code_dim + w) * w
  return batch * (blocks + head + embedding) + table + 2 * logits * w * m.codebook_size


def make_trainer(
  folder: pathlib.Path, size: str, dtype: str, batch: int, remat: bool = False
) -> MaskGITTrainer:
  """The trainer of a size on MAR's levels of the embedded photos, by a random tokenizer."""
  patch_sizes, codes = CASES["mar_16384"]
  vae = VAEConfig(ch=32, ch_mult=(1,), encoder_blocks=1, decoder_blocks=1, encoder_attn=())
  tokenizer = TokenizerConfig(vae, QuantizerConfig(codes, patch_sizes), image_size=patch_sizes[-1])
  rng = np.random.default_rng(0)
  shapes = weights.expected_shapes(lambda: Tokenizer(tokenizer, rngs=nnx.Rngs(0)))
  flat = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
  paths = str(folder / "tokenizer"), str(folder / "tokens")
  weights.write_directory(paths[0], "tokenizer", dataclasses.asdict(tokenizer), flat)
  words = ["--tokenizer", paths[0], "--data", "embedded@val", "--output", paths[1]]
  tokenize_dataset.run(tokenize_dataset.parser().parse_args(words))
  data = c.TokenDataSettings(*paths, batch_size=batch)
  config = c.MaskGITTrainConfig(data, model=SIZES[size], dtype=dtype, remat=remat)
  # The first updates would hardly change anything with the warm-up.
  optimizer = dataclasses.replace(config.optimizer, warmup_steps=0)
  config = dataclasses.replace(
    config, optimizer=optimizer, eval=dataclasses.replace(config.eval, batch_size=1)
  )
  return MaskGITTrainer(config, sharding.make_mesh(config.mesh, jax.devices()[:1]))


class Matmul:
  """FLOPs a second of products of the shapes of the MLP; calls the best so far."""

  def __init__(self, m: MaskGITConfig, batch: int, dtype):
    rng = np.random.default_rng(0)
    inner = round(m.mlp_ratio * m.width)
    shapes = (batch * m.tokens, m.width), (m.width, inner), (inner, m.width)
    self._xs = [jnp.asarray(rng.normal(size=s) / s[0] ** 0.5, dtype) for s in shapes]
    self._run = jax.jit(lambda x, a, b: (x @ a) @ b)
    self._flops = 4 * batch * m.tokens * m.width * inner
    self.rate = 0.0
    self(1)

  def __call__(self, repeats: int = 5) -> None:
    for _ in range(repeats):
      start = time.perf_counter()
      jax.block_until_ready(self._run(*self._xs))
      self.rate = max(self.rate, self._flops / (time.perf_counter() - start))


def measure_training(
  size: str, m: MaskGITConfig, dtype: str, batch: int, steps: int
) -> dict[str, float]:
  """Seconds of an update and its part of the matmul's FLOPs."""
  with tempfile.TemporaryDirectory() as folder:
    trainer = make_trainer(pathlib.Path(folder), size, dtype, batch)
    batches = trainer.batches(0)
    data = next(batches)
    batches.close()
  state = trainer.initial_state()
  matmul = Matmul(m, batch, dtype)
  times = []
  for _ in range(steps + 1):
    matmul()
    start = time.perf_counter()
    state, metrics = jax.block_until_ready(trainer.step(state, data))
    times.append(time.perf_counter() - start)
  matmul()
  assert np.isfinite(metrics["loss"])
  flops = 3 * forward_flops(m, batch, batch * m.tokens)
  return report("an update", batch, min(times[1:]), flops, matmul)


def measure_sampling(m: MaskGITConfig, dtype: str, batch: int, steps: int) -> dict[str, float]:
  """Seconds of a batch of samples, with guidance, and their part of the matmul's FLOPs."""
  model = nnx.jit(lambda: MaskGIT(m, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)))()
  run = sampler.bind(model)
  chosen = sampler.SamplerSettings(steps=steps)
  matmul = Matmul(m, 2 * batch, dtype)
  ids = np.full((batch, m.tokens), m.mask_id, np.int32)
  times = []
  for i in range(3):
    matmul()
    start = time.perf_counter()
    jax.block_until_ready(run(ids, np.zeros(batch, np.int32), jax.random.key(i), chosen).ids)
    times.append(time.perf_counter() - start)
  matmul()
  left = sampler.masked_counts(chosen.schedule, steps, [m.tokens])[:, 0]
  drawn = m.tokens + int(left[:-1].sum())  # tokens that were masked before each step
  table = forward_flops(m, 0, 0)
  flops = steps * (forward_flops(m, 2 * batch, 0) - table) + table
  flops += 2 * batch * drawn * m.width * m.codebook_size
  return report(f"{steps} sampling steps with guidance", batch, min(times[1:]), flops, matmul)


def report(what: str, batch: int, seconds: float, flops: float, matmul: Matmul):
  """Prints and returns the figures."""
  found = {
    "seconds": seconds,
    "fraction": flops / seconds / matmul.rate,
    "matmul_gflops": matmul.rate / 1e9,
  }
  print(
    f"{what}, batch {batch}: {seconds:.2f} s, {flops / seconds / 1e9:.0f} GFLOP/s, "
    f"{found['fraction']:.0%} of a matmul's {matmul.rate / 1e9:.0f}",
    flush=True,
  )
  return found


def materialised(
  hidden, table, bias, labels, *, weights=None, label_smoothing=0.0, chunk_size=None
) -> cross_entropy.CrossEntropy:
  """`cross_entropy` with all logits held, gradients by jax.grad."""
  s = jnp.matmul(hidden, table.T, precision="highest", preferred_element_type=jnp.float32) + bias
  log_sum = jax.nn.logsumexp(s, 1)
  chosen = jnp.take_along_axis(s, labels[:, None], 1)[:, 0]
  loss = log_sum - (1 - label_smoothing) * chosen - label_smoothing * s.mean(1)
  loss = loss if weights is None else weights * loss
  return cross_entropy.CrossEntropy(loss, chosen == s.max(1))


def measure_cross_entropy(form: str, case: str, batch: int, repeats: int) -> dict[str, float]:
  """Seconds of loss and gradients, and the GB that they add to the process."""
  m = model_config("l", case)
  rng = np.random.default_rng(0)
  n = batch * m.tokens
  shapes = (n, m.width), (m.codebook_size, m.width), (m.codebook_size,)
  arrays = [jnp.asarray(rng.normal(size=s) / m.width**0.25, jnp.float32) for s in shapes]
  labels = jnp.asarray(rng.integers(0, m.codebook_size, n), jnp.int32)
  function = materialised if form == "materialised" else cross_entropy.cross_entropy

  def mean(*arrays):
    found = function(*arrays, labels, label_smoothing=0.1)
    return found.loss.mean(), found.correct.sum()

  jax.block_until_ready((arrays, labels))
  before, times = peak(), []
  run = jax.jit(jax.value_and_grad(mean, (0, 1, 2), has_aux=True)).lower(*arrays).compile()
  for _ in range(repeats + 1):
    start = time.perf_counter()
    jax.block_until_ready(run(*arrays))
    times.append(time.perf_counter() - start)
  return {"seconds": min(times[1:]), "peak_gb": peak() - before}


def v5e_update(m: MaskGITConfig, size: str, images: int, remat: bool) -> dict[str, float]:
  """GB of an update compiled for one v5e chip: state and batch (donated), and temporaries.

  A program that the compiler cannot fit has no figures; its message goes to stderr.
  """
  with tempfile.TemporaryDirectory() as folder:
    trainer = make_trainer(pathlib.Path(folder), size, "bfloat16", images, remat)
  batch = {
    "ids": jax.ShapeDtypeStruct((1, images, m.tokens), jnp.uint16),
    "condition": jax.ShapeDtypeStruct((1, images), jnp.int32),
  }
  update, key = (
    trainer._keyed_update,
    jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))),
  )
  try:
    step = compile_for_chip(
      update, trainer.abstract_state(), trainer._frozen, key, batch, donate=True
    )
  except jax.errors.JaxRuntimeError as e:
    print(e, file=sys.stderr)
    return {}
  memory = step.memory_analysis()
  fresh = (memory.output_size_in_bytes - memory.alias_size_in_bytes) / 1e9
  taken, temporaries = memory.argument_size_in_bytes / 1e9, memory.temp_size_in_bytes / 1e9
  return {"state": taken, "temp": temporaries, "total": taken + fresh + temporaries}


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--size", choices=SIZES, default="l", help="of the model")
  parser.add_argument("--steps", type=int, default=3, help="updates that are timed")
  parser.add_argument("--sample-steps", type=int, default=2, help="steps of sampling")
  parser.add_argument("--dtype", default="float32", help="of the computation on the CPU")
  parser.add_argument("--rounds", type=int, default=2, help="processes of each cross-entropy")
  parser.add_argument("--repeats", type=int, default=3, help="calls in each process")
  parser.add_argument(
    "--only", choices=("train", "sample", "cross_entropy", "v5e"), help="one of the parts"
  )
  parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.measure:
    form, case, batch = args.measure
    print(json.dumps(measure_cross_entropy(form, case, int(batch), args.repeats)))
    return
  m, result = model_config(args.size, "mar_16384"), {}
  wanted = lambda part: args.only in (None, part)

  for part_name, key, measure, steps in (
    ("train", "train", functools.partial(measure_training, args.size), args.steps),
    ("sample", f"sample_{args.sample_steps}_steps", measure_sampling, args.sample_steps),
  ):
    for batch in (1, 4) if wanted(part_name) else ():
      found = measure(m, args.dtype, batch, steps)
      result[f"{key}_seconds_batch_{batch}"] = round(found["seconds"], 3)
      result[f"matmul_fraction_{part_name}_batch_{batch}"] = round(found["fraction"], 3)
      result[f"matmul_fraction_{part_name}"] = round(found["fraction"], 3)  # of the larger batch

  for case, batch in (("mar_16384", 4), ("flux_65536", 1)) if wanted("cross_entropy") else ():
    words = [case, str(batch), "--repeats", str(args.repeats)]
    best = best_of_forms(__file__, words, args.rounds)
    for form, x in best.items():
      print(
        f"cross-entropy, {case}, batch {batch}, {form}: loss and gradients {x['seconds']:.2f} s, "
        f"peak {x['peak_gb']:.2f} GB",
        flush=True,
      )
    slow, fast = (best[form] for form in FORMS)
    suffix = "" if case.startswith("mar") else f"_{case}"
    result[f"cross_entropy_speedup{suffix}"] = round(slow["seconds"] / fast["seconds"], 2)
    result[f"cross_entropy_peak_ratio{suffix}"] = round(slow["peak_gb"] / fast["peak_gb"], 2)

  for remat in (False, True) if wanted("v5e") else ():
    key = f"temp_gb_v5e_{args.size}_32" + ("_remat" if remat else "")
    result[key] = None
    if not has_libtpu():
      print("v5e: not compiled, libtpu is not installed (pip install -e '.[tpu]')")
      continue
    found = v5e_update(m, args.size, 32, remat)
    what = f"v5e, an update of 32 images, {'with' if remat else 'without'} remat"
    if not found:
      print(f"{what}: the compiler finds no way to fit {V5E_GB:.0f} GB", flush=True)
      continue
    result[key] = round(found["temp"], 3)
    fits = "fits" if found["total"] < V5E_GB else "does not fit"
    print(
      f"{what}: weights, average, moments and batch {found['state']:.2f} GB, temporaries "
      f"{found['temp']:.2f} GB, together {found['total']:.2f} GB: {fits} {V5E_GB:.0f} GB",
      flush=True,
    )
  print(json.dumps(result))


if __name__ == "__main__":
  main()
