"""Collectives read from the text of compiled programs, checked against hand counts."""

import pytest

from jaxpref.plan import hlo

GATHERS = """
HloModule jit_step

%body (param: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %param = (s32[], f32[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%param), index=0
  %x = f32[8,16]{1,0} get-tuple-element(%param), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %all-gather.1 = bf16[64,16]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=1, WHOLE
  ROOT %tuple = (s32[], f32[8,16]{1,0}) tuple(%next, %x)
}

%condition (param.1: (s32[], f32[8,16])) -> pred[] {
  %param.1 = (s32[], f32[8,16]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%param.1), index=0
  %bound = s32[]{:T(128)} constant(5)
  ROOT %test = pred[] compare(%j, %bound), direction=LT
}

ENTRY %main (arg: f32[8,16]) -> f32[8,16] {
  %arg = f32[8,16]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8,16]{1,0}) tuple(%zero, %arg)
  %loop = (s32[], f32[8,16]{1,0}) while(%start), condition=%condition, body=%body NOTED
  %sum = f32[8,16]{1,0} all-reduce(%arg), channel_id=2, WHOLE, to_apply=%add
  ROOT %out = f32[8,16]{1,0} get-tuple-element(%loop), index=1
}
"""


@pytest.mark.parametrize(
    "noted, times",
    [("", 5), (', backend_config={"known_trip_count":{"n":"7"}}', 7)],
    ids=["counted", "annotated"],
)
@pytest.mark.parametrize(
    "whole",
    [
        "replica_groups={{0,1,2,3,4,5,6,7}}",
        "replica_groups=[1,8]<=[8]",
        "replica_groups=mesh['a'=8,'b'=2] {'a'}",
    ],
)
def test_a_collective_counts_once_per_iteration_of_its_loop(noted, times, whole):
    text = GATHERS.replace("NOTED", noted).replace("WHOLE", whole)
    found = hlo.collectives(text, devices=8)
    gathered, summed = 64 * 16 * 2, 8 * 16 * 4
    assert found == {
        "all-gather": {
            "count": times,
            "bytes": times * gathered,
            "wire_bytes": times * gathered * 7 / 8,
        },
        "all-reduce": {"count": 1, "bytes": summed, "wire_bytes": summed * 2 * 7 / 8},
    }
    assert hlo.wire_bytes(found) == times * gathered * 7 / 8 + summed * 7 / 4


def test_the_step_of_a_counter_may_come_from_outside_the_loop():
    text = GATHERS.replace("WHOLE", "replica_groups=[1,8]<=[8]").replace("NOTED", "")
    text = text.replace("(s32[], f32[8,16]{1,0})", "(s32[], f32[8,16]{1,0}, s32[])")
    text = text.replace(
        "%one = s32[] constant(1)", "%one = s32[] get-tuple-element(%param), index=2"
    )
    text = text.replace("tuple(%next, %x)", "tuple(%next, %x, %one)")
    text = text.replace(
        "tuple(%zero, %arg)", "tuple(%zero, %arg, %two)\n  %two = s32[] constant(2)"
    )
    assert hlo.collectives(text, devices=8)["all-gather"]["count"] == 3  # 0, 2, 4


def test_an_all_reduce_that_keeps_a_part_is_a_reduce_scatter():
    text = """
%all-reduce-scatter.3 (p: f32[64]) -> f32[8] {
  %p = f32[64]{0} parameter(0)
  %all-reduce.9 = f32[64]{0} all-reduce(%p), channel_id=3, replica_groups=[1,8]<=[8]
  ROOT %slice = f32[8]{0} dynamic-slice(%all-reduce.9), dynamic_slice_sizes={8}
}

ENTRY %main (arg: f32[64]) -> f32[8] {
  %arg = f32[64]{0} parameter(0)
  %rs = f32[8]{0} reduce-scatter(%arg), channel_id=4, replica_groups=[1,8]<=[8]
  ROOT %f = f32[8]{0} fusion(%arg), kind=kCustom, calls=%all-reduce-scatter.3
}
"""
    found = hlo.collectives(text, devices=8)
    assert found == {
        "reduce-scatter": {"count": 2, "bytes": 2 * 256, "wire_bytes": 2 * 224}
    }


