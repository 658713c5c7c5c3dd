"""Printing plans to the terminal."""

from jaxpref.errors import show
from jaxpref.plan.advice import advice
from jaxpref.plan.chips import GIB, Topology
from jaxpref.plan.config import PlanConfig
from jaxpref.plan.roofline import ASSUMPTIONS, MULTISLICE_ASSUMPTION


def gib(size: float | None) -> str:
    """Formats bytes in GiB, or in MiB if small."""
    if size is None:
        return "-"
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"


def print_plan(config: PlanConfig, topology: Topology, plan: dict) -> None:
    """Prints a complete plan."""
    held = plan["held_bytes"]
    axes = " x ".join(f"{axis}={size}" for axis, size in plan["mesh"].items())
    lines = [
        f"{plan['model']} on {topology.name}: {plan['devices']} devices, {axes}; "
        f"remat {plan['remat']}",
        "step: {} x {} rows of {} x {} tokens".format(*plan["tokens_shape"]),
        "",
        "memory per device"
        + ("" if topology.chip is None else f" ({topology.chip.name})"),
    ]
    rows = [(name, size) for name, size in held.items() if size and name != "other"]
    rows += [("temporaries", plan["temp_bytes"])]
    rows += [("  of these, activations", plan["activation_bytes"])]
    rows += [("step", plan["hbm_bytes"])]
    scoring = "reference pass" if plan["stored_reference"] else "evaluation pass"
    if plan["score"] is not None:
        rows += [(scoring, plan["score"]["hbm_bytes"])]
    if plan["decode"] is not None:
        rows += [("sampler", plan["decode"]["hbm_bytes"])]
        rows += [("  of this, cache", plan["decode"]["cache_bytes"])]
    lines += [f"  {name:24}{gib(size):>12}" for name, size in rows]
    lines += _verdict(config, plan)
    if plan["roofline_seconds"] is not None:
        lines += _times(plan)
    lines += _collectives(plan)
    show("\n".join(lines))


def _verdict(config: PlanConfig, plan: dict) -> list[str]:
    limit = plan["hbm_limit_bytes"]
    if limit is None:
        return []
    needs = max(one["hbm_bytes"] for one in (plan, plan["score"]) if one is not None)
    over = needs - limit
    if plan["fits"]:
        lines = [f"  fits: {gib(-over)} of {gib(limit)} left"]
    else:
        lines = [f"  does not fit: {gib(over)} over the limit of {gib(limit)}"]
        lines += [f"    try {line}" for line in advice(config, plan)]
    if plan["decode"] is not None and not plan["decode"]["fits"]:
        lines.append("  the sampler does not fit: use fewer prompts at a time")
    return lines


def _times(plan: dict) -> list[str]:
    parts = ", ".join(
        f"{name} {plan[f'{name}_seconds']:.3g} s"
        for name in ("compute", "memory", "ici", "dcn")
        if plan[f"{name}_seconds"]
    )
    source = "as compiled" if plan["wire_bytes"] is not None else "ideal"
    lines = [
        "",
        f"a step takes at least {plan['roofline_seconds']:.3g} s "
        f"({parts}; collectives {source})",
        f"  {plan['flops_per_step']:.3g} FLOPs, {plan['computed_flops']:.3g} including "
        "recomputation",
        f"  at most {plan['tokens_per_second']:,.0f} tokens/s, MFU "
        f"{100 * plan['mfu_estimate']:.0f}%",
    ]
    if "hours" in plan:
        more = ""
        if "score_hours" in plan:
            more = f", plus {plan['score_hours']:.2f} h for the reference log-probs"
        lines.append(f"  at least {plan['hours']:.2f} h for all pairs{more}")
    if (decode := plan["decode"]) is not None:
        lines.append(
            f"  sampling takes at least {decode['seconds_per_token']:.3g} s "
            f"({decode['bound']}) per token of each of {decode['prompts']} prompts, "
            f"with {decode['slots']:,} cache slots each"
        )
        if "sample_seconds" in decode:
            lines.append(
                "  sampling all answers of a step takes at least "
                f"{decode['sample_seconds']:.3g} s if none ends early"
            )
    assumed: list[str] = list(ASSUMPTIONS)
    if plan["dcn_seconds"]:
        assumed.append(MULTISLICE_ASSUMPTION)
    return lines + [f"  assumptions: {'; '.join(assumed)}"]


def _collectives(plan: dict) -> list[str]:
    found = plan["collectives"]
    if found is None:
        return []
    lines = ["", "collectives of a step, per device:"]
    for kind, figures in sorted(found.items()):
        lines.append(
            f"  {kind:33}{figures['count']:>8,.0f}{gib(figures['bytes']):>14}, "
            f"{gib(figures['wire_bytes'])} received"
        )
    if plan["ideal_wire_bytes"]:
        lines.append(
            f"  received in total: {gib(plan['wire_bytes'])} (ideal: "
            f"{gib(plan['ideal_wire_bytes'])})"
        )
    if plan["dcn_bytes"]:
        lines.append(
            f"  received from other slices: {gib(plan['dcn_bytes'])} (ideal: "
            f"{gib(plan['ideal_dcn_bytes'])})"
        )
    return lines


def print_sweep(config: PlanConfig | None, plan: dict | None) -> None:
    """Prints a line of a sweep, or the header if `plan` is None."""
    if plan is None:
        show(
            f"{'data':>5}{'fsdp':>6}{'tensor':>7}  {'remat':5}{'needs':>12}"
            f"{'fits':>6}{'at least':>11}{'MFU':>6}"
        )
        return
    mesh, seconds = plan["mesh"], plan["roofline_seconds"]
    fits = {True: "yes", False: "no", None: "-"}[plan["fits"]]
    time = "-" if seconds is None else f"{seconds:.3g} s"
    mfu = "-" if seconds is None else f"{100 * plan['mfu_estimate']:.0f}%"
    show(
        f"{mesh['data']:>5}{mesh['fsdp']:>6}{mesh['tensor']:>7}  {plan['remat']:5}"
        f"{gib(plan['hbm_bytes']):>12}{fits:>6}{time:>11}{mfu:>6}"
    )
