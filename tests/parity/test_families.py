"""Every family against `transformers`: logits, text, rewards, and weights."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import jax
from transformers.modeling_layers import GenericForSequenceClassification

from jaxpref.models import RewardModel
from jaxpref.models.folder import load_params, save
from jaxpref.models.folder_config import read_architecture
from jaxpref.sampling import generate, pad
from tests.family_cases import CASES, fields_of
from tests.parity.test_huggingface import load, torch_logits, torch_model

pytestmark = pytest.mark.parity
TOKENS = np.random.default_rng(0).integers(3, 64, (2, 100))


def language_model_of(config):
    """The class of language models."""
    return transformers.AutoModelForCausalLM._model_mapping[type(config)]


def classifier_of(config):
    """The sequence classifier; the general one for families that have none."""
    auto = transformers.AutoModelForSequenceClassification
    if type(config) in auto._model_mapping:
        return auto._model_mapping[type(config)]
    backbone = transformers.AutoModel._model_mapping[type(config)]
    name = backbone.__name__.replace("Model", "ForSequenceClassification")
    bases = (GenericForSequenceClassification, *backbone.__bases__)
    return type(name, bases, {})


def theirs(case, class_of, **more):
    """A model of `transformers` with random weights, gains and biases too."""
    fields = fields_of(case) | more
    config = transformers.AutoConfig.for_model(**fields)
    torch.manual_seed(0)
    model = class_of(config)(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or "ln_" in name or "bias" in name:
                weight.add_(0.2 * torch.randn_like(weight))
    return model.eval()


@pytest.fixture(params=CASES)
def folder(request, tmp_path):
    model = theirs(request.param, language_model_of)
    model.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def test_logits_text_and_weights_agree_both_ways(folder, tmp_path):
    model, params = load(folder)
    reference = torch_model(folder)
    wanted = torch_logits(reference, TOKENS)
    assert np.abs(wanted).max() > 0.5  # the comparison says something
    found = jax.jit(model.logits)(params, TOKENS)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)

    prompts = [TOKENS[0, :3].tolist(), TOKENS[1, :9].tolist()]
    tokens, lengths = pad(prompts)
    new, *_ = generate(
        model,
        params,
        tokens,
        lengths,
        jax.random.key(0),
        max_new_tokens=64,
        temperature=0,
    )
    for row, prompt in enumerate(prompts):
        text = reference.generate(
            torch.tensor([prompt]),
            max_new_tokens=64,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert text[0, len(prompt) :].tolist() == new[row].tolist()

    save(tmp_path / "ours", model, params, folder, max_file_bytes=10_000)
    again = torch_model(tmp_path / "ours")
    before, after = reference.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert torch.equal(weight, after[name]), name
    np.testing.assert_array_equal(torch_logits(again, TOKENS), wanted)


@pytest.mark.parametrize("case", [name for name in CASES if " " not in name])
def test_rewards_and_half_precision_folders_agree(case, tmp_path):
    reference = theirs(case, classifier_of, num_labels=1)
    reference.config.pad_token_id = 0
    reference.save_pretrained(tmp_path / "theirs")
    model = RewardModel(read_architecture(tmp_path / "theirs"))
    params = load_params(tmp_path / "theirs", model)
    lengths = np.array([100, 37])
    tokens = np.where(np.arange(100) < lengths[:, None], TOKENS, 0)
    mask = torch.tensor(tokens != 0)
    with torch.no_grad():
        wanted = reference(torch.tensor(tokens), attention_mask=mask).logits[:, 0]
    found = model.rewards(params, tokens, lengths)
    np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=1e-4)

    half = reference.to(torch.bfloat16)
    half.save_pretrained(tmp_path / "half", max_shard_size="10KB")
    params = load_params(tmp_path / "half", model)
    save(tmp_path / "ours", model, params, tmp_path / "half", dtype="bfloat16")
    again = type(reference).from_pretrained(tmp_path / "ours", dtype="auto")
    assert again.dtype == torch.bfloat16
    for name, weight in half.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
