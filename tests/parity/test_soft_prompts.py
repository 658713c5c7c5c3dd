"""Soft prompts against `peft` on torch: each loads what the other writes."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import jax
import jax.numpy as jnp

from jaxpref.models import RewardModel
from jaxpref.models.folder_config import read_architecture
from jaxpref.models.soft_prompt import PROMPT, with_placeholders
from jaxpref.models.soft_prompt_files import save_soft_prompt, soft_prompt_length
from jaxpref.models.weights import Weights, is_reward, load_weights
from tests.parity.test_families import language_model_of, theirs
from tests.parity.test_huggingface import load

pytestmark = pytest.mark.parity
TOKENS = np.random.default_rng(0).integers(3, 64, (2, 20))
N = 5


CASES = "llama", "gpt2", "granite", "opt", "gemma", "gemma2", "gemma3"


@pytest.mark.parametrize("case", CASES)
def test_logits_agree_both_ways(case, tmp_path):
    """To 1e-4 of the largest, in float32."""
    base = theirs(case, language_model_of)
    base.save_pretrained(tmp_path / "base")
    model, params = load(tmp_path / "base")
    rng = np.random.default_rng(1)
    prompt = rng.normal(0, 0.5, (N, model.architecture.hidden_size))
    trained = {PROMPT: jnp.asarray(prompt, jnp.float32)}
    save_soft_prompt(
        tmp_path / "ours", model, trained, base=str(tmp_path), dtype="float32"
    )
    prefixed = np.array([with_placeholders(row.tolist(), N) for row in TOKENS])
    logits = jax.jit(model.logits)
    plain = np.asarray(logits(params, TOKENS))

    def check(folder, wrapped):
        assert soft_prompt_length(folder) == N
        with torch.no_grad():
            expected = wrapped(torch.tensor(TOKENS)).logits.numpy()
        joined = load_weights(Weights(tmp_path / "base", folder), model)
        found = np.asarray(logits(joined, prefixed))
        # Some versions return the logits of the soft prompt too, and some do not.
        own = expected.shape[1]
        atol = 1e-4 * np.abs(expected).max()
        np.testing.assert_allclose(found[:, -own:], expected, rtol=0, atol=atol)
        assert np.abs(found[:, N:] - plain).max() > 0.05 * np.abs(plain).max()
        return own

    wrapped = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    assert check(tmp_path / "ours", wrapped) in (TOKENS.shape[1], prefixed.shape[1])
    wrapped.save_pretrained(tmp_path / "theirs")
    check(tmp_path / "theirs", wrapped)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N)
    new = peft.get_peft_model(theirs(case, language_model_of), config).eval()
    new.save_pretrained(tmp_path / "new")
    check(tmp_path / "new", new)


def test_rewards_agree_both_ways(tmp_path):
    """With the trained head, which `peft` keeps under `modules_to_save`."""
    config = dict(vocab_size=64, hidden_size=32, intermediate_size=48)
    config |= dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**config, num_labels=1, pad_token_id=0)
    base = transformers.LlamaForSequenceClassification(config)
    base.save_pretrained(tmp_path / "base")
    options = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=N)
    wrapped = peft.get_peft_model(base, options).eval()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.5)
    wrapped.save_pretrained(tmp_path / "theirs")
    model = RewardModel(read_architecture(tmp_path / "base"))
    prefixed = np.array([with_placeholders(row.tolist(), N) for row in TOKENS])
    lengths = np.full(len(prefixed), prefixed.shape[1])
    weights = Weights(tmp_path / "base", tmp_path / "theirs")
    assert is_reward(weights)
    params = load_weights(weights, model)
    rewards = np.asarray(jax.jit(model.rewards)(params, prefixed, lengths))
    tokens = torch.tensor(TOKENS)

    def check(wrapped):
        with torch.no_grad():
            expected = wrapped(tokens, attention_mask=torch.ones_like(tokens)).logits
        np.testing.assert_allclose(rewards, expected[:, 0].numpy(), rtol=0, atol=1e-4)

    check(wrapped)
    trained = {name: params[name] for name in (PROMPT, "score")}
    save_soft_prompt(tmp_path / "ours", model, trained, base="base", dtype="float32")
    base = transformers.LlamaForSequenceClassification.from_pretrained(
        tmp_path / "base"
    )
    check(peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval())
