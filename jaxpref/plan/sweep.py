"""The meshes and remat policies that `--sweep` compiles."""

import dataclasses
from collections.abc import Iterator, Sequence

from jaxpref.models import Architecture
from jaxpref.plan.chips import Topology
from jaxpref.plan.config import PlanConfig
from jaxpref.train import MeshConfig


def candidates(
    config: PlanConfig, model: Architecture, topology: Topology
) -> Iterator[PlanConfig]:
    """Plans to compile: each mesh with remat "full" and "dots".

    `tensor` is 1, 2, 4, or 8 if it divides the model, and `expert` that of the config.
    `fsdp` is the largest number of devices of a slice that divides the hidden size and
    the vocabulary.  The other devices are on `data`.  The mesh must divide the rows of
    a micro-batch.
    """
    expert = max(config.mesh.expert, 1)
    for tensor in (1, 2, 4, 8):
        sizes = (model.num_heads, model.num_kv_heads, model.intermediate_size)
        sizes += (model.vocab_size, model.hidden_size)
        parts = expert * tensor * topology.slices
        if topology.devices % parts or any(size % tensor for size in sizes):
            continue
        rest = topology.devices // (tensor * expert)
        fsdp = largest_fsdp(model, topology, rest)
        rows = rest * expert * config.accumulation
        if config.row_length is None and config.batch % rows:
            continue
        mesh = MeshConfig(data=rest // fsdp, fsdp=fsdp, expert=expert, tensor=tensor)
        for remat in ("full", "dots"):
            yield dataclasses.replace(config, mesh=mesh, remat=remat)


def largest_fsdp(model: Architecture, topology: Topology, rest: int) -> int:
    """Most devices of a slice that divide both hidden size and vocabulary.

    `rest` is the number of devices that the other axes leave to data and fsdp.
    """
    return max(
        n
        for n in range(1, rest + 1)
        if not (rest % n or model.hidden_size % n or model.vocab_size % n)
        and rest // n % topology.slices == 0
    )


def flags_of(config: PlanConfig) -> list[str]:
    """The command-line options for the mesh and memory settings of a config."""
    mesh = config.mesh
    data = [] if mesh.data is None else ["--mesh.data", f"{mesh.data}"]
    expert = [] if mesh.expert == 1 else ["--mesh.expert", f"{mesh.expert}"]
    return [
        *(*data, "--mesh.fsdp", f"{mesh.fsdp}", *expert),
        *("--mesh.tensor", f"{mesh.tensor}", "--remat", config.remat),
        *("--accumulation", f"{config.accumulation}"),
    ]


def with_flags(argv: Sequence[str], flags: Sequence[str]) -> list[str]:
    """A command line with these flags in place of its own of the same names."""
    replaced, kept, skip = set(flags[::2]), [], False
    for word in argv:
        if word.startswith("--"):
            skip = word.partition("=")[0].replace("_", "-") in replaced
        if not skip:
            kept.append(word)
    return [*kept, *flags]
