"""Gradients of DoRA against `peft`, and 4-bit codes against `bitsandbytes`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from jaxpref.models import build
from jaxpref.models.adapter_files import load_adapter
from jaxpref.models.folder import load_params, save
from jaxpref.models.paths import by_path
from jaxpref.models.quantized import Quantized, encoded
from tests.parity.test_adapters import (
    ARCHITECTURE,
    TOKENS,
    their_adapter,
    torch_base,
)

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("dora", [False, True])
def test_gradients_of_adapters_are_those_of_peft(dora, tmp_path):
    """Of the sum of the squares of all logits; norms count as constants in both."""
    model = build(ARCHITECTURE)
    save(tmp_path / "base", model, model.init(jax.random.key(0)))
    options = {"target_modules": ["q_proj", "o_proj", "up_proj"], "use_dora": dora}
    their_adapter(tmp_path / "base", False, tmp_path / "adapter", **options)

    base = torch_base(tmp_path / "base", False)
    theirs = peft.PeftModel.from_pretrained(
        base, tmp_path / "adapter", is_trainable=True
    )
    theirs(torch.tensor(TOKENS)).logits.square().sum().backward()
    found = {
        name.replace(".default", ""): parameter.grad.numpy()
        for name, parameter in theirs.named_parameters()
        if parameter.grad is not None
    }

    lora, arrays = load_adapter(tmp_path / "adapter", model)
    params = load_params(tmp_path / "base", model)
    value = lambda x: jnp.sum(jnp.square(model.logits(lora.join(x, params), TOKENS)))
    ours = by_path(jax.jit(jax.grad(value))(arrays))
    modules = {"query": "self_attn.q_proj", "output": "self_attn.o_proj"}
    modules["up"] = "mlp.up_proj"
    kinds = {"a": "lora_A.weight", "b": "lora_B.weight"}
    if dora:
        kinds["m"] = "lora_magnitude_vector.weight"
    assert len(found) == 3 * len(modules) * len(kinds)
    for name, module in modules.items():
        for kind, suffix in kinds.items():
            for layer in range(3):
                key = f"base_model.model.model.layers.{layer}.{module}.{suffix}"
                theirs = found[key].T
                gradient = np.asarray(ours[f"layers.{name}.{kind}"][layer])
                most = np.abs(theirs).max()
                assert most > 0
                # Float32 on both sides, sums in other orders.
                np.testing.assert_allclose(
                    gradient.reshape(theirs.shape), theirs, rtol=0, atol=1e-4 * most
                )


def test_nf4_has_the_values_of_bitsandbytes():
    """Without its second quantization; its blocks are of inputs, like ours."""
    functional = pytest.importorskip("bitsandbytes.functional")
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(48, 192)).astype(np.float32)  # [outputs, inputs]
    codes, state = functional.quantize_4bit(
        torch.tensor(weight), blocksize=64, quant_type="nf4", compress_statistics=False
    )
    theirs = functional.dequantize_4bit(codes, state).numpy()
    ours = Quantized(*map(jnp.asarray, encoded(weight.T, "nf4", 0)), "nf4", 1, None)
    # They multiply by the reciprocal of the scale, so a weight halfway between two
    # levels may get the other one.
    equal = np.isclose(np.asarray(ours.dequantized(jnp.float32)).T, theirs, rtol=1e-6)
    assert equal.mean() > 0.9999
