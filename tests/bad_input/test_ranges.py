"""Every option of every command, with values that no option should swallow."""

import itertools
import types
import typing
from dataclasses import MISSING

import pytest

from experiments import align, annotators, bvpo, noise_methods, noisy_sentiment
from jaxpref.cli import audit, evaluate, plan, sample, train
from jaxpref.cli.objectives import LOSSES, MIXTURES, WRAPPERS, Choice
from jaxpref.cli.options import Option, Part, options_of, parse
from jaxpref.cli.words import split
from jaxpref.errors import InputError
from jaxpref.plan.chips import parse_topology

REQUIRED = {
    "train": ["--model", "m", "--data", "d", "--out", "o"],
    "evaluate": ["--model", "m", "--data", "d", "--out", "o"],
    "sample": ["--model", "m"],
    "audit": ["--model", "m", "--data", "d", "--out", "o"],
    "plan": ["--model", "m", "--topology", "cpu:8", "--batch", "8", "--seq", "64"],
    "align": ["--model", "m", "--data", "d", "--out", "o"],
}
PARTS = {
    "train": train.parts_of(Choice()),
    "evaluate": evaluate.PARTS,
    "sample": sample.PARTS,
    "audit": audit.PARTS,
    "plan": plan.parts_of(Choice()),
    "align": {"all": Part(align.AlignConfig)},
    "annotators": {"all": Part(annotators.Options)},
    "bvpo": {"all": Part(bvpo.Options)},
    "noise_methods": {"all": Part(noise_methods.Options)},
    "noisy_sentiment": {"all": Part(noisy_sentiment.Options)},
}
OPTIONS = {name: options_of(parts) for name, parts in PARTS.items()}


def refusal(command: str, name: str, value: str, **others: list[str]) -> str | None:
    """The complaint about a value; None if it is accepted."""
    given = split(REQUIRED.get(command, [])) | {name: [value]} | others
    try:
        if command == "train":
            train.config_of(given)
        else:
            parsed = parse(PARTS[command], given, command=command)
        if command == "plan":
            Choice().objective(parsed)
        if command == "align":
            align.runs_of(parsed.all)
    except InputError as error:
        return str(error)
    return None


def kinds(option: Option) -> set[type]:
    hint = option.type
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    members = typing.get_args(hint) if union else (hint,)
    return {kind for kind in members if kind in (int, float, str)}


each_option = pytest.mark.parametrize(
    ("command", "name"), [(c, name) for c in OPTIONS for name in OPTIONS[c]]
)
NUMBERS = {
    int: ["", "nan", "inf", "1.5", "1e3", "0x10", "2147483648", "1" + "0" * 30],
    float: ["", "nan", "-nan", "inf", "-inf", "1e400", "-1e400", "1e999999999", "0,5"],
}
TEXTS = ["", " ", "\t\n", "a\udcff", "a\0b"]
RIGHT = {
    ("max-loss-rise", "inf"),  # "inf allows any rise"
    ("max-loss-rise", "1e400"),
    ("max-loss-rise", "1e999999999"),
    ("seed", "2147483648"),
    ("inject.seed", "2147483648"),
}


@each_option
def test_values_that_no_option_takes(command, name):
    found = kinds(OPTIONS[command][name])
    values = itertools.chain.from_iterable(NUMBERS.get(kind, ()) for kind in found)
    for value in TEXTS if found == {str} else values:
        if (name, value) in RIGHT:
            continue
        complaint = refusal(command, name, value)
        assert complaint is not None, f"--{name} {value!r} is accepted"
        plain = name.rpartition(".")[2]
        assert plain in complaint or plain.replace("-", "_") in complaint, complaint
        assert "\0" not in complaint, complaint


MESH = {f"mesh.{axis}" for axis in ("data", "fsdp", "expert", "tensor")}
"""-1 stands for the remaining devices; the product is checked with the devices."""


@each_option
def test_negative_numbers(command, name):
    if kinds(OPTIONS[command][name]) & {int, float} and name not in MESH:
        for value in ("-1", "-2147483647"):
            assert refusal(command, name, value), f"--{name} {value} is accepted"


