"""`jaxpref plan`: one plan, or a sweep that recommends one of several."""

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

from jaxpref.errors import InputError, show, visible_line
from jaxpref.files import check_output, write_json
from jaxpref.models import Model, Numerics, build
from jaxpref.objectives import Objective
from jaxpref.objectives.penalties import with_router_balance
from jaxpref.plan import child
from jaxpref.plan.chips import Topology, parse_topology
from jaxpref.plan.config import PlanConfig
from jaxpref.plan.hlo import wire_bytes
from jaxpref.plan.presets import find_model
from jaxpref.plan.program import Work, measure
from jaxpref.plan.roofline import (
    Load,
    estimate,
    forward_flops,
    ideal_dcn_bytes,
    ideal_wire_bytes,
    step_flops,
    token_estimate,
)
from jaxpref.plan.sweep import candidates, flags_of, with_flags
from jaxpref.plan.table import print_plan, print_sweep
from jaxpref.scoring.checks import check_logit_chunk, check_totals
from jaxpref.scoring.scores import stored_scores


def run(config: PlanConfig, objective: Objective, argv: Sequence[str]) -> dict:
    """Compiles a plan, prints it, and writes it to `config.json` if given.

    Args:
      config: the run and the machine.
      objective: the training objective.
      argv: the equivalent arguments of `jaxpref plan`.

    Returns:
      The plan, or the recommended one of a sweep; see `estimate_plan`.

    Raises:
      InputError: if the options are invalid or not compatible.
    """
    check_logit_chunk(config.logit_chunk, objective.scores)
    config.completions_of(objective)  # an error if it is not known
    topology = parse_topology(config.topology)
    model = model_of(config)
    objective = with_router_balance(objective, config.router_balance)
    check_totals(objective.totals, model.architecture)
    if target := os.environ.get(child.TARGET):
        write_json(target, measure(work_of(config, model, objective), topology))
        return {}
    if config.json is not None:
        check_output("--json", config.json, {"--model": config.model})
    if not config.sweep:
        plan = estimate_plan(config, objective, argv, topology, model)
        print_plan(config, topology, plan)
        _write(config, plan)
        return plan
    plans = []
    for candidate in candidates(config, model.architecture, topology):
        try:
            flags = flags_of(candidate)
            arguments = with_flags(argv, flags)
            plan = estimate_plan(candidate, objective, arguments, topology, model)
        except InputError as error:
            show(visible_line(f"{' '.join(flags)}: {error}"))
            continue
        plans.append((candidate, plan))
        if len(plans) == 1:
            print_sweep(None, None)
        print_sweep(candidate, plan)
    if not plans:
        raise InputError("no mesh of these devices divides the model and the batch")
    best = min(plans, key=lambda pair: _rank(pair[1]))
    show(
        "\nnothing fits; the closest:" if best[1]["fits"] is False else "\nrecommended:"
    )
    print_plan(best[0], topology, best[1])
    _write(config, best[1] | {"sweep": [plan for _, plan in plans]})
    return best[1]


def model_of(config: PlanConfig) -> Model:
    """The model's sizes, with the numerics of the config."""
    numerics = Numerics(
        param_dtype=config.param_dtype,
        compute_dtype=config.compute_dtype,
        remat=config.remat,
        unroll=config.unroll,
    )
    return build(find_model(config.model), numerics)


def work_of(config: PlanConfig, model: Model, objective: Objective) -> Work:
    """The programs to compile."""
    return Work(
        model=model,
        objective=objective,
        optimizer=config.optimizer,
        mesh=config.mesh,
        lora=config.lora,
        head=config.head,
        soft_prompt=config.soft_prompt.length or 0,
        prompt_length=config.seq - config.answer,
        answer_length=config.answer,
        num_completions=config.completions_of(objective),
        batch_size=config.batch,
        accumulation=config.accumulation,
        row_length=config.row_length,
        logit_chunk=config.logit_chunk,
        sampled=_sampled_at_once(config, objective),
        step_only=config.step_only,
    )


def _sampled_at_once(config: PlanConfig, objective: Objective) -> int:
    """The rows of the sampler: one per pair, or those of a run that samples."""
    if not objective.token_numbers or config.answers is None:
        return config.batch
    return min(config.batch * config.answers, config.sample_batch_size)


