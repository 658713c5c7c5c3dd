"""Audits count empty completions and leave them out of the clean file."""

import pytest

from jaxpref import data
from jaxpref.errors import InputError
from tests.test_audit import cache, model, read, records, run  # noqa: F401


@pytest.mark.parametrize("action", ["drop", "relabel", "soft"])
def test_empty_completions_are_counted_and_dropped(
    tmp_path,
    model,  # noqa: F811
    cache,  # noqa: F811
    capsys,
    action,
):
    """For every action, because training rejects records with an empty completion."""
    rows = records(40)
    empty = [rows[3] | {"rejected": ""}, rows[7] | {"chosen": " \n"}]
    empty.append({"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a"})
    empty[2]["rejected"] += "\n\nAssistant: b"
    given = [*rows[:5], empty[0], *rows[5:20], *empty[1:], *rows[20:]]
    found = run(tmp_path, model, given, features=str(cache), action=action)
    assert found.summary["rows"] == 43 and found.summary["pairs"] == 40
    assert found.summary["not_judged"] == {"a completion is empty": 3}
    assert "dropped: a completion is empty 3" in capsys.readouterr().out
    judged = read(tmp_path / "out" / "audit.jsonl")
    assert [given[row["row"] - 1] for row in judged] == rows
    clean = read(tmp_path / "out" / "clean.jsonl")
    assert all(row["chosen"].strip() and row["rejected"].strip() for row in clean)
    remaining = sum(row["action"] != "drop" for row in judged)
    assert len(clean) == remaining and (action == "drop" or remaining == 40)

    # The clean file can be used for training, unlike the original.
    tokenizer = data.load_tokenizer(model)
    data.make_splits(data.open_source(str(tmp_path / "out/clean.jsonl")), tokenizer)
    with pytest.raises(InputError, match="row 6: field 'rejected' is an empty"):
        data.make_splits(data.open_source(str(tmp_path / "pairs.jsonl")), tokenizer)


def test_a_published_file_with_an_empty_answer_is_audited(
    tmp_path, stories260k, shared
):
    """Row 479 of this sample has an empty answer; the other rows are judged."""
    source = data.open_source(
        str(shared / "data" / "ultrafeedback_sample_train.jsonl.gz")
    )
    rows = [source[n] for n in range(470, 486)]
    assert [not row["rejected"].strip() for row in rows].count(True) == 1
    found = run(tmp_path, stories260k, rows, max_length=128)
    assert found.summary["pairs"] == len(found.pairs) == 15
    assert found.summary["not_judged"] == {"a completion is empty": 1}
