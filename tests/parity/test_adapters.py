"""Adapter folders against `peft` on torch: each loads what the other writes."""

import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from jaxpref.errors import InputError
from jaxpref.models import RewardModel, build
from jaxpref.models.adapter_files import load_adapter, read_lora
from jaxpref.models.families.llama import LlamaArchitecture
from jaxpref.models.folder import save
from jaxpref.models.lora import LoraOptions
from jaxpref.models.reward import Padding
from jaxpref.models.reward_head import Head
from jaxpref.models.weights import Weights, load_weights
from jaxpref.scoring.partition import PartitionScorer, Trained
from jaxpref.scoring.reward_scorer import RewardScorer
from jaxpref.scoring.scorer import ExportOptions, PolicyScorer

pytestmark = pytest.mark.parity

ARCHITECTURE = LlamaArchitecture(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=8,
    num_kv_heads=2,
    head_dim=4,
    initializer_range=0.3,
)
MODELS = {False: build(ARCHITECTURE), True: RewardModel(ARCHITECTURE)}
LENGTHS = np.array([12, 7])
TOKENS = np.random.default_rng(0).integers(3, 64, (2, 12))
PAD = 1


@pytest.fixture(scope="module", params=[False, True], ids=["policy", "reward"])
def made(request, tmp_path_factory):
    """Whether it is a reward model, and the folder of a random model."""
    folder = tmp_path_factory.mktemp("base")
    model = MODELS[request.param]
    padding = Padding("<pad>", PAD) if request.param else None
    save(folder, model, model.init(jax.random.key(0)), padding=padding)
    return request.param, folder


def torch_base(folder, reward):
    kind = "SequenceClassification" if reward else "CausalLM"
    load = getattr(transformers, f"AutoModelFor{kind}").from_pretrained
    return load(folder, dtype=torch.float32).eval()


def torch_outputs(model, reward):
    tokens = np.where(np.arange(12) < LENGTHS[:, None], TOKENS, PAD)
    if not reward:
        tokens = TOKENS
    with torch.no_grad():
        mask = torch.tensor(tokens != PAD)
        return model(torch.tensor(tokens), attention_mask=mask).logits.numpy()


def our_outputs(weights, reward):
    model = MODELS[reward]
    params = load_weights(weights, model)
    if reward:
        return np.asarray(model.rewards(params, TOKENS, LENGTHS))[:, None]
    return np.asarray(model.logits(params, TOKENS))


def differ(one, other):
    return float(np.abs(one - other).max())


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 4},
        {"rank": 3, "alpha": 5.0, "rank_stabilized": True, "targets": "mlp"},
        {"rank": 4, "dora": True},
    ],
)
def test_peft_loads_our_adapter_and_transformers_our_export(made, options, tmp_path):
    reward, folder = made
    one = RewardScorer(MODELS[True])
    if not reward:
        one = PolicyScorer(MODELS[False], frozenset({"policy_logps"}))
    scorer = Trained(lora=LoraOptions(**options), start=Weights(folder))(one)
    assert isinstance(scorer, PartitionScorer)
    rng = np.random.default_rng(1)
    params = scorer.load(folder, jax.random.key(0))
    params = jax.tree.map(
        lambda x: x + rng.normal(0, 0.2, x.shape).astype(np.float32), params
    )
    padding = Padding("<pad>", PAD) if reward else None
    options = ExportOptions(folder, str(folder), padding=padding)
    scorer.export(params, tmp_path / "export", options)
    ours = our_outputs(Weights(folder, tmp_path / "adapter"), reward)
    base = torch_base(folder, reward)
    before = torch_outputs(base, reward)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert differ(torch_outputs(theirs, reward), ours) < 1e-4
    assert differ(before, ours) > 1e-2
    exported = torch_base(tmp_path / "export", reward)
    assert differ(torch_outputs(exported, reward), ours) < 1e-4
    # `peft` also finds the base by its name in the config.
    config = peft.PeftConfig.from_pretrained(tmp_path / "adapter")
    assert config.base_model_name_or_path == str(folder)
    assert config.task_type == ("SEQ_CLS" if reward else "CAUSAL_LM")


