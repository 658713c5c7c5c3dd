"""A process of `benchmarks.sampling`: `answer_all` of jaxpref."""

import json
import os
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxpref.models import build
from jaxpref.models.folder import load_params
from jaxpref.models.folder_config import read_architecture
from jaxpref.runtime.malloc import reuse_freed_memory
from jaxpref.sampling import Request, Rule, answer_all
from jaxpref.sampling.selection import greedy


def main(source: Path, out: Path) -> None:
    """Times two passes over the prompts for each case; the first one compiles."""
    reuse_freed_memory()
    job = json.loads(source.read_text("utf-8"))
    model = build(read_architecture(Path(job["model"])))
    params = load_params(Path(job["model"]), model)
    rule = Rule(jax.random.key(0), greedy(), jnp.zeros(0, jnp.int32))
    found: dict = {"cases": {}, "versions": {"jax": jax.__version__}}
    for case, limits in job["cases"].items():
        requests = [
            Request(prompt, (number, 0), limit)
            for number, (prompt, limit) in enumerate(zip(job["prompts"], limits))
        ]
        found["cases"][case] = record = {}
        for prefix in ("cold_", ""):
            started, used = time.perf_counter(), sum(os.times()[:2])
            size = job["batch_size"]
            answers = dict(answer_all(model, params, requests, rule, batch_size=size))
            record[f"{prefix}seconds"] = time.perf_counter() - started
            record[f"{prefix}cpu_seconds"] = sum(os.times()[:2]) - used
        record["answers"] = [answers[number].tokens for number in range(len(requests))]
    out.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
