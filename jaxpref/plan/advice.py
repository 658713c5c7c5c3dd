"""Suggestions for a step that does not fit in memory."""

import math

from jaxpref.plan.chips import GIB, parse_topology
from jaxpref.plan.config import PlanConfig
from jaxpref.plan.presets import find_model
from jaxpref.plan.sweep import largest_fsdp
from jaxpref.sharding import ROWS
from jaxpref.train.optimizer import Optimizer


def advice(config: PlanConfig, plan: dict) -> list[str]:
    """Options that reduce the memory of a step, cheapest first."""
    mesh, held = plan["mesh"], plan["held_bytes"]
    state = held["parameters"] + held["optimizer"]
    rows = plan["tokens_shape"][1] // math.prod(mesh.get(axis, 1) for axis in ROWS)
    topology = parse_topology(config.topology)
    rest = topology.devices // (mesh["tensor"] * mesh.get("expert", 1))
    fsdp = largest_fsdp(find_model(config.model), topology, rest)
    wider = f"--mesh.fsdp {fsdp}" if fsdp > mesh["fsdp"] else ""
    options = []
    if state + held["parameters"] > plan["hbm_limit_bytes"]:
        options.append(
            f"weights, moments, and gradients alone take "
            f"{(state + held['parameters']) / GIB:.1f} GiB: "
            + (f"{wider}, or " if wider else "")
            + "more chips"
        )
        if config.optimizer.optimizer is Optimizer.ADAMW:
            options.append("--optimizer adafactor, or --adam-mu-dtype bfloat16")
    if config.remat != "full":
        options.append("--remat full")
    if rows > 1:
        factor = next(n for n in range(2, rows + 1) if rows % n == 0)
        options.append(
            f"--accumulation {factor * config.accumulation} (a device holds {rows} "
            "rows of a micro-batch)"
        )
    if wider and not options:
        options.append(wider)
    if rows <= 1:
        options.append("--mesh.tensor 2, with half as many rows at a time")
    return options
