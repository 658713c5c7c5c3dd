"""`--train-turns all`: the loss is on all turns of the assistant, and nothing else."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import cli, data
from jaxpref.data import DataOptions, ListSource, make_splits
from jaxpref.data.inspection import segments
from jaxpref.data.kinds import ANSWERS, LABELED, LISTS, PAIRS
from jaxpref.data.noise import flip_pairs
from jaxpref.data.records import PROMPTS_DIFFER, parse
from jaxpref.data.tokenize import INNER_END, NO_ROOM
from jaxpref.errors import InputError
from jaxpref.models import Numerics, build
from jaxpref.models.folder import save
from jaxpref.scoring import make_scorer
from tests.data_tokenizers import CHATML, LLAMA, byte_tokenizer, write_lines
from tests.tiny import tiny_config, tiny_params

END = "<|im_end|>"
BLOCKS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML that says what the model writes."""
FORGETS = CHATML.replace(
    "m['content']",
    "(m['content'] if loop.last else m['content'].split('</think>')[-1])",
)
"""Leaves out the thinking of earlier turns, as that of Qwen3 does."""


def turns(*texts, first="user"):
    """Turns of the user and of the assistant, one after the other."""
    others = {"user": "assistant", "assistant": "user"}
    roles = [first if n % 2 == 0 else others[first] for n in range(len(texts))]
    return [{"role": r, "content": x} for r, x in zip(roles, texts, strict=True)]


def answered(*texts):
    return turns(*texts, first="assistant")


def chatml(template=CHATML, **options):
    options = dict(bos=None, eos=END, merges=(), template=template) | options
    return byte_tokenizer(**options)


def read(records, *, kind=ANSWERS, tokenizer=None, **options):
    options = {"heldout_fraction": 0.0, "train_turns": "all"} | options
    source = ListSource([records] if isinstance(records, dict) else records)
    tokenizer = tokenizer or chatml()
    return make_splits(source, tokenizer, DataOptions(**options), kind=kind)


def marked(pairs, tokenizer=None, index=0):
    """The prompt, and each completion with what is not trained on in braces."""
    decode = (tokenizer or chatml()).decode
    shown = [decode(pairs.prompt(index))]
    for side in range(pairs.num_completions):
        ids = pairs.completion(index, side)
        own, text, start = {*pairs.targets(index, side).tolist()}, "", 0
        for end in range(1, len(ids) + 1):
            if end == len(ids) or (end in own) != (start in own):
                part = decode(ids[start:end])
                text, start = text + (part if start in own else f"{{{part}}}"), end
        shown.append(text)
    return shown


HEAD = "<|im_start|>{}\n".format
Q = HEAD("user") + "q" + END + "\n" + HEAD("assistant")


def between(text):
    """What the template writes between an answer and the next one."""
    return f"{{\n{HEAD('user')}{text}{END}\n{HEAD('assistant')}}}"


# ---- records ------------------------------------------------------------------------

DIALOGUE = turns("q", "a", "r", "b")
PARSED = {
    # name: (record, sides, prompt, turns)
    "one conversation": ({"messages": DIALOGUE}, 1, 1, [2]),
    "ShareGPT": (
        {"conversations": [
            {"from": {"user": "human", "assistant": "gpt"}[x["role"]],
             "value": x["content"]} for x in DIALOGUE]}, 1, 1, [2]),
    "the turns of a prompt are given": (
        {"prompt": DIALOGUE[:3], "completion": answered("b")}, 1, 3, []),
    "a prompt that the answer repeats": (
        {"prompt": DIALOGUE[:1], "completion": DIALOGUE}, 1, 1, [2]),
    "prompt and several turns": (
        {"prompt": turns("q", "a", "r"), "completion": answered("b", "s", "c")},
        1, 3, [2]),
    "a greeting before the user": (
        {"messages": answered("hello", "q", "a", "r", "b")}, 1, 2, [2]),
    "a system turn": (
        {"system": "s", "messages": DIALOGUE}, 1, 2, [2]),
    "one answer each": (
        {"prompt": DIALOGUE[:3], "chosen": answered("b"), "rejected": answered("c")},
        2, 3, []),
    "several turns each": (
        {"prompt": turns("q"), "chosen": answered("a", "r", "b"),
         "rejected": answered("c")}, 2, 1, [2, 0]),
    "what both conversations share is the prompt": (
        {"chosen": DIALOGUE, "rejected": turns("q", "a", "r", "c")}, 2, 3, []),
    "texts": ({"prompt": "q", "chosen": "a", "rejected": "b"}, 2, None, []),
}  # fmt: skip


