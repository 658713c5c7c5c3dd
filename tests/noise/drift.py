"""Coverage of `jaxpref.noise.running` on margins whose scale drifts during a pass.

    python -m tests.noise.drift

The true margins m have mean 0, and the true label is drawn by Bradley-Terry, s(m).  It
is flipped with the given rate.  The policy's margin is scale(t) x (q m + noise), where
q is its correlation with m, the noise has the variance of (1 - q^2) m, and the scale
rises linearly from 0.02 to 1 during one pass of 16,384 pairs in batches of 64.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import expit

from jaxpref.noise import running

BATCH = 64


@dataclasses.dataclass(frozen=True)
class Case:
    """How margins are drawn."""

    name: str
    spread: float = 1.5
    """Standard deviation of m."""
    correlation: tuple[float, float] = (1.0, 1.0)
    """q at the start and at the end of the pass."""
    true_tails: float | None = None
    """Degrees of freedom of Student's t for m; None for a normal distribution."""
    noise_tails: float | None = None
    """The same for the noise."""
    scale: tuple[float, float] = (0.02, 1.0)
    wobble: float = 0.0
    """Standard deviation of the logarithm of the scale between batches."""
    labels: int = 16_384
    datasets: int = 40
    rates: tuple[float, ...] = (0.0, 0.2, 0.4)


RATES = (0.0, 0.1, 0.2, 0.3, 0.4)
TARGET = Case("drifting scale", datasets=1000, rates=RATES)
OTHERS = (
    Case("constant scale", scale=(1.0, 1.0)),
    Case("small margins", spread=0.5),
    Case("large margins", spread=2.5),
    Case("4,096 pairs", labels=4096),
    Case("heavy tails", spread=2.0, true_tails=3.0),
    Case("noisy policy", spread=3.0, correlation=(0.6, 0.6)),
    Case("learning policy", spread=2.0, correlation=(0.0, 0.9)),
    Case("noise with heavy tails", 2.5, (0.7, 0.7), noise_tails=3.0),
    Case("truth with heavy tails, noise without", 2.5, (0.7, 0.7), true_tails=3.0),
    Case("scale varies by 5%", wobble=0.05),
    Case("scale varies by 15%", wobble=0.15, datasets=200),
)


def draw(seed, case: Case, *, rate: float, datasets: int) -> np.ndarray:
    """Margins of the labels, positive where the policy agrees; [datasets, labels]."""
    random = np.random.default_rng(seed)
    shape = datasets, case.labels

    def standard(tails):
        if tails is None:
            return random.normal(size=shape)
        return random.standard_t(tails, shape) * np.sqrt((tails - 2) / tails)

    m = case.spread * standard(case.true_tails)
    q, scale = (
        np.linspace(*ends, case.labels) for ends in (case.correlation, case.scale)
    )
    policy = q * m + np.sqrt(1 - q**2) * case.spread * standard(case.noise_tails)
    if case.wobble:
        batches = random.normal(size=(datasets, case.labels // BATCH))
        policy = policy * np.repeat(np.exp(case.wobble * batches), BATCH, axis=1)
    first_wins = (random.random(shape) < expit(m)) ^ (random.random(shape) < rate)
    return np.where(first_wins, 1, -1) * (scale * policy)


@jax.jit
def fit(margins: jax.Array) -> running.RunningRate:
    """The estimate after one pass over each dataset; [datasets, labels]."""

    def counted(margins):
        add = lambda counts, batch: (running.count(counts, batch), None)
        batches = margins.reshape(-1, BATCH)
        return jax.lax.scan(add, running.no_counts(), batches)[0]

    counts = jax.vmap(counted)(margins)
    return jax.lax.map(running.posterior, counts, batch_size=10)


def row(seed, case: Case, rate: float) -> str:
    """A line of the table."""
    parts = []
    for part in range(0, case.datasets, 100):
        count = min(100, case.datasets - part)
        margins = draw((*seed, part), case, rate=rate, datasets=count)
        parts.append(jax.device_get(fit(jnp.asarray(margins, jnp.float32))))
    found = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    inside = (found.lower <= rate) & (rate <= found.upper)
    known = found.identified
    error = found.rate - rate
    size = np.abs(error)
    width = np.median(found.upper - found.lower)
    of_known = size[known].mean() if known.any() else np.nan
    covers = inside[known].mean() if known.any() else np.nan
    return (
        f"{case.name}, rate {rate}: {inside.mean():.3f} "
        f"(above {np.mean(found.lower > rate):.3f}, below "
        f"{np.mean(found.upper < rate):.3f}), width {width:.3f}; "
        f"error {size.mean():.4f}, "
        f"bias {error.mean():+.4f}; identified {known.mean():.2f}, error then "
        f"{of_known:.4f}, coverage then {covers:.3f}"
    )


def main() -> None:
    """Prints the table."""
    print("coverage of 95% intervals (above, below the truth), median width; mean")
    print("absolute error and bias of the rate; share of datasets with the rate")
    print("identified, and error and coverage in these")
    for number, case in enumerate((TARGET, *OTHERS)):
        for rate in case.rates:
            print(row((18, number, int(100 * rate)), case, rate), flush=True)


if __name__ == "__main__":
    main()
