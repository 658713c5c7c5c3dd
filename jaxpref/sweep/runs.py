"""The runs of a sweep, one after the other."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxpref import data
from jaxpref.data.mixing import read_mixture
from jaxpref.data.read import read_datasets
from jaxpref.errors import InputError
from jaxpref.evaluate.on_policy import (
    Compute,
    Prompts,
    RewardFolder,
    heldout_prompts,
    measure,
    reward_folder,
)
from jaxpref.files import Reads, check_output_folder, read_json
from jaxpref.models import Numerics
from jaxpref.models.folder_config import read_architecture
from jaxpref.models.soft_prompt_files import soft_prompt_length
from jaxpref.report.progress import duration, shown
from jaxpref.report.training import write_training
from jaxpref.runtime.entry import explained
from jaxpref.runtime.metrics_file import read_metrics
from jaxpref.runtime.precision import default_compute_dtype
from jaxpref.runtime.preemption import Preempted
from jaxpref.runtime.processes import log
from jaxpref.runtime.run_folder import open_out
from jaxpref.sweep.options import SweepOptions, SweepRun
from jaxpref.sweep.results import (
    heldout_metrics,
    made_by,
    read_result,
    write_result,
)
from jaxpref.sweep.tables import Record, finite
from jaxpref.train.config import TrainConfig, open_run, to_json
from jaxpref.train.prepare import prepare
from jaxpref.train.run import run as train
from jaxpref.train.task import Task

TABLE = "sweep.json"
FILES = (TABLE, "sweep.csv", "report.html", "frontier.png")
"""Names of what a sweep writes to OUT, besides the folders of its runs."""
SWEEP = "a sweep"
"""What OUT holds, for messages."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run that has been checked and is ready to start."""

    run: SweepRun
    task: Task
    made_by: Mapping[str, Any]
    """What decides the exported model; see `results.made_by`."""
    prompts: Prompts | None
    """What its policy answers; None for reward models, or without a KL."""

    @property
    def out(self) -> Path:
        """The folder of the run."""
        return Path(self.run.config.out)

    @property
    def reference(self) -> Path:
        """The folder of the model that its policy is compared with."""
        reference = self.task.reference
        return self.task.start.folder if reference is None else reference.folder


def run_all(
    runs: Sequence[SweepRun],
    options: SweepOptions,
    out: str,
    *,
    write: Callable[[Path, list[Record]], None],
) -> list[Record]:
    """Trains all runs that are not finished yet, and measures their policies.

    Everything is checked before the first run starts.  A run that fails is recorded,
    and the others go on.  The same call resumes an interrupted sweep and tries failed
    runs again; a call with more runs extends it.

    Args:
      runs: the runs, at least one.
      options: how they are compared.
      out: the folder OUT of the sweep.
      write: `write(folder, records)`, called after every run.

    Returns:
      A record for each run: `name`, `options`, `objective`, `heldout_pairs` (their
      number), `heldout_digest`, `status` ("finished" or "failed"), `error` and
      `exit_code` if it failed, and otherwise the metrics of `results.heldout_metrics`
      and `on_policy.measure`.

    Raises:
      InputError: if something is wrong with a run, before any has started.
      Preempted: after SIGTERM during training; the same call resumes.
    """
    if jax.process_count() > 1:
        raise InputError(
            "a sweep runs in a single process; start its runs one by one with "
            "`jaxpref train`"
        )
    runs = _with_dtypes(runs)
    for run in runs:
        check_output_folder("--out", out, FILES, _reads(run.config, options))
    reads = _reads(runs[0].config, options)
    with open_out(out, TABLE, what=SWEEP, writes=FILES, reads=reads) as folder:
        scorer = reward_folder(options.reward_model) if options.reward_model else None
        ready = _prepare_all(runs, options)
        wanted = _measurement(options, scorer)
        waiting = sum(not _is_done(one, wanted) for one in ready)
        log(f"{len(runs)} runs: {len(runs) - waiting} finished, {waiting} to do")
        records: list[Record] = []
        passed: list[float] = []
        starts: dict[tuple, float] = {}
        for number in range(1, len(runs) + 1):
            one = ready.pop(0)  # not kept, so that its programs are freed
            done, began = _is_done(one, wanted), time.monotonic()
            records.append(_record(one, scorer, wanted, starts))
            line = f"run {number} of {len(runs)}, {_line(records[-1])}"
            if not done:
                waiting -= 1
                passed.append(time.monotonic() - began)
                line += f" in {duration(passed[-1])}"
            if passed and waiting:
                left = duration(waiting * statistics.fmean(passed))
                line += f"; about {left} left"
            log(line)
            write(folder, records)
    return records


