"""The plan: packs that fit, every sample once an epoch, the same on any number of ranks, exact after a resume."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genlip_megatron.data.plan import Plan

SEQ = 64


@st.composite
def plans(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of a plan over a random data set, often smaller than its lanes."""
    return {
        "lengths": np.array(draw(st.lists(st.integers(1, SEQ), min_size=1, max_size=120))),
        "seq_length": SEQ,
        "lanes": draw(st.integers(1, 8)),
        "seed": draw(st.integers(0, 5)),
        "chunk_size": draw(st.integers(1, 20)),
        "shuffle_window": draw(st.integers(1, 40)),
        "pack_buffer": draw(st.integers(1, 30)),
    }


@settings(max_examples=60, deadline=None)
@given(plans(), st.integers(1, 4))
def test_every_sample_exactly_once_an_epoch_in_packs_that_fit(arguments: dict[str, Any], epochs: int) -> None:
    plan = Plan(**arguments, epochs=epochs)
    seen: Counter[int] = Counter()
    for lane in range(arguments["lanes"]):
        while pack := plan.next_pack(lane):
            assert arguments["lengths"][pack].sum() <= SEQ
            seen.update(pack)
    assert seen == Counter(dict.fromkeys(range(len(arguments["lengths"])), epochs))


@settings(max_examples=40, deadline=None)
@given(plans(), st.integers(1, 8), st.integers(1, 12))
def test_lanes_do_not_depend_on_who_works_them(arguments: dict[str, Any], ranks: int, steps: int) -> None:
    lanes = arguments["lanes"]
    whole = Plan(**arguments)
    expected = [[whole.next_pack(lane) for lane in range(lanes)] for _ in range(steps)]
    for rank in range(ranks):
        mine = Plan(**arguments)
        share = range(rank, lanes, ranks)
        for step in range(steps):
            assert [mine.next_pack(lane) for lane in share] == expected[step][rank::ranks]


@settings(max_examples=40, deadline=None)
@given(plans(), st.integers(0, 10), st.integers(1, 10))
def test_a_resumed_plan_continues_exactly(arguments: dict[str, Any], before: int, after: int) -> None:
    lanes = range(arguments["lanes"])
    plan = Plan(**arguments, fingerprint="f")
    for _ in range(before):
        for lane in lanes:
            plan.next_pack(lane)
    cursor = json.loads(json.dumps(plan.state_dict(lanes)))
    resumed = Plan(**arguments, fingerprint="f")
    resumed.load_state_dict(cursor)
    for _ in range(after):
        assert [resumed.next_pack(lane) for lane in lanes] == [plan.next_pack(lane) for lane in lanes]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": "g"}, "another fingerprint"),
        ({"seed": 2}, "another seed"),
        ({"lanes": 3}, "has 2 lanes, this run 3"),
    ],
)
def test_a_cursor_of_another_stream_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"seq_length": SEQ, "lanes": 2, "seed": 1, "fingerprint": "f"}
    state = Plan(np.full(9, 5), **arguments).state_dict(range(2))
    with pytest.raises(ValueError, match=message):
        Plan(np.full(9, 5), **{**arguments, **change}).load_state_dict(state)


def test_samples_that_cannot_be_planned_are_refused() -> None:
    with pytest.raises(ValueError, match="a sample of 65 tokens is longer than data.seq_length = 64"):
        Plan(np.array([65]), SEQ, 1, 0)
    with pytest.raises(ValueError, match="no good sample"):
        Plan(np.array([], dtype=int), SEQ, 1, 0)


def test_order_changes_with_epoch_and_seed() -> None:
    def epoch_orders(seed: int) -> list[list[int]]:
        plan = Plan(np.full(64, SEQ), SEQ, 1, seed, chunk_size=4, shuffle_window=16, pack_buffer=1)
        return [[plan.next_pack(0)[0] for _ in range(64)] for _ in range(2)]

    first, second = epoch_orders(0)
    assert sorted(first) == sorted(second) == list(range(64))
    assert first != second and first != epoch_orders(1)[0] and first != list(range(64))


def test_packs_of_the_stage_1_mix_are_full() -> None:
    rng = np.random.default_rng(0)
    plan = Plan(196 + rng.integers(40, 111, 60_000), 16384, 4, 0)
    filled = [sum(plan.lengths[plan.next_pack(lane)]) for _ in range(100) for lane in range(4)]
    assert np.mean(filled) / 16384 > 0.995
