"""The exact tokens of conversations, in a file for people to read: golden/tokens.txt.

Each record is rendered by each chat template: a line for its prompt, and one for each
answer with its mask, 1 for the tokens that the loss is on.  "·" separates tokens, and Ġ
and Ċ are a space and a newline.  A record that a template cannot render has its error.

    python -m tests.test_golden_tokens

writes the file again; read the difference before committing it.
"""

import json
from pathlib import Path

import pytest

from jaxpref.data import DataOptions, ListSource, make_splits
from jaxpref.data.kinds import ANSWERS, PAIRS
from jaxpref.errors import InputError
from tests.data_tokenizers import CHATML, LLAMA, byte_tokenizer

GOLDEN = Path(__file__).parent / "golden" / "tokens.txt"
WORDS = (
    *("user", "assistant", "system", "tool", "think", "four", "two", "time", "clock"),
    *("function", "arguments", "name", "type", "brief", "yes", "no"),
)
"""Each is one token."""
MERGES = list(
    dict.fromkeys((w[:n], w[n]) for w in sorted(WORDS) for n in range(1, len(w)))
)

TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
GENERATION = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TEMPLATES = {
    "chatml": CHATML,
    "blocks": "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|im_start|>assistant\n' }}{% generation %}{{ m['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{{ '\n' }}{% else %}" + TURN + "{% endif %}{% endfor %}"
    "" + GENERATION,
    "tools": "{% if tools %}{{ '<|im_start|>system\ntools: ' + (tools|tojson)"
    " + '<|im_end|>\n' }}{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['content'] %}{{ m['content'] }}{% endif %}"
    "{% if m.tool_calls %}{{ m.tool_calls|tojson }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}" + GENERATION,
    "thinking": "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}"
    "{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think></think>' }}{% endif %}{% endif %}",
    "r1": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '<U>' + m['content'] }}{% else %}{% set c = m['content'] %}"
    "{% if '</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}"
    "{{ '<A>' + c + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<A><think>\n' }}{% endif %}",
    "llama": LLAMA,
}
CALL = [{"type": "function", "function": {"name": "clock", "arguments": "{}"}}]
CLOCK = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]


def turn(role, content, **others):
    return {"role": role, "content": content, **others}


def pair(prompt, chosen, rejected, **others):
    """A record with messages, each answer a text or a message."""
    sides = [
        turn("assistant", x) if isinstance(x, str) else x for x in (chosen, rejected)
    ]
    return {"prompt": prompt, "chosen": sides[:1], "rejected": sides[1:], **others}


