"""Reasoning traces: their format, their text and tokens, and how they are cut."""

import random

import pytest

from jaxpref.data import (
    DataOptions,
    ListSource,
    TraceMarkers,
    encode_prompt,
    load_tokenizer,
    make_mixed_splits,
    make_splits,
    open_source,
    padded_layout,
)
from jaxpref.data.records import EMPTY, IDENTICAL, Example, expand, parse
from jaxpref.data.tokenize import LONG_ANSWER, tokenize
from jaxpref.errors import InputError
from tests.data_tokenizers import (
    CHATML,
    LLAMA,
    byte_tokenizer,
    ids,
    write_lines,
)
from tests.tiny import make_tokenizer

TOKENIZER = byte_tokenizer()
USER = {"role": "user", "content": "q"}
QWEN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}"
    "{% set parts = m['content'].split('</think>') %}"
    "{% set thought = parts[0].split('<think>')[-1].strip('\n')"
    " if parts | length > 1 else '' %}"
    "{% if loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}"
    "{{ parts[-1].strip('\n') }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""Keeps the last thought in a layout of its own, and knows `enable_thinking`."""
R1 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}User:{{ m['content'] }}"
    "{% else %}Assistant:{{ m['content'].split('</think>')[-1] }}<|im_end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:<think>\n{% endif %}"
)
"""Opens the thought itself and leaves every thought out of what was said before."""
OPENED = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
NO_THINK = CHATML.replace(
    "{% for m", "{% if enable_thinking is false %}/no_think {% endif %}{% for m", 1
)
"""Switches thinking off by a word at the beginning, without any marker."""


def side(trace, answer):
    return {"trace": trace, "answer": answer}


def record(prompt="q", chosen=("t", "a"), rejected=("u", "b"), **fields):
    return {
        "prompt": prompt,
        "chosen": side(*chosen),
        "rejected": side(*rejected),
    } | fields


def traced(count, *, traces=1, prompts=None):
    prompts = prompts or count
    several = lambda word, n: [f"{word} {n} {k}" for k in range(traces)]
    return [
        record(
            f"question {n % prompts}",
            (several("because", n), f" good {n}"),
            (several("since", n)[: 1 + n % traces], f" bad {n}"),
        )
        for n in range(count)
    ]


def plan_of(records, tokenizer=TOKENIZER, *, empty=None, mixed=True, **options):
    options = DataOptions(**(dict(heldout_fraction=0.0) | options))
    if not mixed:
        return make_splits(ListSource(records), tokenizer, options)
    source = None if empty is None else ListSource(empty, "empty.jsonl")
    return make_mixed_splits(ListSource(records), tokenizer, options, empty=source)


def pair_texts(pairs, tokenizer=TOKENIZER):
    """(prompt, completions) of each pair, read back from the tokens."""
    return [
        (
            tokenizer.decode(pairs.prompt(n)),
            *(tokenizer.decode(pairs.completion(n, k)) for k in range(2)),
        )
        for n in range(len(pairs))
    ]


def chat_texts(template, chosen=("t", "a"), rejected=("u", "b"), **options):
    """The trace pair and the empty-trace pair of one record under a chat template."""
    tok = byte_tokenizer(bos=None, eos="<|im_end|>", merges=(), template=template)
    pairs = plan_of([record([USER], chosen, rejected)], tok, **options).train
    assert pairs.columns["empty_trace"].tolist() == [False, True]
    return pair_texts(pairs, tok)


# ---- records -------------------------------------------------------------------------


def test_records_with_traces_are_read():
    pair = Example("q", ("a", "b"), traces=(("t",), ("u",)))
    assert parse(record(), "row 1", sides=2) == pair
    several = record(chosen=(["t", "v"], "a"), flip=True, annotator=3)
    found = parse(several, "row 1", sides=2)
    assert found == Example("q", ("a", "b"), True, "3", {}, (("t", "v"), ("u",)))
    messages = parse(record([USER]), "row 1", sides=2)
    assert messages.prompt == (USER,)
    assert messages.completions[1] == {"role": "assistant", "content": "b"}
    for name in ("chosen", "completion"):
        alone = {"prompt": "q", name: side("t", "a")}
        assert parse(alone, "row 1", sides=1) == Example("q", ("a",), traces=(("t",),))