@pytest.mark.parametrize("name", PARSED)
def test_a_completion_begins_with_the_first_turn_to_train_on(name):
    record, sides, prompt, later = PARSED[name]
    found = parse(record, "f row 1", sides=sides, all_turns=True)
    last = parse(record, "f row 1", sides=sides, allow_own_prompts=True)
    assert found.completions == last.completions
    assert [len(x) for x in found.turns] == later
    if prompt is not None:
        assert len(found.prompt) == prompt and not found.own_prompts
    if not later:
        assert found == last


def test_prompts_that_differ_are_still_refused():
    record = {"chosen": DIALOGUE, "rejected": turns("q", "a", "s", "b")}
    refused = parse(record, "f row 1", sides=2, all_turns=True)
    assert refused == PROMPTS_DIFFER
    allowed = dict(all_turns=True, allow_own_prompts=True)
    found = parse(record, "f row 1", sides=2, **allowed)
    assert found.own_prompts and not found.turns


# ---- tokens -------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHATML, BLOCKS])
def test_every_turn_of_the_assistant_is_trained_up_to_its_stop_token(template):
    tokenizer = chatml(template)
    pairs = read({"messages": DIALOGUE}, tokenizer=tokenizer).train
    newline = "" if template == BLOCKS else "\n"  # Jinja drops it after a block tag
    expected = [Q, f"a{END}{between('r')}b{END}"]
    expected = [x.replace(f"{END}\n", END + newline) for x in expected]
    expected = [x.replace("{\n", "{" + newline) for x in expected]
    assert marked(pairs, tokenizer) == expected
    assert pairs.target_lengths.tolist() == [[4]]


def test_turns_of_tools_are_given():
    messages = DIALOGUE[:3] + [
        {"role": "assistant", "content": "call"},
        {"role": "tool", "content": "12"},
        *answered("b"),
    ]
    (_, answer) = marked(read({"messages": messages}).train)
    tool = f"{{\n{HEAD('tool')}12{END}\n{HEAD('assistant')}}}"
    assert answer == f"a{END}{between('r')}call{END}{tool}b{END}"


@pytest.mark.parametrize("merges", [(), (("a", "b"), ("Ċ", "a"), ("b", "Ċ"))])
@pytest.mark.parametrize("texts", [("q", "ab", "r", "ba"), ("ü", "aé", "ab", "日b")])
def test_the_mask_is_that_of_transformers(merges, texts):
    """Merges cross the ends of blocks, and characters have several tokens."""
    tokenizer = chatml(BLOCKS, merges=merges)
    messages = [{"role": "system", "content": "ab"}, *turns(*texts)]
    expected = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    pairs = read({"messages": messages}, tokenizer=tokenizer).train
    mask = np.zeros(pairs.packed_lengths[0], bool)
    mask[pairs.prompt_lengths[0] + pairs.targets(0, 0)] = True
    assert pairs.tokens.tolist() == expected["input_ids"]
    assert mask.astype(int).tolist() == expected["assistant_masks"]


def test_a_pair_has_all_turns_of_both_sides():
    chosen, rejected = answered("a", "r", "b"), answered("c")
    record = {"prompt": turns("q"), "chosen": chosen, "rejected": rejected}
    for template in (CHATML, BLOCKS.replace("{% endif %}\n", "{% endif %}\n\n")):
        tokenizer = chatml(template)
        splits = read(record, kind=PAIRS, tokenizer=tokenizer)
        assert marked(splits.train, tokenizer) == [
            Q, f"a{END}{between('r')}b{END}", f"c{END}"
        ]  # fmt: skip
        assert splits.train.target_lengths.tolist() == [[4, 2]]
    with pytest.raises(InputError, match=f"dropped: {PROMPTS_DIFFER[:20]}"):
        read(record, kind=PAIRS, train_turns="last")


