"""Ids and completion masks of real records, against TRL's tokenization and collators.

TRL's own methods prepare the data; only its model and its training loop are left out.
docs/data.md lists the differences that are meant.
"""

import gzip
import itertools
import json
import re
import types

import numpy as np
import pytest

datasets = pytest.importorskip("datasets")
dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer")
kto_trainer = pytest.importorskip("trl.trainer.kto_trainer")
sft_trainer = pytest.importorskip("trl.trainer.sft_trainer")

from jaxpref.data import (
    DataOptions,
    ListSource,
    load_tokenizer,
    make_splits,
    padded_layout,
)
from jaxpref.data.kinds import ANSWERS, LABELED, PAIRS
from tests.data_tokenizers import CHATML, byte_tokenizer
from tests.test_golden_tokens import TEMPLATES

pytestmark = pytest.mark.parity

ROWS = 200
LONG = 1 << 20
"""A length that nothing exceeds: how each cuts is in docs/data.md."""


def rows_of(path):
    with gzip.open(path, "rt") as file:
        yield from map(json.loads, file)


def hh(shared):
    """Texts: the prompt ends with "Assistant:", as HH-RLHF is usually prepared."""
    for row in rows_of(shared / "data" / "hh_rlhf_helpful_base_test.jsonl.gz"):
        sides = [row[x].rpartition("\n\nAssistant:") for x in ("chosen", "rejected")]
        prompts = [start + turn for start, turn, _ in sides]
        answers = [answer for _, _, answer in sides]
        if prompts[0] == prompts[1] and all(x.strip() for x in answers):
            if answers[0] != answers[1]:
                sides = {"chosen": answers[0], "rejected": answers[1]}
                yield {"prompt": prompts[0], **sides}


def ultrafeedback(shared):
    """Conversations of a user's turn and an assistant's."""
    turn = lambda role, text: [{"role": role, "content": text}]
    for row in rows_of(shared / "data" / "ultrafeedback_sample_train.jsonl.gz"):
        if row["chosen"] != row["rejected"] and row["chosen"] and row["rejected"]:
            yield {
                "prompt": turn("user", row["prompt"]),
                "chosen": turn("assistant", row["chosen"]),
                "rejected": turn("assistant", row["rejected"]),
            }


def unpaired(records):
    """Every other answer, with its label."""
    for n, row in enumerate(records):
        side = ("chosen", "rejected")[n % 2]
        yield {"prompt": row["prompt"], "completion": row[side], "label": n % 2 == 0}


def tokenizer_of(name, shared):
    if name == "stories260k":
        return load_tokenizer(shared / "models" / "stories260k-hf")
    return byte_tokenizer(template=CHATML, eos="<|im_end|>")


def theirs(records, tokenizer, kind):
    """(ids, completion mask) of every sequence, without padding, by TRL."""
    module = dpo_trainer if kind == PAIRS else kto_trainer
    trainer = module.DPOTrainer if kind == PAIRS else module.KTOTrainer
    stand_in = types.SimpleNamespace(
        _tokenizer=tokenizer, calculate_KL=False, _is_vision_dataset=False
    )
    arguments = types.SimpleNamespace(
        dataset_num_proc=None,
        max_length=None,
        truncation_mode="keep_start",
        desirable_weight=1.0,
        undesirable_weight=1.0,
    )
    made = trainer._prepare_dataset(
        stand_in, datasets.Dataset.from_list(records), tokenizer, arguments, "train"
    )
    if kind == PAIRS:
        collate = module.DataCollatorForPreference(pad_token_id=0)
    else:
        collate = module.DataCollatorForUnpairedPreference(pad_token_id=0)
    found = {}
    for row in made:
        batch = collate([row])
        key = json.dumps([row["prompt"], row.get("chosen", row.get("completion"))])
        used = batch["attention_mask"].bool()
        found[key.replace(tokenizer.eos_token, "")] = [
            (ids[mask].tolist(), inside[mask].bool().tolist())
            for ids, inside, mask in zip(
                batch["input_ids"], batch["completion_mask"], used
            )
        ]
    return found


def ours(records, tokenizer, kind):
    """The same by record, from the batches that a run trains on."""
    options = DataOptions(heldout_fraction=0, max_length=LONG)
    pairs = make_splits(ListSource(records), tokenizer, options, kind=kind).train
    layout = padded_layout(pairs, batch_size=1)
    found = {}
    for n, batch in enumerate(layout.eval_batches(pairs, threads=0)):
        row = records[int(pairs.columns["row"][n])]
        key = json.dumps([row["prompt"], row.get("chosen", row.get("completion"))])
        sequences = []
        for side in range(kind.sides):
            length = batch.lengths[0, 0, side]
            inside = np.zeros(length, bool)
            used = batch.completions[0, 0, side] >= 0
            # The state at a predictor predicts the next token.
            inside[batch.predictors[0, 0, side][used] + 1] = True
            ids = batch.tokens[0, 0, side, :length].tolist()
            sequences.append((ids, inside.tolist()))
        found[key.replace(tokenizer.eos_token, "")] = sequences
    return found


