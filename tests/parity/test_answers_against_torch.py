"""Twenty steps on labeled answers and on lists, against a torch loop.

The losses are written here from the papers, in torch; the loop is that of DPO in
`test_training_against_torch`.
"""

import math

import numpy as np
import pytest

from jaxpref import data, objectives
from tests.answers import write_records
from tests.parity.test_training_against_torch import (
    BETA,
    STEPS,
    batches,
    jaxpref_losses,
    torch_losses,
)

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity


def labels(batch, name):
    """The labels of the rows of a padded batch: [R], or [R, K] of lists."""
    return torch.tensor(batch.numbers[name][0, :, 0]).double()


def signs(batch):
    return 2 * labels(batch, "desirable") - 1


def kto():
    def loss(ratio, batch):
        z = ratio[:, 1].mean().clamp(min=0).detach()
        weight = 1.05 + 0.25 * signs(batch)
        value = torch.sigmoid(BETA * signs(batch) * (ratio[:, 0] - z))
        return (weight * (1 - value)).mean()

    return loss, {"loss.desirable-weight": 1.3, "loss.undesirable-weight": 0.8}


def apo_zero_unpaired():
    def loss(ratio, batch):
        return (1 - torch.sigmoid(BETA * signs(batch) * ratio[:, 0])).mean()

    return loss, {}


def bco():
    moving = {"shift": 0.0, "weight": 0.0}

    def loss(ratio, batch):
        rewards, sign = BETA * ratio[:, 0], signs(batch)
        good, bad = (rewards[sign == s].detach() for s in (1, -1))
        if len(good) and len(bad):
            new = float(good.mean() + bad.mean()) / 2
            moving["shift"] = 0.9 * moving["shift"] + 0.1 * new
            moving["weight"] = 0.9 * moving["weight"] + 0.1
        shift = moving["shift"] / max(moving["weight"], 1e-12)
        return torch.nn.functional.softplus(-sign * (rewards - shift)).mean()

    return loss, {}


def of_lists(of_list):
    """The mean over lists of `of_list(rewards, numbers)`, without missing answers."""

    def make(label):
        def loss(ratio, batch):
            found = []
            sizes = (batch.completion_lengths[0, :, 0] > 0).sum(-1)
            for row, size in enumerate(sizes):
                numbers = labels(batch, label)[row, :size].tolist()
                found.append(of_list(BETA * ratio[row, :size], numbers))
            return torch.stack(found).mean()

        return loss, {}

    return make


@of_lists
def plackett_luce(rewards, ranks):
    assert ranks == sorted(ranks)
    terms = [torch.logsumexp(rewards[i:], 0) - rewards[i] for i in range(len(ranks))]
    return torch.stack(terms).sum()


@of_lists
def lipo_lambda(rewards, scores):
    order = sorted(range(len(scores)), key=lambda n: (-float(rewards[n].detach()), n))
    rank = {n: place + 1 for place, n in enumerate(order)}
    total = torch.zeros((), dtype=rewards.dtype)
    for i in rank:
        for j in rank:
            if scores[i] > scores[j]:
                gain = 2 ** scores[i] - 2 ** scores[j]
                discount = abs(1 / math.log(1 + rank[i]) - 1 / math.log(1 + rank[j]))
                margin = rewards[i] - rewards[j]
                total = total + gain * discount * torch.nn.functional.softplus(-margin)
    return total


@of_lists
def irpo(rewards, relevances):
    total = torch.zeros((), dtype=rewards.dtype)
    for i, own in enumerate(relevances):
        position = 1 + sum(other > own for other in relevances)
        others = [j for j in range(len(relevances)) if j != i]
        mean = torch.exp(rewards[others] - rewards[i]).mean()
        weight = (2**own - 1) / math.log2(1 + position)
        total = total + weight * torch.log(1 + mean)
    return total / len(relevances)


CASES = {
    "kto": kto,
    "bco": bco,
    "apo_zero_unpaired": apo_zero_unpaired,
    "plackett_luce": lambda: plackett_luce("ranks"),
    "lipo_lambda": lambda: lipo_lambda("qualities"),
    "irpo": lambda: irpo("relevances"),
}


def records(shared, *, lists):
    """Labeled answers, or lists of two to four with scores, from dialogues."""
    file = shared / "data" / "hh_rlhf_helpful_base_test.jsonl.gz"
    source, rng = data.open_source(str(file)), np.random.default_rng(0)
    split = lambda n, side: source[n][side].rpartition("\n\nAssistant:")[::2]
    for n in range(100):
        side = ("chosen", "rejected")[n % 3 == 0]
        before, answer = split(n, side)
        prompt = f"{before}\n\nAssistant:"
        if not lists:
            yield {"prompt": prompt, "completion": answer, "label": side == "chosen"}
            continue
        answers = [answer, *(split(100 + 3 * n + k, "chosen")[1] for k in range(3))]
        answers = answers[: rng.integers(2, 5)]
        scores = (rng.permutation(8)[: len(answers)] / 8).tolist()
        yield {"prompt": prompt, "completions": answers, "scores": scores}


@pytest.mark.parametrize("name", CASES)
def test_twenty_steps(name, stories260k, shared, tmp_path, monkeypatch):
    kind = getattr(objectives, name)().kind
    path = tmp_path / "data.jsonl"
    write_records(path, records(shared, lists=kind.sides is None))
    loss_of, options = CASES[name]()
    # All are in float64, except that the state of an objective is float32.
    ours = jaxpref_losses(
        stories260k,
        path,
        tmp_path / "run",
        dtype="float64",
        learning_rate=1e-3,
        loss=name,
        **options,
    )
    theirs = torch_losses(
        stories260k,
        batches(stories260k, path, kind),
        dtype=torch.float64,
        learning_rate=1e-3,
        monkeypatch=monkeypatch,
        loss_of=loss_of,
    )
    assert len(ours) == STEPS and np.ptp(ours) > 1e-3
    tolerance = 2e-6 if name == "bco" else 1e-8
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)