def _with_dtypes(runs: Sequence[SweepRun]) -> list[SweepRun]:
    """The runs with the default dtype filled in, as a run does before it starts."""
    default = functools.cache(default_compute_dtype)  # it logs a line
    filled = lambda config: dataclasses.replace(
        config, compute_dtype=config.compute_dtype or default()
    )
    return [dataclasses.replace(run, config=filled(run.config)) for run in runs]


def _reads(config: TrainConfig, options: SweepOptions) -> Reads:
    return {
        "--model": config.model,
        "--data": read_mixture(config.data).names,
        "--adapter": config.adapter,
        "--reference": config.reference,
        "--eval-data": config.eval_data,
        "--reward-model": options.reward_model,
    }


# --- before the first run


def _prepare_all(runs: Sequence[SweepRun], options: SweepOptions) -> list[Prepared]:
    """Checks all runs, and reads the records that they share once.

    Raises:
      InputError: names the run, if it is not the first one.
    """
    read, ready = shared(read_datasets), []
    for run in runs:
        try:
            ready.append(_prepare(run, options, read))
        except InputError as error:
            where = f"{run.name}: " if ready else ""
            raise type(error)(f"{where}{error}") from error
    return ready


def _prepare(
    run: SweepRun, options: SweepOptions, read: Callable[..., data.Datasets]
) -> Prepared:
    config, out = run.config, Path(run.config.out)
    if (out / "config.json").exists():
        with open_run(config, to_json(config)):
            pass  # another run in its folder is found before the first one starts
    task = prepare(config, read=read)
    if not len(task.datasets.splits.heldout):
        raise InputError(
            "no pairs are held out, so there is nothing to compare the runs on; give "
            "a larger --heldout-fraction or --eval-data"
        )
    of_run = task.reference
    adapter = of_run and of_run.weights.adapter
    if options.kl_prompts and adapter is not None:
        raise InputError(
            f"the reference has the adapter {adapter}, but KL is measured to a "
            "model folder; merge the adapter, or pass --kl-prompts 0"
        )
    soft = config.soft_prompt.given or soft_prompt_length(task.start.adapter)
    if options.kl_prompts and soft and not task.objective.trains_reward_model:
        raise InputError(
            "--soft-prompt: its runs export no model folder, to which KL is measured; "
            "pass --kl-prompts 0 to compare the runs on held-out pairs alone"
        )
    prompts = None
    if options.kl_prompts and not task.objective.trains_reward_model:
        positions = read_architecture(task.start.folder).context_length
        prompts = heldout_prompts(
            task.datasets,
            config.options,
            count=options.kl_prompts,
            max_new_tokens=options.kl_tokens,
            positions=positions,
        )
    return Prepared(run, task, made_by(config, task), prompts)


def shared(read: Callable[..., data.Datasets]) -> Callable[..., data.Datasets]:
    """`read_datasets` that reads the same records once.

    The tokenizer of another model, a reference, is checked again only if it is not in
    the folder of the tokenizer.
    """
    found: dict[tuple, data.Datasets] = {}

    def read_once(
        tokenizer: Any,
        options: data.DataOptions,
        *,
        scored_by: Mapping[str, Path],
        **others: Any,
    ) -> data.Datasets:
        own = str(tokenizer.name_or_path)
        models = {name: x for name, x in scored_by.items() if str(x) != own}
        key = (own, options, *sorted(models.items()), *sorted(others.items()))
        if key not in found:
            found[key] = read(tokenizer, options, scored_by=scored_by, **others)
        return found[key]

    return read_once