def estimate_plan(
    config: PlanConfig,
    objective: Objective,
    argv: Sequence[str],
    topology: Topology,
    model: Model,
) -> dict:
    """Computes one plan, as plain values.  All bytes are per device.

    Returns:
      A dict with the requested options, `mesh`, `devices`, `compile_seconds`, and:

      - `fits`: whether the step and the reference pass fit; None on CPU.
      - `hbm_bytes` (required by the step), `hbm_limit_bytes`, `temp_bytes`, and
        `argument_bytes`.  The last two are None if the compiler runs out of memory.
      - `held_bytes` of parameters, optimizer, batch, frozen weights, and reference;
        `activation_bytes`, a part of the temporaries.
      - `flops_per_step`, `roofline_seconds`, `mfu_estimate`, `tokens_per_second`, and
        the rest of `roofline.estimate`; None on CPU.
      - `collectives` (see `hlo.collectives`; None if the program is too large),
        `wire_bytes` and `ideal_wire_bytes` within a slice, `dcn_bytes` and
        `ideal_dcn_bytes` between slices.
      - `score`: the same for the reference pass; None with `config.step_only`.
      - `decode`: the same for the sampler, with the collectives and the time of one
        token, and `cache_bytes`, a part of its memory; None for a reward model, and
        with `config.step_only`.  For objectives of sampled answers, its memory includes
        the optimizer's, and it has the time of all samples of a step.
    """
    numerics = dataclasses.replace(model.numerics, remat=config.remat)
    model = build(model.architecture, numerics)
    title = f"compiling {config.model} for {topology.name} {' '.join(flags_of(config))}"
    measured = child.compile_in_child(argv, topology, title)
    load = _load(config, objective, topology, model, measured)
    step = _memory(measured["step"], topology)
    score = _reference_pass(measured, load, topology)
    plan = {
        "model": config.model,
        "topology": topology.name,
        "devices": topology.devices,
        "mesh": measured["mesh"],
        "loss": objective.name,
        "batch": config.batch,
        "remat": config.remat,
        "accumulation": config.accumulation,
        "tokens_shape": measured["shape"]["tokens"],
        "held_bytes": measured["bytes"],
        "activation_bytes": measured["activations"],
        **step,
        "fits": step["fits"] and (score is None or score["fits"]),
        "stored_reference": bool(stored_scores(objective.scores)),
        "ideal_wire_bytes": ideal_wire_bytes(load),
        "ideal_dcn_bytes": ideal_dcn_bytes(load),
        "score": score,
        "decode": _decode(config, objective, measured, model, topology),
        **_time(load, topology, measured["bytes"], step),
    }
    return plan | _hours(config, plan)


def _load(
    config: PlanConfig,
    objective: Objective,
    topology: Topology,
    model: Model,
    measured: dict,
) -> Load:
    """The computation of a step, with the shapes of the compiled program."""
    tokens, targets = measured["shape"]["tokens"], measured["shape"]["targets"]
    sequences = tokens[0] * tokens[1] * tokens[2]
    extra_passes = int(bool(objective.couples) and config.accumulation > 1)
    extra_passes += len(objective.models)
    return Load(
        model=model,
        mesh=measured["mesh"],
        slices=topology.slices,
        sequences=sequences,
        length=tokens[-1],
        predictions=targets[-1],
        seen=_attended_pairs(config, objective, sequences),
        accumulation=config.accumulation,
        extra_passes=extra_passes,
        head=not objective.trains_reward_model,
        logit_chunk=config.logit_chunk,
        models=objective.num_models,
        adapter_weights=measured["adapter_weights"],
        quantization=config.lora.base,
    )


def _reference_pass(measured: dict, step: Load, topology: Topology) -> dict | None:
    """Memory, communication, and the bound on the time of scoring a batch."""
    if measured["score"] is None:
        return None
    once = dataclasses.replace(step, extra_passes=0, models=1)
    flops = sum(forward_flops(once).values())
    score = _memory(measured["score"], topology) | {"flops": flops}
    if topology.chip is not None:
        score["compute_seconds"] = flops / topology.devices / topology.chip.flops
    return score


def _time(load: Load, topology: Topology, held: dict[str, int], step: dict) -> dict:
    """The bound on the time of a step, and its speed; on CPU only the FLOPs."""
    timed: dict[str, Any] = dict.fromkeys(
        ("flops_per_step", "roofline_seconds", "mfu_estimate", "tokens_per_second")
    )
    if topology.chip is None:
        return timed | {"flops_per_step": step_flops(load)[0]}
    received = step["wire_bytes"], step["dcn_bytes"]
    timed |= estimate(load, topology.chip, held, *received)
    seconds = timed["roofline_seconds"]
    return timed | {"tokens_per_second": load.sequences * load.length / seconds}


