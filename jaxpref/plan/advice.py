"""Which knob helps where a step does not fit."""

from jaxpref.plan.chips import GIB, parse_topology
from jaxpref.plan.config import PlanConfig
from jaxpref.plan.presets import find_model
from jaxpref.plan.sweep import most_for_fsdp
from jaxpref.train.optimizer import Optimizer


def advice(config: PlanConfig, plan: dict) -> list[str]:
    """What would make a step need less, the cheapest first."""
    mesh, held = plan["mesh"], plan["held_bytes"]
    state = held["parameters"] + held["optimizer"]
    rows = plan["tokens_shape"][1] // (mesh["data"] * mesh["fsdp"])
    topology = parse_topology(config.topology)
    fsdp = most_for_fsdp(find_model(config.model), topology, mesh["tensor"])
    wider = f"--mesh.fsdp {fsdp}" if fsdp > mesh["fsdp"] else ""
    found = []
    if state + held["parameters"] > plan["hbm_limit_bytes"]:
        found.append(
            f"weights, moments and gradients alone take "
            f"{(state + held['parameters']) / GIB:.1f} GiB: "
            + (f"{wider}, or " if wider else "")
            + "take more chips"
        )
        if config.optimizer.optimizer is Optimizer.ADAMW:
            found.append("--optimizer adafactor, or --adam-mu-dtype bfloat16")
    if config.remat != "full":
        found.append("--remat full")
    if rows > 1:
        factor = next(n for n in range(2, rows + 1) if rows % n == 0)
        found.append(
            f"--accumulation {factor * config.accumulation} (a device has {rows} rows "
            "of a micro-batch)"
        )
    if wider and not found:
        found.append(wider)
    if rows <= 1:
        found.append("--mesh.tensor 2, with half as many rows at a time")
    return found