def test_labels_and_lists():
    good, bad = turns("q", "a", "r", "b"), turns("o", "c")
    labeled = [{"messages": good, "label": True}, {"messages": bad, "label": False}]
    kto = read(labeled, kind=dataclasses.replace(LABELED, mismatched=True)).train
    # The mismatched answer is that of the other prompt, with its mask.
    assert marked(kto)[1:] == [f"a{END}{between('r')}b{END}", f"c{END}"]
    assert marked(kto, index=1)[1:] == [f"c{END}", f"a{END}{between('r')}b{END}"]
    listed = {
        "prompt": turns("q"),
        "completions": [answered("c"), answered("a", "r", "b"), answered("d")],
        "scores": [1, 3, 2],
    }
    lists = read(listed, kind=LISTS).train
    assert marked(lists)[1:] == [f"a{END}{between('r')}b{END}", f"d{END}", f"c{END}"]


def test_one_turn_is_trained_as_before():
    records = [
        {"messages": turns("q", " a ")},
        {"prompt": turns("q"), "completion": answered("ab")},
        {"prompt": "text", "completion": " ab"},
    ]
    tokenizer = byte_tokenizer(template=CHATML)
    whole, last = (
        read(records, tokenizer=tokenizer, train_turns=x).train for x in ("all", "last")
    )
    assert last.trained is None and whole.trained.all()
    for name in ("tokens", "offsets", "completion_lengths", "ids"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(last, name))


def test_long_answers_lose_their_end():
    record = {"messages": turns("q", "a", "r", "b" * 50)}
    whole = read(record).train
    size = int(whole.packed_lengths[0])
    cut = read(record, max_length=size - 20).train
    assert cut.completion_lengths[0, 0] == whole.completion_lengths[0, 0] - 20
    assert cut.target_lengths[0, 0] == whole.target_lengths[0, 0] - 20


# ---- what cannot be trained ---------------------------------------------------------


@pytest.mark.parametrize(
    "template, texts, words",
    [
        (FORGETS, ("q", "<think>t</think>a", "r", "b"),
         "message 2: the chat template renders .* differently .*--train-turns last"),
        (LLAMA.replace("{{ eos_token }}", ""), ("q", "a", "r", "b"),
         "writes no stop token after an earlier turn"),
        (BLOCKS.replace("{{ m['content'] }}<|im_end|>{% endg", "{{ m['content'][:1] }}"
         "{% endg"), ("q", "abc", "r", "b"), "changes part of message 2"),
        ("{% generation %}" + CHATML + "{% endgeneration %}", ("q", "a", "r", "b"),
         "has 1 generation blocks for 2 assistant turns"),
    ],
)  # fmt: skip
def test_a_template_that_loses_a_turn_is_refused_by_name(template, texts, words):
    tokenizer = chatml(template)
    with pytest.raises(InputError, match=f"row 1: .*{words}"):
        read({"messages": turns(*texts)}, tokenizer=tokenizer)


def test_blocks_say_what_a_template_that_forgets_writes():
    """The thinking of an earlier turn is in its block, or the row is refused."""
    forgets = BLOCKS.replace(
        "{{ m['content'] }}<|im_end|>{% endg",
        "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}"
        "<|im_end|>{% endg",
    )
    tokenizer = chatml(forgets)
    kept = turns("q", "a", "r", "<think>t</think>b")
    (_, answer) = marked(read({"messages": kept}, tokenizer=tokenizer).train, tokenizer)
    assert answer.startswith(f"a{END}{{") and answer.endswith(f"<think>t</think>b{END}")
    lost = turns("q", "<think>t</think>a", "r", "b")
    with pytest.raises(InputError, match="changes part of message 2"):
        read({"messages": lost}, tokenizer=tokenizer)


