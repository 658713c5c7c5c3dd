"""Summarizes the steps of all processes in one record per case and system."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

FIRST_LOSS = 2e-4
"""Tolerance of the first loss, log 2: beta times the rounding of summed log-probs."""
LATER_LOSSES = 0.02
"""Relative tolerance of the decrease of the loss, in addition to the one above."""
GRAD_NORM = 5e-4
"""Relative tolerance of the first gradient's norm."""


def useful_flops(config, prompts: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """The floating-point operations that a DPO step needs for each pair.

    flops = 6 L (N_layer t + 2 H K s) + 6 D V a

    with N_layer the weights of a layer's matrices, t the pair's tokens (its prompt
    once), s the (query, key) pairs that attend, and a the answers' tokens.  A weight or
    a key costs two operations in the forward pass and four in the backward pass.  An
    answer sees the prompt and itself: s = p (p + 1) / 2 + sum over answers of
    c p + c (c + 1) / 2.  The stored reference, the optimizer, and everything that is
    not a matrix product are not counted.

    Args:
      config: the sizes, a `jaxpref.models.Architecture`.
      prompts: int [N], tokens of the prompts.
      answers: int [N, 2], tokens of the answers.

    Returns:
      float64 [N].
    """
    p, c = np.asarray(prompts, float), np.asarray(answers, float)
    queries = config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    layer = config.hidden_size * (2 * queries + 2 * keys + 3 * config.intermediate_size)
    tokens, total = p + c.sum(1), c.sum(1)
    seen = p * (p + 1) / 2 + (c * p[:, None] + c * (c + 1) / 2).sum(1)
    backbone = config.num_layers * (layer * tokens + 2 * queries * seen)
    return 6 * (backbone + config.hidden_size * config.vocab_size * total)


def pairs_per_second(run: Mapping, tokens: np.ndarray) -> float:
    """Pairs per second of a process, normalized to the mean length of a list.

    Packed batches may hold other pairs than the list, and a few more or fewer.  So a
    pair shorter than the list's mean counts as less than one.  If a process did the
    whole list, this is the number of pairs divided by the seconds.

    Args:
      run: `seconds` of each step, and `pairs`, their indices in the list.
      tokens: int [N], tokens of each pair of the list, with its prompt once; 0 for
        those of the warm-up.
    """
    done = sum(int(tokens[step].sum()) for step in run["pairs"])
    return done / tokens[tokens > 0].mean() / sum(run["seconds"])


def summarize(
    case: str,
    system: str,
    runs: Sequence[Mapping],
    lists: Sequence[tuple[np.ndarray, np.ndarray]],
    config,
    *,
    warmup: int,
    rate: float,
) -> dict:
    """One record: medians over rounds, and quartiles of pairs per second.

    Args:
      case: its name.
      system: its name.
      runs: the results of each round's process.
      lists: tokens of prompts [N] and answers [N, 2] of each round's pairs.
      config: the sizes of the model.
      warmup: number of pairs at the start of each list that were not timed.
      rate: FLOP/s of a matrix product in the same run.
    """
    speeds, seconds, shares = [], [], []
    for run, (prompts, answers) in zip(runs, lists):
        tokens = prompts + answers.sum(1)
        timed = np.where(np.arange(len(tokens)) < warmup, 0, tokens)
        speeds.append(pairs_per_second(run, timed))
        seconds.append(np.mean(run["seconds"]))
        flops = useful_flops(config, prompts, answers)
        needed = sum(flops[step].sum() for step in run["pairs"])
        shares.append(needed / sum(run["seconds"]) / rate)
    steps = [step for run in runs for step in run["pairs"]]
    return {
        "case": case,
        "system": system,
        "pairs_per_second": float(np.median(speeds)),
        "seconds_per_step": float(np.median(seconds)),
        "peak_mib": float(np.median([run["peak_mib"] for run in runs])),
        "utilization": float(np.median(shares)),
        "spread": [float(x) for x in np.quantile(speeds, [0.25, 0.75])],
        "pairs_per_second_of_rounds": [float(speed) for speed in speeds],
        "pairs_per_step": float(np.mean([len(step) for step in steps])),
        "steps": len(steps),
        "seconds": [run["seconds"] for run in runs],
        "warmup_seconds": [run["warmup_seconds"] for run in runs],
        "versions": runs[0]["versions"],
    }


def ratios(records: Sequence[Mapping]) -> list[dict]:
    """jaxpref relative to each peer in a case: speed by round, and memory."""
    found = []
    for case in dict.fromkeys(record["case"] for record in records):
        of_case = {r["system"]: r for r in records if r["case"] == case}
        ours = of_case.pop("jaxpref", None)
        for system, theirs in of_case.items() if ours else ():
            rounds = zip(
                ours["pairs_per_second_of_rounds"],
                theirs["pairs_per_second_of_rounds"],
            )
            of_rounds = [mine / other for mine, other in rounds]
            found.append(
                {
                    "case": case,
                    "system": system,
                    "speed": float(np.median(of_rounds)),
                    "speed_spread": [
                        float(x) for x in np.quantile(of_rounds, [0.25, 0.75])
                    ],
                    "memory": ours["peak_mib"] / theirs["peak_mib"],
                }
            )
    return found


def disagreements(found: Mapping[str, Mapping]) -> list[str]:
    """Describes where systems that took the same steps disagree.

    Args:
      found: `losses` and `grad_norms` of steps on the same batch, by system.
    """
    differences = []
    name, (first, *_) = next(iter(found)), found.values()
    for system, run in found.items():
        if not abs(run["losses"][0] - math.log(2)) <= FIRST_LOSS:
            differences.append(
                f"{system}: the first loss is {run['losses'][0]:.6f}, not log 2"
            )
        norm, expected = run["grad_norms"][0], first["grad_norms"][0]
        if not abs(norm - expected) <= GRAD_NORM * expected:
            differences.append(
                f"{system}: the first gradient's norm is {norm:.5g}, not {expected:.5g}"
                f" as of {name}"
            )
        for step, (loss, other) in enumerate(zip(run["losses"], first["losses"])):
            allowed = FIRST_LOSS + LATER_LOSSES * abs(math.log(2) - other)
            if step and not abs(loss - other) <= allowed:
                differences.append(
                    f"{system}: the loss of step {step} is {loss:.6f}, not {other:.6f}"
                    f" as of {name}"
                )
    return differences


def table(records: Sequence[Mapping]) -> str:
    """Formats the records and ratios as text."""
    lines = [
        f"{'case':14} {'system':8} {'pairs/s':>8} {'quartiles':>15} {'s/step':>8}"
        f" {'pairs':>6} {'MiB':>7} {'useful':>7}"
    ]
    for r in records:
        low, high = r["spread"]
        quartiles = f"{low:.3f} to {high:.3f}"
        lines.append(
            f"{r['case']:14} {r['system']:8} {r['pairs_per_second']:8.3f}"
            f" {quartiles:>15} {r['seconds_per_step']:8.2f}"
            f" {r['pairs_per_step']:6.1f} {r['peak_mib']:7.0f}"
            f" {100 * r['utilization']:5.1f}%"
        )
    for r in ratios(records):
        low, high = r["speed_spread"]
        lines.append(
            f"{r['case']}: jaxpref / {r['system']}: {r['speed']:.2f} times the pairs a"
            f" second ({low:.2f} to {high:.2f}), {r['memory']:.2f} of the memory"
        )
    return "\n".join(lines)
