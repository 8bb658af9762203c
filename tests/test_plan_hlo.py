"""The reader of compiled programs, on programs compiled here for 8 virtual devices, and on a TPU's spellings."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kd_jax.plan import hlo

SIZE = 256


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("rows", "columns"), axis_types=(AxisType.Auto,) * 2)


def module(mesh, function, *specs):
    args = [jax.ShapeDtypeStruct((SIZE, SIZE), jnp.float32, sharding=NamedSharding(mesh, spec)) for spec in specs]
    return hlo.parse(jax.jit(function, out_shardings=NamedSharding(mesh, P())).lower(*args).compile().as_text())


def test_a_gather_sends_what_a_chip_does_not_have(mesh):
    found = hlo.collectives(module(mesh, lambda x: x * 2, P("rows")), 8)
    assert list(found) == ["all-gather"] and found["all-gather"].count == 1
    assert found["all-gather"].bytes == pytest.approx(SIZE * SIZE * 4 * 3 / 4)


def test_a_sum_over_an_axis_is_an_all_reduce_of_its_group(mesh):
    found = hlo.collectives(module(mesh, lambda x, y: x @ y, P(None, "rows"), P("rows")), 8)
    assert found["all-reduce"].bytes == pytest.approx(2 * SIZE * SIZE * 4 * 3 / 4)


def test_collectives_in_a_loop_count_as_often_as_it_runs(mesh):
    def loop(x, w):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=7)[0]

    program = module(mesh, loop, P(), P("rows"))
    once = module(mesh, lambda x, w: jnp.tanh(x @ w), P(), P("rows"))
    whiles = [op for ops in program.computations.values() for op in ops if op.kind == "while"]
    assert [hlo.trips(op, program) for op in whiles] == [7]
    total = sum(t.bytes for t in hlo.collectives(program, 8).values())
    assert total >= sum(t.bytes for t in hlo.collectives(once, 8).values()) > 0


def test_a_loop_whose_length_is_data_runs_as_often_as_is_said(mesh):
    def loop(x, n):
        return jax.lax.fori_loop(0, n, lambda _, c: jnp.sin(c @ c), x)

    x = jax.ShapeDtypeStruct((SIZE, SIZE), jnp.float32)
    program = hlo.parse(jax.jit(loop).lower(x, jax.ShapeDtypeStruct((), jnp.int32)).compile().as_text())
    five, ten = hlo.traffic(program, 5), hlo.traffic(program, 10)
    assert ten - five >= 5 * 2 * SIZE * SIZE * 4
    assert hlo.traffic(program, 15) - ten == ten - five


def test_traffic_of_one_product_is_its_operands_and_result():
    x = jax.ShapeDtypeStruct((SIZE, SIZE), jnp.float32)
    program = hlo.parse(jax.jit(lambda a, b: a @ b).lower(x, x).compile().as_text())
    assert hlo.traffic(program) == 3 * SIZE * SIZE * 4


def test_of_a_stacked_weight_the_layer_that_is_read_counts():
    def stack(x, w):
        return jax.lax.scan(lambda c, layer: (jnp.tanh(c @ layer), None), x, w)[0]

    x, w = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((8, SIZE), (16, SIZE, SIZE)))
    moved = hlo.traffic(hlo.parse(jax.jit(stack).lower(x, w).compile().as_text()))
    assert 16 * SIZE * SIZE * 4 <= moved < 16 * 16 * SIZE * SIZE * 4 / 2, "not the whole stack for every layer"


def test_the_largest_array_is_named_by_its_operation():
    x = jax.ShapeDtypeStruct((8, SIZE), jnp.float32)
    program = hlo.parse(jax.jit(lambda a: jnp.sin(a.T @ a).sum()).lower(x).compile().as_text())
    array, label = hlo.largest(program)[0]
    assert array.shape == (SIZE, SIZE) and "dot_general" in label or "sin" in label


TPU = """HloModule m, is_scheduled=true