@pytest.mark.parametrize(
    "texts, options, reason",
    [
        (("q", f"a{END}c", "r", "b"), {}, INNER_END),
        (("q", "a", "r", f"b{END}c"), {}, INNER_END),
        (("q" * 40, "a", "r", "b"), {"max_length": 12}, NO_ROOM),
    ],
)
def test_rows_that_are_dropped(texts, options, reason):
    with pytest.raises(InputError, match=reason):
        read({"messages": turns(*texts)}, **options)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"whole_turns": True}, "reward model"),
        ({"kind": dataclasses.replace(PAIRS, joint=True)}, "joint"),
        ({"kind": dataclasses.replace(PAIRS, rationale=True)}, "rationale"),
    ],
)
def test_objectives_without_turns_refuse_the_option(changes, words):
    options = DataOptions(train_turns="all")
    with pytest.raises(InputError, match=f"--train-turns all: .*{words}"):
        make_splits(ListSource([{}]), chatml(), options, **changes)
    with pytest.raises(InputError, match="--train-turns all: bvpo"):
        data.splits.make_mixed_splits(ListSource([{}]), chatml(), options)


# ---- datasets and batches -----------------------------------------------------------


@pytest.fixture(scope="module")
def conversations():
    """Pairs of conversations with one to three turns of the assistant."""
    rng = np.random.default_rng(0)
    word = lambda: "".join(rng.choice(list("abc"), rng.integers(1, 6)))
    side = lambda: answered(*(word() for _ in range(2 * rng.integers(0, 3) + 1)))
    records = [
        {"prompt": turns(word()), "chosen": side(), "rejected": side()}
        for _ in range(12)
    ]
    return read(records, kind=PAIRS).train


def test_datasets_keep_masks_with_their_tokens(conversations):
    pairs = conversations
    assert (pairs.target_lengths < pairs.completion_lengths).any()
    taken = pairs.take(np.array([3, 1])).prefixed(2)
    assert marked(taken, index=1)[1:] == marked(pairs, index=1)[1:]
    flips = np.arange(len(pairs)) % 2 == 1
    flipped = flip_pairs(pairs, flips)
    for n in range(len(pairs)):
        prompt, chosen, rejected = marked(pairs, index=n)
        sides = (rejected, chosen) if flips[n] else (chosen, rejected)
        assert marked(flipped, index=n) == [prompt, *sides]
    assert flipped.target_lengths[1].tolist() == pairs.target_lengths[1, ::-1].tolist()
    # Another mask is another completion, with another score.
    other = dataclasses.replace(pairs, trained=np.ones_like(pairs.trained))
    differs = pairs.completion_keys() != other.completion_keys()
    assert (differs == (pairs.target_lengths < pairs.completion_lengths)).all()
    assert pairs.digest() != other.digest()


def test_injected_flips_swap_masks():
    records = [
        {"prompt": turns(x), "chosen": answered("a", "r", "b"),
         "rejected": answered("c")} for x in "abc"
    ]  # fmt: skip
    noise = data.InjectOptions(flip_rate=1.0)
    pairs = read(records, kind=PAIRS, inject=noise).train
    assert marked(pairs)[1:] == [f"c{END}", f"a{END}{between('r')}b{END}"]


def test_chunks_on_disk_keep_masks(tmp_path):
    source = ListSource([{"messages": DIALOGUE}])
    options = DataOptions(heldout_fraction=0.0, train_turns="all")
    make = lambda: (
        make_splits(source, chatml(), options, kind=ANSWERS, folder=tmp_path).train
    )
    assert marked(make()) == marked(make()) == marked(read(source[0]).train)
    last = dataclasses.replace(options, train_turns="last")
    other = make_splits(source, chatml(), last, kind=ANSWERS, folder=tmp_path).train
    assert other.trained is None


