"""Which meshes and policies are worth compiling."""

import dataclasses
from collections.abc import Iterator, Sequence

from jaxpref.models import Architecture
from jaxpref.plan.chips import Topology
from jaxpref.plan.config import PlanConfig
from jaxpref.train import MeshConfig


def candidates(
    config: PlanConfig, model: Architecture, topology: Topology
) -> Iterator[PlanConfig]:
    """Plans to try: each mesh with remat "full" and with "dots".

    For `tensor` 1, 2, 4 and 8, where it divides the model, the most devices for `fsdp`
    that divide hidden size and vocabulary and lie on one slice, and the rest for
    `data`; where the rows of a micro-batch can be split over them.
    """
    for tensor in (1, 2, 4, 8):
        sizes = (model.num_heads, model.num_kv_heads, model.intermediate_size)
        sizes += (model.vocab_size, model.hidden_size)
        parts = tensor * topology.slices
        if topology.devices % parts or any(size % tensor for size in sizes):
            continue
        rest = topology.devices // tensor
        fsdp = most_for_fsdp(model, topology, tensor)
        if config.row_length is None and config.batch % (rest * config.accumulation):
            continue
        mesh = MeshConfig(data=rest // fsdp, fsdp=fsdp, tensor=tensor)
        for remat in ("full", "dots"):
            yield dataclasses.replace(config, mesh=mesh, remat=remat)


def most_for_fsdp(model: Architecture, topology: Topology, tensor: int) -> int:
    """Devices of a slice that can divide hidden size and vocabulary, at most."""
    rest = topology.devices // tensor
    return max(
        n
        for n in range(1, rest + 1)
        if not (rest % n or model.hidden_size % n or model.vocab_size % n)
        and rest // n % topology.slices == 0
    )


def flags_of(config: PlanConfig) -> list[str]:
    """The options of mesh and memory that say the same, for the command line."""
    mesh = config.mesh
    data = [] if mesh.data is None else ["--mesh.data", f"{mesh.data}"]
    return [
        *(*data, "--mesh.fsdp", f"{mesh.fsdp}"),
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
