"""Lists of answers with ranks or scores: their order, labels, lengths, and errors."""

import numpy as np
import pytest

from jaxpref.data import DataOptions, InjectOptions, Kind, ListSource, make_splits
from jaxpref.errors import InputError
from jaxpref.objectives import irpo, lipo_lambda, plackett_luce
from tests.answers import list_records
from tests.data_tokenizers import byte_tokenizer

TOKENIZER = byte_tokenizer()
GRADED, RELEVANT, RANKED = (
    objective.kind for objective in (lipo_lambda(), irpo(), plackett_luce())
)


def train_of(records, kind=GRADED, **options):
    options = DataOptions(**({"heldout_fraction": 0.0} | options))
    return make_splits(ListSource(records), TOKENIZER, options, kind=kind).train


def listed(answers="xyz", **numbers):
    return {"prompt": "q", "completions": [f" {x}" for x in answers], **numbers}


def answers_of(train, n=0):
    found = (train.completion(n, k) for k in range(train.num_completions))
    texts = (TOKENIZER.decode(x, skip_special_tokens=True).strip() for x in found)
    return "".join(texts)


def test_objectives_say_what_they_read():
    assert (GRADED.sides, GRADED.num_completions) == (None, None)
    kinds = [GRADED.numbers, RELEVANT.numbers, RANKED.numbers]
    assert kinds == [{"qualities"}, {"relevances"}, {"ranks"}]


@pytest.mark.parametrize(
    ("numbers", "order", "qualities"),
    [
        ({"scores": [1, 3.5, -2]}, "yxz", [3.5, 1, -2]),
        ({"scores": [1, 1, 2]}, "zxy", [2, 1, 1]),
        ({"ranks": [2, 3, 1]}, "zxy", [1, 0.5, 0]),
        ({"ranking": [1, 1, 2]}, "xyz", [0.5, 0.5, 0]),
    ],
)
def test_the_best_answer_comes_first(numbers, order, qualities):
    train = train_of([listed(**numbers)])
    assert answers_of(train) == order
    assert train.numbers["qualities"].dtype == np.float32
    assert train.numbers["qualities"].tolist() == [qualities]


def test_each_loss_gets_its_own_numbers():
    record = listed(scores=[1, 3, 2])
    assert train_of([record], RELEVANT).numbers["relevances"].tolist() == [[3, 2, 1]]
    assert train_of([record], RANKED).numbers["ranks"].tolist() == [[1, 2, 3]]
    tied = listed(scores=[1, 3, 3])
    splits = make_splits(
        ListSource([record, tied]), TOKENIZER, DataOptions(), kind=RANKED
    )
    assert splits.report["dropped: completions have the same rank"] == 1
    with pytest.raises(InputError, match="row 1: field 'scores' has -1"):
        train_of([listed(scores=[-1, 0, 1])], RELEVANT)


def test_lists_of_different_lengths_share_one_table():
    records = list_records(30)
    train = train_of(records)
    counts = [len(record["completions"]) for record in records]
    assert set(counts) == {2, 3, 4} and train.num_completions == 4
    assert ((train.completion_lengths > 0).sum(1) == counts).all()
    for n, record in enumerate(records):
        ordered = sorted(zip(record["scores"], record["completions"]), reverse=True)
        scores = [score for score, _ in ordered] + [0] * (4 - counts[n])
        np.testing.assert_array_equal(train.numbers["qualities"][n], np.float32(scores))
        texts = "".join(text.strip() for _, text in ordered)
        assert answers_of(train, n) == texts
    wide = train.widened(6)
    assert wide.completion_lengths.shape == wide.numbers["qualities"].shape == (30, 6)
    assert wide.completion(3, 5).size == 0 and answers_of(wide, 3) == answers_of(
        train, 3
    )


def test_messages_and_ends_keep_the_order():
    record = listed("xy", scores=[0, 1], ended=[False, True])
    train = train_of([record])
    ends = [train.completion(0, k)[-1] == TOKENIZER.eos_token_id for k in (0, 1)]
    assert answers_of(train) == "yx" and ends == [True, False]


BAD = [
    ({}, "has 'completions' and either 'scores'"),
    ({"scores": [1, 2, 3], "ranks": [3, 2, 1]}, "'scores' and 'ranks'"),
    ({"scores": [1, 2]}, "3 'completions', but 2 numbers in 'scores'"),
    ({"scores": [1, 2, "3"]}, "field 'scores' must hold numbers, but one is '3'"),
    ({"scores": [1, 2, True]}, "must hold numbers, but one is True"),
    ({"scores": [1, 2, float("nan")]}, "must hold finite numbers"),
    ({"scores": [1, 2, 10**400]}, "must hold finite numbers"),
    ({"ranks": [1, 2, 0]}, "must hold whole numbers, where 1 is best"),
    ({"ranks": [1, 2, 2.5]}, "must hold whole numbers"),
    ({"scores": 3}, "field 'scores' must be a list"),
]


@pytest.mark.parametrize(("numbers", "message"), BAD)
def test_bad_lists_name_row_and_field(numbers, message):
    with pytest.raises(InputError, match=f"row 1: .*{message}"):
        train_of([listed(**numbers)])


def test_lists_without_an_order_are_dropped():
    records = [listed(scores=[1, 2, 3]), listed("x", scores=[1]), listed(ranks=[1] * 3)]
    options = DataOptions(heldout_fraction=0.0)
    splits = make_splits(ListSource(records), TOKENIZER, options, kind=GRADED)
    assert splits.report["rows"] == 3 and splits.report["train"] == 1
    assert splits.report["dropped: a list has fewer than two completions"] == 1


def test_lists_are_refused_elsewhere_and_cannot_be_flipped():
    for sides in (1, 2):
        with pytest.raises(InputError, match="row 1: a list of answers.*lipo_lambda"):
            train_of([listed(scores=[1, 2, 3])], Kind(sides))
    with pytest.raises(InputError, match="a list has no label to flip"):
        train_of([listed(ranks=[1, 2, 3])], inject=InjectOptions(flip_rate=0.2))