%body.1 (p.1: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %p.1 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %gte.1 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p.1), index=1
  %permuted = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} collective-permute(%gte.1), channel_id=4, source_target_pairs={{0,1}}
  %piece.2 = bf16[64,128]{1,0:T(8,128)(2,1)} fusion(%gte.1), kind=kCustom, calls=%pieces.2
  %two = s32[]{:T(128)} constant(2)
  %counter = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %next = s32[]{:T(128)} add(%counter, %two)
  ROOT %t.1 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}) tuple(%next, %permuted)
}

%cond.1 (p.2: (s32[], bf16[8,128])) -> pred[] {
  %c.16 = s32[]{:T(128)} constant(16)
  %p.2 = (s32[]{:T(128)}, /*index=1*/bf16[8,128]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %gte.2 = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  ROOT %lt = pred[]{:T(512)} compare(%gte.2, %c.16), direction=LT
}

%pieces.1 (q.1: bf16[16,128]) -> bf16[64,128] {
  %q.1 = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %gather.1 = bf16[64,128]{1,0:T(8,128)(2,1)} all-gather(%q.1), channel_id=9, replica_groups=mesh['a'=4] {'a'}
}

%all-reduce-scatter.3 (r.1: f32[64,128]) -> f32[16,128] {
  %r.1 = f32[64,128]{1,0:T(8,128)} parameter(0)
  %sum = f32[64,128]{1,0:T(8,128)} all-reduce(%r.1), channel_id=11, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %own = f32[16,128]{1,0:T(8,128)} dynamic-slice(%sum), dynamic_slice_sizes={16,128}
}

ENTRY %main (a.1: bf16[8,128], b.1: bf16[16,128], c.1: f32[64,128]) -> f32[16,128] {
  %a.1 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %b.1 = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(1)
  %c.1 = f32[64,128]{1,0:T(8,128)} parameter(2)
  %start = bf16[64,128]{1,0:T(8,128)(2,1)} fusion(%b.1), kind=kCustom, calls=%pieces.1
  %tuple.1 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}) tuple(%a.1, %a.1)
  %loop = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}) while(%tuple.1), condition=%cond.1, body=%body.1
  ROOT %out = f32[16,128]{1,0:T(8,128)} fusion(%c.1), kind=kCustom, calls=%all-reduce-scatter.3
}
"""


def test_a_tpus_spellings():
    """Counts from a loop's condition, pieces of one gather, a scatter written as a fused all-reduce, fast memory."""
    program = hlo.parse(TPU.replace("calls=%pieces.2", "calls=%pieces.1"))
    found = hlo.collectives(program, 8)
    assert found["collective-permute"] == hlo.Traffic(8, 8 * 8 * 128 * 2), "16 by twos"
    assert found["reduce-scatter"] == hlo.Traffic(1, 64 * 128 * 4 * 3 / 4)
    assert found["all-gather"].bytes % (64 * 128 * 2 * 3 / 4) == 0
    assert program.computations["body.1"][1].arrays[0].space == 1


def test_pieces_of_one_collective_count_once():
    """A gather begun outside a loop and carried on inside it: the pieces share a channel."""
    pieces = TPU[TPU.index("%pieces.1 (") : TPU.index("%all-reduce-scatter.3 (")]
    inside = pieces.replace("pieces.1", "pieces.2").replace("q.1", "q.2").replace("gather.1", "gather.2")
    found = hlo.collectives(
        hlo.parse(TPU.replace(pieces, "").replace("%body.1 (p.1", pieces + inside + "%body.1 (p.1")), 8
    )
    assert found["all-gather"] == hlo.Traffic(1, 64 * 128 * 2 * 3 / 4)


@pytest.mark.parametrize(
    "attributes,size",
    [
        ("replica_groups={{0,2,4},{1,3,5}}, x", 3),
        ("replica_groups=[2,32]<=[32,2]T(1,0), dimensions={1}", 32),
        ("replica_groups=mesh['axis_0'=32,'axis_1'=1,'axis_2'=2] {'axis_0','axis_2'}, use", 64),
        ("replica_groups=mesh['a'=2,'b'=32], device_ids=([32,2]T(1,0)) {'a'}, use", 2),
        ("replica_groups={}", 8),
    ],
)
def test_groups_in_every_spelling(attributes, size):
    assert hlo.group_size(attributes, 8) == size


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.parse("HloModule nothing\n")
