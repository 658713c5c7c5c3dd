"""Which knob helps where a step does not fit."""

from jaxpref.plan.chips import GIB
from jaxpref.plan.config import PlanConfig


def advice(config: PlanConfig, plan: dict) -> list[str]:
    """What would make a step need less, the cheapest first."""
    mesh, held = plan["mesh"], plan["held_bytes"]
    state = held["parameters"] + held["optimizer"]
    rows = plan["tokens_shape"][1] // (mesh["data"] * mesh["fsdp"])
    found = []
    if state + held["parameters"] > plan["hbm_limit_bytes"]:
        found.append(
            f"weights, moments and gradients alone take "
            f"{(state + held['parameters']) / GIB:.1f} GiB: "
            + ("raise --mesh.fsdp, or " if mesh["data"] > 1 else "")
            + "take more chips"
        )
    if config.remat != "full":
        found.append("--remat full")
    if rows > 1:
        found.append(
            f"--accumulation {2 * config.accumulation} (a device has {rows} rows of a "
            "micro-batch)"
        )
    if mesh["data"] > 1 and not found:
        found.append(f"--mesh.fsdp {mesh['fsdp'] * mesh['data']} --mesh.data 1")
    if config.row_length is None:
        found.append("--row-length, whose attention keeps no scores")
    if rows <= 1:
        found.append("--mesh.tensor 2, with half as many rows at a time")
    return found