# --- one run


def _measurement(options: SweepOptions, scorer: RewardFolder | None) -> dict[str, Any]:
    """What decides what is measured of a policy, besides the run, as JSON values."""
    return {
        "prompts": options.kl_prompts,
        "tokens": options.kl_tokens,
        "reward_model": None if scorer is None else scorer.digest,
    }


def _is_done(one: Prepared, wanted: Mapping[str, Any]) -> bool:
    result = read_result(one.out, one.made_by)
    measured = one.prompts is None or (result or {}).get("measured_with") == wanted
    return result is not None and measured


def _record(
    one: Prepared,
    scorer: RewardFolder | None,
    wanted: Mapping[str, Any],
    starts: dict[tuple, float],
) -> Record:
    """Finishes a run, unless it is finished; what is known of it.

    Args:
      one: the run.
      scorer: scores what its policy writes, or None.
      wanted: from `_measurement`.
      starts: mean rewards of references that were measured before; one is added.
    """
    about = {
        "name": one.run.name,
        "options": dict(one.run.values),
        "objective": one.task.objective.name,
        "heldout_pairs": len(one.task.datasets.splits.heldout),
        "heldout_digest": one.made_by["contents"]["the held-out pairs"],
    }
    try:
        result = read_result(one.out, one.made_by)
        if result is None:
            train(one.run.config, task=one.task)
            write_training(one.out, command=one.run.command)
            result = {"made_by": one.made_by}
            write_result(one.out, result)
        if one.prompts is not None and result.get("measured_with") != wanted:
            measured = _measure(one, one.prompts, scorer, starts)
            result |= {"measured_with": wanted, "measured": measured}
            write_result(one.out, result)
        lines = read_metrics(one.out / "metrics.jsonl")
        metrics = heldout_metrics(lines, step=_exported_step(one))
        measured = result["measured"] if one.prompts is not None else {}
        return {**about, "status": "finished", **finite({**metrics, **measured})}
    except Preempted:
        raise
    except Exception as error:
        message, code = explained(error, one.out)
        return about | {"status": "failed", "error": message, "exit_code": code}


def _exported_step(one: Prepared) -> int | None:
    """The step whose weights are exported; None for the last one."""
    best = one.out / "best.json"
    if one.run.config.export == "best" and best.exists():
        return read_json(best)["step"]
    return None


def _measure(
    one: Prepared,
    prompts: Prompts,
    scorer: RewardFolder | None,
    starts: dict[tuple, float],
) -> dict[str, Any]:
    """What the policy writes; with a reward model, also what the reference writes."""
    config = one.run.config
    numerics = Numerics(
        param_dtype=config.param_dtype,
        compute_dtype=config.compute_dtype or default_compute_dtype(),
    )
    compute = Compute(
        mesh=one.task.mesh, batch_size=config.batch_size, numerics=numerics
    )
    of = lambda policy: measure(policy, one.reference, prompts, scorer, compute=compute)
    found = of(one.out / "export")
    if scorer is not None:
        key = (one.reference, one.made_by["contents"]["the held-out pairs"])
        if key not in starts:
            starts[key] = of(one.reference)["reward"]
        found["reference_reward"] = starts[key]
    return finite(found)


def _line(record: Record) -> str:
    """A run in one line."""
    if record["status"] == "failed":
        return f"{record['name']}: failed: {record['error']}"
    named = {"loss": "loss", "accuracy": "accuracy", "margin": "margin", "kl": "KL"}
    named |= {"reward": "reward"}
    found = [
        f"{title} {shown(name, record[name])}"
        for name, title in named.items()
        if record.get(name) is not None
    ]
    return f"{record['name']}: {', '.join(found)}"
