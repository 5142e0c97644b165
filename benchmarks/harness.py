"""What several benchmarks do alike."""

import ctypes
import importlib.util
import json
import os
import pathlib
import platform
import re
import resource
import subprocess
import sys

import jax

from coda_jax import config as c
from coda_jax import sharding

V5E_GB = 16.0  # of one chip
FORMS = ("materialised", "streamed")


def peak() -> float:
  """Largest resident size of this process so far, or since `forget_peak`, in GB."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def cores() -> int:
  """Cores that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def host() -> str:
  """The processor's name, the cores that this process may use, and its vector instructions."""
  cpuinfo = pathlib.Path("/proc/cpuinfo")
  text = cpuinfo.read_text() if cpuinfo.exists() else ""
  name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
  flags = sorted(set(re.findall(r"\b(?:avx\w*|amx\w*|fma)\b", text)))
  found = name[1] if name else platform.processor() or platform.machine()
  return f"{found}, {cores()} cores, {' '.join(flags) or 'instruction set unknown'}"


def forget_peak() -> None:
  """Gives freed memory back and starts `peak` anew, where Linux and glibc can; see proc(5)."""
  try:
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")
  except OSError:
    pass


def best_of_forms(file: str, words: list[str], rounds: int) -> dict[str, dict[str, float]]:
  """Least of every figure of both forms, which alternate, each in a process of its own.

  `python FILE --measure FORM WORDS` prints the figures as a last line of JSON.
  """
  environment, best = {**os.environ, "JAX_PLATFORMS": "cpu"}, {}
  for form in FORMS * rounds:
    command = [sys.executable, file, "--measure", form, *words]
    out = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    new = json.loads(out.stdout.splitlines()[-1])
    best[form] = {k: min(x, best.get(form, new)[k]) for k, x in new.items()}
  return best


def has_libtpu() -> bool:
  """Whether programs can be compiled for TPUs; no TPU is needed for that."""
  return importlib.util.find_spec("libtpu") is not None


def compile_for_chip(function, *args, donate: bool = False):
  """`function` compiled for one v5e chip; every array of `args` may be a shape.

  With `donate` the first argument is given up to the outputs. Only one process can use libtpu at a
  time.

  Raises:
    JaxRuntimeError: among others where the compiler finds no way to fit the chip's memory.
  """
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  from jax.experimental import topologies

  topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
  mesh = sharding.make_mesh(c.MeshSettings(), topology.devices[:1])
  chip = sharding.replicated(mesh)

  def place(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip)

  with jax.set_mesh(mesh):
    step = jax.jit(function, donate_argnums=0 if donate else ())
    return step.lower(*jax.tree.map(place, args)).compile()
