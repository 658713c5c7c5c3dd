"""Pairs whose answers follow different prompts: records, splits, layouts, runs."""

import dataclasses
import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from jaxpref import data, losses
from jaxpref.data import DataOptions, InjectOptions, Kind, ListSource, make_splits
from jaxpref.data.joint import with_trained_prompts
from jaxpref.data.noise import flip_pairs
from jaxpref.data.records import PROMPTS_DIFFER, Example, parse
from jaxpref.data.shared_prompts import count_shared
from jaxpref.errors import InputError
from jaxpref.evaluate import evaluation as evaluate
from jaxpref.evaluate.audit_records import cleaned, named_annotators
from jaxpref.models import Numerics, RewardModel, build
from jaxpref.objectives import bco, from_loss
from jaxpref.scoring import make_scorer
from jaxpref.train import (
    Decay,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
    read_metrics,
    run,
)
from tests.answers import words, write_records
from tests.data_tokenizers import CHATML, byte_tokenizer
from tests.tiny import MULTIPLES, tiny_config, tiny_params

TOKENIZER = byte_tokenizer()
PAIR = {
    "chosen_prompt": "two",
    "chosen": " a",
    "rejected_prompt": "twenty",
    "rejected": " bb",
}
ASKED, ALSO = ({"role": "user", "content": text} for text in ("q", "r"))
SAID, SAID_TOO = ({"role": "assistant", "content": text} for text in ("a", "b"))


def splits_of(records, kind=None, tokenizer=TOKENIZER, **options):
    options = DataOptions(**{"heldout_fraction": 0.0} | options)
    kind = Kind() if kind is None else kind
    return make_splits(ListSource(records), tokenizer, options, kind=kind)


def word_records(count=40, seed=0, prompts=12):
    """Pairs of few prompts, so that many share one; some follow one prompt alone."""
    rng = np.random.default_rng(seed)
    asked = [words(rng, 2, 6) for _ in range(prompts)]
    found = []
    for n in range(count):
        one, two = rng.choice(asked, 2, replace=False)
        row = {"chosen": " " + words(rng), "rejected": " " + words(rng)}
        # A file may mix both kinds, as long as it begins with two prompts.
        own = {"chosen_prompt": one, "rejected_prompt": two}
        found.append((own if n % 4 != 3 else {"prompt": one}) | row)
    return found


# ---- records -------------------------------------------------------------------------


def test_a_record_has_a_prompt_for_each_answer():
    found = parse(PAIR, "f row 1", sides=2)
    assert found == Example("two", (" a", " bb"), own_prompts=("two", "twenty"))
    assert parse(PAIR, "f row 1", sides=1) == Example("two", (" a",))
    same = PAIR | {"rejected_prompt": "two"}
    assert parse(same, "f row 1", sides=2) == Example("two", (" a", " bb"))
    # The same answer to two prompts is a pair.
    found = parse(PAIR | {"rejected": " a"}, "f row 1", sides=2)
    assert isinstance(found, Example) and not found.is_identical
    chat = {
        "chosen_prompt": [ASKED],
        "chosen": [SAID],
        "rejected_prompt": "r",
        "rejected": [SAID_TOO],
        "system": "Be brief.",
    }
    system = {"role": "system", "content": "Be brief."}
    found = parse(chat, "f row 1", sides=2)
    assert found.own_prompts == ((system, ASKED), (system, ALSO))


