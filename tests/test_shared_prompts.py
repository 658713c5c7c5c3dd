"""One prompt in several forms is one prompt: in the split, and across files."""

import dataclasses
import json

import numpy as np
import pytest

from jaxpref.data import PAIRS, DataOptions, InjectOptions, ListSource, make_splits
from jaxpref.data.hashing import hash_uniforms
from jaxpref.data.read import read_datasets
from jaxpref.data.records import prompt_key
from jaxpref.data.shared_prompts import grouped_keys, prompt_hash, split_key
from jaxpref.errors import InputError
from jaxpref.scoring.checks import check_logit_chunk
from tests.data_tokenizers import CHATML, byte_tokenizer, write_lines

TOKENIZER = byte_tokenizer(template=CHATML)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


ONE_TURN = (
    "Why?",
    " Why?\n",
    "\n\nHuman: Why?\n\nAssistant:",
    "Human:  Why? \n\nAssistant: ",
    (user("Why?"),),
    (user("\tWhy? "),),
    (system(" "), user("Why?")),
    (user([{"type": "text", "text": "Why?"}]),),
    (user("Why?") | {"id": 7},),
)
DIALOGUE = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c d\n\nAssistant:"
THREE_TURNS = (
    DIALOGUE,
    DIALOGUE.strip(),
    DIALOGUE.replace("b\n", "b \n"),
    (user("a"), assistant("b"), user("c d")),
    (user("a "), assistant(None), assistant("\nb"), user("c d")),
    (user("a"), assistant([{"type": "text", "text": "b"}]), user("c d")),
)
SYSTEM = (
    (system("s"), user("q")),
    ({"role": "developer", "content": "s"}, user("q ")),
)
DIFFERENT = (
    "Why",
    "why?",
    "Human: Why?",  # no dialogue: nothing is to be answered
    (assistant("Why?"),),
    (user("Why?"), assistant("b")),
    (user("a"), assistant("b"), user("c"), user("d")),
    (user("b"), assistant("a"), user("c d")),
    (user("q"),),
    (user("q"), assistant(None) | {"tool_calls": [{"name": "f"}]}, user("d")),
    (user("q"), assistant(None) | {"tool_calls": [{"name": "g"}]}, user("d")),
    (system("t"), user("q")),
)


@pytest.mark.parametrize("forms", [ONE_TURN, THREE_TURNS, SYSTEM])
def test_all_forms_of_a_prompt_have_one_key(forms):
    assert len({split_key(form) for form in forms}) == 1
    assert len({prompt_hash(form) for form in forms}) == 1


def test_different_prompts_have_different_keys():
    every = [ONE_TURN[0], THREE_TURNS[0], SYSTEM[0], *DIFFERENT]
    assert len({split_key(x) for x in every}) == len(every)
    assert len({prompt_hash(x) for x in every}) == len(every)


@pytest.mark.parametrize(
    "variant",
    [
        "a  b",
        "a\nb",
        " a b ",
        "a\u00a0b",
        (user("a \t b"),),
        "Human: a\nb\n\nAssistant:",
    ],
)
def test_inner_white_space_matters_for_the_split_only(variant):
    assert prompt_hash(variant) == prompt_hash("a b")
    inner = isinstance(variant, str) and "Human" not in variant
    if inner:
        assert split_key(variant) == variant.strip()


def test_accents_may_be_composed():
    assert prompt_hash("caf\u00e9") == prompt_hash("cafe\u0301")
    assert prompt_hash("cafe") != prompt_hash("caf\u00e9")


def test_the_split_of_strings_and_of_dialogues_of_several_turns_is_as_ever():
    prompts = [f"question {n}" + " " * (n % 2) for n in range(60)]
    prompts += [DIALOGUE.replace(" a\n", f" {name}\n") for name in "xyz"]
    rows = [{"prompt": x, "chosen": " a", "rejected": " b"} for x in prompts]
    held = make_splits(
        ListSource(rows), TOKENIZER, DataOptions(heldout_fraction=0.3)
    ).heldout
    expected = hash_uniforms([x.strip() for x in prompts], salt="heldout") < 0.3
    assert 5 < expected.sum() < 35
    assert held.columns["row"].tolist() == np.flatnonzero(expected).tolist()