@pytest.mark.parametrize("absent", [{"answer": "a"}, side(None, "a")])
def test_without_a_trace_on_both_sides_it_is_a_plain_pair(absent):
    pair = {"prompt": "q", "chosen": absent, "rejected": {"answer": "b"}}
    assert parse(pair, "row 1", sides=2) == Example("q", ("a", "b"))


def test_the_shorter_list_of_traces_begins_again():
    example = Example("q", ("a", "b"), traces=(("1", "2", "3"), ("x", "y")))
    assert [x.traces for x in expand(example)] == [
        (("1",), ("x",)),
        (("2",), ("y",)),
        (("3",), ("x",)),
    ]
    assert expand(Example("q", ("a", "b"))) == [Example("q", ("a", "b"))]


BAD = {
    "number": (record(chosen=(3, "a")), "'chosen' 'trace' must be a string.*a int"),
    "in a list": (
        record(rejected=(["u", None], "b")),
        "'rejected' 'trace' 2 must be a string, but it is null",
    ),
    "empty list": (record(rejected=([], "b")), "'rejected' has an empty list"),
    "no answer": (record() | {"chosen": {"trace": "t"}}, "'chosen' has no 'answer'"),
    "null answer": (record(chosen=("t", None)), "'chosen' has no 'answer'"),
    "answer a list": (record(chosen=("t", ["a"])), "'answer' must be a string.*a list"),
    "empty answer": (record(rejected=("u", " \n")), "'rejected' has an empty 'answer'"),
    "one side": (record() | {"rejected": {"answer": "b"}}, "'rejected' has no 'trace'"),
    "one side null": (record(chosen=(None, "a")), "'chosen' has no 'trace'"),
    "string beside": (
        record() | {"chosen": "a"},
        "'chosen' must be an object of trace",
    ),
    "no prompt": (
        {"chosen": side("t", "a"), "rejected": side("u", "b")},
        "no field 'prompt'",
    ),
    "no messages": (record([]), "'prompt' has no messages"),
    "no rejected": ({"prompt": "q", "chosen": side("t", "a")}, "no field 'rejected'"),
    "surrogate": (record(chosen=("\ud800", "a")), "'trace' holds half a surrogate"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("mixed", [False, True])
def test_bad_records_are_named(tmp_path, name, mixed):
    bad, message = BAD[name]
    path = write_lines(tmp_path / "pairs.jsonl", [record(), bad])
    make = make_mixed_splits if mixed else make_splits
    with pytest.raises(InputError, match=f"pairs.jsonl row 2: .*{message}") as error:
        make(open_source(path), TOKENIZER)
    assert "\n" not in str(error.value)


def test_empty_answers_and_identical_sides_are_counted():
    blank = record(chosen=("t", " "))
    assert parse(blank, "row 1", sides=2, drop_empty=True) == EMPTY
    same = record(rejected=("t", "a"))
    # The same answer after other traces is a pair with a trace, and none without.
    answer = record(chosen=("one", "a"), rejected=("two", "a"))
    plan = plan_of([record(), blank, same, answer], drop_empty=True)
    assert plan.report[f"dropped: {EMPTY}"] == 1
    assert plan.report[f"dropped: {IDENTICAL}"] == 2
    assert plan.train.columns["empty_trace"].tolist() == [False, True, False]


# ---- text and tokens -----------------------------------------------------------------


def test_trace_pairs_and_empty_trace_pairs_of_strings():
    plan = plan_of([record("q: ", ("t1", " a"), ("u", " b"))])
    assert pair_texts(plan.train) == [
        ("<s>q: ", "<think>t1</think> a</s>", "<think>u</think> b</s>"),
        ("<s>q: <think></think>", " a</s>", " b</s>"),
    ]
    assert plan.report["with a trace"] == plan.report["with an empty trace"] == 1
    plan = plan_of([record()], trace_open="[", trace_close="] ")
    assert pair_texts(plan.train) == [
        ("<s>q", "[t] a</s>", "[u] b</s>"),
        ("<s>q[] ", "a</s>", "b</s>"),
    ]


@pytest.mark.parametrize(
    "prompt, opening, empty",
    [
        ("q <think>\n", "", "q <think>\n</think>"),
        ("q <think> </think>\n", "<think>", "q <think> </think>\n"),
        ("q </think>", "<think>", "q </think><think></think>"),
    ],
)
def test_markers_a_prompt_ends_with_are_not_written_again(prompt, opening, empty):
    (trace, chosen, _), (without, answer, _) = pair_texts(
        plan_of([record(prompt)]).train
    )
    assert trace == "<s>" + prompt and chosen == f"{opening}t</think>a</s>"
    assert without == "<s>" + empty and answer == "a</s>"


def test_an_ordinary_plan_has_trace_pairs_only():
    records = [record(), {"prompt": "q", "chosen": "a", "rejected": "b"}]
    pairs = plan_of(records, mixed=False).train
    assert pair_texts(pairs) == [
        ("<s>q", "<think>t</think>a</s>", "<think>u</think>b</s>"),
        ("<s>q", "a</s>", "b</s>"),
    ]
    assert not pairs.columns["empty_trace"].any()
    # The same tokens as those of the whole text given as a string.
    whole = {"prompt": "q", "chosen": "<think>t</think>a"}
    (expected,) = pair_texts(
        plan_of([whole | {"rejected": "<think>u</think>b"}], mixed=False).train
    )
    assert pair_texts(pairs)[0] == expected


def test_pairs_without_a_trace_get_an_empty_one_where_the_run_mixes():
    plain = {"prompt": "q", "chosen": "a", "rejected": "b"}
    plan = plan_of([record("p"), plain])
    assert plan.train.columns["empty_trace"].tolist() == [False, True, True]
    assert pair_texts(plan.train)[2] == ("<s>q<think></think>", "a</s>", "b</s>")
    plan = plan_of([record("p"), plain], empty=[plain | {"prompt": "r"}])
    assert plan.train.columns["empty_trace"].tolist() == [False, True, True]
    assert [x[0] for x in pair_texts(plan.train)] == [
        "<s>p",
        "<s>q<think></think>",
        "<s>r<think></think>",
    ]


def test_round_trip_through_a_word_tokenizer(tmp_path):
    make_tokenizer(tmp_path)
    tok = load_tokenizer(tmp_path)
    plan = plan_of(
        [record("the film was", ("good food", " great"), ("bad plot", " dull"))],
        tok,
        trace_open=" <extra_38> ",
        trace_close=" <extra_39> ",
    )
    start = ids(tok, "<s>", "the", "film", "was")
    assert plan.train.prompt(0).tolist() == start
    expected = ids(tok, "<extra_38>", "good", "food", "<extra_39>", "great", "</s>")
    assert plan.train.completion(0, 0).tolist() == expected
    assert plan.train.prompt(1).tolist() == start + ids(tok, "<extra_38>", "<extra_39>")
    assert plan.train.completion(1, 1).tolist() == ids(tok, "dull", "</s>")


def test_solutions_with_their_steps_as_traces(shared, stories260k):
    tok = load_tokenizer(stories260k)
    source = open_source(shared / "data" / "gsm8k_solution_pairs.jsonl.gz")
    records = []
    for row in range(60):
        parts = [
            source[row][name].rpartition("\nA: ") for name in ("chosen", "rejected")
        ]
        if all(found for _, found, _ in parts):
            sides = [(steps, f"\nA: {number}") for steps, _, number in parts]
            records.append(record(source[row]["prompt"], *sides))
    plan = plan_of(records, tok, max_length=200, max_prompt_length=100)
    assert len(records) > 40 and plan.report["traces cut"] > 10
    for n, row in enumerate(plan.train.columns["row"]):
        for k, name in enumerate(("chosen", "rejected")):
            answer = records[row][name]["answer"]
            text = tok.decode(plan.train.completion(n, k))
            assert text.endswith(f"{answer}</s>")
            if not plan.train.columns["empty_trace"][n]:
                before = text.removesuffix(f"</think>{answer}</s>").strip()
                kept = before.removeprefix("<think>").rstrip("\ufffd")
                assert before.startswith("<think>")
                assert records[row][name]["trace"].startswith(kept)
    lengths = plan.train.prompt_lengths[:, None] + plan.train.completion_lengths
    assert lengths.max() == 200
    assert (plan.train.completion_lengths[plan.train.columns["empty_trace"]] < 20).all()


def test_the_answer_alone_is_predicted_behind_an_empty_trace():
    pairs = plan_of([record("q", ("t", "xyz"), ("u", "w"))]).train
    assert [len(pairs.completion(1, k)) for k in (0, 1)] == [4, 2]
    (batch,) = padded_layout(pairs, batch_size=2).eval_batches(pairs)
    assert batch.empty_trace.tolist() == [[[False], [True]]]
    used = batch.completions >= 0
    assert used[0, 1].sum(-1).tolist() == [4, 2]
    assert batch.targets[0, 1, 0][used[0, 1, 0]].tolist() == ids(
        TOKENIZER, *"xyz", "</s>"
    )
    whole = "<s>q<think></think>xyz</s>"
    assert TOKENIZER.decode(batch.tokens[0, 1, 0, : batch.lengths[0, 1, 0]]) == whole
    # What predicts the first token of the answer is the last one of the marker.
    assert batch.predictors[0, 1, 0, 0] == len("sq<think></think>") - 1


# ---- chat templates ------------------------------------------------------------------

TURN = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_that_knows_nothing_of_thinking():
    assert chat_texts(CHATML) == [
        (TURN, "<think>t</think>a<|im_end|>", "<think>u</think>b<|im_end|>"),
        (TURN + "<think></think>", "a<|im_end|>", "b<|im_end|>"),
    ]


@pytest.mark.parametrize("outer", ["", "\n"])
def test_a_template_that_knows_enable_thinking(outer):
    """Given traces stripped or as sampled, the layout is the template's own."""
    found = chat_texts(QWEN, (f"{outer}t{outer}", f"{outer}{outer}a"))
    assert found == [
        (
            TURN,
            "<think>\nt\n</think>\n\na<|im_end|>",
            "<think>\nu\n</think>\n\nb<|im_end|>",
        ),
        (TURN + "<think>\n\n</think>\n\n", "a<|im_end|>", "b<|im_end|>"),
    ]


def test_a_template_that_opens_the_thought_and_strips_it_later():
    assert chat_texts(R1) == [
        ("User:qAssistant:<think>\n", "t</think>a<|im_end|>", "u</think>b<|im_end|>"),
        ("User:qAssistant:<think>\n</think>", "a<|im_end|>", "b<|im_end|>"),
    ]


def test_a_template_that_opens_the_thought_and_keeps_it():
    assert chat_texts(OPENED) == [
        (TURN + "<think>", "t</think>a<|im_end|>", "u</think>b<|im_end|>"),
        (TURN + "<think></think>", "a<|im_end|>", "b<|im_end|>"),
    ]


def test_a_template_that_switches_thinking_off_in_its_own_way_gets_no_marker():
    (trace, *_), (without, *answers) = chat_texts(NO_THINK)
    assert trace == TURN and without == "/no_think " + TURN
    assert answers == ["a<|im_end|>", "b<|im_end|>"]


def test_a_template_that_trims_and_writes_bos_and_eos():
    tok = byte_tokenizer(merges=(), template=LLAMA)
    assert pair_texts(plan_of([record([USER], ("t ", " a"))], tok).train, tok) == [
        ("<s>[INST] q [/INST]", " <think>t </think> a</s>", " <think>u</think>b</s>"),
        ("<s>[INST] q [/INST]<think></think>", " a</s>", "b</s>"),
    ]


def test_markers_that_are_not_the_templates_are_written_all_the_same():
    found = chat_texts(QWEN, trace_open="<r>", trace_close="</r>")
    assert found[0] == (TURN, "<r>t</r>a<|im_end|>", "<r>u</r>b<|im_end|>")


@pytest.mark.parametrize("word", ["end", "think", "<think>", "", "t\n</think>"])
def test_traces_and_answers_that_look_like_markup(word):
    for template in (CHATML, R1, OPENED):
        (_, chosen, _), (_, answer, _) = chat_texts(template, (word, "end"))
        opening = "<think>" if template == CHATML else ""
        assert chosen == f"{opening}{word}</think>end<|im_end|>"
        assert answer == "end<|im_end|>"


def test_earlier_turns_and_ordinary_pairs_know_nothing_of_thinking():
    seen = "{{ 'knows' if enable_thinking is defined else 'does not' }} "
    tok = byte_tokenizer(bos=None, eos="<|im_end|>", template=seen + CHATML)
    plain = {"prompt": [USER], "chosen": "a", "rejected": "b"}
    (found,) = pair_texts(plan_of([plain], tok, mixed=False).train, tok)
    assert found == ("does not " + TURN, "a<|im_end|>", "b<|im_end|>")
    assert tok.decode(encode_prompt(tok, [USER])) == "does not " + TURN


def test_a_template_that_rewrites_the_answer_is_refused():
    shouts = CHATML.replace(
        "m['content']",
        "m['content'] | upper if m['role'] == 'assistant' else m['content']",
    )
    with pytest.raises(
        InputError, match="records row 1: .*changes the text of the answer"
    ):
        chat_texts(shouts, ("t", "a"))
    tok = byte_tokenizer()
    with pytest.raises(InputError, match="records row 1: .*no chat template"):
        plan_of([record([USER])], tok)


@pytest.mark.parametrize("template", [CHATML, QWEN, R1, OPENED, NO_THINK])
def test_prompts_to_sample_from_are_those_of_training(template):
    tok = byte_tokenizer(bos=None, eos="<|im_end|>", template=template)
    pairs = plan_of([record([USER])], tok).train
    for n, thinking in enumerate((True, False)):
        prompt = encode_prompt(tok, [USER], thinking=thinking)
        assert prompt == pairs.prompt(n).tolist()
    markers = TraceMarkers("[", "]")
    assert encode_prompt(TOKENIZER, "q", thinking=False, markers=markers) == ids(
        TOKENIZER, "<s>", *"q[]"
    )


# ---- cutting -------------------------------------------------------------------------


def cut(tokenizer, example, max_length, *, max_prompt_length=8, markers="<>"):
    (result,) = tokenize(
        [example],
        ["row 1"],
        tokenizer,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        markers=TraceMarkers(*markers),
    )
    return result


def test_long_traces_lose_their_end_and_answers_nothing():
    tok = byte_tokenizer(merges=())
    example = Example("q", ("xyz", "w"), traces=(("12345678",), ("9",)))
    for room in range(16, 5, -1):
        result = cut(tok, example, 2 + room)
        # Eight of the trace, three of the answer, two markers, EOS: 14 tokens.
        kept = "12345678"[: max(0, room - 6)]
        assert result.completions[0] == ids(tok, *f"<{kept}>xyz", "</s>")
        assert result.completions[1] == ids(tok, *"<9>w", "</s>")
        assert result.traces_cut == (room < 14) and result.completions_cut == 0
        assert len(result.completions[0]) == min(room, 14)
    assert cut(tok, example, 2 + 5) == LONG_ANSWER


def test_a_cut_prompt_leaves_its_room_to_the_trace():
    tok = byte_tokenizer(merges=())
    example = Example("q" * 30, ("x", "w"), traces=(("1" * 30,), ("2" * 30,)))
    result = cut(tok, example, 20, max_prompt_length=8)
    assert result.prompt == ids(tok, "<s>", *"q" * 7) and result.prompt_cut
    assert result.completions[0] == ids(tok, "<", *"1" * 8, *">x", "</s>")
    assert result.traces_cut == 2


@pytest.mark.parametrize("seed", range(10))
def test_cutting_where_tokens_reach_across_every_boundary(seed):
    """Text oracle: open, a beginning of the trace, close, answer; nothing else."""
    draw = random.Random(seed)
    merges = (("a", "b"), ("ab", "<"), (">", "a"), ("b", ">"), ("<", "a"), ("b>", "a"))
    tok = byte_tokenizer(merges=merges)
    word = lambda letters, high: "".join(draw.choices(letters, k=draw.randint(1, high)))
    cuts = 0
    for _ in range(20):
        prompt, trace, answer = word("qab", 5), word("ab<>é", 30), word("ab<>é", 6)
        example = Example(prompt, (answer, "b"), traces=((trace,), ("",)))
        for max_length in range(8, 50, 3):
            result = cut(tok, example, max_length)
            if isinstance(result, str):
                continue
            chosen = result.completions[0]
            length = len(result.prompt) + len(chosen)
            # A byte that is half of a letter is no text.
            text = tok.decode(result.prompt[1:] + chosen).replace("\ufffd", "")
            start, end = prompt + "<", f">{answer}</s>"
            assert text.startswith(start) and text.endswith(end)
            kept = text[len(start) : len(text) - len(end)]
            # The token `b>` has the last letter of the trace and stays with the answer.
            last = trace.endswith("b") and kept.endswith("b")
            assert trace.startswith((kept, kept[:-1] if last else kept))
            assert result.completions_cut == 0
            assert length == max_length if result.traces_cut else length <= max_length
            cuts += result.traces_cut
    assert cuts > 20


@pytest.mark.parametrize("template", [CHATML, QWEN, R1, OPENED])
def test_cutting_under_a_chat_template_keeps_its_layout(template):
    long = [record([USER], ("0123456789" * 5, "answer"), ("u", "b"))]
    tok = byte_tokenizer(bos=None, eos="<|im_end|>", merges=(), template=template)
    full = plan_of(long, tok).train
    prompt, whole, _ = pair_texts(full, tok)[0]
    size = full.longest - 20
    plan = plan_of(long, tok, max_length=size, max_prompt_length=60)
    (cut_prompt, chosen, _), (_, answer, _) = pair_texts(plan.train, tok)
    trace = "0123456789" * 5
    assert cut_prompt == prompt and answer == "answer<|im_end|>"
    assert chosen == whole.replace(trace, trace[:30])
    assert plan.report["traces cut"] == 1


def test_answers_that_do_not_fit_are_dropped_and_counted_where_there_are_traces():
    long = record("q", ("t", "y" * 40), ("u", "n"))
    plan = plan_of([record(), long], max_length=40, max_prompt_length=20)
    assert plan.report[f"dropped: {LONG_ANSWER}"] == 2
    assert plan.train.columns["row"].tolist() == [0, 0]
    assert not plan.report["completions cut"]
    # A run without traces cuts its completions as it always did.
    plain = {"prompt": "q", "chosen": "y" * 60, "rejected": "n"}
    plan = plan_of([plain], mixed=False, max_length=40, max_prompt_length=20)
    assert plan.report["completions cut"] == 1


def test_blank_markers_are_refused():
    with pytest.raises(InputError, match="trace_close is blank"):
        DataOptions(trace_close=" ")
