"""`jaxpref plan`: one plan, or several of which one is recommended."""

import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path

from jaxpref.errors import InputError
from jaxpref.files import write_json
from jaxpref.models import ModelConfig
from jaxpref.objectives import Objective
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
    of_a_token,
)
from jaxpref.plan.sweep import candidates, flags_of, with_flags
from jaxpref.plan.table import print_plan, print_sweep
from jaxpref.scoring.scores import NEED_REFERENCE_WEIGHTS, stored_scores


def run(config: PlanConfig, objective: Objective, argv: Sequence[str]) -> dict:
    """Compiles, prints what was found, and writes it to `config.json` where given.

    Args:
      config: the run and the machine.
      objective: what is made small.
      argv: the arguments of `jaxpref plan` that say the same.

    Returns:
      The plan, that of the recommendation where there are several; see `find`.

    Raises:
      InputError: for anything the caller can put right.
    """
    topology = parse_topology(config.topology)
    model = model_of(config)
    if target := os.environ.get(child.TARGET):
        write_json(target, measure(work_of(config, model, objective), topology))
        return {}
    if config.row_length is not None and objective.mixes_empty_traces:
        raise InputError(
            f"--row-length {config.row_length}: {objective.name} is trained with one "
            "pair a row; leave it out"
        )
    if config.json is not None and not Path(config.json).absolute().parent.is_dir():
        raise InputError(f"--json {config.json}: its folder does not exist")
    if not config.sweep:
        found = find(config, objective, argv, topology, model)
        print_plan(config, topology, found)
        _write(config, found)
        return found
    plans = []
    for tried in candidates(config, model, topology):
        try:
            flags = flags_of(tried)
            plan = find(tried, objective, with_flags(argv, flags), topology, model)
        except InputError as error:
            print(f"{' '.join(flags)}: {error}", flush=True)
            continue
        plans.append((tried, plan))
        if len(plans) == 1:
            print_sweep(None, None)
        print_sweep(tried, plan)
    if not plans:
        raise InputError("no mesh of these devices fits the model and the batch")
    best = min(plans, key=lambda pair: _merit(pair[1]))
    print(
        "\nnothing fits; the nearest:" if best[1]["fits"] is False else "\nrecommended:"
    )
    print_plan(best[0], topology, best[1])
    _write(config, best[1] | {"sweep": [plan for _, plan in plans]})
    return best[1]


def model_of(config: PlanConfig) -> ModelConfig:
    """The model's sizes, with the numerics that were asked for."""
    return dataclasses.replace(
        find_model(config.model),
        param_dtype=config.param_dtype,
        compute_dtype=config.compute_dtype,
        remat=config.remat,
        unroll=config.unroll,
    )


def work_of(config: PlanConfig, model: ModelConfig, objective: Objective) -> Work:
    """What is to be compiled."""
    return Work(
        model=model,
        objective=objective,
        optimizer=config.optimizer,
        mesh=config.mesh,
        prompt_length=config.seq - config.answer,
        answer_length=config.answer,
        batch_size=config.batch,
        accumulation=config.accumulation,
        row_length=config.row_length,
        logit_chunk=config.logit_chunk,
    )