def test_a_collective_split_over_fusions_and_a_loop_counts_once():
    text = GATHERS.replace("WHOLE", "replica_groups=[1,8]<=[8]").replace("NOTED", "")
    begun = "  %begun = bf16[64,16]{1,0} fusion(%arg), calls=%async_collective_fusion\n"
    text = text.replace("  %sum =", begun + "  %sum =")
    text += """
%async_collective_fusion (q: f32[8,16]) -> bf16[64,16] {
  %q = f32[8,16]{1,0} parameter(0)
  ROOT %g = bf16[64,16]{1,0} all-gather(%q), channel_id=1, replica_groups=[1,8]<=[8]
}
"""
    assert hlo.collectives(text, devices=8)["all-gather"]["count"] == 1


def test_a_peeled_iteration_counts_in_addition_to_the_loop():
    """Even with the same channel, groups, and size."""
    text = GATHERS.replace("WHOLE", "replica_groups=[1,8]<=[8]").replace("NOTED", "")
    first = (
        "  %first = bf16[64,16]{1,0} all-gather(%arg), channel_id=1, "
        "replica_groups=[1,8]<=[8]\n  %sum ="
    )
    text = text.replace("  %sum =", first)
    assert hlo.collectives(text, devices=8)["all-gather"]["count"] == 6


def test_started_collectives_and_branches_count_once():
    text = """
%yes (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  ROOT %r = f32[4]{0} all-reduce(%a), channel_id=5, replica_groups=[4,2]<=[8]
}

%no (b: f32[4]) -> f32[4] {
  ROOT %b = f32[4]{0} parameter(0)
}

ENTRY %main (arg: f32[4]) -> f32[4] {
  %arg = f32[4]{0} parameter(0)
  %go = pred[] constant(true)
  %g = (f32[4]{0}, f32[8]{0}) all-gather-start(%arg), channel_id=1, REPLICAS
  %gd = f32[8]{0} all-gather-done(%g)
  %p = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%arg)
  %pd = f32[4]{0} collective-permute-done(%p)
  %self = f32[4]{0} all-reduce(%arg), channel_id=9, replica_groups=[8,1]<=[8]
  ROOT %c = f32[4]{0} conditional(%go, %arg, %arg), branch_computations={%yes, %no}
}
""".replace("REPLICAS", "replica_groups=[4,2]<=[8]")
    assert hlo.collectives(text, devices=8) == {
        "all-gather": {"count": 1, "bytes": 32, "wire_bytes": 16},
        "collective-permute": {"count": 1, "bytes": 16, "wire_bytes": 16},
        "all-reduce": {"count": 1, "bytes": 16, "wire_bytes": 16},
    }


def test_the_attributes_of_a_kernel_do_not_end_a_computation():
    """They span several lines, the last of which begins with braces."""
    kernel = """  %kernel = f32[8,16]{1,0} custom-call(%x), attributes={metadata={
"block": "{\\"q\\": 512}"
}}, metadata={op_name="kernel"}
  ROOT %tuple ="""
    text = GATHERS.replace("WHOLE", "replica_groups=[1,8]<=[8]").replace("NOTED", "")
    text = text.replace("  ROOT %tuple =", kernel)
    assert hlo.collectives(text, devices=8)["all-gather"]["count"] == 5


def test_several_collectives_may_share_a_channel():
    text = """
ENTRY %main (arg: f32[64]) -> f32[8] {
  %arg = f32[64]{0} parameter(0)
  %a = f32[16]{0} reduce-scatter(%arg), channel_id=1, replica_groups=[2,4]<=[8]
  %b = f32[8]{0} reduce-scatter(%a), channel_id=1, replica_groups=[4,2]<=[8]
  %c = f32[8]{0} reduce-scatter(%a), channel_id=1, replica_groups=[4,2]<=[8]
  ROOT %f = f32[8]{0} add(%b, %c)
}
"""
    assert hlo.collectives(text, devices=8) == {
        "reduce-scatter": {
            "count": 3,
            "bytes": 256 + 2 * 64,
            "wire_bytes": 256 * 3 / 4 + 2 * 64 / 2,
        }
    }