def forms_of(text):
    """The same question in five records."""
    sides = {"chosen": "yes", "rejected": "no"}
    as_messages = {name: [assistant(x)] for name, x in sides.items()}
    dialogue = f"\n\nHuman: {text}\n\nAssistant: "
    return [
        {"prompt": text, **sides},
        {"prompt": [user(text)], **sides},
        {"prompt": [user(f" {text}\n")], **as_messages},
        {name: [user(text), *x] for name, x in as_messages.items()},
        {name: dialogue + x for name, x in sides.items()},
    ]


def test_all_forms_of_a_prompt_are_on_one_side_of_the_split():
    rows = [row for n in range(40) for row in forms_of(f"question {n}")]
    plan = make_splits(ListSource(rows), TOKENIZER, DataOptions(heldout_fraction=0.4))
    train, held = (set(x.columns["row"] // 5) for x in (plan.train, plan.heldout))
    assert not train & held and len(train | held) == 40 and len(held) > 5
    assert len(plan.train) == 5 * len(train)


def test_keys_of_one_form_stay_those_of_an_audit():
    prompts = ["b", DIALOGUE, (user("q"), assistant("a"), user("r")), "b ", "b\n c"]
    assert grouped_keys(prompts) == [prompt_key(x) for x in prompts]
    mixed = [DIALOGUE, "x", THREE_TURNS[3], "b c", "b  c"]
    keys = grouped_keys(mixed)
    assert keys[0] == keys[2] and keys[3] == keys[4] and len(set(keys)) == 3
    assert dict(zip(map(str, mixed), keys)) == dict(
        zip(map(str, mixed[::-1]), grouped_keys(mixed[::-1]))
    )


# ---- two files ---------------------------------------------------------------------


def read(folder, train, heldout, **options):
    write = lambda name, rows: str(write_lines(folder / name, rows))
    return read_datasets(
        TOKENIZER,
        DataOptions(**options),
        kind=PAIRS,
        mix=None,
        train=write("0.jsonl", train),
        heldout=None if heldout is None else write("1.jsonl", heldout),
    )


def questions(*numbers, form=0):
    return [forms_of(f"question {n}")[form] for n in numbers]


TRAIN = questions(*range(40))


@pytest.mark.parametrize(
    "heldout, counts",
    [
        (TRAIN, "40 of 40 pairs (100.0%; 40 of 40 prompts)"),
        (questions(3, 50, 51, form=1), "1 of 3 pairs (33.3%; 1 of 3 prompts)"),
        (questions(3, 3, 50, form=4), "2 of 3 pairs (66.7%; 1 of 2 prompts)"),
        ([r | {"prompt": f" {r['prompt'].replace(' ', '  ')}"} for r in TRAIN[:2]],
         "2 of 2 pairs (100.0%; 2 of 2 prompts)"),
        ([r | {"chosen": " other", "rejected": " answers"} for r in TRAIN[:9]],
         "9 of 9 pairs (100.0%; 9 of 9 prompts)"),
        (questions(*range(38, 58), form=3), "2 of 20 pairs (10.0%; 2 of 20 prompts)"),
    ],
)  # fmt: skip
def test_what_both_files_share_is_counted_and_refused(
    heldout, counts, tmp_path, capsys
):
    with pytest.raises(InputError) as error:
        read(tmp_path, TRAIN, heldout)
    line = str(error.value)
    assert counts in line and "The limit is 5%" in line and "\n" not in line
    assert "--allow-shared-prompts" in line
    assert str(tmp_path / "0.jsonl") in line and str(tmp_path / "1.jsonl") in line
    capsys.readouterr()
    found = read(tmp_path, TRAIN, heldout, allow_shared_prompts=True)
    assert counts in capsys.readouterr().out
    assert len(found.splits.heldout) == len(heldout)


def test_a_rendered_chat_is_the_prompt_of_its_messages(tmp_path):
    question = [user("question 3")]
    rendered = TOKENIZER.apply_chat_template(
        question, tokenize=False, add_generation_prompt=True
    )
    assert "question 3" in rendered != "question 3"
    texts = [forms_of(text)[0] for text in (rendered, "question 99")]
    with pytest.raises(InputError, match="1 of 2 pairs .50.0%; 1 of 2 prompts"):
        read(tmp_path, questions(*range(9), form=1), texts)
    with pytest.raises(InputError, match="1 of 9 pairs"):
        read(tmp_path, texts, questions(*range(9), form=1))


@pytest.mark.parametrize("shared, of", [(0, 20), (1, 20), (2, 40)])
def test_a_few_shared_prompts_are_said_and_accepted(shared, of, tmp_path, capsys):
    numbers = [*range(shared), *range(100, 100 + of - shared)]
    read(tmp_path, TRAIN, questions(*numbers, form=2))
    said = f"{shared} of {of} pairs ({shared / of:.1%}"
    assert said in capsys.readouterr().out


def test_a_split_that_differs_in_white_space_only_is_said(tmp_path, capsys):
    rows = [
        row | {"prompt": row["prompt"].replace(" ", " " * (1 + n % 2))}
        for n, row in enumerate([*TRAIN, *TRAIN])
    ]
    rows = sorted(rows, key=lambda row: row["prompt"])
    rows += [row | {"prompt": row["prompt"].replace(" ", "   ")} for row in rows]
    read(tmp_path, rows, None, heldout_fraction=0.4)
    assert (
        "differs from a training prompt only in whitespace" in capsys.readouterr().out
    )
    read(tmp_path, TRAIN, None, heldout_fraction=0.4)
    assert "whitespace" not in capsys.readouterr().out


def test_the_hash_of_the_prompt_does_not_change_the_digest():
    rows = questions(1, 2)
    plan = make_splits(ListSource(rows), TOKENIZER, DataOptions(heldout_fraction=0))
    columns = plan.train.columns | {"prompt": plan.train.columns["prompt"] + 1}
    other = dataclasses.replace(plan.train, columns=columns)
    assert other.digest() == plan.train.digest()
    assert columns["prompt"].dtype == np.int64
    assert "prompt" not in plan.train.numbers


# ---- options that nothing would read -----------------------------------------------


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.3])
def test_a_held_out_share_beside_evaluation_data(fraction, tmp_path):
    with pytest.raises(
        InputError, match=f"--heldout-fraction {fraction} .*--eval-data"
    ):
        read(tmp_path, TRAIN, questions(99), heldout_fraction=fraction)


