"""The routers' load-balancing loss and its gradient against `transformers`."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import jax
import jax.numpy as jnp

from jaxpref.objectives.penalties import router_balance
from tests.parity.test_families import language_model_of, theirs
from tests.parity.test_huggingface import load

pytestmark = pytest.mark.parity
LENGTHS = np.array([20, 13, 7])
TOKENS = np.random.default_rng(0).integers(3, 64, (3, 20))


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe", "olmoe"])
def test_the_loss_and_the_gradient_of_the_routers(case, tmp_path):
    """To rounding in float32, relative to the largest gradient."""
    reference = theirs(case, language_model_of)
    reference.save_pretrained(tmp_path / "theirs")
    real = np.arange(TOKENS.shape[1]) < LENGTHS[:, None]
    out = reference(
        torch.tensor(TOKENS),
        attention_mask=torch.tensor(real.astype(np.int64)),
        output_router_logits=True,
    )
    out.aux_loss.backward()
    expected = {
        name: weight.grad.numpy()
        for name, weight in reference.named_parameters()
        if name.endswith("gate.weight") and weight.grad is not None
    }
    model, params = load(tmp_path / "theirs")
    assert len(expected) == model.architecture.num_layers

    def loss(params):
        counted = jnp.asarray(real, jnp.float32)
        router = model.hidden_and_router(params, TOKENS, counted=counted)[1]
        return router_balance(*router)

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, out.aux_loss.item(), rtol=1e-5)
    found = grads["layers"]["router"]
    for ours, gradient in zip(found, expected.values(), strict=True):
        atol = 1e-4 * np.abs(gradient).max()
        np.testing.assert_allclose(ours.T, gradient, rtol=0, atol=atol)