def _hours(config: PlanConfig, plan: dict) -> dict[str, float]:
    """Hours of training on `config.pairs`, and of scoring them, if there is a bound."""
    if not config.pairs or plan["roofline_seconds"] is None:
        return {}
    steps = config.pairs / config.batch
    hours = {"hours": steps * plan["roofline_seconds"] / 3600}
    if plan["stored_reference"] and plan["score"] is not None:
        hours["score_hours"] = steps * plan["score"]["compute_seconds"] / 3600
    return hours


def _decode(
    config: PlanConfig,
    objective: Objective,
    measured: dict,
    model: Model,
    topology: Topology,
) -> dict | None:
    """Memory of the sampler, and the bound on its time per token."""
    if (sampler := measured["decode"]) is None:
        return None
    prompts, prompt, answer = measured["shape"]["prompts"]
    per_token = sampler.get("collectives_of_a_turn")
    plan = {
        "prompts": prompts,
        "slots": prompt + answer,
        "cache_bytes": measured["cache"],
        **_memory(sampler | {"collectives": per_token}, topology),
    }
    if objective.token_numbers:
        plan |= _with_resident(plan, measured)
    if topology.chip is None:
        return plan
    load = Load(
        model=model,
        mesh=measured["mesh"],
        sequences=prompts,
        length=prompt + answer,
        predictions=answer,
        seen=0,
    )
    plan |= token_estimate(load, topology.chip, plan["wire_bytes"])
    if objective.token_numbers and config.answers is not None:
        turns = -(-config.batch * config.answers // prompts)
        plan["sample_seconds"] = turns * answer * plan["seconds_per_token"]
    return plan


def _with_resident(plan: dict, measured: dict) -> dict:
    """The sampler's memory in a run that trains, whose state stays in memory."""
    held = measured["bytes"]
    resident = sum(held.values()) - held["batch"]
    if measured["adapter_weights"] is None:  # its weights are those that are trained
        resident -= held["parameters"]
    needs = plan["hbm_bytes"] + resident
    limit = plan["hbm_limit_bytes"]
    fits = None if limit is None else bool(plan["fits"]) and needs <= limit
    return {"hbm_bytes": needs, "fits": fits}


def _memory(measured: dict, topology: Topology) -> dict:
    """Memory and communication of one program, per device."""
    limit = None if topology.chip is None else topology.chip.hbm_bytes
    limit = measured.get("limit", limit)
    needs, temp, argument = measured.get("needs"), None, None
    if needs is None:
        temp, argument = measured["temp"], measured["argument"]
        # Outputs that alias arguments are counted with the arguments.
        needs = argument + temp + measured["output"] - measured["alias"]
    collectives = measured.get("collectives")
    received = dict.fromkeys(("wire_bytes", "dcn_bytes"))
    if collectives is not None:
        received["wire_bytes"] = wire_bytes(collectives)
        received["dcn_bytes"] = wire_bytes(collectives, between_slices=True)
    return {
        "fits": None if limit is None else "needs" not in measured and needs <= limit,
        "hbm_bytes": needs,
        "hbm_limit_bytes": limit,
        "temp_bytes": temp,
        "argument_bytes": argument,
        "collectives": collectives,
        **received,
        "compile_seconds": measured["seconds"],
    }


def _attended_pairs(config: PlanConfig, objective: Objective, sequences: int) -> float:
    """Number of (query, key) token pairs that attend in a step, itself included."""
    length = config.seq + (config.soft_prompt.length or 0)
    if config.row_length is None:
        return sequences * length * (length + 1) / 2
    answer, prompt = config.answer, length - config.answer
    one = answer * prompt + answer * (answer + 1) / 2
    answers = config.completions_of(objective)
    return config.batch * (prompt * (prompt + 1) / 2 + answers * one)


def _rank(plan: dict) -> tuple:
    """Sort key: plans that fit by time, then the others by memory."""
    if plan["fits"] is False:
        return (1, plan["hbm_bytes"])
    return (0, plan["roofline_seconds"] or 0, plan["hbm_bytes"])


def _write(config: PlanConfig, plan: dict) -> None:
    if config.json is not None:
        write_json(config.json, json.loads(json.dumps(plan)))
