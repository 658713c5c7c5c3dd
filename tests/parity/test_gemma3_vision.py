"""Adapters of the text model of Gemma 3 with a vision part, and `peft`."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from jaxpref.models.adapter_files import load_adapter, save_adapter
from jaxpref.models.lora import LoraOptions, lora_of
from jaxpref.models.weights import Weights, load_weights
from tests.parity.test_families import TOKENS, language_model_of, theirs
from tests.parity.test_huggingface import load, torch_logits

pytestmark = pytest.mark.parity
OURS = dict(dtype="float32", reward=False)


def torch_base(folder):
    kind = transformers.Gemma3ForConditionalGeneration
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def test_adapters_agree_both_ways(tmp_path):
    folder = tmp_path / "base"
    theirs("gemma3_vision", language_model_of).save_pretrained(folder)
    model, _ = load(folder)
    lora = lora_of(LoraOptions(rank=2, alpha=3.0), model.architecture.family)
    rng = np.random.default_rng(1)
    params = lora.trained({}, model, jax.random.key(0))
    params = jax.tree.map(
        lambda x: x + rng.normal(0, 0.2, x.shape).astype(np.float32), params
    )
    save_adapter(tmp_path / "ours", lora, model, params, base=str(folder), **OURS)
    weights = Weights(folder, tmp_path / "ours")
    ours = model.logits(load_weights(weights, model), TOKENS)
    base = torch_base(folder)
    assert np.abs(torch_logits(base, TOKENS) - ours).max() > 1e-2
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    np.testing.assert_allclose(torch_logits(adapted, TOKENS), ours, rtol=0, atol=1e-4)
    assert not any("vision" in n for n, _ in adapted.named_parameters() if "lora" in n)

    adapted.save_pretrained(tmp_path / "theirs")
    again, found = load_adapter(tmp_path / "theirs", model)
    assert again == lora
    jax.tree.map(np.testing.assert_array_equal, found, params)
