"""A process of `benchmarks.step`: google-tunix's DPOTrainer with a live reference.

Tunix has no stored reference.  It requires prompts padded on the left and answers on
the right to fixed lengths, so that a run compiles once.  The model is loaded onto a
mesh, as in Tunix's examples; otherwise the step compiles twice.
"""

import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from job import Job, Steps, in_order, read_job, read_pairs, write_steps
from safetensors import safe_open
from tunix.models.llama3 import model as llama
from tunix.models.llama3.params import create_model_from_safe_tensors
from tunix.sft.dpo.dpo_trainer import DPOTrainer, DPOTrainingConfig, TrainingInput


def model_config(folder: str) -> llama.ModelConfig:
    """Tunix's model config from a Hugging Face config."""
    fields = json.loads((Path(folder) / "config.json").read_text("utf-8"))
    return llama.ModelConfig(
        num_layers=fields["num_hidden_layers"],
        vocab_size=fields["vocab_size"],
        embed_dim=fields["hidden_size"],
        hidden_dim=fields["intermediate_size"],
        num_heads=fields["num_attention_heads"],
        head_dim=fields["head_dim"],
        num_kv_heads=fields["num_key_value_heads"],
        rope_theta=int(fields["rope_theta"]),
        norm_eps=fields["rms_norm_eps"],
        weight_tying=fields["tie_word_embeddings"],
    )


def padded(texts, length: int, *, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, length], and a mask of the real ones."""
    tokens = np.zeros((len(texts), length), np.int32)
    mask = np.zeros_like(tokens)
    for row, text in enumerate(texts):
        inside = slice(length - len(text), None) if left else slice(len(text))
        tokens[row, inside], mask[row, inside] = text, 1
    return tokens, mask


def inputs(job: Job, micro: int):
    """Yields every micro-batch."""
    listed = read_pairs(job)
    for start in range(0, len(listed), micro):
        prompts, chosen, rejected = zip(*listed[start : start + micro])
        prompt = padded(prompts, job.prompt_length, left=True)
        answers = (
            padded(texts, job.response_length, left=False)
            for texts in (chosen, rejected)
        )
        (chosen, chosen_mask), (rejected, rejected_mask) = answers
        yield TrainingInput(
            prompt_ids=prompt[0],
            prompt_mask=prompt[1],
            chosen_ids=chosen,
            chosen_mask=chosen_mask,
            rejected_ids=rejected,
            rejected_mask=rejected_mask,
        )


def trainer_class(steps: Steps, parts: int) -> type[DPOTrainer]:
    """Tunix's trainer; it records losses and the time when each step has finished."""
    of_parts = []

    class Trainer(DPOTrainer):
        def _buffer_metrics(self, buffer, loss, step, additional_metrics=None):
            norm = additional_metrics["grad_norm"][0]
            jax.block_until_ready((loss, norm, nnx.state(self.model)))
            of_parts.append((float(loss), float(norm)))
            if len(of_parts) == parts:
                steps.ends.append(time.perf_counter())
                losses, norms = zip(*of_parts)
                steps.losses.append(statistics.fmean(losses))
                # Known per micro-batch only, so unknown for several.
                steps.grad_norms.append(norms[0] if parts == 1 else float("nan"))
                of_parts.clear()
            return super()._buffer_metrics(buffer, loss, step, additional_metrics)

    return Trainer


def train(job: Job, out: Path) -> None:
    """Trains on the batches in order."""
    micro = job.micro_batch or job.batch_size
    parts = job.batch_size // micro
    steps = Steps(pairs=in_order(job))
    axes = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=axes)
    config = model_config(job.model)
    load = lambda: create_model_from_safe_tensors(job.model, config, mesh, jnp.float32)
    with mesh:
        trainer = trainer_class(steps, parts)(
            model=load(),
            ref_model=load(),
            optimizer=optax.chain(
                optax.clip_by_global_norm(job.max_grad_norm),
                optax.adamw(job.learning_rate, weight_decay=0.0),
            ),
            training_config=DPOTrainingConfig(
                eval_every_n_steps=10**6,
                max_steps=job.warmup + job.steps,
                gradient_accumulation_steps=parts if parts > 1 else None,
                max_inflight_computations=1,
                beta=job.beta,
            ),
        )
        check_loaded(trainer.model, job.model)
        steps.ends.append(time.perf_counter())
        trainer.train(inputs(job, micro))
    write_steps(out, job, steps, ["google-tunix", "jax", "flax"])


def check_loaded(model, folder: str) -> None:
    """Checks that the weights were loaded, not left at their random values."""
    with safe_open(Path(folder) / "model.safetensors", "numpy") as file:
        stored = file.get_tensor("model.layers.0.mlp.up_proj.weight").T
    np.testing.assert_array_equal(stored, model.layers[0].mlp.up_proj.kernel[...])


if __name__ == "__main__":
    job, out = read_job()
    train(job, out)
