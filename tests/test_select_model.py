"""`jaxpref data select` with a model: CHES, DONOD, and prompts for FiFA."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import cli
from jaxpref.data import DataOptions, ListSource, load_tokenizer, make_splits
from jaxpref.models import build
from jaxpref.models.folder import load_params
from jaxpref.models.folder_config import read_architecture
from jaxpref.select import donod
from tests.data_tokenizers import write_lines
from tests.tiny import WORDS, make_model_folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a model, records, and what a plain computation needs of them."""
    folder = tmp_path_factory.mktemp("select")
    make_model_folder(folder / "model", num_layers=1)
    rng = np.random.default_rng(0)
    text = lambda low, high: " ".join(rng.choice(WORDS, rng.integers(low, high)))
    records = [
        {"prompt": text(2, 6), "chosen": text(3, 9), "rejected": text(3, 9), "m": n}
        for n in range(11)
    ]
    records.insert(4, records[0] | {"chosen": records[0]["rejected"]})
    records.append(records[2] | {"m": 20})  # the same prompt
    write_lines(folder / "pairs.jsonl", records)
    model = build(read_architecture(folder / "model"))
    params = load_params(folder / "model", model)
    options = DataOptions(heldout_fraction=0)
    tokenizer = load_tokenizer(folder / "model")
    pairs = make_splits(ListSource(records), tokenizer, options).train
    return folder, jax.jit(model.hidden), model.head(params), params, pairs