HI, TIME, SUM = ([turn("user", x)] for x in ("hi", "time?", "2+2?"))
CASES = {
    "01 row 1, tools": pair(TIME, "ten", "no", tools=CLOCK),
    "02 row 1, a call in the history": pair(
        [*TIME, turn("assistant", None, tool_calls=CALL), turn("tool", "10:00")],
        *("ten", "no"),
    ),
    "02 row 2, a call as the answer": pair(
        TIME, turn("assistant", "", tool_calls=CALL), "no idea"
    ),
    "03 row 1, system": pair(HI, "yes", "no", system="Answer in one word."),
    "03 row 2, enable_thinking": pair(
        HI, "yes", "no", chat_template_kwargs={"enable_thinking": False}
    ),
    "04 row 1, thoughts": pair(
        SUM, "<think>two and two</think>four", "<think>hm</think>five"
    ),
    "04 row 2, thoughts alone differ": pair(
        SUM, "<think>two and two</think>four", "<think>I guess</think>four"
    ),
    "05 row 1, one turn": pair(HI, "yes", "no"),
    "09 row 2, system and answers as texts": {
        "prompt": [
            turn("system", "Be brief and kind."),
            turn("user", "Tom saw a dog and ran. What now?"),
        ],
        "chosen": "yes",
        "rejected": "no",
    },
    "17 row 1, a message a side": {
        "prompt": HI,
        "chosen": turn("assistant", "yes"),
        "rejected": turn("assistant", "no"),
    },
    "17 row 2, ShareGPT": {
        "conversations": [{"from": "human", "value": "hi"}],
        "chosen": {"from": "gpt", "value": "yes"},
        "rejected": {"from": "gpt", "value": "no"},
    },
    "17 row 4, parts of a text": {
        "prompt": [turn("user", [{"type": "text", "text": "hi"}])],
        "chosen": "yes",
        "rejected": "no",
    },
}
"""Records of ../shared/cases, by case and row."""
THREE = [turn("assistant", "yes"), turn("user", "hi"), turn("assistant", "no")]
TURNS = {
    "a demonstration": {"messages": [*HI, *THREE]},
    "a tool between two turns": {
        "messages": [*TIME, turn("assistant", "clock"), turn("tool", "10"), THREE[0]]
    },
    "a thought in an earlier turn": {
        "messages": [*SUM, turn("assistant", "<think>hm</think>four"), *HI, THREE[0]]
    },
    "a pair with several turns": {
        "prompt": HI,
        "chosen": THREE,
        "rejected": [turn("assistant", "no")],
    },
    "a pair that shares a turn": {
        "chosen": [*HI, *THREE],
        "rejected": [*HI, *THREE[:2], turn("assistant", "two")],
    },
}
"""Records with several turns, read with --train-turns all."""


def tokenizers():
    """A tokenizer for each template, by name."""
    for name, template in TEMPLATES.items():
        chatml = dict(eos="<|im_end|>", bos=None) if "<|im_start|>" in template else {}
        yield name, byte_tokenizer(template=template, merges=MERGES, **chatml)
    # The model folder says that <|im_end|> ends an answer; EOS is another token.
    both = byte_tokenizer(template=CHATML, merges=MERGES, bos=None)
    both.folder_stop_tokens = (both.get_vocab()["<|im_end|>"], both.eos_token_id)
    yield "chatml_eos2", both


def shown(record, tokenizer, **options):
    """The lines of a record."""
    options = DataOptions(heldout_fraction=0.0, **options)
    kind = PAIRS if "chosen" in record else ANSWERS
    source = ListSource([record])
    try:
        pairs = make_splits(source, tokenizer, options, kind=kind).train
    except InputError as error:
        yield f"error    | {error}"
        return
    joined = lambda ids: "·".join(tokenizer.convert_ids_to_tokens(ids.tolist()))
    yield f"prompt   | {joined(pairs.prompt(0))}"
    for side in range(pairs.num_completions):
        completion = pairs.completion(0, side)
        trained = {*pairs.targets(0, side).tolist()}
        mask = "".join(str(int(n in trained)) for n in range(len(completion)))
        name = ("chosen", "rejected")[side] if kind == PAIRS else "answer"
        yield f"{name:8} | {joined(completion)} | {mask}"


def golden():
    """The text of the file."""
    parts = []
    for name, tokenizer in tokenizers():
        for title, records, options in (
            ("", CASES, {}),
            (", --train-turns all", TURNS, {"train_turns": "all"}),
        ):
            parts.append(f"==== {name}{title}")
            for case, record in records.items():
                lines = shown(record, tokenizer, **options)
                parts.append("\n".join([case, *lines]))
    return "\n\n".join(parts) + "\n"


def test_tokens_are_those_of_the_file():
    found, expected = golden().split("\n\n"), GOLDEN.read_text("utf-8").split("\n\n")
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected):
        assert ours == theirs


@pytest.mark.parametrize("name", CASES)
def test_records_are_those_of_the_cases(name, shared):
    case, _, row = name.partition(",")[0].split()
    lines = (shared / "cases" / f"{case}.jsonl").read_text().splitlines()
    assert json.loads(lines[int(row) - 1]) == CASES[name]


if __name__ == "__main__":
    GOLDEN.write_text(golden(), "utf-8")
