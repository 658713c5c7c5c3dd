"""Injected noise: the rates asked for, by pair id alone, the truth kept."""

import hashlib

import numpy as np
import pytest
from scipy import optimize

from jaxpref.data import (
    DataOptions,
    DatasetBuilder,
    InjectOptions,
    ListSource,
    make_splits,
)
from jaxpref.data.noise import (
    flip_by_class,
    flip_by_margin,
    flip_pairs,
    flip_symmetric,
    margin_temperature,
    read_rates,
)
from jaxpref.errors import InputError
from tests.data_tokenizers import byte_tokenizer, synthetic_pairs

TOKENIZER = byte_tokenizer()
IDS = [f"pair {n}" for n in range(20_000)]


def uniform(text):
    """The first 53 bits of SHA-256 as a number in [0, 1)."""
    return (int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) >> 11) / 2**53


def near(flips, rate):
    """Within five standard deviations of a binomial."""
    return abs(flips.mean() - rate) < 5 * (rate * (1 - rate) / len(flips)) ** 0.5


def plan_of(records, **options):
    return make_splits(ListSource(records), TOKENIZER, DataOptions(**options))


def test_only_pairs_are_flipped():
    builder = DatasetBuilder(1)
    builder.add([1], [[2]], id="a")
    with pytest.raises(InputError, match="1 completions are not a pair"):
        flip_pairs(builder.build(), np.ones(1, bool))


def test_symmetric_flips_are_pinned():
    """A change here flips other pairs in every run: no such change."""
    flips = flip_symmetric(IDS[:300], rate=0.3, seed=7)
    assert flips.tolist() == [uniform(f"flip 7\n{name}") < 0.3 for name in IDS[:300]]
    assert flips.dtype == bool and 60 < flips.sum() < 120


def test_classes_flip_at_their_own_rates():
    classes = ["ann", "bob", "eve", None] * 5000
    rates = {"ann": 0.1, "bob": 0.4, "eve": 0.9}
    flips = flip_by_class(IDS, classes, rates, seed=3, default=0.2)
    for start, rate in enumerate((0.1, 0.4, 0.9, 0.2)):
        assert near(flips[start::4], rate)
    # One number a pair decides whatever the kind: more rate only adds flips.
    assert (flips | ~flip_symmetric(IDS, rate=0.1, seed=3)).all()
    alike = flip_by_class(IDS, classes, {}, seed=3, default=0.4)
    assert (alike == flip_symmetric(IDS, rate=0.4, seed=3)).all()
    # A pair's flip depends on no other pair.
    part = flip_by_class(IDS[1::2], classes[1::2], rates, seed=3, default=0.2)
    assert (part == flips[1::2]).all()


def test_hard_pairs_flip_more():
    margins = np.random.default_rng(0).normal(0, 3, len(IDS))
    flips = flip_by_margin(IDS, margins, temperature=0.5, seed=0)
    expected = 1 / (1 + np.exp(np.abs(margins) / 0.5))
    order = np.argsort(np.abs(margins))
    for part in np.array_split(order, 10):
        mean = expected[part].mean()
        error = (flips[part].mean() - mean) / np.sqrt(mean / len(part))
        assert abs(error) < 5
    assert flips[order[:500]].mean() > 0.4 and flips[order[-10_000:]].mean() < 0.05
    assert (flips == flip_by_margin(IDS, -margins, temperature=0.5, seed=0)).all()
    assert (flips != flip_by_margin(IDS, margins, temperature=0.5, seed=1)).any()
    certain = flip_by_margin(IDS, margins, temperature=1e-12, seed=0)
    assert not certain.any()


@pytest.mark.parametrize("rate", [0.01, 0.2, 0.45])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_temperature_gives_the_rate_that_was_asked(rate, scale):
    margins = scale * np.random.default_rng(1).normal(0, 1, 5000)
    mean = lambda log_t: np.mean(
        1 / (1 + np.exp(np.minimum(np.abs(margins) / np.exp(log_t), 700)))
    )
    root = optimize.brentq(
        lambda x: mean(x) - rate, np.log(scale) - 9, np.log(scale) + 9
    )
    assert margin_temperature(margins, rate=rate) == pytest.approx(np.exp(root))


def test_planted_flips_swap_completions_and_keep_the_truth():
    records = [r | {"flip": n % 5 == 0} for n, r in enumerate(synthetic_pairs(60))]
    pairs = plan_of(records, heldout_fraction=0).train
    flips = flip_symmetric(pairs.ids.tolist(), rate=0.4, seed=0)
    noisy = flip_pairs(pairs, flips)
    for n in range(len(pairs)):
        assert noisy.prompt(n).tolist() == pairs.prompt(n).tolist()
        for side in (0, 1):
            source = pairs.completion(n, 1 - side if flips[n] else side)
            assert noisy.completion(n, side).tolist() == source.tolist()
    assert (
        noisy.columns["is_flipped"].tolist()
        == (pairs.columns["is_flipped"] != flips).tolist()
    )
    assert noisy.ids is pairs.ids
    assert flip_pairs(noisy, flips).digest() == pairs.digest()
    # The same as planting while the file is read.
    planned = plan_of(
        records, heldout_fraction=0, inject=InjectOptions(flip_rate=0.4)
    ).train
    assert noisy.digest() == planned.digest()


def test_what_cannot_be_is_refused(tmp_path):
    path = tmp_path / "rates.json"
    refused = {
        "{": "rates.json: cannot be read",
        "[0.1]": "must be an object",
        "{}": "must be an object",
        '{"ann": 1.5}': "field 'ann'.* 1.5 .*0 to 1",
        '{"ann": "half"}': "field 'ann'.*'half'",
        '{"ann": true}': "field 'ann'",
        '{"ann": NaN}': "field 'ann'",
    }
    for text, message in refused.items():
        path.write_text(text)
        with pytest.raises(InputError, match=message) as error:
            read_rates(path)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="none.json"):
        read_rates(tmp_path / "none.json")
    for rate in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match="flip rate"):
            flip_symmetric(IDS[:3], rate=rate, seed=0)
    with pytest.raises(InputError, match="temperature"):
        flip_by_margin(IDS[:3], np.ones(3), temperature=0.0, seed=0)
    for rate in (0.0, 0.5):
        with pytest.raises(InputError, match="between 0 and 1/2"):
            margin_temperature(np.ones(3), rate=rate)
    with pytest.raises(InputError, match="not zero"):
        margin_temperature(np.zeros(3), rate=0.2)
