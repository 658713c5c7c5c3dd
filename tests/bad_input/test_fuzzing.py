"""Inputs drawn at random: a clean result or one clear line, within time and memory.

    python -m pytest -m slow tests/bad_input/test_fuzzing.py

Every example has 10 seconds, and all of them together 1 GiB more than the process has
at the start.  `--hypothesis-seed N` repeats a run.
"""

import datetime
import json
import resource
from pathlib import Path

import pytest

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxpref import data
from jaxpref.cli import audit, evaluate, plan, sample, train
from jaxpref.cli.objectives import LOSSES, MIXTURES, WRAPPERS, Choice
from jaxpref.cli.options import options_of, parse
from jaxpref.cli.words import split
from jaxpref.data.noise import read_rates
from jaxpref.data.template import render_template
from jaxpref.errors import InputError
from jaxpref.models.folder import check_folder
from jaxpref.report.training import read_records
from jaxpref.runtime.metrics_file import MetricsWriter, read_metrics
from tests.data_tokenizers import byte_tokenizer
from tests.tiny import make_model_folder

pytestmark = pytest.mark.slow
MEMORY = 2**30
fuzzed = settings(
    max_examples=400,
    deadline=datetime.timedelta(seconds=10),
    suppress_health_check=list(HealthCheck),
    database=None,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = make_model_folder(tmp_path_factory.mktemp("fuzzed") / "model")
    return folder, json.loads((folder / "config.json").read_text())


@pytest.fixture(autouse=True, scope="module")
def started(model):
    """What the first example would wait for: imports, and the process of templates."""
    question = [{"role": "user", "content": "q"}]
    render_template(question, "row 1", TOKENIZER, True)
    data.make_splits(
        data.ListSource([{"prompt": question, "chosen": "a", "rejected": "b"}]),
        TOKENIZER,
        data.DataOptions(heldout_fraction=0.0),
    )


@pytest.fixture(autouse=True, scope="module")
def limited_memory(started):
    """Once jax has its threads and their memory; soft, so that it can be lifted."""
    used = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = used * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def clean(function, *args, **kwargs):
    """Calls a function that may refuse, in one line of at most 2,000 characters."""
    try:
        return function(*args, **kwargs)
    except InputError as error:
        line = " ".join(str(error).split())
        assert 10 < len(line) < 2000, line[:3000]
        return None


numbers = (
    st.integers() | st.floats() | st.sampled_from([0, 1, -1, 2**31, 10**12, 1e308])
)
atoms = st.none() | st.booleans() | numbers | st.text(max_size=12)
FIELDS = (
    "prompt chosen rejected completion completions label labels messages role content "
    "tools tool_calls system images score score_chosen margin annotator weight flip "
    "ratings conversations from value chat_template_kwargs enable_thinking type text "
    "name function arguments reasoning_content thinking id"
).split()
ROLES = ["system", "user", "assistant", "tool", "developer", "human", "gpt", "x"]


def json_of(names):
    keys = st.sampled_from(names) | st.text(max_size=6)
    return st.recursive(
        atoms,
        lambda x: st.lists(x, max_size=3) | st.dictionaries(keys, x, max_size=4),
        max_leaves=8,
    )


texts = st.text(max_size=20) | st.sampled_from(
    ["<s>", "</s>", "<think>", "</think>a", "a" * 3000, "\N{GRINNING FACE}", "\ud800"]
)
turn = st.fixed_dictionaries(
    {"role": st.sampled_from(ROLES), "content": texts | json_of(FIELDS)},
    optional={"tool_calls": json_of(FIELDS), "reasoning_content": texts},
)
side = texts | st.lists(turn, max_size=4) | turn | json_of(FIELDS)
record = st.dictionaries(st.sampled_from(FIELDS), side, max_size=7) | (
    st.fixed_dictionaries(
        {"prompt": side, "chosen": side, "rejected": side},
        optional={name: json_of(FIELDS) for name in FIELDS[3:]},
    )
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKENIZER = byte_tokenizer(template=CHATML)


@fuzzed
@given(
    st.lists(record.map(json.dumps) | st.text(max_size=40), min_size=1, max_size=4),
    st.sampled_from([1, 2, None]),
    st.sampled_from([None, 4, 16]),
)
def test_records(tmp_path_factory, lines, sides, max_length):
    path = tmp_path_factory.getbasetemp() / "fuzzed.jsonl"
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    options = data.DataOptions(max_length=max_length, drop_empty=True)

    def splits():
        kind = data.Kind(sides)
        return data.make_splits(data.open_source(path), TOKENIZER, options, kind=kind)

    clean(splits)
    clean(lambda: data.read_prompts(data.open_source(path), TOKENIZER, limit=9))


@fuzzed
@given(st.binary(max_size=200), st.sampled_from([".jsonl", ".json", ".json.gz"]))
def test_bytes(tmp_path_factory, content, suffix):
    path = tmp_path_factory.getbasetemp() / f"fuzzed{suffix}"
    path.write_bytes(content)

    def read_all():
        source = data.open_source(path)
        return [source[n] for n in range(len(source))]

    clean(read_all)
    clean(read_rates, path)
    clean(read_records, path)
    clean(read_metrics, path)


CONFIG = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim rms_norm_eps max_position_embeddings model_type "
    "tie_word_embeddings initializer_range rope_theta rope_scaling rope_parameters "
    "architectures hidden_act attention_bias mlp_bias quantization_config rope_type "
    "factor low_freq_factor high_freq_factor original_max_position_embeddings dtype "
    "partial_rotary_factor torch_dtype eos_token_id bos_token_id"
).split()
sizes = st.sampled_from([0, 1, 2, 3, 4, 8, 16, 10**4, 10**8, 2**31 - 1, 2**31, 10**30])


@fuzzed
@given(st.dictionaries(st.sampled_from(CONFIG), sizes | json_of(CONFIG), max_size=4))
def test_configs(model, changes):
    folder, fields = model
    text = json.dumps(fields | changes)
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    clean(check_folder, folder)


pieces = st.sampled_from(
    [
        *("{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{ m.role }}"),
        *("{% for i in range(99999) %}", "{% if m %}", "{% else %}", "{% endif %}"),
        *("{{ 'a' * 10 ** 9 }}", "{{ 10 ** 10 ** 3 }}", "{{ 1 / 0 }}", "{{ m.x.y }}"),
        *("{% set n = namespace(a='x') %}", "{% set n.a = n.a ~ n.a %}", "{{ n.a }}"),
        *("{% macro f(x) %}", "{{ f(f) }}", "{% endmacro %}", "{{ f(1) }}"),
        *("{{ messages | tojson }}", "{{ messages | join }}", "{{ tools | tojson }}"),
        *("{{ 'x' | center(10 ** 8) }}", "{{ messages[0]['content'] | upper }}"),
        *("{{ raise_exception('no') }}", "{% generation %}", "{% endgeneration %}"),
        *("{{ strftime_now('%Y') }}", "{% break %}", "{{ dict(a=1) }}", "{{ cycler }}"),
        *("{% include 'x' %}", "{% raw %}", "{% endraw %}", "{{ ''.__class__ }}"),
        *("{%- if add_generation_prompt -%}", "{{ lipsum(n=10 ** 5) }}", "{{", "%}"),
        *("{{ eos_token }}", "{{ bos_token + 1 }}", "{{ (1,) * 10 ** 8 }}", "{# "),
    ]
)


@settings(fuzzed, max_examples=150)
@given(st.lists(pieces | st.text(max_size=10), max_size=8), st.lists(turn, max_size=3))
def test_templates(parts, messages):
    tokenizer = byte_tokenizer(template="".join(parts))
    clean(render_template, messages, "a row 1", tokenizer, True)


needed = "--model m --data d --out o".split()
COMMANDS = {
    "evaluate": (evaluate.PARTS, needed),
    "sample": (sample.PARTS, needed[:2]),
    "audit": (audit.PARTS, needed),
    "plan": (
        plan.parts_of(Choice()),
        "--model m --topology cpu:8 --batch 8 --seq 64".split(),
    ),
}
words = (
    st.text(max_size=10)
    | numbers.map(str)
    | st.sampled_from(
        ["auto", "none", "inf", "nan", "1e400", "true", "None", "a\udcff"]
    )
)


@fuzzed
@given(st.data())
def test_options(drawn):
    choice = drawn.draw(
        st.sampled_from(sorted(LOSSES)).map(lambda x: Choice(loss=x))
        | st.sampled_from(sorted(WRAPPERS)).map(lambda x: Choice(wrapper=x))
        | st.sampled_from(sorted(MIXTURES)).map(lambda x: Choice(mixture=x))
    )
    command = drawn.draw(st.sampled_from(["train", *COMMANDS]))
    if command == "train":
        names, fixed = options_of(train.parts_of(choice)), needed
    else:
        parts, fixed = COMMANDS[command]
        names = options_of(parts)
    values = st.lists(words, max_size=2)
    typed = drawn.draw(
        st.dictionaries(st.sampled_from(sorted(names)) | words, values, max_size=4)
    )
    if command == "train":
        line = split([*fixed, *choice.about.split()])
        clean(lambda: train.config_of(line | typed))
    else:
        clean(lambda: parse(parts, split(fixed) | typed, command=command))


@fuzzed
@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(
                ["seed", "loss", "mesh", "out", "batch-size", "name", "a.b"]
            ),
            json_of(["seed", "name", "data", "beta", "no-seed"]),
            max_size=3,
        ).map(json.dumps)  # JSON is YAML
        | st.text(max_size=30),
        max_size=3,
    )
)
def test_config_files(tmp_path_factory, parts):
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_bytes("\n".join(parts).encode("utf-8", "surrogatepass"))
    clean(lambda: train.config_of(split(needed) | {"config": [str(path)]}))


@fuzzed
@given(st.lists(json_of(["step", "loss", "eval_loss"]).map(json.dumps), max_size=5))
def test_metrics(tmp_path_factory, lines):
    folder = tmp_path_factory.getbasetemp() / "fuzzed_run"
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    MetricsWriter(folder, resumed_at=2).close()
    assert all(record["step"] <= 2 for record in read_metrics(folder / "metrics.jsonl"))
    clean(read_records, folder / "metrics.jsonl")
