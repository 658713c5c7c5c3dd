"""Soft prompts against `peft` on torch: each loads what the other writes."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import jax
import jax.numpy as jnp

from jaxpref.models.soft_prompt import PROMPT, with_placeholders
from jaxpref.models.soft_prompt_files import save_soft_prompt, soft_prompt_length
from jaxpref.models.weights import Weights, load_weights
from tests.parity.test_families import language_model_of, theirs
from tests.parity.test_huggingface import load

pytestmark = pytest.mark.parity
TOKENS = np.random.default_rng(0).integers(3, 64, (2, 20))
N = 5


@pytest.mark.parametrize("case", ["llama", "gpt2", "granite", "opt"])
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