def find(
    config: PlanConfig,
    objective: Objective,
    argv: Sequence[str],
    topology: Topology,
    model: ModelConfig,
) -> dict:
    """One plan, as plain values; bytes are of one device.

    Returns:
      `fits` (whether step and scoring pass do; None on a CPU), and of the step
      `hbm_bytes` (needed), `hbm_limit_bytes`, `temp_bytes` and
      `argument_bytes` (None where the compiler only says how much is too much),
      `held_bytes` by what, `activation_bytes` (a part of the temporaries),
      `flops_per_step`, `roofline_seconds`, `mfu_estimate` and the rest of
      `roofline.estimate` (None on a CPU), `collectives` (see `hlo.collectives`; None
      where the program is too large), `wire_bytes` and `ideal_wire_bytes` within
      a slice, `dcn_bytes` and `ideal_dcn_bytes` between slices, `tokens_per_second`,
      `score` (the reference pass: the same of it), `decode` (the sampler: the same of
      it, collectives and time of a token; None for a reward model), `mesh`, `devices`,
      `compile_seconds`, and what was asked for.
    """
    model = dataclasses.replace(model, remat=config.remat)
    title = f"compiling {config.model} for {topology.name} {' '.join(flags_of(config))}"
    measured = child.ask(argv, topology, title)
    tokens, targets = measured["shape"]["tokens"], measured["shape"]["targets"]
    sequences = tokens[0] * tokens[1] * tokens[2]
    load = functools.partial(
        Load,
        model=model,
        mesh=measured["mesh"],
        slices=topology.slices,
        sequences=sequences,
        length=tokens[-1],
        predictions=targets[-1],
        seen=_seen(config, objective, sequences),
        accumulation=config.accumulation,
        head="rewards" not in objective.scores,
        logit_chunk=config.logit_chunk,
    )
    ahead = int(objective.coupled and config.accumulation > 1)
    ahead += int(bool(objective.scores & NEED_REFERENCE_WEIGHTS))
    work = load(passes_ahead=ahead, models=objective.num_models)
    step = _memory(measured["step"], topology)
    score = _memory(measured["score"], topology)
    held = measured["bytes"]
    found = {
        "model": config.model,
        "topology": topology.name,
        "devices": topology.devices,
        "mesh": measured["mesh"],
        "loss": objective.name,
        "batch": config.batch,
        "remat": config.remat,
        "accumulation": config.accumulation,
        "tokens_shape": tokens,
        "held_bytes": held,
        "activation_bytes": measured["activations"],
        **step,
        "fits": step["fits"] and score["fits"],
        "stored_reference": bool(stored_scores(objective.scores)),
        "ideal_wire_bytes": ideal_wire_bytes(work),
        "ideal_dcn_bytes": ideal_dcn_bytes(work),
        "score": score | {"flops": sum(forward_flops(load()).values())},
        "decode": _decode(measured, model, topology),
    }
    timed = dict.fromkeys(
        ("flops_per_step", "roofline_seconds", "mfu_estimate", "tokens_per_second")
    )
    if topology.chip is not None:
        received = found["wire_bytes"], found["dcn_bytes"]
        timed |= estimate(work, topology.chip, held, *received)
        seconds = timed["roofline_seconds"]
        timed["tokens_per_second"] = sequences * tokens[-1] / seconds
        forward = found["score"]["flops"] / topology.devices / topology.chip.flops
        found["score"]["compute_seconds"] = forward
        if config.pairs:
            steps = config.pairs / config.batch
            timed["hours"] = steps * seconds / 3600
            if stored_scores(objective.scores):
                timed["score_hours"] = steps * forward / 3600
    else:
        timed["flops_per_step"] = 3 * sum(forward_flops(work).values())
    return found | timed


def _decode(measured: dict, model: ModelConfig, topology: Topology) -> dict | None:
    """What the sampler needs, and how fast it may be."""
    if (of_sampler := measured["decode"]) is None:
        return None
    prompts, prompt, answer = measured["shape"]["prompts"]
    of_a_turn = of_sampler.get("collectives_of_a_turn")
    found = {
        "prompts": prompts,
        "slots": prompt + answer,
        **_memory(of_sampler | {"collectives": of_a_turn}, topology),
    }
    if topology.chip is None:
        return found
    load = Load(
        model=model,
        mesh=measured["mesh"],
        sequences=prompts,
        length=prompt + answer,
        predictions=answer,
        seen=0,
    )
    return found | of_a_token(load, topology.chip, found["wire_bytes"])


def _memory(measured: dict, topology: Topology) -> dict:
    """What one program needs of a device, and says to others."""
    limit = None if topology.chip is None else topology.chip.hbm_bytes
    limit = measured.get("limit", limit)
    needs, temp, argument = measured.get("needs"), None, None
    if needs is None:
        temp, argument = measured["temp"], measured["argument"]
        # What is written in place is counted with the arguments.
        needs = argument + temp + measured["output"] - measured["alias"]
    spoken = measured.get("collectives")
    received = dict.fromkeys(("wire_bytes", "dcn_bytes"))
    if spoken is not None:
        received["wire_bytes"] = wire_bytes(spoken)
        received["dcn_bytes"] = wire_bytes(spoken, between_slices=True)
    return {
        "fits": None if limit is None else "needs" not in measured and needs <= limit,
        "hbm_bytes": needs,
        "hbm_limit_bytes": limit,
        "temp_bytes": temp,
        "argument_bytes": argument,
        "collectives": spoken,
        **received,
        "compile_seconds": measured["seconds"],
    }


def _seen(config: PlanConfig, objective: Objective, sequences: int) -> float:
    """Pairs of a token and one that it attends to (itself too), of a step."""
    if config.row_length is None:
        return sequences * config.seq * (config.seq + 1) / 2
    answer, prompt = config.answer, config.seq - config.answer
    one = answer * prompt + answer * (answer + 1) / 2
    return config.batch * (prompt * (prompt + 1) / 2 + objective.num_completions * one)


def _merit(plan: dict) -> tuple:
    """Smaller is better: what fits, by its time; what does not, by its need."""
    if plan["fits"] is False:
        return (1, plan["hbm_bytes"])
    return (0, plan["roofline_seconds"] or 0, plan["hbm_bytes"])


def _write(config: PlanConfig, found: dict) -> None:
    if config.json is not None:
        write_json(config.json, json.loads(json.dumps(found)))
