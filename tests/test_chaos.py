"""A run with injected faults ends bit-identical to an undisturbed one."""

import collections
import dataclasses
import re

import pytest

from benchmarks import chaos
from benchmarks.chaos_child import DAMAGES, KINDS
from jaxpref.errors import InputError
from tests.tiny import make_model_folder, make_pairs_file

CONFIG = chaos.ChaosConfig(model="model", data="pairs.jsonl")


def check(record: dict, kills: int) -> None:
    """Checks that every fault occurred, was handled, and changed nothing."""
    description = chaos.describe(record)
    assert record["differences"] == [] and len(record["events"]) == kills, description
    for event in record["events"]:
        log = "\n".join(event["log"])
        assert event["seconds"] > 0, description
        if event["kind"].startswith("SIGTERM"):
            assert "preempted: saved step" in log and "with code 143" in log, (
                description
            )
        elif event["kind"] == "full disk":
            assert event["supervisor"] == 2 and "jaxpref: error: " in log, description
        else:
            assert "SIGKILL" in log, description
        if event["kind"] in DAMAGES:
            step = int(event["damaged"].split("/")[0])
            detected = re.search("is damaged: |cannot be read", log)
            # Not all bytes of a file are read.  If the damage was not detected, the run
            # resumed from this checkpoint, and its results show that nothing was lost.
            assert (detected is None) == (event["resumed_at"] == step), description
        if event["kind"] == "kill in a restore":
            assert event["restoring"], description


def test_events_are_a_function_of_the_seed():
    events = chaos.draw(CONFIG)
    assert events == chaos.draw(CONFIG) and len(events) == 20
    other = chaos.draw(dataclasses.replace(CONFIG, seed=1))
    assert [e.kind for e in other] != [e.kind for e in events]
    for found in (events, other):
        counts = collections.Counter(e.kind for e in found)
        assert counts.keys() == KINDS.keys() and max(counts.values()) < 6
        assert found[0].kind in ("kill one", *DAMAGES)
        assert {e.actor for e in found} == {0, 1}
    assert chaos.steps_for(events) > sum(e.after for e in events)


def test_invalid_usage():
    for wrong in ({"kinds": ("earthquake",)}, {"kills": 0}, {"kinds": ("kill both",)}):
        with pytest.raises(InputError):
            dataclasses.replace(CONFIG, **wrong)


@pytest.mark.slow
def test_three_events(tmp_path):
    config = chaos.ChaosConfig(
        model=str(make_model_folder(tmp_path / "model")),
        data=str(make_pairs_file(tmp_path / "pairs.jsonl")),
        kills=3,
        kinds=("kill in a save", "flipped bit", "SIGTERM to one"),
        out=str(tmp_path / "runs"),
    )
    check(chaos.main(config), 3)


@pytest.mark.slow
def test_twenty_events_with_a_real_model_and_real_pairs(shared, stories260k, tmp_path):
    config = chaos.ChaosConfig(
        model=str(stories260k),
        data=str(shared / "data" / "hh_rlhf_helpful_base_test.jsonl.gz"),
        kills=20,
        out=str(tmp_path / "runs"),
    )
    check(chaos.main(config), 20)
