"""Every experiment runs from its command to its report, at a small size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import align
from jaxpref.errors import InputError
from tests.tiny import make_model_folder, make_pairs_file
from tests.virtual import xla_flags


@pytest.fixture
def config(stories260k, shared, tmp_path):
    return align.AlignConfig(
        model=str(stories260k),
        data=str(shared / "data" / "hh_rlhf_helpful_base_test.jsonl.gz"),
        out=str(tmp_path / "align"),
        max_steps=2,
        batch_size=8,
        max_length=64,
        max_pairs=40,
        heldout_fraction=0.3,
    )


def test_align_with_a_real_model_and_real_pairs(config, tmp_path):
    align.main(config)
    rows = json.loads((tmp_path / "align" / "results.json").read_text())
    assert [row["loss"] for row in rows] == ["dpo", "rdpo"]
    for row in rows:
        assert row["accuracy before"] == 0.5  # the policy is its reference: all ties
        assert row["margin before"] == pytest.approx(0, abs=1e-4)
        assert row["margin after"] != row["margin before"]
    page = (tmp_path / "align" / "report.html").read_text()
    assert f"--max-pairs {config.max_pairs}" in page
    for name in ("dpo", "rdpo"):
        assert (tmp_path / "align" / name / "export" / "model.safetensors").exists()


def test_align_needs_held_out_pairs(tmp_path):
    config = align.AlignConfig(
        model=str(make_model_folder(tmp_path / "model")),
        data=str(make_pairs_file(tmp_path / "pairs.jsonl")),
        out=str(tmp_path / "align"),
        heldout_fraction=0.0,
    )
    with pytest.raises(InputError, match="heldout-fraction"):
        align.main(config)
    assert not (tmp_path / "align").exists()


@pytest.mark.parametrize(
    ("out", "reason"), [("run", "holds a run"), ("model", "holds a model")]
)
def test_align_keeps_what_another_command_wrote(tmp_path, out, reason):
    make_model_folder(tmp_path / "model")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"loss": {"name": "dpo"}}')
    page = tmp_path / out / "report.html"
    page.write_text("mine")
    config = align.AlignConfig(
        model=str(tmp_path / "model"),
        data=str(make_pairs_file(tmp_path / "pairs.jsonl")),
        out=str(tmp_path / out),
    )
    with pytest.raises(InputError, match=f"--out {tmp_path / out}: .*{reason}"):
        align.main(config)
    assert page.read_text() == "mine"


def noisy_sentiment(*options, timeout):
    """Runs the command as a user would, on one device."""
    root = Path(__file__).resolve().parents[1]
    script = str(root / "experiments" / "noisy_sentiment.py")
    return subprocess.run(
        [sys.executable, script, *map(str, options)],
        env=os.environ | {"XLA_FLAGS": xla_flags(1)},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


FLIPPED = ["DPO, 40% flips", "rDPO, 40% flips", "forward DPO, 40% flips"]


@pytest.mark.slow
def test_noisy_sentiment_from_command_to_report(tmp_path):
    out = tmp_path / "smoke"
    first = noisy_sentiment("--smoke", "--out", out, timeout=600)
    assert first.returncode == 0, first.stderr[-2000:]
    made = json.loads((out / "results.json").read_text())
    arms = ["DPO, no flips", *FLIPPED]
    assert [run["arm"] for run in made["runs"]] == arms
    for run in made["runs"]:
        assert np.isfinite(run["reward"]) and run["kl"] > 0
        assert run["share_of_best_possible"] is None or np.isfinite(
            run["share_of_best_possible"]
        )
    assert made["best_possible"][0]["kl"] == 0
    small = json.loads((out / "frontier.json").read_text())["runs"]
    assert [run["arm"] for run in small] == arms
    assert small[0]["kl"] == pytest.approx(made["runs"][0]["kl"], abs=1e-4)
    page = (out / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert 'src="http' not in page and "<link" not in page
    for name in ("reward_kl.png", "training.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")

    # Repeating the command trains nothing, and reports what it did not time.
    again = noisy_sentiment("--smoke", "--out", out, timeout=600)
    assert again.returncode == 0, again.stderr[-2000:]
    resumed = json.loads((out / "results.json").read_text())
    assert resumed.pop("seconds") is None and made.pop("seconds") > 0
    assert resumed == made
    assert "8/8 [" in first.stderr and " 1/8 [" not in again.stderr

    # Another protocol in the same folder is rejected with one line.
    other = noisy_sentiment("--out", out, timeout=600)
    assert other.returncode == 2 and "pairs was 640, is 16384" in other.stderr
    assert "Traceback" not in other.stderr


@pytest.mark.slow
def test_corrections_of_symmetric_flips_gain_no_larger_share_than_dpo(tmp_path):
    done = noisy_sentiment("--out", tmp_path / "default", timeout=3600)
    assert done.returncode == 0, done.stderr[-2000:]
    runs = json.loads((tmp_path / "default" / "results.json").read_text())["runs"]
    share = "share_of_best_possible"
    shares = {
        # There is no share beyond the KLs that samples of the reference reach.
        arm: np.mean([r[share] for r in runs if r["arm"] == arm and r[share]])
        for arm in ("DPO, no flips", *FLIPPED)
    }
    clean, dpo, rdpo, forward = shares.values()
    assert clean > dpo
    assert max(rdpo, forward) < dpo + 0.1
