"""The programs of a run, compiled from shapes alone for devices that are not here."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from jaxpref.errors import InputError, first_line
from jaxpref.files import write_json
from jaxpref.models import Model, RewardModel, build
from jaxpref.models.lora import LoraOptions
from jaxpref.models.reward_head import HeadOptions
from jaxpref.models.weights import Weights
from jaxpref.objectives import Objective
from jaxpref.plan.chips import Topology
from jaxpref.plan.hlo import collectives
from jaxpref.plan.layout import uniform_layout
from jaxpref.runtime.cache_folder import cache_folder, make_private
from jaxpref.runtime.mesh import on_devices, row_shards
from jaxpref.sampling import lower as lower_sampler
from jaxpref.scoring.partition import Trained, frozen_parts
from jaxpref.scoring.reward_head import head_of
from jaxpref.scoring.score_dataset import make_score_step
from jaxpref.scoring.twin import make_scorer
from jaxpref.train import MeshConfig, OptimizerConfig, make_mesh
from jaxpref.train.optimizer import make_optimizer, make_schedule
from jaxpref.train.task import Programs

FORMAT = 6
"""Version of the format of cached results; part of the cache key."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """The work of one step and its layout."""

    model: Model
    """Sizes and numerics, including remat."""
    objective: Objective
    """The objective to minimize."""
    optimizer: OptimizerConfig
    """The optimizer and its state."""
    mesh: MeshConfig
    """The mesh of devices."""
    lora: LoraOptions = LoraOptions()
    """The adapters, if not all weights are trained."""
    soft_prompt: int = 0
    """Length of the soft prompt that is trained instead; 0 for none."""
    prompt_length: int
    """Tokens per prompt, without the soft prompt."""
    answer_length: int
    """Tokens per answer."""
    num_completions: int
    """Completions per prompt."""
    batch_size: int
    """Pairs per step."""
    accumulation: int = 1
    """Micro-batches per step."""
    row_length: int | None = None
    """Tokens per packed row; None for one pair per row."""
    logit_chunk: int | None = None
    """Completion tokens whose logits are in memory at once."""
    head: HeadOptions = HeadOptions()
    """The head of a reward model."""
    sampled: int
    """Answers that are sampled at once."""
    step_only: bool = False
    """Whether the reference pass and the sampler are left out."""


def devices_of(topology: Topology) -> list:
    """The devices of a slice, which need not exist on this machine.

    Raises:
      InputError: if libtpu is not installed, or knows no such slice.
    """
    if topology.chip is None:
        return jax.devices("cpu")[: topology.devices]
    try:
        importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        raise InputError(
            f"--topology {topology.name}: the compiler for TPUs, libtpu, is not "
            'installed: pip install "jaxpref[plan]"'
        ) from None
    try:
        found = topologies.get_topology_desc(
            topology_name=topology.slice,
            platform="tpu",
            chip_config_name=topology.chip.config,
            num_slices=topology.slices,
        ).devices
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"--topology {topology.name}: libtpu knows no such slice "
            f"({first_line(error)})"
        ) from error
    if len(found) != topology.devices:
        raise RuntimeError(f"{topology.name}: {len(found)} devices")
    return found


def measure(work: Work, topology: Topology) -> dict:
    """Compiles the train step, the reference pass, and the sampler; measures them.

    Returns:
      Plain values: `mesh` sizes by axis; `bytes` per device by content, including the
      `activations` that a micro-batch stores for its backward pass; those of the
      sampler's `cache`; the number of
      `adapter_weights` of one model, None if all weights are trained; for `step`,
      `score`, and `decode`, the result of `_compiled` (`decode` is None for a reward
      model, and both are with `work.step_only`); the `shape` of the batch, and of the
      `prompts` and their continuations.

    Raises:
      InputError: if mesh, batch, and topology are not compatible.
    """
    task = programs_of(work, make_mesh(work.mesh, devices_of(topology)))
    mesh = task.mesh
    start = Weights(Path(), quantization=work.lora.base)
    with jax.set_mesh(mesh):
        params, state = task.abstract_params(), task.abstract_state()
        frozen = task.abstract_frozen()
        batch = task.abstract_batch()
        one = jax.eval_shape(
            functools.partial(task.scorer.reference_params, start),
            *(frozen, params),
        )
        one = on_devices(one, mesh)
        score = make_score_step(task.reference_scorer)
        plain = dataclasses.replace(batch, reference={})
        scored = functools.partial(task.scorer, totals=work.objective.totals)
        activations = _activations(scored, params, frozen, plain)
        prompts, draw = _sampler(work, one, mesh)
        cache = jax.eval_shape(
            lambda params: work.model.empty_cache(
                params, prompts[0], prompts[1] + work.answer_length
            ),
            one,
        )
        programs = {"step": lambda: task.train_step.lower(state, frozen, batch)}
        if not work.step_only:
            programs["score"] = lambda: score.lower(one, frozen, plain)
            if not task.objective.trains_reward_model:
                programs["decode"] = draw
        found: dict[str, Any] = {
            name: _compiled(lower, topology) for name, lower in programs.items()
        }
    rest = (state.objective_state, state.step, state.skipped)
    held = {
        "parameters": params,
        "optimizer": state.opt_state,
        "batch": batch,
        **frozen_parts(frozen),
        "other": rest,
    }
    return (
        {"score": None, "decode": None}
        | found
        | {
            "mesh": dict(mesh.shape),
            "bytes": {name: _bytes_of_one(tree) for name, tree in held.items()},
            "activations": activations,
            "cache": _bytes_of_one(on_devices(cache, mesh)),
            "adapter_weights": _adapter_weights(work, params),
            "shape": {
                "tokens": batch.tokens.shape,
                "targets": batch.targets.shape,
                "prompts": (*prompts, work.answer_length),
            },
        }
    )


def programs_of(work: Work, mesh: jax.sharding.Mesh) -> Programs:
    """The programs that a run would compile."""
    objective = work.objective
    head = head_of(objective.reads, objective.options, work.head)
    make_model = functools.partial(RewardModel, head=head) if head else build
    # As in a run: a probe differentiates a gradient.
    numerics = dataclasses.replace(
        work.model.numerics, twice_differentiable=work.objective.probe is not None
    )
    # The number of steps does not change the program.
    schedule = make_schedule(work.optimizer, max(1000, work.optimizer.warmup_steps))
    start = Weights(Path(), quantization=work.lora.base)
    return Programs(
        scorer=make_scorer(
            make_model(work.model.architecture, numerics),
            work.objective.scores,
            statistics=work.objective.statistics,
            heads=work.objective.heads,
            chunk_size=work.logit_chunk,
            num_models=work.objective.num_models,
            trained=Trained(
                lora=work.lora,
                soft_prompt=(0,) * work.soft_prompt,
                start=start,
                reference=start,
            ),
        ),
        objective=work.objective,
        optimizer=make_optimizer(work.optimizer, schedule),
        schedule=schedule,
        mesh=mesh,
        layout=uniform_layout(
            work.num_completions,
            mesh,
            prompt_length=work.soft_prompt + work.prompt_length,
            answer_length=work.answer_length,
            batch_size=work.batch_size,
            accumulation=work.accumulation,
            row_length=work.row_length,
        ),
    )


def _adapter_weights(work: Work, params) -> int | None:
    if work.lora.rank is None and not work.soft_prompt:
        return None
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    return count // work.objective.num_models


def _activations(scorer: Callable, params, frozen, batch) -> int:
    """Bytes per device of the activations that are stored for the gradient.

    Counts all arrays sharded by rows (`data`), which include the copies of a gathered
    embedding.
    """
    residuals = []

    def backward(params, frozen, batch):
        micro = jax.tree.map(lambda x: x[0], batch)
        _, pullback = jax.vjp(lambda params: scorer(params, frozen, micro), params)
        residuals.extend(map(jax.typeof, jax.tree.leaves(pullback)))

    jax.eval_shape(backward, params, frozen, batch)
    return _bytes_of_one([x for x in residuals if "data" in str(x.sharding.spec)])


def _sampler(work: Work, params, mesh: jax.sharding.Mesh) -> tuple:
    """The prompts' shape (those at once or a few more), and a function to lower it."""
    shards = row_shards(mesh)
    length = work.soft_prompt + work.prompt_length
    shape = (-(-work.sampled // shards) * shards, length)
    whole = lambda shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def lower():
        return lower_sampler(
            work.model,
            params,
            *on_devices((whole(shape), whole(shape[:1]), key), mesh),
            max_new_tokens=work.answer_length,
        )

    return shape, lower


def _compiled(lower, topology: Topology) -> dict:
    """Memory and collectives of one program, cached on disk.

    The memory is `argument`, `output`, `temp`, and `alias` bytes per device.  If the
    compiler runs out of memory, it is `needs` and `limit` from its message instead.
    `collectives` assumes one iteration of loops whose end depends on computed values;
    `collectives_of_a_turn` is what each further iteration adds.
    """
    start = time.monotonic()
    lowered = lower()
    key = hashlib.sha256(
        "\n".join([lowered.as_text(), topology.name, *_versions()]).encode()
    )
    path = cache_folder() / "plans" / f"{key.hexdigest()[:32]}.json"
    if (found := _read(path)) is not None:
        return found
    try:
        compiled, text = _compile(lowered, topology)
    except jax.errors.JaxRuntimeError as error:
        if (found := too_large(str(error))) is None:
            raise
        found["seconds"] = time.monotonic() - start
    else:
        memory = compiled.memory_analysis()
        found = {
            name: getattr(memory, f"{name}_size_in_bytes")
            for name in ("argument", "output", "temp", "alias")
        }
        read = functools.partial(
            collectives,
            text,
            devices=topology.devices // topology.slices,
            slices=topology.slices,
        )
        found["collectives"] = once = read()
        found["collectives_of_a_turn"] = {
            kind: {name: x - once[kind][name] for name, x in figures.items()}
            for kind, figures in read(turns=2).items()
            if figures != once[kind]
        }
        found["seconds"] = time.monotonic() - start
    make_private(path.parent)
    write_json(path, found)
    return found


def _compile(lowered, topology: Topology) -> tuple[jax.stages.Compiled, str]:
    """The compiled program and its text.

    The TPU compiler writes the text to a folder, because jax cannot read all of its
    programs.
    """
    if topology.chip is None:
        compiled = lowered.compile()
        return compiled, compiled.as_text()
    with tempfile.TemporaryDirectory(prefix="jaxpref-plan-") as folder:
        compiled = lowered.compile(
            compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        )
        (path,) = Path(folder).glob("*.after_optimizations.txt")
        return compiled, path.read_text("utf-8")


def _read(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _versions() -> list[str]:
    found = [f"format {FORMAT}"]
    for package in ("jax", "jaxlib", "libtpu"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {package}")
    return found


UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def too_large(message: str) -> dict | None:
    """`needs` and `limit` in bytes, from a compiler's message that memory ran out.

    `needs` includes the arguments.  None for any other message.
    """
    size = r"([\d.]+)([KMGT]?)B?"
    match = re.search(
        rf"\({size}\) exceeds available HBM \({size}\)|Used {size} of {size} hbm",
        message,
    )
    if match is None:
        return None
    needs, unit, limit, limit_unit = (g for g in match.groups() if g is not None)
    return {
        "needs": float(needs) * UNITS[unit],
        "limit": float(limit) * UNITS[limit_unit],
    }


def _bytes_of_one(tree) -> int:
    """Bytes of arrays on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )
