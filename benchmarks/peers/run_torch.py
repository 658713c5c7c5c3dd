"""A process of `benchmarks.step`: a DPO step in plain torch.

Chosen and rejected in one batch, padded to its longest sequence; logits at every
position; reference log-probs computed in advance; fused AdamW.
"""

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from job import (
    RATE_SIZE,
    Job,
    Steps,
    in_order,
    read_job,
    read_pairs,
    write_rate,
    write_steps,
)
from transformers import LlamaForCausalLM


def collate(pairs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens [2B, T], and masks of real tokens and of answer tokens."""
    rows = [(p, c) for p, c, _ in pairs] + [(p, r) for p, _, r in pairs]
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    real, answers = torch.zeros_like(tokens), torch.zeros_like(tokens)
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        tokens[row, :end] = torch.tensor(prompt + answer)
        real[row, :end] = 1
        answers[row, len(prompt) : end] = 1
    return tokens, real, answers


def log_probs(model, tokens, real, answers) -> torch.Tensor:
    """The log-prob of each answer, [2B]."""
    logits = model(tokens, attention_mask=real, use_cache=False).logits[:, :-1]
    chosen = logits.gather(-1, tokens[:, 1:, None])[..., 0]
    return ((chosen - logits.logsumexp(-1)) * answers[:, 1:]).sum(1)


def train(job: Job, out: Path) -> None:
    """Trains on the batches in order."""
    model = LlamaForCausalLM.from_pretrained(job.model, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=job.learning_rate, weight_decay=0.0, fused=True
    )
    listed, size = read_pairs(job), job.batch_size
    batches = [listed[i : i + size] for i in range(0, len(listed), size)]
    with torch.no_grad():
        reference = [log_probs(model, *collate(batch)) for batch in batches]
    steps = Steps(pairs=in_order(job), ends=[time.perf_counter()])
    for batch, fixed in zip(batches, reference):
        chosen, rejected = (log_probs(model, *collate(batch)) - fixed).chunk(2)
        loss = -F.logsigmoid(job.beta * (chosen - rejected)).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), job.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps.losses.append(loss.item())
        steps.grad_norms.append(norm.item())
        steps.ends.append(time.perf_counter())
    write_steps(out, job, steps, ["torch", "transformers"])


def rate(out: Path) -> None:
    """Times torch's product of two matrices."""
    x = torch.ones(RATE_SIZE, RATE_SIZE)
    write_rate(out, lambda: x @ x)


if __name__ == "__main__":
    job, out = read_job()
    torch.set_num_threads(job.threads)
    rate(out) if job.mode == "rate" else train(job, out)
