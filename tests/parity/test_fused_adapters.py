"""Adapters of matrices that share a tensor, or are stored input-major, and `peft`."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from jaxpref.models import build
from jaxpref.models.adapter_files import load_adapter, read_lora, save_adapter
from jaxpref.models.folder import load_params, save
from jaxpref.models.lora import LoraOptions, lora_of
from jaxpref.models.weights import Weights, load_weights
from tests.family_cases import architecture_of, random_params

pytestmark = pytest.mark.parity
TOKENS = np.random.default_rng(0).integers(3, 64, (2, 12))
CASES = ("phi3", "gpt_neox", "gpt2")


@pytest.fixture(params=CASES)
def made(request, tmp_path):
    """A random model and its folder."""
    model = build(architecture_of(request.param))
    save(tmp_path / "base", model, random_params(model))
    return model, tmp_path / "base"


def torch_base(folder):
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(folder, dtype=torch.float32).eval()


def torch_logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


@pytest.mark.parametrize("kind", [{}, {"rank_stabilized": True}, {"dora": True}])
def test_peft_loads_our_adapter(made, kind, tmp_path):
    model, folder = made
    options = LoraOptions(rank=2, alpha=3.0, **kind)
    lora = lora_of(options, model.architecture.family)
    rng = np.random.default_rng(1)
    weights = load_params(folder, model)
    params = lora.trained(weights, model, jax.random.key(0))
    params = jax.tree.map(
        lambda x: x + rng.normal(0, 0.2, x.shape).astype(np.float32), params
    )
    options = dict(base=str(folder), dtype="float32", reward=False)
    save_adapter(tmp_path / "adapter", lora, model, params, **options)
    ours = model.logits(
        load_weights(Weights(folder, tmp_path / "adapter"), model), TOKENS
    )
    base = torch_base(folder)
    assert np.abs(torch_logits(base) - ours).max() > 1e-2
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    np.testing.assert_allclose(torch_logits(theirs), ours, rtol=0, atol=1e-4)

    # What we wrote is read as it was, not as factors of three times the rank.
    again, found = load_adapter(tmp_path / "adapter", model)
    assert again == lora
    jax.tree.map(np.testing.assert_array_equal, found, params)


def test_we_load_an_adapter_of_peft(made, tmp_path):
    model, folder = made
    base = torch_base(folder)
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules="all-linear")
    torch.manual_seed(0)
    adapted = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.add_(0.2 * torch.randn_like(weight))
    adapted.save_pretrained(tmp_path / "theirs")
    weights = Weights(folder, tmp_path / "theirs")
    ours = model.logits(load_weights(weights, model), TOKENS)
    np.testing.assert_allclose(ours, torch_logits(adapted), rtol=0, atol=1e-4)

    # Written again, from separate factors, the function is the same.
    lora, params = load_adapter(tmp_path / "theirs", model)
    assert lora == read_lora(tmp_path / "theirs", model)
    options = dict(base=str(folder), dtype="float32", reward=False)
    save_adapter(tmp_path / "ours", lora, model, params, **options)
    weights = Weights(folder, tmp_path / "ours")
    again = model.logits(load_weights(weights, model), TOKENS)
    np.testing.assert_allclose(again, ours, rtol=0, atol=1e-5)
    theirs = peft.PeftModel.from_pretrained(
        torch_base(folder), tmp_path / "ours"
    ).eval()
    np.testing.assert_allclose(torch_logits(theirs), ours, rtol=0, atol=1e-4)
