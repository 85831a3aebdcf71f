"""The plan: packs fit, every sample comes once per epoch, the order does not depend on the ranks, resume is exact."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genlip_megatron.data.plan import Phase, Plan, Source, permutation
from genlip_megatron.data.resize import native_sizes

SEQ = 64


def source(lengths: list[int] | np.ndarray) -> Source:
    table = np.asarray(lengths)
    return Source(len(table), lambda ids: table[ids])


@st.composite
def plans(draw: st.DrawFn, sources: int = 3, weighted: bool = False) -> dict[str, Any]:
    """Arguments of a plan over random data sets, often smaller than its lanes; with weights that change."""
    lengths = st.lists(st.integers(1, SEQ), min_size=1, max_size=100)
    tables = draw(st.lists(lengths, min_size=1, max_size=sources))
    weights = st.tuples(*[st.integers(1, 9).map(float) for _ in tables])
    starts = draw(st.lists(st.integers(1, 10), max_size=2, unique=True).map(sorted)) if weighted else []
    phases = [Phase(start, draw(weights)) for start in [0, *starts]] if weighted else None
    return {
        "phases": phases,
        "sources": [source(table) for table in tables],
        "seq_length": SEQ,
        "lanes": draw(st.integers(1, 8)),
        "seed": draw(st.integers(0, 5)),
        "chunk_size": draw(st.integers(1, 20)),
        "shuffle_window": draw(st.integers(1, 40)),
        "pack_buffer": draw(st.integers(1, 30)),
    }


def lengths_of(arguments: dict[str, Any]) -> np.ndarray:
    """Tokens of every sample by its id."""
    return np.concatenate([part.lengths(np.arange(part.size)) for part in arguments["sources"]])


@settings(max_examples=80, deadline=None)
@given(plans(), st.integers(1, 4))
def test_every_sample_comes_exactly_once_per_epoch_in_packs_that_fit(arguments: dict[str, Any], epochs: int) -> None:
    plan, lengths = Plan(**arguments, epochs=epochs), lengths_of(arguments)
    seen: Counter[int] = Counter()
    for lane in range(arguments["lanes"]):
        while pack := plan.next_pack(lane):
            assert lengths[pack].sum() <= SEQ
            seen.update(pack)
    assert seen == Counter(dict.fromkeys(range(len(lengths)), epochs))


@settings(max_examples=40, deadline=None)
@given(plans(weighted=True), st.sampled_from([1, 2, 4, 8]), st.integers(1, 12))
def test_lanes_do_not_depend_on_the_ranks(arguments: dict[str, Any], ranks: int, steps: int) -> None:
    lanes = arguments["lanes"]
    whole = Plan(**arguments)
    expected = [[whole.next_pack(lane) for lane in range(lanes)] for _ in range(steps)]
    for rank in range(ranks):
        mine = Plan(**arguments)
        share = range(rank, lanes, ranks)
        for step in range(steps):
            assert [mine.next_pack(lane) for lane in share] == expected[step][rank::ranks]


@settings(max_examples=60, deadline=None)
@given(plans(weighted=True), st.lists(st.integers(0, 8), min_size=1, max_size=4), st.data())
def test_a_plan_interrupted_anywhere_continues_exactly(
    arguments: dict[str, Any], stops: list[int], data: st.DataObject
) -> None:
    """Interrupted several times, each time resumed by other ranks from their merged cursors."""
    lanes = range(arguments["lanes"])
    plan = Plan(**arguments, fingerprint="f")
    resumed = [Plan(**arguments, fingerprint="f")]
    for steps in stops:
        for _ in range(steps):
            expected = [plan.next_pack(lane) for lane in lanes]
            assert [resumed[lane % len(resumed)].next_pack(lane) for lane in lanes] == expected
        ranks = len(resumed)
        states = [part.state_dict(range(rank, len(lanes), ranks)) for rank, part in enumerate(resumed)]
        merged = {**states[0], "lanes": {lane: s for state in states for lane, s in state["lanes"].items()}}
        cursor = json.loads(json.dumps(merged))
        resumed = [Plan(**arguments, fingerprint="f") for _ in range(data.draw(st.integers(1, 3)))]
        for part in resumed:
            part.load_state_dict(cursor)
    assert [resumed[lane % len(resumed)].next_pack(lane) for lane in lanes] == [plan.next_pack(lane) for lane in lanes]


@settings(max_examples=60, deadline=None)
@given(plans(), st.lists(st.tuples(st.integers(1, 8), st.integers(0, 6)), min_size=1, max_size=3))
def test_another_number_of_lanes_keeps_every_sample_once_per_epoch(
    arguments: dict[str, Any], changes: list[tuple[int, int]]
) -> None:
    """Over the whole run all samples of a source come equally often, except in the current epoch."""
    seen: Counter[int] = Counter()
    lanes = arguments.pop("lanes")
    plan = Plan(**arguments, lanes=lanes)
    for new_lanes, steps in [*changes, (1, 0)]:
        for _ in range(steps):
            for lane in range(lanes):
                seen.update(plan.next_pack(lane))
        cursor = json.loads(json.dumps(plan.state_dict(range(lanes))))
        lanes = new_lanes
        plan = Plan(**arguments, lanes=lanes)
        if cursor["count"] != lanes:
            with pytest.raises(ValueError, match=r"or --change-lanes"):
                plan.load_state_dict(cursor)
        plan.load_state_dict(cursor, change_lanes=True)
    # Finish only the latest epoch that has begun: continue the last cursor to its end.
    last = max(walk.epoch for lane in plan._lanes.values() for stream in lane.streams for walk in stream.walks)
    for lane in plan._lanes.values():
        for stream in lane.streams:
            stream.walks[-1].last_epoch = last
    while pack := plan.next_pack(0):
        seen.update(pack)
    assert seen == Counter(dict.fromkeys(range(len(lengths_of(arguments))), last + 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": "g"}, "data fingerprint"),
        ({"seed": 2}, "data seed"),
        ({"chunk_size": 3}, "data chunk_size"),
        ({"shuffle_window": 3}, "data shuffle_window"),
        ({"pack_buffer": 3}, "data pack_buffer"),
        ({"seq_length": 2 * SEQ}, "data seq_length"),
        ({"sources": [source([5] * 8)]}, "data sources"),
        ({"lanes": 3}, "has 2 lanes, this run 3"),
    ],
)
def test_a_cursor_of_another_stream_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "sources": [source([5] * 9)], "seq_length": SEQ, "lanes": 2, "seed": 1, "fingerprint": "f",
    }  # fmt: skip
    state = Plan(**arguments).state_dict(range(2))
    with pytest.raises(ValueError, match=message):
        Plan(**{**arguments, **change}).load_state_dict(state)


def test_weights_of_steps_already_taken_cannot_change_and_later_ones_can() -> None:
    def plan(*phases: tuple[int, float, float]) -> Plan:
        return Plan(
            [source([8] * 90), source([8] * 90)], SEQ, 2, 1, [Phase(at, (a, b)) for at, a, b in phases], 4, 64, 16
        )

    begun = plan((0, 6, 3), (2, 1, 1), (50, 1, 2))
    for _ in range(5):
        for lane in range(2):
            begun.next_pack(lane)
    cursor = json.loads(json.dumps(begun.state_dict(range(2))))
    for phases in ([(0, 6, 3)], [(0, 6, 3), (3, 1, 1)], [(0, 1, 8), (2, 1, 1)], [(0, 6, 3), (2, 1, 1), (4, 2, 1)]):
        with pytest.raises(ValueError, match="the weights of the 5 steps already taken were"):
            plan(*phases).load_state_dict(cursor)
    changed = plan((0, 6, 3), (2, 1, 1), (5, 0, 1))
    changed.load_state_dict(cursor)
    later = [sample for _ in range(40) for lane in range(2) for sample in changed.next_pack(lane)]
    assert all(sample >= 90 for sample in later[-40:])


def test_lanes_cannot_change_with_a_part_of_the_cursor() -> None:
    plan = Plan([source([5] * 9)], SEQ, 4, 1)
    with pytest.raises(ValueError, match=r"the cursor lacks lanes \[2, 3\]"):
        Plan([source([5] * 9)], SEQ, 2, 1).load_state_dict(plan.state_dict(range(2)), change_lanes=True)


def test_samples_that_cannot_be_planned_are_refused() -> None:
    with pytest.raises(ValueError, match="a sample of 65 tokens is longer than data.seq_length = 64"):
        Plan([source([65])], SEQ, 1, 0).next_pack(0)


def test_order_changes_with_epoch_and_seed() -> None:
    def epoch_orders(seed: int) -> list[list[int]]:
        plan = Plan([source([SEQ] * 64)], SEQ, 1, seed, chunk_size=4, shuffle_window=16, pack_buffer=1)
        return [[plan.next_pack(0)[0] for _ in range(64)] for _ in range(2)]

    first, second = epoch_orders(0)
    assert sorted(first) == sorted(second) == list(range(64))
    assert first != second and first != epoch_orders(1)[0] and first != list(range(64))


def test_the_stream_is_the_same_on_every_machine_and_version() -> None:
    """Committed values: changing them changes the data order of every existing run."""
    plan = Plan([source(np.arange(300) % 50 + 10), source([7] * 40)], SEQ, 3, 11, [Phase(0, (2.0, 1.0))], 8, 64, 16)
    packs = [plan.next_pack(lane) for _ in range(2) for lane in range(3)]
    assert packs == COMMITTED
    assert permutation(6, 1, 2, 3, 4, 5).tolist() == [3, 4, 2, 0, 5, 1]


COMMITTED = [[183, 319, 304, 311], [91, 323], [140, 302, 332], [120, 338, 165], [334, 104, 33], [205, 237]]


@pytest.mark.parametrize("lanes", [1, 5])
def test_weights_set_the_mix_everywhere_and_change_at_their_step(lanes: int) -> None:
    sources = [source([4] * 5000), source([4] * 300), source([4] * 20)]
    phases = [Phase(0, (6.0, 3.0, 1.0)), Phase(50, (0.0, 1.0, 1.0))]
    plan = Plan(sources, SEQ, lanes, 0, phases, pack_buffer=32)
    owner = np.repeat([0, 1, 2], [5000, 300, 20])
    packs = [[plan.next_pack(lane) for lane in range(lanes)] for _ in range(100)]
    early = np.bincount(owner[np.concatenate([pack for step in packs[:50] for pack in step])], minlength=3)
    assert early / early.sum() == pytest.approx([0.6, 0.3, 0.1], abs=0.01)
    for start in range(0, 50, 10):  # in every part, not only on average
        some = np.bincount(owner[np.concatenate([pack for step in packs[start : start + 10] for pack in step])])
        assert some / some.sum() == pytest.approx([0.6, 0.3, 0.1], abs=0.04)
    # Samples in the look-ahead buffer were drawn before the change.
    late = np.bincount(owner[np.concatenate([pack for step in packs[53:] for pack in step])], minlength=3)
    assert late[0] == 0 and late[1] / late.sum() == pytest.approx(0.5, abs=0.01)


def test_weights_change_at_exactly_their_step() -> None:
    phases = [Phase(0, (1.0, 0.0)), Phase(5, (0.0, 1.0)), Phase(7, (1.0, 0.0))]
    plan = Plan([source([4] * 50), source([4] * 50)], SEQ, 2, 0, phases, pack_buffer=1)  # nothing is drawn ahead
    owners = [[sample >= 50 for lane in range(2) for sample in plan.next_pack(lane)] for _ in range(9)]
    assert owners == [[False] * 2] * 5 + [[True] * 2] * 2 + [[False] * 2] * 2


def test_lanes_draw_a_rare_source_at_different_times() -> None:
    plan = Plan([source([4] * 5000), source([4] * 50)], SEQ, 16, 0, [Phase(0, (99.0, 1.0))], pack_buffer=16)
    per_step = [sum(sample >= 5000 for lane in range(16) for sample in plan.next_pack(lane)) for _ in range(40)]
    assert max(per_step) <= 8 and sum(per_step) == pytest.approx(40 * 16 * 16 / 100, rel=0.2)


def test_without_weights_every_source_is_finished_together() -> None:
    plan = Plan([source([8] * 400), source([8] * 100)], SEQ, 2, 0, pack_buffer=8)
    ids = [sample for _ in range(25) for lane in range(2) for sample in plan.next_pack(lane)]
    assert len(ids) == 400 and sum(sample >= 400 for sample in ids) == pytest.approx(80, abs=4)


def mix(stage: int, count: int) -> np.ndarray:
    """Lengths of a stage's samples."""
    rng = np.random.default_rng(0)
    if stage == 1:
        return 196 + rng.integers(40, 111, count)
    area, aspect = np.exp(rng.uniform(np.log(300**2), np.log(1200**2), count)), rng.uniform(-1, 1, count)
    heights = np.sqrt(area * 2**aspect).astype(int)
    rows, columns = (side // 16 for side in native_sizes(heights, (area / heights).astype(int)))
    return rows * columns + np.clip(rng.lognormal(5.2, 0.5, count), 20, 2000).astype(int)


@pytest.mark.parametrize(("stage", "least", "most"), [(1, 0.995, 0.02), (2, 0.99, 0.04)])
def test_packs_are_full_and_ranks_have_equal_work(stage: int, least: float, most: float) -> None:
    """The slowest of 64 ranks with 8 packs each, by the FLOPs of so16's linear layers and attention."""
    lengths = mix(stage, 100_000)
    linear, attention = 2 * 27 * (5 * 1152**2 + 3 * 1152 * 3072), 4 * 1152 * 27
    cost = linear * lengths.astype(float) + attention * lengths.astype(float) ** 2
    plan = Plan([source(lengths)], 16384, 512, 0)
    filled, excess = [], []
    for _ in range(4):
        packs = [plan.next_pack(lane) for lane in range(512)]
        filled += [lengths[pack].sum() for pack in packs]
        ranks = np.array([cost[pack].sum() for pack in packs]).reshape(64, 8).sum(1)
        excess.append(ranks.max() / ranks.mean() - 1)
    assert np.mean(filled) / 16384 >= least and np.mean(excess) <= most


def test_memory_does_not_grow_with_the_samples() -> None:
    def lengths(ids: np.ndarray) -> np.ndarray:
        return 200 + ids % 70

    tracemalloc.start()
    plan = Plan([Source(1_000_000_000, lengths)], 16384, 512, 0)
    for lane in range(8):
        for _ in range(3):
            assert plan.next_pack(lane)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # One permutation of four million chunks: 64 MB while it is sorted, 16 MB afterwards.
    assert peak < 200 * 2**20