@pytest.mark.parametrize("command", ["train", "sample", "audit", "align"])
@pytest.mark.parametrize(
    ("seed", "fits"),
    [
        ("0", True),
        (str(2**31), True),
        (str(2**32 - 1), True),
        (str(2**32), False),  # the random numbers of seed 0
        (str(2**32 + 5), False),
        (str(2**64), False),
        ("-1", False),  # those of 2^32 - 1
        ("1.0", False),
    ],
)
def test_seeds(command, seed, fits):
    assert (refusal(command, "seed", seed) is None) == fits
    if command == "train":
        rate = {"inject.flip-rate": ["0.1"]}
        assert (refusal(command, "inject.seed", seed, **rate) is None) == fits


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning-rate", "1e-46"),  # 0 in float32
        ("learning-rate", "1e39"),  # infinite in float32
        ("adam-eps", "1e-50"),
        ("adam-b1", "0.99999999999"),  # 1 in float32
        ("adam-b2", "0.99999998"),
        ("weight-decay", "1e400"),
        ("loader-processes", "100000"),
        ("epochs", "0"),
        ("heldout-fraction", "1.1"),
        ("keep-best", "max:loss"),
        ("max-loss-rise", "0"),
        ("trace-open", " "),
        ("row-length", "0"),
        ("row-length", "2000000000"),
    ],
)
def test_values_at_the_ends_of_the_range(name, value):
    complaint = refusal("train", name, value)
    assert complaint is not None
    assert name in complaint or name.replace("-", "_") in complaint


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch", "2000000000"), ("seq", "2000000000"), ("row-length", "2000000000")],
)
def test_plans_too_large_to_make(name, value):
    assert name.replace("-", "_") in refusal("plan", name, value)


@pytest.mark.parametrize(
    "topology",
    ["cpu:5000", "cpu:2000000000", "v5e:100000x100000", "99999xv5p:4x4x4", "cpu:0"],
)
def test_topologies_too_large_to_make(topology):
    with pytest.raises(InputError, match=f"--topology {topology}: "):
        parse_topology(topology)


NOT_FINITE = "nan", "inf", "-inf", "1e400", ""
CHOICES = [
    *(Choice(loss=name) for name in LOSSES),
    *(Choice(wrapper=name) for name in WRAPPERS),
    *(Choice(mixture=name) for name in MIXTURES),
]


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice.about)
def test_options_of_losses_and_objectives(choice):
    options = options_of(choice.parts)
    needed = {o.name: ["0.25"] for o in options.values() if o.default is MISSING}
    command = split([*REQUIRED["train"], *choice.about.split()]) | needed
    for name, option in options.items():
        # Any word may name an attribute.
        wrong = ("",) if option.type == tuple[str, ...] else NOT_FINITE
        for value in wrong:
            with pytest.raises(InputError) as refused:
                train.config_of(command | {name: [value]})
            plain, message = name.rpartition(".")[2], str(refused.value)
            named = plain in message or plain.replace("-", "_") in message
            assert named, f"--{name} {value}: {message}"


@pytest.mark.parametrize(
    "content",
    [
        "seed: 4294967296",
        "learning-rate: .nan",
        "learning-rate: -.inf",
        "batch-size: 1e3",
        "batch-size: 99999999999999999999",
        'eval-data: ""',
        'eval-data: "a\\0b"',
        "adam-b1: 0.99999999999",
        "inject: {flip-rate: .inf}",
        "mesh: {data: 1.5}",
        "optimizer: [adamw, adafactor]",
        "seed: [[1, 2], [3]]",
        "seed: {a: {b: {c: {d: {e: 1}}}}}",
        "a: &a [x, x]\nb: &b [*a, *a]\nseed: [*b, *b]",
        "seed: &s {s: *s}",
        "seed: 1\nseed: 2147483648000",
        "? [1, 2]\n: 3",
        "- seed",
        "seed: !!python/object/apply:os.system ['true']",
        "\x00",
        "[" * 20_000,
        "2026-11-29",
        "",
    ],
)
def test_config_files(tmp_path, content):
    path = tmp_path / "options.yaml"
    path.write_text(content)
    with pytest.raises(InputError):
        train.config_of(split(REQUIRED["train"]) | {"config": [str(path)]})
