"""The audit goes on at an empty completion, counts it and never calls it clean."""

import pytest

from jaxpref import data
from jaxpref.errors import InputError
from tests.test_audit import cache, model, read, records, run  # noqa: F401


@pytest.mark.parametrize("action", ["drop", "relabel", "soft"])
def test_empty_completions_are_counted_and_never_clean(
    tmp_path,
    model,  # noqa: F811
    cache,  # noqa: F811
    capsys,
    action,
):
    """Whatever is done with suspicious pairs: training would stop at such a record."""
    rows = records(40)
    spoiled = [rows[3] | {"rejected": ""}, rows[7] | {"chosen": " \n"}]
    spoiled.append({"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a"})
    spoiled[2]["rejected"] += "\n\nAssistant: b"
    given = [*rows[:5], spoiled[0], *rows[5:20], *spoiled[1:], *rows[20:]]
    found = run(tmp_path, model, given, features=str(cache), action=action)
    assert found.summary["rows"] == 43 and found.summary["pairs"] == 40
    assert found.summary["not_judged"] == {"a completion is empty": 3}
    assert "dropped: a completion is empty 3" in capsys.readouterr().out
    judged = read(tmp_path / "out" / "audit.jsonl")
    assert [given[row["row"] - 1] for row in judged] == rows
    clean = read(tmp_path / "out" / "clean.jsonl")
    assert all(row["chosen"].strip() and row["rejected"].strip() for row in clean)
    kept = sum(row["action"] != "drop" for row in judged)
    assert len(clean) == kept and (action == "drop" or kept == 40)

    # It is a file to train on, at which the given one still stops.
    tokenizer = data.load_tokenizer(model)
    data.make_splits(data.open_source(str(tmp_path / "out/clean.jsonl")), tokenizer)
    with pytest.raises(InputError, match="row 6: field 'rejected' is an empty"):
        data.make_splits(data.open_source(str(tmp_path / "pairs.jsonl")), tokenizer)


def test_a_published_file_with_an_empty_answer_is_audited(
    tmp_path, stories260k, shared
):
    """Row 479 of this sample has one; its neighbours are judged."""
    source = data.open_source(
        str(shared / "data" / "ultrafeedback_sample_train.jsonl.gz")
    )
    rows = [source[n] for n in range(470, 486)]
    assert [not row["rejected"].strip() for row in rows].count(True) == 1
    found = run(tmp_path, stories260k, rows, max_length=128)
    assert found.summary["pairs"] == len(found.pairs) == 15
    assert found.summary["not_judged"] == {"a completion is empty": 1}