def test_prompts_that_differ_by_accident_are_dropped_unless_allowed():
    record = {"chosen": [ASKED, SAID], "rejected": [ALSO, SAID_TOO]}
    dialogues = {
        name: f"\n\nHuman: {asked}\n\nAssistant: {said}"
        for name, asked, said in (("chosen", "q", "a"), ("rejected", "r", "b"))
    }
    for one in (record, dialogues):
        assert parse(one, "f row 1", sides=2) == PROMPTS_DIFFER
        found = parse(one, "f row 1", sides=2, allow_own_prompts=True)
        assert len(set(map(str, found.own_prompts))) == 2
    assert "--own-prompts" in PROMPTS_DIFFER
    plan = splits_of([record, PAIR], tokenizer=byte_tokenizer(template=CHATML))
    assert plan.report[f"dropped: {PROMPTS_DIFFER}"] == 1 and len(plan.train) == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompt": "q"}, "both 'prompt' and 'chosen_prompt'"),
        ({"rejected_prompt": None}, "'rejected_prompt' must be a string or messages"),
        ({"chosen_prompt": [ASKED]}, "the prompt of one answer is a string"),
        ({"chosen_prompt": []}, "'chosen_prompt' has no messages"),
        ({"chosen": ""}, "'chosen' is an empty completion"),
    ],
)
def test_a_malformed_record_names_the_field(change, message):
    with pytest.raises(InputError, match=f"f row 1: .*{message}"):
        parse(PAIR | change, "f row 1", sides=2)
    missing = {k: v for k, v in PAIR.items() if k != "rejected_prompt"}
    with pytest.raises(InputError, match="no field 'rejected_prompt'"):
        parse(missing, "f row 1", sides=2)


# ---- datasets ------------------------------------------------------------------------


def test_tokens_by_hand():
    """Byte tokens: BOS, the prompts' common start, then each prompt's rest."""
    dataset = splits_of([PAIR]).train
    ids = lambda text: TOKENIZER(text, add_special_tokens=False)["input_ids"]
    bos, eos = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id
    assert dataset.prompt(0).tolist() == [bos, *ids("tw")]
    assert [dataset.side_prompt(0, k).tolist() for k in (0, 1)] == [
        ids("o"),
        ids("enty"),
    ]
    assert dataset.context(0, 1).tolist() == [bos, *ids("twenty")]
    assert dataset.completion(0, 0).tolist() == [*ids(" a"), eos]
    assert dataset.completion(0, 1).tolist() == [*ids(" bb"), eos]
    assert dataset.longest == 1 + 6 + 3 + 1
    joint = with_trained_prompts(dataset)
    assert joint.prompt(0).tolist() == [bos] and not joint.side_prompt_lengths.any()
    assert joint.completion(0, 1).tolist() == [*ids("twenty bb"), eos]
    assert joint.packed_lengths.tolist() == [1 + 3 + 2 + 1 + 6 + 3 + 1]


def test_without_bos_the_first_token_of_each_prompt_remains():
    tokenizer = byte_tokenizer(bos=None)
    records = [PAIR | {"rejected_prompt": "one"}, PAIR]
    dataset = splits_of(records, tokenizer=tokenizer).train
    assert not len(dataset.prompt(0)) and dataset.side_prompt_lengths[0].all()
    joint = splits_of(records, Kind(joint=True), tokenizer).train
    decode = lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True)
    assert [decode(joint.context(0, k)) for k in (0, 1)] == ["t", "o"]
    assert [decode(joint.completion(0, k)) for k in (0, 1)] == ["wo a", "ne bb"]
    assert joint.prompt_lengths.tolist() == [0, 1]
    for layout in layouts(joint):
        for n, sides in read_back(layout.collate(joint, blocks(layout, 2))).items():
            assert sides == both_sides(joint, n)


def test_a_flip_exchanges_prompts_with_their_answers():
    records = word_records()
    plain = splits_of(records).train
    options = {"inject": InjectOptions(flip_rate=1.0)}
    for flipped in (
        splits_of(records, **options).train,
        flip_pairs(plain, np.ones(len(plain), bool)),
    ):
        for n in range(len(plain)):
            assert both_sides(flipped, n) == both_sides(plain, n)[::-1]
        np.testing.assert_array_equal(
            flipped.columns["prompt"], plain.columns["rejected_prompt"]
        )
        assert flipped.columns["is_flipped"].all()


def test_relabeled_records_of_an_audit_exchange_the_prompts():
    source = named_annotators(ListSource([PAIR]), None)
    (record,) = cleaned(source, [{"row": 1, "action": "relabel"}])
    names = ("chosen_prompt", "rejected_prompt", "chosen", "rejected")
    assert [record[name] for name in names] == ["twenty", "two", " bb", " a"]


