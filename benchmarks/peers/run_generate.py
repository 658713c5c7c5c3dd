"""A process of `benchmarks.sampling`: `generate` of transformers, in batches.

Prompts are padded on the left, in the order in which they come.  A batch ends with its
longest answer.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
import transformers


def answer(model, job: dict, limits: list[int]) -> list[list[int]]:
    """The answers to all prompts, greedily."""
    size, found = job["batch_size"], []
    for start in range(0, len(job["prompts"]), size):
        prompts = job["prompts"][start : start + size]
        most = limits[start : start + size]
        width = max(map(len, prompts))
        tokens = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(prompts):
            tokens[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        out = model.generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=max(most),
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        rows = out[:, width:].tolist()
        found += [row[:limit] for row, limit in zip(rows, most)]
    return found


def main(source: Path, out: Path) -> None:
    """Times one pass over the prompts for each case, after a short one."""
    job = json.loads(source.read_text("utf-8"))
    torch.set_num_threads(job["threads"])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=torch.float32
    ).eval()
    size = job["batch_size"]
    answer(model, job | {"prompts": job["prompts"][:size]}, [2] * size)
    found: dict = {"cases": {}, "versions": {}}
    for library in (torch, transformers):
        found["versions"][library.__name__] = library.__version__
    for case, limits in job["cases"].items():
        started, used = time.perf_counter(), sum(os.times()[:2])
        answers = answer(model, job, limits)
        found["cases"][case] = {
            "seconds": time.perf_counter() - started,
            "cpu_seconds": sum(os.times()[:2]) - used,
            "answers": answers,
        }
    out.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
