"""Every experiment runs from its command to its report, as small as it can be."""

import json

import pytest

from experiments import align
from jaxpref.errors import InputError
from tests.tiny import make_model_folder, make_pairs_file


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


def test_align_on_a_real_model_and_real_pairs(config, tmp_path):
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


def test_align_refuses_to_compare_on_nothing(tmp_path):
    config = align.AlignConfig(
        model=str(make_model_folder(tmp_path / "model")),
        data=str(make_pairs_file(tmp_path / "pairs.jsonl")),
        out=str(tmp_path / "align"),
        heldout_fraction=0.0,
    )
    with pytest.raises(InputError, match="heldout-fraction"):
        align.main(config)
    assert not (tmp_path / "align").exists()
