"""Twenty steps of DPO on a real model and real pairs, against a torch loop in here.

The torch side shares nothing with jaxpref but the order of the tokenized pairs: its own
model, log-probs, loss, clipping, schedule and optimizer.
"""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from jaxpref import data

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity

STEPS, BATCH, BETA = 20, 4, 0.1


def jaxpref_losses(
    model, pairs_file, out, *, dtype: str, learning_rate: float, loss="dpo", **more
):
    command = [sys.executable, "-m", "jaxpref", "train", "--loss", loss]
    options = {
        "model": model,
        "data": pairs_file,
        "out": out,
        "loss.beta": BETA,
        "max-steps": STEPS,
        "batch-size": BATCH,
        "learning-rate": learning_rate,
        "warmup-steps": 5,
        "weight-decay": 0.01,
        "max-length": 128,
        "max-prompt-length": 64,
        "max-pairs": 100,
        "heldout-fraction": 0.0,
        "param-dtype": dtype,
        "compute-dtype": dtype,
        "log-every": 1,
        "eval-every": 1000,
        "seed": 7,
    } | more
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    environment = os.environ | {"JAX_ENABLE_X64": "1" if dtype == "float64" else "0"}
    environment["XLA_FLAGS"] = ""
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return np.array([row["loss"] for row in map(json.loads, lines) if "loss" in row])


def batches(model, pairs_file, kind=data.PAIRS):
    options = data.DataOptions(
        max_length=128, max_prompt_length=64, max_pairs=100, heldout_fraction=0.0
    )
    plan = data.make_splits(
        data.open_source(str(pairs_file)),
        data.load_tokenizer(str(model)),
        options,
        kind=kind,
    )
    layout = data.padded_layout(plan.train, batch_size=BATCH)
    return layout.batches(plan.train, data.uniform(plan.train, 7), threads=0)


def torch_logps(model, batch):
    """log pi(completion | prompt) of every row and side, from full logits."""
    tokens = torch.tensor(batch.tokens[0]).long()  # [R, 2, T]
    rows, sides, length = tokens.shape
    flat = tokens.reshape(rows * sides, length)
    logps = model(input_ids=flat).logits.log_softmax(-1)[:, :-1]
    chosen = logps.gather(-1, flat[:, 1:, None])[..., 0]
    ends = torch.tensor(batch.lengths[0]).reshape(-1, 1)
    starts = ends - torch.tensor(batch.completion_lengths[0]).reshape(-1, 1)
    position = torch.arange(1, length)[None]
    own = (position >= starts) & (position < ends)
    return (chosen * own).sum(-1).reshape(rows, sides)


def rotary_in_full_precision(self, x, position_ids):
    """LlamaRotaryEmbedding.forward without its float32: for the float64 comparison."""
    half = self.config.head_dim // 2
    theta = self.config.rope_parameters["rope_theta"]
    frequencies = theta ** -(torch.arange(half, dtype=torch.float64) / half)
    angles = position_ids[..., None].double() * frequencies
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def rms_norm_in_full_precision(self, x):
    """LlamaRMSNorm.forward without its float32: for the float64 comparison."""
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * (x * scale)


def dpo(ratio, batch):
    """The DPO loss of log-ratios [R, 2]."""
    return -torch.nn.functional.logsigmoid(BETA * (ratio[:, 0] - ratio[:, 1])).mean()


def torch_losses(folder, iterator, *, dtype, learning_rate, monkeypatch, loss_of=dpo):
    from transformers import LlamaForCausalLM
    from transformers.models.llama import modeling_llama as llama

    if dtype == torch.float64:
        rotary, norm = llama.LlamaRotaryEmbedding, llama.LlamaRMSNorm
        monkeypatch.setattr(rotary, "forward", rotary_in_full_precision)
        monkeypatch.setattr(norm, "forward", rms_norm_in_full_precision)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    reference = LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    norms = [p for n, p in model.named_parameters() if "norm" in n]
    others = [p for n, p in model.named_parameters() if "norm" not in n]
    groups = [
        {"params": others, "weight_decay": 0.01},
        {"params": norms, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, eps=1e-8)
    losses = []
    for step in range(STEPS):
        if step < 5:
            rate = learning_rate * (step + 1) / 5
        else:
            share = (step - 5) / (STEPS - 5)
            rate = learning_rate * 0.5 * (1 + math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = next(iterator)
        with torch.no_grad():  # kept in float32, as jaxpref keeps them on disk
            before = torch_logps(reference, batch).float().to(dtype)
        ratio = torch_logps(model, batch) - before
        loss = loss_of(ratio, batch)
        optimizer.zero_grad()
        loss.backward()
        gradients = [p.grad for p in model.parameters()]
        norm = torch.sqrt(sum((g**2).sum() for g in gradients))
        for gradient in gradients:
            gradient *= min(1.0, 1.0 / float(norm))
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses)


@pytest.mark.parametrize(
    ("dtype", "learning_rate", "tolerance"),
    # AdamW divides by the root of the second moment, which amplifies float32 rounding:
    # hence the smaller learning rate there.
    [("float64", 1e-3, 1e-8), ("float32", 1e-6, 1e-5)],
)
def test_twenty_steps_of_dpo(
    stories260k, shared, tmp_path, monkeypatch, dtype, learning_rate, tolerance
):
    pairs_file = shared / "data" / "hh_rlhf_helpful_base_test.jsonl.gz"
    ours = jaxpref_losses(
        stories260k, pairs_file, tmp_path, dtype=dtype, learning_rate=learning_rate
    )
    theirs = torch_losses(
        stories260k,
        batches(stories260k, pairs_file),
        dtype=getattr(torch, dtype),
        learning_rate=learning_rate,
        monkeypatch=monkeypatch,
    )
    assert len(ours) == STEPS
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)