def as_we_do(sequence, tokenizer, *, bos, stop):
    """TRL's sequence with the two differences that are meant.

    A text begins with BOS if the tokenizer defines one, even if its own program does
    not write it.  A turn ends with its stop token: what the template writes after it is
    never sampled.
    """
    ids, inside = sequence
    if bos:
        ids, inside = [tokenizer.bos_token_id, *ids], [False, *inside]
    if stop:
        start = inside.index(True)
        end = ids.index(tokenizer.eos_token_id, start) + 1
        ids, inside = ids[:end], inside[:end]
    return ids, inside


CASES = {
    # name: (records, tokenizer, kind, differences)
    "texts": (hh, "stories260k", PAIRS, {}),
    "texts, a tokenizer that writes no BOS": (hh, "chatml", PAIRS, {"bos": True}),
    "conversations": (ultrafeedback, "chatml", PAIRS, {"stop": True}),
    "labeled texts": (lambda s: unpaired(hh(s)), "stories260k", LABELED, {}),
    "labeled conversations": (
        lambda s: unpaired(ultrafeedback(s)),
        "chatml",
        LABELED,
        {"stop": True},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_ids_and_masks_are_those_of_trl(name, shared):
    read, which, kind, differences = CASES[name]
    records = [*itertools.islice(read(shared), ROWS)]
    tokenizer = tokenizer_of(which, shared)
    expected = theirs(records, tokenizer, kind)
    found = ours(records, tokenizer, kind)
    assert len(records) == ROWS and found.keys() == expected.keys()
    assert len(found) > ROWS - 5  # a record may occur twice
    same = {"bos": False, "stop": False} | differences
    for key, sequences in expected.items():
        assert len(sequences) == len(found[key]) == kind.sides
        for one, other in zip(found[key], sequences):
            assert one == as_we_do(other, tokenizer, **same), key
            # Each difference is one of all sequences, or the list is out of date.
            assert (one == other) == (not differences)


def chats(shared):
    """The dialogues of HH-RLHF as messages; most have several turns."""
    roles = {"Human": "user", "Assistant": "assistant"}
    for row in rows_of(shared / "data" / "hh_rlhf_helpful_base_test.jsonl.gz"):
        turns = re.split(r"\n\n(Human|Assistant):", row["chosen"])[1:]
        pairs = zip(turns[::2], turns[1::2], strict=True)
        messages = [{"role": roles[x], "content": said} for x, said in pairs]
        if all(x["content"].strip() for x in messages):
            if messages[-1]["role"] == "assistant":
                yield {"messages": messages}


@pytest.mark.parametrize("template", ["blocks", "chatml"])
def test_all_turns_are_those_of_assistant_only_loss(template, shared):
    """TRL needs generation blocks; without them, the same turns are found."""
    records = [*itertools.islice(chats(shared), ROWS)]
    assert sum(len(x["messages"]) > 2 for x in records) > ROWS / 2
    blocks, tokenizer = (
        byte_tokenizer(template=TEMPLATES[name], eos="<|im_end|>", bos=None)
        for name in ("blocks", template)
    )
    stand_in = types.SimpleNamespace(
        _tokenizer=blocks, chat_template=blocks.chat_template, completion_only_loss=None
    )
    arguments = types.SimpleNamespace(
        dataset_num_proc=None,
        dataset_text_field="text",
        assistant_only_loss=True,
        max_length=None,
        shuffle_dataset=False,
    )
    made = sft_trainer.SFTTrainer._prepare_dataset(
        stand_in,
        datasets.Dataset.from_list(records),
        *(blocks, arguments, False, None, "train"),
    )
    options = DataOptions(heldout_fraction=0, max_length=LONG, train_turns="all")
    pairs = make_splits(
        ListSource(records), tokenizer, options, kind=ANSWERS, folder=None
    ).train
    assert pairs.columns["row"].tolist() == list(range(ROWS))
    for n, row in enumerate(made):
        end = len(row["input_ids"]) - 1  # the newline after the last stop token
        assert row["labels"][end] == -100
        assert pairs.take(np.array([n])).tokens.tolist() == row["input_ids"][:end]
        trained = pairs.prompt_lengths[n] + pairs.targets(n, 0)
        theirs = np.flatnonzero(np.array(row["labels"]) != -100)
        assert trained.tolist() == theirs.tolist()