# ---- splits --------------------------------------------------------------------------


def prompts_of(records, dataset):
    rows = [records[row] for row in dataset.columns["row"]]
    names = ("prompt", "chosen_prompt", "rejected_prompt")
    return {row[name] for row in rows for name in names if name in row}


def test_no_prompt_is_on_both_sides_of_a_split():
    """Prompts come in groups of four; a few pairs connect those of a group."""
    rng = np.random.default_rng(5)
    records = []
    for group in range(60):
        for _ in range(5):
            one, two = rng.choice(4, 2, replace=False)
            names = {
                "chosen_prompt": f"{group}/{one}",
                "rejected_prompt": f"{group}/{two}",
            }
            records.append(names | {"chosen": " a", "rejected": f" {rng.random()}"})
        records.append({"prompt": f"{group}/0", "chosen": "a", "rejected": "b"})
    plan = splits_of(records, heldout_fraction=0.2)
    assert not prompts_of(records, plan.train) & prompts_of(records, plan.heldout)
    # 60 groups, each held out with probability 0.2: three standard deviations.
    assert abs(len(plan.heldout) / len(records) - 0.2) < 3 * np.sqrt(0.2 * 0.8 / 60)
    assert not count_shared(plan.train, plan.heldout, bos=1).pairs
    # Splits do not depend on the order of the records.
    shuffled = random.Random(1).sample(records[1:], len(records) - 1)
    other = splits_of([records[0], *shuffled], heldout_fraction=0.2)
    assert set(other.heldout.ids) == set(plan.heldout.ids)


def test_a_group_of_most_records_is_trained_on():
    chain = [
        PAIR | {"chosen_prompt": f"{n}", "rejected_prompt": f"{n + 1}"}
        for n in range(20)
    ]
    plan = splits_of(chain, heldout_fraction=0.99)
    assert len(plan.train) == 20 and not len(plan.heldout)


def test_records_with_one_prompt_and_with_two_may_be_in_one_file():
    plain = {"prompt": "q", "chosen": " a", "rejected": " b"}
    for options in ({"heldout_fraction": 0.2}, {}):
        plan = splits_of([plain, PAIR], **options)
        assert len(plan.train) + len(plan.heldout) == 2


def test_either_prompt_counts_as_shared_with_other_data():
    train = splits_of([{"prompt": "twenty\n", "chosen": " a", "rejected": " b"}]).train
    assert count_shared(train, splits_of([PAIR]).train, bos=1).pairs == 1


# ---- layouts and scores --------------------------------------------------------------


def both_sides(dataset, n):
    return [
        (dataset.context(n, k).tolist(), dataset.completion(n, k).tolist())
        for k in range(dataset.num_completions)
    ]


def layouts(dataset):
    yield data.padded_layout(dataset, batch_size=2, **MULTIPLES)
    yield data.packed_layout(
        dataset, order=data.in_order(dataset), batch_size=2, num_steps=1
    )


def blocks(layout, count):
    """The first records, as `collate` takes them: one a row, or all in one row."""
    if isinstance(layout, data.PackedLayout):
        found = np.full((1, 1, layout.slots), -1)
        found[0, 0, :count] = np.arange(count)
        return found
    return np.arange(count)[None]


def read_back(batch):
    """{pair: [(prompt, completion), ...]} from the arrays alone."""
    found = {}
    count = batch.completion_lengths.shape[-1]
    for a, r, s in np.argwhere(batch.pair_index >= 0):
        sides = []
        for side in range(count):
            q = 0 if batch.segments is not None else side
            own = batch.completions[a, r, q] == s * count + side
            targets = batch.targets[a, r, q][own].tolist()
            predictors = batch.predictors[a, r, q][own]
            tokens = batch.tokens[a, r, q]
            if batch.segments is None:
                context = tokens[: predictors[0] + 1].tolist()
            else:
                parts = batch.segments[a, r, 0] - batch.num_parts * s
                seen = np.isin(parts, (0, 1 + side))
                places = np.flatnonzero(seen)
                order = batch.positions[a, r, 0][places]
                assert order.tolist() == [*range(len(places))]
                context = tokens[places].tolist()[: -len(targets)]
                # The token before the answer predicts its first one.
                assert predictors[0] == places[len(context) - 1]
            assert tokens[predictors[1:]].tolist() == targets[:-1]
            sides.append((context, targets))
        found[int(batch.pair_index[a, r, s])] = sides
    return found


