"""Against `transformers` on torch: logits, greedy text, folders and filters."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from jaxpref.models import build
from jaxpref.models.families.llama import LlamaArchitecture
from jaxpref.models.folder import load_params, save
from jaxpref.models.folder_config import architecture_to_fields, read_architecture
from jaxpref.models.rotary import Llama3Scaling
from jaxpref.sampling import generate, pad

pytestmark = pytest.mark.parity

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.3,
    rms_norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=2,
)
CASES = {
    "grouped queries": {},
    "tied": {"tie_word_embeddings": True},
    "all heads own keys": {"num_key_value_heads": 8},
    "one key head": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "wide heads": {"head_dim": 16},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
    "llama3": {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}},
    "llama3 tied": {"rope_parameters": LLAMA3, "tie_word_embeddings": True},
}


def torch_model(folder, dtype=torch.float32):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval()


def torch_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens))).logits.float().numpy()


def load(folder):
    model = build(read_architecture(folder))
    return model, load_params(folder, model)


@pytest.fixture(params=CASES)
def random_folder(request, tmp_path):
    """A randomly initialized folder, as this version of transformers writes it."""
    config = transformers.LlamaConfig(**SIZES | CASES[request.param])
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:  # not all ones
                weight.add_(0.2 * torch.randn_like(weight))
    model.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def test_logits_agree_on_the_real_model(stories260k):
    tokens = np.random.default_rng(0).integers(3, 512, (2, 200))
    model, params = load(stories260k)
    ours = jax.jit(model.logits)(params, tokens)
    theirs = torch_logits(torch_model(stories260k), tokens)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_logits_agree_on_random_models_both_ways(random_folder, tmp_path):
    tokens = np.random.default_rng(0).integers(0, 64, (2, 100))
    model, params = load(random_folder)
    theirs = torch_logits(torch_model(random_folder), tokens)
    assert np.abs(theirs).max() > 1  # the comparison says something
    np.testing.assert_allclose(
        jax.jit(model.logits)(params, tokens), theirs, rtol=0, atol=1e-4
    )

    save(tmp_path / "ours", model, params, random_folder, max_file_bytes=20_000)
    before, after = torch_model(random_folder), torch_model(tmp_path / "ours")
    assert before.state_dict().keys() == after.state_dict().keys()
    for name, weight in before.state_dict().items():
        assert torch.equal(weight, after.state_dict()[name]), name
    np.testing.assert_array_equal(torch_logits(after, tokens), theirs)
    for field in ("rope_parameters", "bos_token_id", "eos_token_id", "head_dim"):
        ours, wanted = (getattr(m.config, field) for m in (after, before))
        if field == "rope_parameters":
            ours = {name: value for name, value in ours.items() if name != "type"}
        assert ours == wanted


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_folders_are_the_same_numbers(tmp_path, dtype):
    config = transformers.LlamaConfig(**SIZES)
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path / "theirs")
    model, params = load(tmp_path / "theirs")
    tokens = np.random.default_rng(0).integers(0, 64, (2, 30))
    np.testing.assert_allclose(
        jax.jit(model.logits)(params, tokens),
        torch_logits(torch_model(tmp_path / "theirs"), tokens),
        rtol=0,
        atol=1e-4,
    )
    save(tmp_path / "ours", model, params, tmp_path / "theirs", dtype=dtype)
    ours = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype="auto"
    )
    assert ours.dtype == getattr(torch, dtype)
    for name, weight in theirs.state_dict().items():
        assert torch.equal(weight, ours.state_dict()[name]), name


def test_a_model_made_here_loads_there(tmp_path):
    model = build(
        LlamaArchitecture(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            rope_scaling=Llama3Scaling(
                factor=4.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=16,
            ),
            initializer_range=0.3,
        )
    )
    params = model.init(jax.random.key(0))
    save(tmp_path / "ours", model, params)
    tokens = np.random.default_rng(0).integers(0, 64, (2, 60))
    theirs = torch_model(tmp_path / "ours")
    assert theirs.config.eos_token_id is None
    np.testing.assert_allclose(
        jax.jit(model.logits)(params, tokens),
        torch_logits(theirs, tokens),
        rtol=0,
        atol=1e-4,
    )


PROMPTS = ["Once upon a time, there was a little", "Tom", "The big dog saw a cat. It"]


def test_greedy_text_agrees_on_the_real_model(stories260k):
    tokenizer = transformers.AutoTokenizer.from_pretrained(stories260k)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    model, params = load(stories260k)
    tokens, lengths = pad(prompts)
    ours, counts, *_ = generate(
        model,
        params,
        tokens,
        lengths,
        jax.random.key(0),
        max_new_tokens=120,
        temperature=0,
        stop_tokens=(2,),
    )
    assert counts.tolist() == [120] * 3
    theirs = torch_model(stories260k)
    for row, prompt in enumerate(prompts):
        text = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=120, do_sample=False, pad_token_id=0
        )
        assert text[0, len(prompt) :].tolist() == ours[row].tolist()


@pytest.mark.parametrize("top_k, top_p", [(3, 1.0), (None, 0.7), (9, 0.8), (1, 0.1)])
def test_filters_keep_the_tokens_that_transformers_keeps(top_k, top_p):
    from jaxpref.sampling.selection import filter_likely

    logits = np.random.default_rng(0).normal(size=(100, 40)).astype(np.float32) * 2
    theirs = torch.tensor(logits)
    if top_k is not None:
        theirs = transformers.TopKLogitsWarper(top_k)(None, theirs)
    theirs = transformers.TopPLogitsWarper(top_p)(None, theirs)
    ours = filter_likely(jnp.asarray(logits), top_k or 40, top_p)
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs.numpy()))


def test_our_config_reads_as_its_config(tmp_path):
    """The rotary fields of old and new spelling mean the same to both."""
    for case in CASES.values():
        theirs = transformers.LlamaConfig(**SIZES | case)
        theirs.save_pretrained(tmp_path)
        fields = json.loads((tmp_path / "config.json").read_text())
        assert "rope_parameters" in fields
        config = read_architecture(tmp_path)
        again = transformers.LlamaConfig(**architecture_to_fields(config))
        for name in ("rope_type", "rope_theta", "factor", "low_freq_factor"):
            found, wanted = (c.rope_parameters.get(name) for c in (again, theirs))
            assert found == wanted
