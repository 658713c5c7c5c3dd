"""Chat templates are programs of strangers: limits on time, memory and length."""

import pytest

from jaxpref.data import template
from jaxpref.data.template import render_template
from jaxpref.errors import InputError
from tests.data_tokenizers import byte_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = [
    {"role": "user", "content": "café \N{GRINNING FACE}\n"},
    {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "x": [1.5]}]},
]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {}}}


@pytest.mark.parametrize(
    ("text", "variables"),
    [
        (CHATML, {}),
        (CHATML, {"enable_thinking": False}),
        ("{{ bos_token }}{{ tools | tojson }}{{ messages[1] }}", {"tools": [WEATHER]}),
        ("{{ enable_thinking }}{{ nothing }}|", {"enable_thinking": True}),
        ("{% generation %}{{ messages[0].content | trim }}{% endgeneration %}", {}),
        ({"default": CHATML, "tool_use": "{{ tools[0].function.name }}"}, {}),
        ({"default": CHATML, "tool_use": "{{ tools[0].type }}"}, {"tools": [WEATHER]}),
    ],
)
@pytest.mark.parametrize("open_answer", [True, False])
def test_the_text_is_that_of_apply_chat_template(text, variables, open_answer):
    tokenizer = byte_tokenizer(template=text)
    expected = tokenizer.apply_chat_template(
        CHAT, tokenize=False, add_generation_prompt=open_answer, **variables
    )
    found = render_template(CHAT, "a row 1", tokenizer, open_answer, **variables)
    assert found == expected


TOO_MUCH = "needs more than 512 MiB; use a template that does less"
DOUBLED = (
    "{% set n = namespace(a='ab') %}{% for i in range(64) %}"
    "{% set n.a = n.a ~ n.a %}{% endfor %}{{ n.a | length }}"
)
REFUSED = {
    "{{ 1 / 0 }}": "rejects it (division by zero)",
    "{{ 10 ** 400 * 1.5 }}": "rejects it (int too large to convert to float)",
    "{{ raise_exception('only one turn') }}": "rejects it (only one turn)",
    "{{ messages[9].content.x }}": "rejects it (list object has no element 9)",
    "{{ nothing() }}": "rejects it ('nothing' is undefined)",
    "{{ messages[0].content.missing.x }}": "has no attribute 'missing'",
    "{{ '%d' % 'x' }}": "rejects it (%d format: a real number is required",
    "{% for %}": "rejects it (Expected an expression",
    "{% include '/etc/passwd' %}": "rejects it (no loader",
    "{{ ''.__class__.__mro__ }}": "rejects it (access to attribute '__class__'",
    "{% for i in range(10 ** 12) %}x{% endfor %}": "rejects it (Range too big",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}": "calls itself without end",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": "calls itself without end",
    "{{ 'a' * 10 ** 10 }}": TOO_MUCH,
    "{{ [0] * 10 ** 10 }}": TOO_MUCH,
    "{{ 'x' | center(10 ** 10) }}": TOO_MUCH,
    "{{ '%1000000000d' % 1 }}": TOO_MUCH,
    "{{ '{:1000000000}'.format(1) }}": TOO_MUCH,
    "{{ [1] | tojson(indent=10 ** 10) }}": TOO_MUCH,
    DOUBLED: TOO_MUCH,
    "{{ 'a' * 20000000 }}": "writes 20,000,000 characters; the limit is 10,000,000",
}


@pytest.mark.parametrize("text", REFUSED)
def test_a_template_that_fails_or_needs_too_much(text):
    tokenizer = byte_tokenizer(template=text)
    with pytest.raises(InputError) as refused:
        render_template(CHAT, "a.jsonl row 7", tokenizer, True)
    message = str(refused.value)
    assert message.startswith("a.jsonl row 7: the chat template "), message
    assert REFUSED[text] in message and "\n" not in message, message


def test_a_template_that_never_ends(monkeypatch):
    children = template._Children()
    monkeypatch.setattr(template, "_CHILDREN", children)
    monkeypatch.setattr(template, "MAX_SECONDS", 1)
    # Within C, where no signal handler runs.
    endless = byte_tokenizer(template="{{ 10 ** (10 ** 8) }}")
    with pytest.raises(InputError, match="a row 1: the chat template takes more than"):
        render_template(CHAT, "a row 1", endless, True)
    # The process is restarted for the next template.
    good = byte_tokenizer(template="{{ messages[0].role }}")
    assert render_template(CHAT, "a row 1", good, False) == "user"
    children.close()


def test_a_process_that_is_killed(monkeypatch):
    children = template._Children()
    monkeypatch.setattr(template, "_CHILDREN", children)
    tokenizer = byte_tokenizer(template="{{ messages[0].role }}")
    assert render_template(CHAT, "a row 1", tokenizer, False) == "user"
    children._child.kill()
    with pytest.raises(InputError, match="its process ended by SIGKILL"):
        render_template(CHAT, "a row 1", tokenizer, False)
    assert render_template(CHAT, "a row 1", tokenizer, False) == "user"
    children.close()


def test_a_tokenizer_with_a_format_of_its_own():
    tokenizer = byte_tokenizer(template="unused")
    tokenizer.apply_chat_template = lambda messages, **options: 7
    with pytest.raises(InputError, match="it returns int, not a string"):
        render_template(CHAT, "a row 1", tokenizer, False)