def test_layouts_hold_each_answer_after_its_own_prompt():
    dataset = splits_of(word_records(12)).train
    for layout in layouts(dataset):
        batch = layout.collate(dataset, blocks(layout, 2))
        assert read_back(batch) == {n: both_sides(dataset, n) for n in (0, 1)}


def word_dataset(tokenizer, count=8, kind=None):
    return splits_of(word_records(count), kind, tokenizer).train


@pytest.fixture(scope="module")
def tokenizer(inputs):
    return data.load_tokenizer(inputs / "model")


@pytest.mark.parametrize("joint", [False, True], ids=["conditional", "joint"])
def test_log_probs_are_those_of_each_whole_text(tokenizer, joint):
    """The oracle runs each prompt with its answer alone, with a plain log-softmax."""
    dataset = word_dataset(tokenizer, kind=Kind(joint=joint))
    plain = word_dataset(tokenizer)
    with jax.enable_x64(True):
        wide = Numerics(param_dtype="float64", compute_dtype="float64")
        model = build(tiny_config(), wide)
        params = jax.tree.map(lambda x: x.astype(jnp.float64), tiny_params(model))
        scorer = jax.jit(make_scorer(model, frozenset({"policy_logps"})))
        sides = [side for n in range(len(plain)) for side in both_sides(plain, n)]
        texts = np.zeros((len(sides), 32), np.int32)
        for row, (context, answer) in zip(texts, sides):
            row[: len(context) + len(answer)] = context + answer
        hidden, head, _ = jax.jit(model.hidden_and_heads)(params, texts)
        logits = np.asarray(hidden) @ np.asarray(head)
        expected = np.zeros((len(plain), 2))
        for n, (context, answer) in enumerate(sides):
            logp = log_softmax(logits[n], axis=-1)
            first = 1 if joint else len(context)
            places = np.arange(first, len(context) + len(answer))
            expected.flat[n] = logp[places - 1, texts[n, places]].sum()
        for layout in layouts(dataset):
            (batch, *_) = dataclasses.replace(layout, **whole(layout)).eval_batches(
                dataset
            )
            micro = jax.tree.map(lambda x: x[0], batch)
            found = scorer(params, {}, micro).scores["policy_logps"]
            real = micro.pair_index >= 0
            where = micro.pair_index[real]
            assert len(where) == len(plain)
            # Sums of about 20 terms in float64.
            np.testing.assert_allclose(found[real], expected[where], rtol=1e-11)


def whole(layout):
    """Sizes with which all eight records are one micro-batch."""
    if isinstance(layout, data.PackedLayout):
        return {"rows": 8, "slots": 8}
    return {"batch_size": 8}


def test_rewards_are_those_of_each_whole_text(tokenizer):
    dataset = word_dataset(tokenizer)
    model = RewardModel(tiny_config())
    params = tiny_params(model)
    scorer = jax.jit(make_scorer(model, frozenset({"rewards"})))
    found = []
    for layout in layouts(dataset):
        (batch, *_) = dataclasses.replace(layout, **whole(layout)).eval_batches(dataset)
        micro = jax.tree.map(lambda x: x[0], batch)
        real = micro.pair_index >= 0
        table = np.zeros((8, 2))
        rewards = scorer(params, {}, micro).scores["rewards"]
        table[micro.pair_index[real]] = rewards[real]
        found.append(table)
    alone = data.DatasetBuilder(1)
    for n in range(8):
        for prompt, answer in both_sides(dataset, n):
            alone.add(prompt, [answer], id=f"{len(alone)}")
    layout = data.padded_layout(alone.build(), batch_size=16, **MULTIPLES)
    (batch,) = layout.eval_batches(alone.build())
    micro = jax.tree.map(lambda x: x[0], batch)
    expected = scorer(params, {}, micro).scores["rewards"]
    for table in found:  # float32 sums of 16 features
        np.testing.assert_allclose(table.ravel(), expected.ravel(), atol=1e-5)


