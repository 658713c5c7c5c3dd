r"""Align a model folder on a preference file, with and without a robust loss.

Claim
    The same code trains a 260-thousand-parameter model on a laptop CPU and a real
    instruct model on an accelerator (not yet verified on one).  It runs rDPO (Chowdhury
    et al. 2024, arXiv:2403.00409) and DPO (Rafailov et al. 2023, arXiv:2305.18290) on
    the same pairs, in the same order, from the same reference.

Commands
    With access to the Hugging Face hub, on a CPU or GPU machine or on every worker of a
    TPU pod:

        python -m experiments.align --model HuggingFaceTB/SmolLM2-135M-Instruct \
            --data Anthropic/hh-rlhf --flip-rate 0.2 --out runs/align

    With a folder and a file:

        python -m experiments.align --model DIR --data pairs.jsonl --out runs/align

Expected
    A table of held-out accuracy and margin before and after training, for each loss.
    It takes as long as two `jaxpref train` runs of `--max-steps` steps.

Output in OUT
    `dpo/` and `rdpo/` (complete runs with `metrics.jsonl` and `export/`),
    `results.json`, `curves.png`, `report.html`.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import tyro

from jaxpref import losses, report
from jaxpref.data import DataOptions
from jaxpref.errors import InputError
from jaxpref.files import check_output_folder, write_json
from jaxpref.objectives import from_loss
from jaxpref.runtime.entry import entry_point
from jaxpref.runtime.ranges import checked
from jaxpref.train import Decay, OptimizerConfig, TrainConfig, read_metrics, run
from jaxpref.train.options import Dtype

WRITTEN = "results.json", "curves.png", "report.html"
"""Names of what the experiment writes to OUT, besides the runs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignConfig:
    """Options of this experiment; all other settings are defaults of `TrainConfig`."""

    model: str
    """Hugging Face model folder or Hub ID."""
    data: str
    """Preference file or dataset."""
    out: str
    """Folder for the runs and the report."""
    flip_rate: float = 0.2
    """Share of wrong labels that rDPO assumes."""
    beta: float = 0.1
    """Inverse temperature of both losses."""
    learning_rate: float = 5e-7
    """Peak learning rate of AdamW."""
    max_steps: int = 200
    """Optimizer steps of each run."""
    batch_size: int = 32
    """Pairs per step."""
    accumulation: int = 1
    """Micro-batches per step."""
    max_length: int = 1024
    """Maximum length of prompt plus completion, in tokens."""
    max_pairs: int | None = None
    """Maximum number of pairs to read."""
    heldout_fraction: float = 0.05
    """Share of the prompts held out for evaluation."""
    compute_dtype: Dtype | None = None
    """Dtype of matrix products (default: bfloat16 on TPU and GPU, float32 on CPU)."""
    seed: int = 0
    """Seed of the order of the pairs."""


def main(config: AlignConfig) -> None:
    """Runs both losses, then compares them."""
    arms = runs_of(config)
    reads = {"--model": config.model, "--data": config.data}
    check_output_folder("--out", config.out, (*WRITTEN, *arms), reads)
    for each in arms.values():
        run(each)
    if jax.process_index() == 0:
        write_report(config, tuple(arms), Path(config.out))


def runs_of(config: AlignConfig) -> dict[str, TrainConfig]:
    """The run of each loss; checks all options."""
    if not config.heldout_fraction:
        raise InputError(
            "--heldout-fraction 0 leaves no pairs to compare the losses on"
        )
    arms = {
        "dpo": from_loss(losses.dpo, beta=config.beta),
        "rdpo": from_loss(losses.rdpo, beta=config.beta, flip_rate=config.flip_rate),
    }
    out = Path(config.out)
    return {
        name: train_config(config, objective, out / name)
        for name, objective in arms.items()
    }


def write_report(config: AlignConfig, arms: Sequence[str], out: Path) -> None:
    """Writes results, curves, and the report from the held-out metrics."""
    heldout = {}
    for name in arms:
        lines = read_metrics(out / name / "metrics.jsonl")
        heldout[name] = [line for line in lines if "eval_loss" in line]
    rows = [{"loss": name} | before_and_after(lines) for name, lines in heldout.items()]
    write_json(out / "results.json", rows)
    records = [
        {"arm": name, **line} for name, lines in heldout.items() for line in lines
    ]
    report.training_curves(
        out / "curves.png",
        records,
        {
            "eval_rewards/accuracies": "held-out accuracy",
            "eval_rewards/margins": "held-out margin",
        },
        title="Held-out pairs during training",
    )
    table = report.Table(list(rows[0]), [list(row.values()) for row in rows])
    options = dataclasses.asdict(config).items()
    command = "    python -m experiments.align" + "".join(
        f" --{name.replace('_', '-')} {value}" for name, value in options
    )
    section = report.Section(
        "Before and after",
        [
            "Implicit-reward accuracy on prompts never trained on; before training the "
            "policy is its reference, so every pair is a tie and counts half.",
            table,
            report.Figure(out / "curves.png", "accuracy and margin during training"),
            "Made by",
            command,
        ],
    )
    report.write_html(out / "report.html", "Aligning a model on a file", [section])
    for row in rows:
        print("  ".join(f"{k} {v:.4f}" if k != "loss" else v for k, v in row.items()))
    print(f"report: {out / 'report.html'}")


def train_config(config: AlignConfig, objective, out: Path) -> TrainConfig:
    """The config of one training run."""
    return TrainConfig(
        model=config.model,
        data=config.data,
        out=str(out),
        objective=objective,
        max_steps=config.max_steps,
        batch_size=config.batch_size,
        accumulation=config.accumulation,
        seed=config.seed,
        compute_dtype=config.compute_dtype,
        options=DataOptions(
            max_length=config.max_length,
            max_pairs=config.max_pairs,
            heldout_fraction=config.heldout_fraction,
        ),
        optimizer=OptimizerConfig(
            learning_rate=config.learning_rate,
            decay=Decay.LINEAR,
            warmup_steps=max(config.max_steps // 10, 1),
        ),
        log_every=max(config.max_steps // 50, 1),
        eval_every=max(config.max_steps // 4, 1),
    )


def before_and_after(heldout: list[dict]) -> dict[str, float]:
    """Held-out accuracy and margin at the first and the last step."""
    first, last = heldout[0], heldout[-1]
    return {
        f"{name} {when}": line[f"eval_rewards/{key}"]
        for name, key in (("accuracy", "accuracies"), ("margin", "margins"))
        for when, line in (("before", first), ("after", last))
    }


if __name__ == "__main__":
    with entry_point():
        main(checked(tyro.cli(AlignConfig, description=__doc__)))