def test_collectives_between_slices_are_separate_kinds():
    """A `send` and a `recv`; received arrays count once per iteration of the loop."""
    runtime = (
        "channel_id=5, is_host_transfer=true, frontend_attributes={"
        '_xla_host_transfer_rendezvous="a_0",_xla_megascale_target="{1,2}x{0:3}",'
        '_xla_megascale_transfer_type="KIND"}'
    )
    summed, gathered = (
        runtime.replace("KIND", "ALL_REDUCE"),
        runtime.replace("KIND", "ALL_GATHER"),
    )
    inside = f"""  %after = token[] after-all()
  %s = (f32[2,8]{{1,0}}, u32[]{{:S(2)}}, token[]) send(%x, %after), {summed}
  %r = (f32[2,8]{{1,0}}, u32[]{{:S(2)}}, token[]) recv(%after), {summed}
  %done = (f32[2,8]{{1,0}}, token[]) recv-done(%r), channel_id=5
  ROOT %tuple ="""
    outside = f"""  %token = token[] after-all()
  %g = (s32[3,8]{{1,0}}, u32[]{{:S(2)}}, token[]) recv(%token), {gathered}
  ROOT %out ="""
    text = GATHERS.replace("WHOLE", "replica_groups=[1,4]<=[4]").replace("NOTED", "")
    text = text.replace("  ROOT %tuple =", inside).replace("  ROOT %out =", outside)
    found = hlo.collectives(text, devices=4, slices=3)
    assert found.pop("all-gather")["count"] == 5
    del found["all-reduce"]
    assert found == {
        "all-reduce between slices": {
            "count": 5,
            "bytes": 5 * 64,
            "wire_bytes": pytest.approx(5 * 64 * 2 * 2 / 3),
        },
        "all-gather between slices": {"count": 1, "bytes": 96, "wire_bytes": 64},
    }
    between = hlo.wire_bytes(found, between_slices=True)
    assert between == pytest.approx(5 * 64 * 4 / 3 + 64)
    assert hlo.wire_bytes(found) == 0


def test_a_collective_on_another_core_is_counted():
    text = """
%carried (p: f32[64]) -> f32[8] {
  %p = f32[64]{0} parameter(0)
  ROOT %rs = f32[8]{0} reduce-scatter(%p), channel_id=1, replica_groups=[1,8]<=[8]
}, execution_thread="sparsecore"

%begun (q: f32[64]) -> f32[8] {
  %q = f32[64]{0} parameter(0)
  ROOT %k = f32[8]{0} custom-call(%q), called_computations={%carried}
}, execution_thread="sparsecore"

ENTRY %main (arg: f32[64]) -> f32[8] {
  %arg = f32[64]{0} parameter(0)
  %start = ((f32[64]{0}), f32[8]{0}, s32[]) async-start(%arg), calls=%begun
  ROOT %done = f32[8]{0} async-done(%start)
}
"""
    assert hlo.collectives(text, devices=8)["reduce-scatter"]["bytes"] == 256


def test_the_iterations_of_a_data_dependent_loop_are_given():
    text = GATHERS.replace("WHOLE", "replica_groups=[1,8]<=[8]").replace("NOTED", "")
    text = text.replace(
        "ROOT %test = pred[] compare(%j, %bound), direction=LT",
        "%more = pred[] compare(%j, %bound), direction=LT\n"
        "  ROOT %test = pred[] and(%more, %more)",
    )
    for turns in (1, 7):
        found = hlo.collectives(text, devices=8, turns=turns)
        assert found["all-gather"]["count"] == turns
        assert found["all-reduce"]["count"] == 1