# ---- runs ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "own.jsonl"
    return write_records(path, word_records(40))


def train(inputs, file, out, objective, **changes):
    defaults = dict(
        model=str(inputs / "model"),
        data=str(file),
        out=str(out),
        objective=objective,
        optimizer=OptimizerConfig(learning_rate=1e-2, decay=Decay.CONSTANT),
        options=DataOptions(max_length=32, heldout_fraction=0.0),
        mesh=MeshConfig(data=1),
        max_steps=3,
        batch_size=8,
        row_length="none",
        log_every=1,
    )
    run(TrainConfig(**(defaults | changes)))
    lines = read_metrics(out / "metrics.jsonl")
    return [line["loss"] for line in lines if "loss" in line]


DOVE = from_loss(losses.dove, beta=0.5)


def test_dove_starts_at_its_known_value(inputs, file, tmp_path):
    assert DOVE.kind == Kind(joint=True, votes=True)
    options = DataOptions(max_length=32, heldout_fraction=0.3)
    packed = dict(max_steps=1, row_length="auto", options=options)
    (loss,) = train(inputs, file, tmp_path / "run", DOVE, **packed)
    assert loss == pytest.approx(np.log(2), abs=1e-6)


@pytest.mark.slow
def test_dove_trains_packed_sharded_and_resumed(inputs, file, tmp_path):
    objective = DOVE
    padded = train(inputs, file, tmp_path / "padded", objective)
    assert padded[0] == pytest.approx(np.log(2), abs=1e-6)
    sharded = MeshConfig(data=2, fsdp=2, tensor=2)
    packed = dict(mesh=sharded, row_length="auto")
    found = train(inputs, file, tmp_path / "packed", objective, **packed)
    # Float32 with other shapes; after three steps at a high rate.
    np.testing.assert_allclose(found, padded, rtol=1e-4)
    part = tmp_path / "part"
    train(inputs, file, part, objective, max_steps=2, **packed)
    assert train(inputs, file, part, objective, **packed) == found
    # The prompts matter: DPO trains on the same pairs, and differs.
    dpo = train(inputs, file, tmp_path / "dpo", from_loss(losses.dpo, beta=0.5))
    assert dpo[0] == pytest.approx(np.log(2), abs=1e-6)
    assert abs(dpo[-1] - padded[-1]) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("row_length", ["none", "auto"])
def test_other_objectives_train_on_two_prompts(inputs, file, tmp_path, row_length):
    """A reward model, and a loss of labeled answers, each with its own prompt."""
    for name, objective in {
        "rewards": from_loss(losses.bradley_terry),
        "answers": bco(),
    }.items():
        out = tmp_path / name
        found = train(inputs, file, out, objective, row_length=row_length)
        assert np.isfinite(found).all() and found[0] != found[-1]


def test_evaluation_reads_two_prompts(inputs, file, tmp_path):
    config = evaluate.EvaluateConfig(
        model=str(inputs / "model"), data=str(file), out=str(tmp_path / "out")
    )
    metrics = evaluate.run(config)
    rows = [json.loads(x) for x in (tmp_path / "out/eval_pairs.jsonl").open()]
    assert len(rows) == 40 and np.isfinite(metrics["rewards/margins"])


def test_prompts_to_sample_from_are_those_of_the_chosen_answers(tokenizer):
    records = word_records(8)
    found, _ = data.read_prompts(ListSource(records), tokenizer, limit=3)
    expected = [row.get("chosen_prompt", row.get("prompt")) for row in records]
    assert [x.text for x in found] == [*dict.fromkeys(expected)][:3]