def select(made, capsys, words):
    """The scores that the command writes, without the record of identical answers."""
    folder = made[0]
    data = f"data select {folder}/pairs.jsonl --out {folder}/out.jsonl --batch-size 8"
    cli.main(f"{data} --model {folder}/model {words}".split())
    capsys.readouterr()
    scores = (folder / "out.scores.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in scores]
    assert len(found) == 13
    assert "--kind" in words or "identical" in found[4]["reason"]
    return found[:4] + found[5:]


def states(made, n, side):
    """The final hidden states of a prompt and a completion, one sequence alone."""
    _, hidden_of, _, params, pairs = made
    tokens = np.concatenate([pairs.prompt(n), pairs.completion(n, side)])
    # Padding on the right changes nothing to its left; a single shape compiles once.
    padded = np.pad(tokens, (0, 20 - len(tokens)))[None]
    hidden = hidden_of(params, padded)[0, : len(tokens)]
    return np.asarray(hidden, np.float64), len(pairs.prompt(n))


def test_ches_of_the_states_that_predict_the_answers(made, capsys):
    plain, normalized = [], []
    for n in range(12):
        sums, lengths = [], []
        for side in (0, 1):
            hidden, start = states(made, n, side)
            sums.append(hidden[start - 1 : -1].sum(axis=0))
            lengths.append(len(hidden) - start)
        chosen, rejected = sums
        plain.append(chosen @ rejected - chosen @ chosen)
        chosen, rejected = chosen / lengths[0], rejected / lengths[1]
        normalized.append(chosen @ rejected - chosen @ chosen)
    found = select(made, capsys, "--by normalized-ches --keep 4")
    # float32 sums of up to ten states.
    close = dict(rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose([x["ches"] for x in found], plain, **close)
    np.testing.assert_allclose([x["score"] for x in found], normalized, **close)
    # The pairs that displace most are left out.
    lowest = sorted(normalized)[:4]
    assert [x["kept"] for x in found] == [x in lowest for x in normalized]


def test_a_template_option_that_nothing_reads_is_refused(made, capsys):
    with pytest.raises(SystemExit):
        select(made, capsys, "--by ches --keep 4 --template.style short")
    error = capsys.readouterr().err
    assert "--template.style: the chat template of" in error, error


def test_donod_is_the_change_of_a_small_step(made, capsys):
    """Norms before and after a step on the head, in float64, sample by sample."""
    _, _, head, _, pairs = made
    head = np.asarray(head, np.float64)
    costs = []
    for n in range(12):
        hidden, start = states(made, n, 0)
        before, targets = hidden[start - 1 : -1], pairs.completion(n, 0)
        z = before @ head
        gradients = np.exp(z - z.max(axis=1, keepdims=True))
        gradients /= gradients.sum(axis=1, keepdims=True)
        gradients[np.arange(len(targets)), targets] -= 1
        change = -(before.T @ gradients) / len(targets)
        rate = 1e-5
        after, before = (np.linalg.norm(head + x * change) for x in (rate, -rate))
        derivative = (after - before) / (2 * rate)
        costs.append([np.linalg.norm(change), derivative])
    found = select(made, capsys, "--by donod --kind answers --keep 6")
    of = lambda name: [x[name] for x in found]
    np.testing.assert_allclose(of("norm_of_delta"), np.array(costs)[:, 0], rtol=1e-4)
    np.testing.assert_allclose(
        of("delta_of_norm"), np.array(costs)[:, 1], rtol=1e-3, atol=1e-5
    )


def test_the_gradient_respects_a_cap_of_the_logits():
    """Against the gradient of the loss by JAX."""
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(5, 4)), 3 * rng.normal(size=(4, 16))
    targets = rng.integers(0, 16, 3)

    model = types.SimpleNamespace(
        architecture=types.SimpleNamespace(logit_soft_cap=2.0),
        hidden=lambda params, tokens: jnp.asarray(hidden, jnp.float32)[None],
        head=lambda params: params,
    )
    batch = types.SimpleNamespace(
        tokens=np.zeros((1, 1, 5), np.int32),
        predictors=np.array([[[1, 2, 3, 0]]]),
        targets=np.append(targets, 0)[None, None],
        completions=np.array([[[0, 0, 0, -1]]]),
        completion_lengths=np.array([[[3]]]),
    )

    def loss(head):
        z = 2 * jnp.tanh(jnp.asarray(hidden[1:4], jnp.float32) @ head / 2)
        return -jnp.mean(jax.nn.log_softmax(z)[np.arange(3), targets])

    norms = jax.jit(lambda head: donod.head_gradient_norms(model, head, batch))
    found = np.asarray(norms(np.float32(head)))[0]
    gradient = np.asarray(jax.jit(jax.grad(loss))(np.float32(head)))
    expected = [
        np.linalg.norm(gradient),
        -(head * gradient).sum() / np.linalg.norm(head),
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_topsis():
    """Computed by hand: columns divided by 5 and 10; the ideal is (3/5, 0)."""
    costs = np.array([[3.0, 10.0], [4.0, 0.0], [0.0, 0.0]])
    # To the best (0, 0): (.6, 1), (.8, 0), (0, 0); to the worst (.8, 1).
    best = np.hypot([0.6, 0.8, 0], [1, 0, 0])
    worst = np.hypot([0.2, 0, 0.8], [0, 1, 1])
    np.testing.assert_allclose(donod.topsis(costs), worst / (best + worst))
    assert donod.topsis(costs)[2] == 1
    np.testing.assert_array_equal(donod.topsis(np.ones((3, 2))), 1)


def test_fifa_with_the_states_of_prompts(made, capsys):
    points = []
    for n in range(12):
        hidden, start = states(made, n, 0)
        mean = hidden[:start].mean(axis=0)
        points.append(mean / np.linalg.norm(mean))
    gaps = np.linalg.norm(np.array(points)[:, None] - np.array(points), axis=-1)
    nearest = np.sort(gaps, axis=1)[:, 2]  # itself, then the first neighbor
    found = select(made, capsys, "--by fifa --column m --neighbors 2 --keep 3")
    np.testing.assert_allclose(
        [x["diversity"] for x in found], np.log1p(nearest), rtol=1e-3
    )


def test_a_reward_model_is_refused(tmp_path, made, capsys):
    config = json.loads((made[0] / "model" / "config.json").read_text())
    for path in (made[0] / "model").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config |= {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = f"data select {made[0]}/pairs.jsonl --by ches --keep 3 --model {tmp_path}"
    with pytest.raises(SystemExit):
        cli.main([*words.split(), "--out", str(made[0] / "none.jsonl")])
    error = capsys.readouterr().err
    assert "is a reward model; name a language model" in error
    assert not (made[0] / "none.jsonl").exists()
