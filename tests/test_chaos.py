"""A run that is killed again and again ends with the bits of one that is not."""

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
    """Every event came, was noticed as it should be, and cost no bit."""
    told = chaos.describe(record)
    assert record["differences"] == [] and len(record["events"]) == kills, told
    for event in record["events"]:
        heard = "\n".join(event["told"])
        assert event["seconds"] > 0, told
        if event["kind"].startswith("SIGTERM"):
            assert "preempted: saved step" in heard and "with code 143" in heard, told
        elif event["kind"] == "full disk":
            assert event["supervisor"] == 2 and "jaxpref: error: " in heard, told
        else:
            assert "SIGKILL" in heard, told
        if event["kind"] in DAMAGES:
            step = int(event["damaged"].split("/")[0])
            noticed = re.search("is damaged: |cannot be read", heard)
            # Not all bytes of a file are read: then it went on from there, and the bits
            # that it ended with show that nothing was lost.
            assert (noticed is None) == (event["resumed_at"] == step), told
        if event["kind"] == "kill in a restore":
            assert event["restoring"], told


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


def test_wrong_use():
    for wrong in ({"kinds": ("earthquake",)}, {"kills": 0}, {"kinds": ("kill both",)}):
        with pytest.raises(InputError):
            dataclasses.replace(CONFIG, **wrong)


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
def test_twenty_events_over_a_real_model_and_real_pairs(shared, stories260k, tmp_path):
    config = chaos.ChaosConfig(
        model=str(stories260k),
        data=str(shared / "data" / "hh_rlhf_helpful_base_test.jsonl.gz"),
        kills=20,
        out=str(tmp_path / "runs"),
    )
    check(chaos.main(config), 20)