def test_a_page_shows_what_is_not_trained(conversations):
    n = int(np.argmin(conversations.target_lengths[:, 0] - 1e3))
    kinds = {x.kind for part in segments(conversations, n, chatml()) for x in part}
    assert {"prompt", "answer", "special"} <= kinds
    several = int(np.argmax(np.ptp(conversations.completion_lengths, axis=1)))
    for part, text in zip(
        segments(conversations, several, chatml()), marked(conversations, index=several)
    ):
        given = "".join(x.text for x in part if x.kind == "given")
        assert bool(given) == ("{" in text)
        assert "".join(x.text for x in part) == text.replace("{", "").replace("}", "")


def test_scores_of_all_layouts_are_sums_over_the_mask(conversations):
    """In float64, against log-softmax of whole sequences and the mask."""
    pairs = conversations
    vocabulary = -(-len(chatml()) // 8) * 8
    wide = Numerics(param_dtype="float64", compute_dtype="float64")
    with jax.enable_x64(True):
        model = build(tiny_config(vocab_size=vocabulary), wide)
        params = jax.tree.map(lambda x: x.astype(jnp.float64), tiny_params(model))
        score = jax.jit(make_scorer(model, frozenset({"policy_logps"}), chunk_size=8))
        padded = data.padded_layout(pairs, batch_size=len(pairs))
        order = data.uniform(pairs, 0)
        packed = data.packed_layout(pairs, order=order, batch_size=12, row_length=256)
        found = []
        for layout in (padded, packed):
            (batch,) = layout.eval_batches(pairs, threads=0)
            values = [
                score(
                    params, None, jax.tree.map(lambda x, a=a: jnp.asarray(x[a]), batch)
                )
                for a in range(layout.accumulation)
            ]
            values = np.stack([x.scores["policy_logps"] for x in values])
            held = batch.pair_index >= 0
            numbers = batch.pair_index[held]
            assert sorted(numbers.tolist()) == list(range(len(pairs)))
            sizes = batch.completion_lengths[held]
            assert (sizes == pairs.target_lengths[numbers]).all()
            found.append(values[held][np.argsort(numbers)])
        places = [(n, side) for n in range(len(pairs)) for side in range(2)]
        ids = [[*pairs.context(*at), *pairs.completion(*at)] for at in places]
        rows = np.array([x + [0] * (pairs.longest - len(x)) for x in ids])
        logits = np.asarray(jax.jit(model.logits)(params, rows))
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = np.zeros((len(pairs), 2))
    for row, (n, side) in enumerate(places):
        for at in pairs.context_lengths[n, side] + pairs.targets(n, side):
            expected[n, side] += logps[row, at - 1, ids[row][at]]
    for ours in found:
        np.testing.assert_allclose(ours, expected, rtol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sft", "dpo", "kto", "lipo_lambda"])
def test_a_run_by_command(loss, tmp_path):
    """On every kind of record; the first loss of pairs is log 2."""
    folder = tmp_path / "model"
    model = build(tiny_config(vocab_size=-(-len(chatml()) // 8) * 8))
    save(folder, model, tiny_params(model))
    chatml().save_pretrained(folder)
    make = {
        "sft": lambda x: {"messages": turns(x, "a", "r", "b")},
        "dpo": lambda x: {
            "prompt": turns(x),
            "chosen": answered("a", "r", "b"),
            "rejected": answered("c"),
        },
        "kto": lambda x: {"messages": turns(x, "a", "r", "b"), "label": x < "e"},
        "lipo_lambda": lambda x: {
            "prompt": turns(x),
            "completions": [answered("a", "r", "b"), answered("c")],
            "scores": [2, 1],
        },
    }[loss]
    write_lines(tmp_path / "data.jsonl", [make(x) for x in "abcdefgh"])
    out = tmp_path / "run"
    options = f"--loss {loss} --train-turns all --max-steps 2 --batch-size 4"
    files = ["--model", folder, "--data", tmp_path / "data.jsonl", "--out", out]
    cli.main(["train", *map(str, files), *options.split(), "--heldout-fraction", "0"])
    first = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    assert np.isfinite(first["loss"])
    if loss == "dpo":
        assert first["loss"] == pytest.approx(np.log(2), rel=1e-6)
    config = json.loads((out / "config.json").read_text())
    assert config["options"]["train_turns"] == "all"