def test_shared_prompts_are_allowed_between_two_files_only(tmp_path):
    with pytest.raises(InputError, match="--allow-shared-prompts: only --eval-data"):
        read(tmp_path, TRAIN, None, allow_shared_prompts=True)


def test_the_default_share_is_held_out():
    assert DataOptions().heldout_share == 0.05
    assert DataOptions(heldout_fraction=0.0).heldout_share == 0.0
    rows = questions(*range(400))
    plan = make_splits(ListSource(rows), TOKENIZER)
    keys = [row["prompt"] for row in rows]
    assert len(plan.heldout) == (hash_uniforms(keys, salt="heldout") < 0.05).sum() > 5


def test_a_seed_of_no_noise(tmp_path):
    for seed in (0, 3):
        with pytest.raises(InputError, match=f"inject.seed {seed}: nothing is flipped"):
            InjectOptions(seed=seed)
    (tmp_path / "rates.json").write_text(json.dumps({"ann": 0.1}))
    for rate in (
        {"flip_rate": 0.0},  # one of several rates of a sweep
        {"flip_rate": 0.2},
        {"prefer_longer": 0.1},
        {"rates": str(tmp_path / "rates.json")},
    ):
        assert InjectOptions(seed=3, **rate).seed == 3
    assert not InjectOptions(flip_rate=0.0, seed=3).active


def test_chunks_of_logits_that_are_not_computed():
    check_logit_chunk(None, {"rewards"})
    check_logit_chunk(8, {"policy_logps", "reference_logps"})
    with pytest.raises(InputError, match="--logit-chunk 8: a reward model"):
        check_logit_chunk(8, {"rewards"})
