"""A model family is one file: a dummy one, defined here, does all that Llama does."""

import ast
import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxpref.errors import InputError
from jaxpref.models import Numerics, RewardModel, build, families
from jaxpref.models.families import TensorName, llama
from jaxpref.models.folder import check_folder, load_params, save
from jaxpref.models.folder_config import read_architecture
from jaxpref.models.transformer import zeros
from jaxpref.sampling import generate, pad
from tests.test_models import TOKENS, loss, mesh

# --- what a new file in families/ holds: Llama with a bias on the query projection, a
# --- factor on the queries that differs by layer, and one renamed tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class BiasedArchitecture(llama.LlamaArchitecture):
    query_scale: float = 1.0

    @property
    def family(self):
        return FAMILY


class BiasedBlock(llama.LlamaBlock):
    def __init__(self, architecture, numerics, rngs):
        super().__init__(architecture, numerics, rngs)
        a = architecture
        shape = (a.num_layers, a.num_heads, a.head_dim)
        self.query_bias = zeros(numerics, shape, P(None, "tensor", None))

    def project(self, h):
        q, k, v = super().project(h)
        return q + self.query_bias[...].astype(q.dtype), k, v

    def attend(self, h, shared, attributes, attend):
        factor = attributes["query_scale"].astype(h.dtype)
        scaled = lambda q, *others: attend(q * factor, *others)
        return super().attend(h, shared, attributes, scaled)


class BiasedTransformer(llama.LlamaTransformer):
    block = BiasedBlock

    def layer_attributes(self):
        a = self.architecture
        return {"query_scale": a.query_scale * 2.0 ** jnp.arange(a.num_layers)}


def read_config(fields):
    for name, supported in llama.FIXED.items():
        fields.require(name, supported)
    scale = fields.read("query_scale", float)
    return BiasedArchitecture(query_scale=scale, **llama.read_sizes(fields))


def write_config(architecture):
    return llama.write_config(architecture) | {"query_scale": architecture.query_scale}


FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="biased",
    causal_lm="BiasedForCausalLM",
    classifier="BiasedForSequenceClassification",
    read_config=read_config,
    write_config=write_config,
    transformer=BiasedTransformer,
    tensors=llama.TENSORS
    | {
        "layers.query_bias": TensorName("model.layers.{}.self_attn.q_proj.bias"),
        "layers.down": TensorName("model.layers.{}.mlp.shrink.weight", 1),
    },
)

# --- and the one line in families/__init__.py


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, FAMILY))


SIZES = dict(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    initializer_range=0.3,
)
ARCHITECTURE = BiasedArchitecture(**SIZES, query_scale=0.5)


def random_params(model):
    rng = np.random.default_rng(0)
    params = model.init(jax.random.key(0))
    return jax.tree.map(
        lambda x: x + jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype), params
    )


@pytest.mark.parametrize("make", [build, RewardModel])
def test_a_folder_of_a_new_family_round_trips(tmp_path, make):
    model = make(ARCHITECTURE)
    params = random_params(model)
    save(tmp_path / "m", model, params)
    fields = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (fields["model_type"], fields["query_scale"]) == ("biased", 0.5)
    assert fields["architectures"][0].startswith("BiasedFor")
    assert check_folder(tmp_path / "m") == read_architecture(tmp_path / "m")
    assert read_architecture(tmp_path / "m") == ARCHITECTURE
    jax.tree.map(
        np.testing.assert_array_equal, load_params(tmp_path / "m", model), params
    )


def test_a_new_family_computes_trains_and_decodes():
    """Llama's function if the bias is 0, with the factors moved into the weights."""
    model, plain = build(ARCHITECTURE), build(llama.LlamaArchitecture(**SIZES))
    params = random_params(model)
    inner = {k: v for k, v in params["layers"].items() if k != "query_bias"}
    factors = jnp.array([0.5, 1.0])[:, None, None, None]
    scaled = inner | {"query": factors * inner["query"]}
    same = params | {"layers": params["layers"] | {"query_bias": jnp.zeros((2, 4, 6))}}
    logits = jax.jit(model.logits)
    np.testing.assert_allclose(
        logits(same, TOKENS),
        plain.logits(params | {"layers": scaled}, TOKENS),
        atol=1e-5,
    )
    assert jnp.abs(logits(params, TOKENS) - logits(same, TOKENS)).max() > 1e-3

    _, gradient = loss(model)(params, TOKENS)
    assert jnp.all(jnp.any(gradient["layers"]["query_bias"] != 0, axis=(1, 2)))
    with mesh(2, 2, 2):
        spread = jax.tree.map(
            lambda x, like: jax.device_put(
                x, jax.NamedSharding(jax.sharding.get_mesh(), like.sharding.spec)
            ),
            params,
            jax.eval_shape(model.init, jax.random.key(0)),
        )
        _, found = loss(model)(spread, TOKENS)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    jax.tree.map(close, found, gradient)

    prompts, lengths = pad([TOKENS[0, :3].tolist(), TOKENS[1, :2].tolist()])
    options = dict(max_new_tokens=3, temperature=0)
    tokens, *_ = generate(model, params, prompts, lengths, jax.random.key(0), **options)
    for row, n in enumerate((3, 2)):
        text = TOKENS[row, :n].tolist()
        for token in tokens[row].tolist():
            assert token == int(jnp.argmax(logits(params, np.array([text]))[0, -1]))
            text.append(token)


def test_architectures_of_two_families_differ():
    plain = llama.LlamaArchitecture(**SIZES)
    assert ARCHITECTURE != plain and hash(ARCHITECTURE) != hash(plain)
    assert dataclasses.replace(ARCHITECTURE, query_scale=1.0) != plain
    assert build(plain) != build(plain, Numerics(remat="full"))
    assert (
        build(plain).architecture == build(plain, Numerics(remat="full")).architecture
    )


def test_an_unknown_model_type_lists_the_supported_ones(tmp_path):
    save(tmp_path / "m", build(ARCHITECTURE), random_params(build(ARCHITECTURE)))
    path = tmp_path / "m" / "config.json"
    path.write_text(path.read_text().replace('"biased"', '"mamba"'))
    supported = ", ".join(sorted(x.model_type for x in families.FAMILIES))
    with pytest.raises(InputError, match=f"'mamba'; supported: {supported}$"):
        check_folder(tmp_path / "m")


def test_only_presets_name_a_family_outside_families():
    package = Path(families.__file__).parents[2]
    for path in package.rglob("*.py"):
        if path.parent.name != "families" and path.name != "presets.py":
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    names = [alias.name for alias in node.names]
                    names.append(getattr(node, "module", None) or "")
                    assert not any("llama" in name for name in names), path
