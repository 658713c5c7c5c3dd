"""The tables of the sentiment experiment, from runs with known frontiers."""

from experiments import sentiment_report as made

BEST = [{"kl": 0.0, "reward": 0.0}, {"kl": 1.0, "reward": 2.0}]


def runs_of(arm: str, slope: float, seeds, kls=(0.25, 1.0)) -> list[dict]:
    """A frontier on which the reward is `slope` times the root of the KL."""
    return [
        {"arm": arm, "beta": 1 / kl, "seed": seed, "kl": kl, "malformed": 0.01,
         "reward": (slope + 0.1 * seed) * kl**0.5}
        for seed in seeds
        for kl in kls
    ]  # fmt: skip


def test_shares_and_matched_rewards_with_paired_intervals():
    records = runs_of("DPO", 1.0, (0, 2)) + runs_of("rDPO", 1.5, (0, 2))
    made.add_shares(records, BEST)
    assert [round(r["share_of_best_possible"], 9) for r in records[:2]] == [0.5, 0.5]
    table = made.matched_table(records, BEST, baseline="DPO", at=(0.49, 2.0))
    dpo, rdpo, best = table.rows
    # 1.1 and 1.6 times 0.7; draws move both methods alike, so the interval is a point.
    assert dpo == ["DPO", "0.77", "0.55", "", "–", "–", ""]
    assert rdpo == ["rDPO", "1.12", "0.80", "+0.35 (+0.35 to +0.35)", "–", "–", "–"]
    assert best == ["best possible", "1.40", "1", "", "–", "1", ""]


def test_runs_beyond_the_best_possible_curve_have_no_share():
    records = runs_of("DPO", 1.0, (0,), kls=(2.0,))
    made.add_shares(records, BEST)
    assert records[0]["share_of_best_possible"] is None
    assert made.make_table(records, "runs").rows[0][4] == "–"


def test_betas_are_tuned_on_the_tuning_draws_only():
    runs = runs_of("DPO", 1.0, (7,), kls=(0.25, 0.5, 1.0)) + runs_of("DPO", 1.0, (0,))
    tuned = made.tuned_betas(runs, [7], BEST, most_kl=0.6)
    assert tuned == {"DPO": 2.0}
    assert made.tuned_betas(runs, [], BEST, most_kl=0.6) == {}
    assert made.tuned_betas(runs, [7], BEST, most_kl=0.2) == {}  # all exceed it
    made.add_shares(runs, BEST)
    marked = [row[1] for row in made.make_table(runs, "runs", tuned).rows]
    assert marked == ["4", "2*", "1"]