@pytest.mark.parametrize("way", ["adapters", "soft prompt"])
def test_peft_loads_a_linear_head_of_several_ratings(way, tmp_path):
    """On the language model from which it was trained."""
    base, lm = tmp_path / "base", MODELS[False]
    save(base, lm, lm.init(jax.random.key(0)))
    model = RewardModel(ARCHITECTURE, head=Head(attributes=("helpful", "short")))
    trained = {"adapters": {"lora": LoraOptions(rank=2)}}.get(
        way, {"soft_prompt": (5, 6, 7)}
    )
    scorer = Trained(start=Weights(base), **trained)(RewardScorer(model))
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda x: x + rng.normal(0, 0.2, x.shape).astype(np.float32),
        scorer.load(base, jax.random.key(0)),
    )
    scorer.export(params, tmp_path / "export", ExportOptions(base, str(base)))
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        base, dtype=torch.float32, num_labels=2, pad_token_id=PAD
    )
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    before = 0 if way == "adapters" else 3
    tokens = np.pad(TOKENS, ((0, 0), (before, 0)))
    whole = load_weights(Weights(base, tmp_path / "adapter"), model)
    states, _ = model.states_and_router(whole, tokens, LENGTHS[:, None] + before - 1)
    ours = np.asarray(model.head(whole, states))[:, 0]
    # With embeddings as inputs, `transformers` reads the last token, padding or not.
    rows = slice(None) if way == "adapters" else slice(1)
    assert differ(torch_outputs(theirs, True)[rows], ours[rows]) < 1e-4
    assert np.std(ours) > 0.1


CONFIGS = {
    "list": {"target_modules": ["q_proj", "down_proj"]},
    "pattern": {"target_modules": r".*\.[12]\.self_attn\.(k|v)_proj"},
    "all-linear": {"target_modules": "all-linear", "use_rslora": True},
    "dora": {"target_modules": ["q_proj", "o_proj", "down_proj"], "use_dora": True},
    "some layers": {"target_modules": ["o_proj"], "layers_to_transform": [0, 2]},
    "ranks and alphas": {
        "target_modules": ["q_proj", "up_proj", "gate_proj"],
        "rank_pattern": {"up_proj": 7, r"layers\.0\.self_attn\.q_proj": 2},
        "alpha_pattern": {"up_proj": 3, r"layers\.1\.mlp\.gate_proj": 40},
    },
    "whole modules": {
        "target_modules": ["v_proj"],
        "modules_to_save": ["embed_tokens", "model.norm", "input_layernorm"],
    },
}


def their_adapter(folder, reward, out, **options):
    """An adapter that `peft` makes, all of it random, and its outputs."""
    task = "SEQ_CLS" if reward else "CAUSAL_LM"
    if reward and (saved := options.get("modules_to_save")):
        options["modules_to_save"] = [*saved, "score"]
    config = peft.LoraConfig(**{"task_type": task, "r": 4, "lora_alpha": 6} | options)
    model = peft.get_peft_model(torch_base(folder, reward), config)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.eval().save_pretrained(out)
    return torch_outputs(model, reward)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_of_peft_is_read(made, name, tmp_path):
    reward, folder = made
    theirs = their_adapter(folder, reward, tmp_path, **CONFIGS[name])
    ours = our_outputs(Weights(folder, tmp_path), reward)
    assert differ(theirs, ours) < 1e-4
    lora, _ = load_adapter(tmp_path, MODELS[reward])
    assert ("score" in lora.whole) == reward


@pytest.mark.parametrize(
    "options, field",
    [
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"trainable_token_indices": [3, 4]}, "trainable_token_indices"),
    ],
)
def test_what_changes_the_function_otherwise_is_refused(made, options, field, tmp_path):
    reward, folder = made
    their_adapter(folder, reward, tmp_path, target_modules=["q_proj"], **options)
    assert json.loads((tmp_path / "adapter_config.json").read_text())[field]
    with pytest.raises(InputError, match=f"field {field}"):
        read_lora(tmp_path, MODELS[reward])


def test_new_factors_are_drawn_as_in_peft(made):
    """The same range and spread; b is zero."""
    reward, folder = made
    config = peft.LoraConfig(target_modules=["down_proj"], r=64)
    model = peft.get_peft_model(torch_base(folder, reward), config)
    theirs = torch.cat(
        [p for n, p in model.named_parameters() if "lora_A" in n]
    ).detach()
    trained = Trained(
        lora=LoraOptions(rank=64, targets="down_proj"), start=Weights(folder)
    )
    lora = trained.partition(MODELS[reward])
    ours = lora.trained({}, MODELS[reward], jax.random.key(0))["layers"]["down"]
    assert not ours["b"].any()
    assert float(ours["a"].std()) == pytest.approx(float(theirs.std()), rel=0.02)
    for a in (np.asarray(ours["a"]), theirs.numpy()):
        assert np.abs(a).max() == pytest.approx(48**-0.5, rel=1e-3)
