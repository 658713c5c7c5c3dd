"""The programs of a run, compiled from shapes alone for devices that are elsewhere."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from jaxpref.errors import InputError, first_line
from jaxpref.files import cache_folder, write_json
from jaxpref.models import Model, RewardModel, build
from jaxpref.objectives import Objective
from jaxpref.plan.chips import Topology
from jaxpref.plan.hlo import collectives
from jaxpref.plan.layout import uniform_layout
from jaxpref.runtime.mesh import on_devices, row_shards
from jaxpref.sampling import lower as lower_sampler
from jaxpref.scoring.score_dataset import make_score_step
from jaxpref.scoring.scorer import Scorer, make_scorer
from jaxpref.train import MeshConfig, OptimizerConfig, make_mesh
from jaxpref.train.optimizer import make_optimizer, make_schedule
from jaxpref.train.task import Programs

FORMAT = 5
"""Of what is kept of a compiled program; part of the key."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What one step does, and how it is laid out."""

    model: Model
    """Sizes and numerics, remat included."""
    objective: Objective
    """What is made small."""
    optimizer: OptimizerConfig
    """What is remembered of gradients for each weight."""
    mesh: MeshConfig
    """How the devices are used."""
    prompt_length: int
    """Tokens of a prompt."""
    answer_length: int
    """Tokens of an answer."""
    batch_size: int
    """Pairs of a step."""
    accumulation: int = 1
    """Micro-batches of a step."""
    row_length: int | None = None
    """Tokens of a packed row."""
    logit_chunk: int | None = None
    """Completion tokens whose logits exist at the same time."""


def devices_of(topology: Topology) -> list:
    """The devices of a slice, of which none need exist here.

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
    """Compiles the train step, the reference pass and the sampler; reads their needs.

    Returns:
      Plain values: `mesh` by axis; `bytes` of one device by what they hold, and of the
      `activations` that a micro-batch keeps for its backward pass; for `step`,
      `score` and `decode` what `_compiled` says (`decode` is None for a reward model);
      `shape` of the batch, and of the `prompts` and what is sampled after them.

    Raises:
      InputError: if mesh, batch or topology do not fit each other.
    """
    task = programs_of(work, make_mesh(work.mesh, devices_of(topology)))
    mesh = task.mesh
    with jax.set_mesh(mesh):
        params, state = task.abstract_params(), task.abstract_state()
        frozen = task.abstract_frozen()
        batch = task.abstract_batch()
        one = params["one"] if task.objective.num_models > 1 else params
        score = make_score_step(task.reference_scorer)
        plain = dataclasses.replace(batch, reference={})
        activations = _activations(task.scorer, params, frozen, plain)
        prompts, draw = _sampler(work, one, mesh)
        programs = {
            "step": lambda: task.train_step.lower(state, frozen, batch),
            "score": lambda: score.lower(one, frozen, plain),
        }
        if "rewards" not in task.objective.scores:
            programs["decode"] = draw
        found: dict[str, Any] = {
            name: _compiled(lower, topology) for name, lower in programs.items()
        }
    rest = (state.objective_state, state.step, state.skipped)
    held = {
        "parameters": params,
        "optimizer": state.opt_state,
        "batch": batch,
        "reference": frozen,
        "other": rest,
    }
    found.setdefault("decode", None)
    return found | {
        "mesh": dict(mesh.shape),
        "bytes": {name: _bytes_of_one(tree) for name, tree in held.items()},
        "activations": activations,
        "shape": {
            "tokens": batch.tokens.shape,
            "targets": batch.targets.shape,
            "prompts": (*prompts, work.answer_length),
        },
    }


def programs_of(work: Work, mesh: jax.sharding.Mesh) -> Programs:
    """What a run would compile."""
    make_model = RewardModel if "rewards" in work.objective.scores else build
    # As a run has it: a probe differentiates a gradient.
    numerics = dataclasses.replace(
        work.model.numerics, twice_differentiable=work.objective.probe is not None
    )
    schedule = make_schedule(work.optimizer, 1000)
    return Programs(
        scorer=make_scorer(
            make_model(work.model.architecture, numerics),
            work.objective.scores,
            chunk_size=work.logit_chunk,
            num_models=work.objective.num_models,
        ),
        objective=work.objective,
        optimizer=make_optimizer(work.optimizer, schedule),
        schedule=schedule,
        mesh=mesh,
        layout=uniform_layout(
            work.objective.num_completions,
            mesh,
            prompt_length=work.prompt_length,
            answer_length=work.answer_length,
            batch_size=work.batch_size,
            accumulation=work.accumulation,
            row_length=work.row_length,
        ),
    )


def _activations(scorer: Scorer, params, frozen, batch) -> int:
    """Bytes of one device, of what is computed of tokens and kept for the gradient.

    What is laid out by rows (`data`), so a gathered embedding's copies too.
    """
    residuals = []

    def backward(params, frozen, batch):
        micro = jax.tree.map(lambda x: x[0], batch)
        _, pullback = jax.vjp(lambda params: scorer(params, frozen, micro), params)
        residuals.extend(map(jax.typeof, jax.tree.leaves(pullback)))

    jax.eval_shape(backward, params, frozen, batch)
    return _bytes_of_one([x for x in residuals if "data" in str(x.sharding.spec)])


def _sampler(work: Work, params, mesh: jax.sharding.Mesh) -> tuple:
    """Shape of the prompts, as many as pairs or a few more, and how to lower it."""
    shards = row_shards(mesh)
    shape = (-(-work.batch_size // shards) * shards, work.prompt_length)
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
    """Memory and collectives of one program, from the cache where they are known.

    `argument`, `output`, `temp` and `alias` bytes of one device; or `needs`, where the
    compiler only says that it is too much, and the `limit` that it found.
    `collectives`, where a loop that ends by what it computes turns once, and
    `collectives_of_a_turn`, what each turn more adds.
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
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, found)
    return found


def _compile(lowered, topology: Topology) -> tuple[jax.stages.Compiled, str]:
    """The program and its text.

    TPU's compiler writes the text to a folder: jax cannot read all of its programs.
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
    """`needs` and `limit` in bytes, of the compiler's message that memory ran out.

    Arguments are in what it says is needed.  None of another message.
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
    """Bytes that one device holds of arrays."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )
