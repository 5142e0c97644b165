"""FLOPs, traffic and collectives against programs that can be counted by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from coda_jax.planning import hlo
from coda_jax.planning.costs import count
from coda_jax.planning.loops import trip_count

pytestmark = pytest.mark.usefixtures("optimized")


def compiled(function, *args, devices=1):
  return count(hlo.parse(jax.jit(function).lower(*args).compile().as_text()), devices)


def shape(*dims, spec=None, mesh=None, dtype=jnp.float32):
  sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec(*(spec or ())))
  return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)


@pytest.fixture(scope="module")
def mesh():
  return jax.make_mesh((8,), ("data",), (AxisType.Auto,))


def test_products_and_convolutions():
  assert compiled(jnp.matmul, shape(48, 64), shape(64, 80)).flops == 2 * 48 * 64 * 80
  batched = compiled(jnp.matmul, shape(5, 48, 64), shape(5, 64, 80))
  assert batched.flops == 5 * 2 * 48 * 64 * 80
  numbers = ("NHWC", "HWIO", "NHWC")
  same = lambda x, k: lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=numbers)
  # 3 taps on 8 pixels meet 22, as in tests/test_benchmarks.py.
  x, k = shape(2, 8, 8, 4), shape(3, 3, 4, 16)
  assert compiled(same, x, k).flops == 2 * 2 * 22 * 22 * 4 * 16


def test_precision_counts_as_passes():
  highest = lambda a, b: jnp.matmul(a, b, precision="highest")
  found = compiled(highest, shape(48, 64), shape(64, 80))
  assert found.passes == 6 * found.flops


def test_a_loop_counts_as_often_as_it_runs():
  w = shape(64, 64)

  def inner(x, w):
    return lax.scan(lambda c, _: (jnp.sin(c @ w), None), x, None, length=5)[0]

  def outer(x, w):
    return lax.scan(lambda c, y: (inner(c + y, w), None), x[0], x)[0]

  found = compiled(outer, shape(7, 32, 64), w)
  assert found.flops == 7 * 5 * 2 * 32 * 64 * 64 and not found.unknown_loops
  once = compiled(lambda x, w: jnp.sin(x @ w), shape(32, 64), w)
  assert found.traffic > 35 * once.traffic * 0.8


def test_a_loop_of_unknown_length_counts_once_and_is_told():
  def f(n, x):
    return lax.fori_loop(0, n, lambda i, x: jnp.sin(x @ x), x)

  found = compiled(f, shape(dtype=jnp.int32), shape(64, 64))
  assert found.unknown_loops == 1 and found.flops == 2 * 64**3


def test_a_branch_counts_the_dearest_way():
  def f(a, x):
    return lax.cond(a > 0, lambda x: jnp.sin(x @ x) @ x, lambda x: x @ x, x)

  assert compiled(f, shape(), shape(64, 64)).flops == 2 * 2 * 64**3


def test_a_slice_reads_what_it_takes():
  """Of the stack in a loop a run reads one matrix, not all of them."""
  found = compiled(lambda x: lax.map(lambda a: jnp.sin(a) * 2, x), shape(100, 64, 64))
  assert found.traffic < 6 * 100 * 64 * 64 * 4


def test_collectives(mesh):
  split = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
  x = shape(64, 128, spec=("data",), mesh=mesh)
  summed = compiled(lambda x: x.sum(0), x, devices=8)
  assert summed.payload == {"all-reduce": 128 * 4} and summed.count == {"all-reduce": 1}
  assert summed.sent == 2 * 7 / 8 * 128 * 4
  gathered = compiled(lambda x: lax.with_sharding_constraint(x, split()), x, devices=8)
  assert gathered.payload == {"all-gather": 64 * 128 * 4}
  assert gathered.sent == 7 / 8 * 64 * 128 * 4


def test_collectives_in_loops_and_of_groups():
  mesh = jax.make_mesh((2, 4), ("data", "model"), (AxisType.Auto,) * 2)
  x = shape(6, 8, 128, spec=(None, "model", None), mesh=mesh)

  def f(x):
    return lax.scan(lambda c, y: (jnp.sin(c) + y.sum(0), None), jnp.zeros(128), x)[0]

  found = compiled(f, x, devices=8)
  assert found.count == {"all-reduce": 6} and found.payload == {"all-reduce": 6 * 128 * 4}
  assert found.sent == 2 * 3 / 4 * 6 * 128 * 4  # over 4 of 8 devices


@pytest.mark.parametrize(
  ("groups", "size"),
  [
    ("{{0,1,2,3},{4,5,6,7}}", 4),
    ("[4,2]<=[8]", 2),
    ("[4,2]<=[2,4]T(1,0)", 2),
    ("mesh['a'=4,'b'=2] {'b'}", 2),
    ("mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a','c'}", 8),
    ("mesh['a'=8] {'a':(1)4}", 4),
    ("{}", 16),
  ],
)
def test_groups_of_devices(groups, size):
  text = "\n".join(
    [
      "ENTRY %main (x: f32[6]) -> f32[6] {",
      "  %x = f32[6]{0} parameter(0)",
      f"  ROOT %y = f32[6]{{0}} all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%a",
      "}",
    ]
  )
  assert count(hlo.parse(text), 16).sent == 2 * (size - 1) / size * 24


# What only TPUs' programs have.

_TPU = """
HloModule jit_f, is_scheduled=true

%start (p.0: bf16[128,512]) -> bf16[512,512] {
  %p.0 = bf16[128,512]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %all-gather.1 = bf16[512,512]{1,0:T(8,128)(2,1)} all-gather(%p.0), channel_id=5, replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}
}

%done (p.1: bf16[128,512]) -> bf16[512,512] {
  %p.1 = bf16[128,512]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.2 = bf16[512,512]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=5, replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}
  ROOT %custom-call.5 = bf16[512,512]{1,0:T(8,128)(2,1)S(1)} custom-call(%p.1, %all-gather.2), custom_call_target="AsyncCollectiveDone"
}

%body (s: (s32[], f32[64,64], /*index=2*/s32[])) -> (s32[], f32[64,64], s32[]) {
  %s = (s32[]{:T(128)}, f32[64,64]{1,0:T(8,128)}, /*index=2*/s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %x = f32[64,64]{1,0:T(8,128)} get-tuple-element(%s), index=1
  %n = s32[]{:T(128)} get-tuple-element(%s), index=2
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %y = f32[64,64]{1,0:T(8,128)} convolution(%x, %x), dim_labels=bf_io->bf, operand_precision={highest,highest}
  ROOT %t = (s32[]{:T(128)}, f32[64,64]{1,0:T(8,128)}, s32[]{:T(128)}) tuple(%next, %y, %n)
}

%condition (s.1: (s32[], f32[64,64], s32[])) -> pred[] {
  %s.1 = (s32[]{:T(128)}, f32[64,64]{1,0:T(8,128)}, s32[]{:T(128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%s.1), index=0
  %n.1 = s32[]{:T(128)} get-tuple-element(%s.1), index=2
  ROOT %less = pred[]{:T(512)} compare(%i.1, %n.1), direction=LT
}

ENTRY %main (a: bf16[128,512], b: f32[64,64], c: f32[10,3]) -> f32[64,64] {
  %a = bf16[128,512]{1,0:T(8,128)(2,1)} parameter(0)
  %b = f32[64,64]{1,0:T(8,128)} parameter(1)
  %c = f32[10,3]{1,0:T(8,128)} parameter(2)
  %copy = bf16[128,512]{1,0:T(8,128)(2,1)S(1)} copy(%a)
  %f = bf16[512,512]{1,0:T(8,128)(2,1)S(1)} fusion(%copy), kind=kCustom, calls=%start
  %g = bf16[512,512]{1,0:T(8,128)(2,1)S(1)} fusion(%copy), kind=kCustom, calls=%done
  %sine = f32[10,3]{1,0:T(8,128)} sine(%c)
  %zero = s32[]{:T(128)} constant(0)
  %nine = s32[]{:T(128)} constant(9)
  %state = (s32[]{:T(128)}, f32[64,64]{1,0:T(8,128)}, s32[]{:T(128)}) tuple(%zero, %b, %nine)
  %while.17 = (s32[]{:T(128)}, f32[64,64]{1,0:T(8,128)}, s32[]{:T(128)}) while(%state), condition=%condition, body=%body
  ROOT %out = f32[64,64]{1,0:T(8,128)} get-tuple-element(%while.17), index=1
}
"""  # noqa: E501


def test_a_program_of_a_tpu():
  module = hlo.parse(_TPU)
  main = module.computations[module.entry]
  assert trip_count(module, main, main.instructions["while.17"]) == 9
  found = count(module, 8)
  assert found.flops == 9 * 2 * 64**3 and found.passes == 6 * found.flops
  # One gather in two fusions, over four of eight devices.
  assert found.payload == {"all-gather": 512 * 512 * 2} and found.count == {"all-gather": 1}
  assert found.sent == 3 / 4 * 512 * 512 * 2
  # The copy reads main memory and writes the chip's; [10, 3] is padded to [16, 128]; each run of
  # the loop reads and writes [64, 64], which is padded to [64, 128].
  scalars = 9 * (3 + 3) * 128 * 4  # of the counter
  arrays = 128 * 512 * 2 + 2 * 16 * 128 * 4 + 9 * 2 * 64 * 128 * 4
  assert arrays <= found.traffic <= arrays + scalars


def test_moves_to_memory_on_the_chip_read_what_they_take():
  text = "\n".join(
    [
      "ENTRY %main (x: f32[64,256]) -> f32[64,128] {",
      "  %x = f32[64,256]{1,0:T(8,128)} parameter(0)",
      "  %s = ((f32[64,256]{1,0:T(8,128)}), f32[64,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) "
      "slice-start(%x), slice={[0:64], [0:128]}",
      "  %d = f32[64,128]{1,0:T(8,128)S(1)} slice-done(%s)",
      "  %c = (f32[64,256]{1,0:T(8,128)S(1)}, f32[64,256]{1,0:T(8,128)}, u32[]{:S(2)}) "
      "copy-start(%x)",
      "  ROOT %e = f32[64,256]{1,0:T(8,128)S(1)} copy-done(%c)",
      "}",
    ]
  )
  assert count(hlo.parse(text), 1).traffic == 4 * 64 * (128 + 256)
  # The same slice as the compiler writes it before it generates code.
  text = "\n".join(
    [
      "%async (p: f32[64,256]) -> f32[64,128] {",
      "  %p = f32[64,256]{1,0:T(8,128)} parameter(0)",
      "  ROOT %s = f32[64,128]{1,0:T(8,128)S(1)} slice(%p), slice={[0:64], [0:128]}",
      "}",
      "",
      "ENTRY %main (x: f32[64,256]) -> f32[64,128] {",
      "  %x = f32[64,256]{1,0:T(8,128)} parameter(0)",
      "  %a = ((f32[64,256]{1,0:T(8,128)}), f32[64,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) "
      "async-start(%x), calls=%async",
      "  ROOT %d = f32[64,128]{1,0:T(8,128)S(1)} async-done(%a)",
      "}",
    ]
  )
  assert count(hlo.parse(text), 1).traffic == 4 * 64 * 128


def test_elements_of_tuples_by_number():
  """As newer compilers write them."""
  text = "\n".join(
    [
      "ENTRY %main (x: (f32[64,128], (s32[], bf16[8,128]))) -> f32[64,128] {",
      "  %x = (f32[64,128]{1,0}, /*index=1*/(s32[], bf16[8,128]{1,0})) parameter(0)",
      "  %y = bf16[8,128]{1,0} negate(%x#1#1)",
      "  ROOT %z = f32[64,128]{1,0} negate(f32[64,128]{1,0} %x#0)",
      "}",
    ]
  )
  module = hlo.parse(text)
  (computation,) = module.computations.values()
  element = computation.instructions["x#1#1"]
  assert element.op == "get-tuple-element" and element.operands == ["x#1"]
  assert element.attribute(r"index=(\d+)") == "1" and element.results[0].dims == (8, 128)
  assert count(module, 1).traffic == 2 * 8 * 128 * 2 + 2 * 64 * 128 * 4


def test_shapes():
  (shape,) = hlo.shapes("bf16[32,2,40,64]{3,0,2,1:T(8,128)(2,1)S(1)}")
  assert (shape.bytes, shape.space) == (2 * 32 * 2 * 40 * 64, 1)
  assert shape.padded == 2 * 32 * 2 * 40 * 128
  assert [s.kind for s in hlo.shapes("(f32[2]{0}, (s32[], pred[3]{0}))")] == ["f32", "s32", "pred"]


def test_text_that_is_no_program():
  with pytest.raises(ValueError, match="ENTRY"):
    hlo.parse("HloModule nothing")


def test_a_batch_of_products_as_a_convolution():
  """As TPUs write it: dilated, so that each output meets one input."""
  line = (
    "  ROOT %c = f32[8,16,32]{2,1,0} convolution(%x, %y), "
    "window={size=8 stride=7 pad=0_0 lhs_dilate=8}, dim_labels=0bf_0io->0bf"
  )
  text = "\n".join(
    [
      "ENTRY %main (x: f32[8,16,24], y: f32[8,24,32]) -> f32[8,16,32] {",
      "  %x = f32[8,16,24]{2,1,0} parameter(0)",
      "  %y = f32[8,24,32]{2,1,0} parameter(1)",
      line,
      "}",
    ]
  )
  assert count(hlo.parse(text), 1).flops == 8 * 2 * 16 * 24 * 32
