"""The examples of CONTRIBUTING.md run as they are."""

import dataclasses
import functools
import re
import textwrap
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

from jaxpref import losses
from jaxpref.cli.objectives import options_type
from jaxpref.data import ListSource, RecordOptions, record_source, records
from jaxpref.data.records import EMPTY, Example
from jaxpref.data.records.adapters.adapter import TIE
from jaxpref.errors import InputError
from jaxpref.models import build, families
from jaxpref.models.families import llama
from jaxpref.models.folder import load_params, save
from jaxpref.models.folder_config import architecture_from_fields, read_architecture
from jaxpref.sampling import selection
from tests.family_cases import SIZES, random_params
from tests.losses.arrays import arrays_of
from tests.tiny import step_on_margins

PAGE = Path(__file__).resolve().parents[1] / "CONTRIBUTING.md"
BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
SECTIONS = {
    part.partition("\n")[0]: [textwrap.dedent(code) for _, code in BLOCK.findall(part)]
    for part in PAGE.read_text("utf-8").split("\n## ")
}
"""The Python blocks of each section, by its title."""


def run(title, number=0, module=None):
    """The names that a block defines, as part of a module if one is given."""
    names = dict(vars(module)) if module else {}
    exec(compile(SECTIONS[title][number], f"{PAGE}: {title}", "exec"), names)
    return types.SimpleNamespace(**names)


def test_every_block_is_tested():
    assert {title: len(found) for title, found in SECTIONS.items() if found} == {
        "Add a loss": 2,
        "Add an objective": 1,
        "Add a model family": 2,
        "Add a record format": 1,
        "Add a decoder": 1,
    }


def test_the_loss_and_its_row(monkeypatch):
    loss = run("Add a loss").squared_hinge
    monkeypatch.setattr(losses, "squared_hinge", loss, raising=False)
    (row,) = run("Add a loss", 1).ROWS
    assert options_type(loss)() == options_type(loss)(**row.defaults)
    with jax.enable_x64(True):
        arrays = [jnp.asarray(x, jnp.float64) for x in arrays_of(row)]
        swapped = [arrays[n] for n in (1, 0, 3, 2)]
        for options in row.options:
            options = row.defaults | options
            found, other = loss(*arrays, **options), loss(*swapped, **options)
            np.testing.assert_allclose(found, row.oracle(*arrays, **options))
            zero = row.mirror(found, other, *arrays, **options)
            np.testing.assert_allclose(zero, 0, atol=1e-9)
            same = loss(*arrays[:2], *arrays[:2], **options)
            np.testing.assert_allclose(same, row.at_reference(**options))
        ((options, other, theirs),) = row.special
        near = [jnp.asarray(x, jnp.float64) for x in arrays_of(row, extreme=False)]
        np.testing.assert_allclose(loss(*near, **options), other(*near, **theirs))
    with pytest.raises(ValueError, match="target > 0"):
        loss(*arrays, target=-1.0)


def test_the_objective():
    annealed = run("Add an objective").annealed
    assert [*options_type(annealed).__dataclass_fields__] == ["steps"]
    objective = annealed(functools.partial(losses.dpo, beta=1.0), steps=2)
    margins = np.array([2.0, -1.0, np.nan])
    full = np.mean(-margins[:2] * expit(-margins[:2]))
    state = objective.init(0)
    for weight in (0.5, 1.0, 1.0):
        found, state, metrics = step_on_margins(objective, margins, state)
        np.testing.assert_allclose(found, weight * full, rtol=1e-5)
        assert metrics["annealed/weight"] == weight
    with pytest.raises(InputError, match="steps -1"):
        annealed(losses.dpo, steps=-1)


def test_the_family_and_its_configs(monkeypatch, tmp_path):
    family = run("Add a model family").FAMILY
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, family))
    for name, case in run("Add a model family", 1).CASES.items():
        architecture: Any = architecture_from_fields(SIZES | case, name)
        assert architecture.attention_factor == case.get("attention_factor", 1)
        model = build(architecture)
        params = random_params(model)
        save(tmp_path / name, model, params)
        assert read_architecture(tmp_path / name) == architecture
        found = load_params(tmp_path / name, model)
        jax.tree.map(np.testing.assert_array_equal, found, params)

        # Llama's function, with the gain and the factor in the output projection.
        names = {field.name for field in dataclasses.fields(llama.LlamaArchitecture)}
        sizes = {k: v for k, v in vars(architecture).items() if k in names}
        plain = build(llama.LlamaArchitecture(**sizes))
        layers = dict(params["layers"])
        gain = architecture.attention_factor * layers.pop("output_gain")
        layers["output"] *= gain[:, None, None]
        if architecture.output_bias:
            layers["output_bias"] *= gain
        tokens = jnp.array([[1, 5, 9]])
        expected = plain.logits(params | {"layers": layers}, tokens)
        np.testing.assert_allclose(model.logits(params, tokens), expected, atol=1e-5)
    with pytest.raises(InputError, match="attention_factor is -1.0"):
        architecture_from_fields(SIZES | case | {"attention_factor": -1.0}, name)


def test_the_record_format(monkeypatch):
    votes = run("Add a record format").VOTES
    monkeypatch.setattr(record_source, "ADAPTERS", (votes, *record_source.ADAPTERS))
    record = {"question": "q", "answer_a": "x", "answer_b": "y", "winner": "b"}

    def parse(record, sides, **options):
        source = ListSource([record], "f")
        found = record_source.RecordSource(source, RecordOptions(), sides=sides)
        return records.parse(found[0], "f row 1", sides=sides, **options)

    assert parse(record | {"judge": 7}, 2) == Example("q", ("y", "x"), annotator="7")
    assert parse(record, 1) == Example("q", ("y",))
    assert parse(record | {"winner": "tie"}, 2) == TIE
    assert parse(record | {"answer_a": ""}, 2, drop_empty=True) == EMPTY
    for change, words in (
        ({"winner": "c"}, "field 'winner' must be one of 'a', 'b', 'tie'"),
        ({"question": 3}, "field 'prompt' .*'prompt' is read from 'question'"),
        ({"weight": 2}, "field 'weight' changes what the record means"),
    ):
        with pytest.raises(InputError, match=f"f row 1: .*{words}"):
            parse(record | change, 2)


def test_the_decoder():
    min_p_sample = run("Add a decoder", module=selection).min_p_sample
    p = np.array([0.5, 0.25, 0.15, 0.06, 0.04])
    logits = jnp.tile(jnp.log(jnp.asarray(p, jnp.float32)), (20_000, 1))
    tokens = jax.jit(min_p_sample(1.0, 0.25))(
        logits, jax.random.split(jax.random.key(0), len(logits))
    )
    drawn = np.bincount(tokens, minlength=5) / len(tokens)
    kept = np.where(p >= 0.25 * p.max(), p, 0)
    np.testing.assert_allclose(drawn, kept / kept.sum(), atol=0.02)  # 5 deviations
    assert not drawn[3:].any()
