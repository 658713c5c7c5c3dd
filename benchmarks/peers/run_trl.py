"""A process of `benchmarks.step`: TRL's DPOTrainer with a stored reference.

Default settings, except: reference log-probs in advance, no gradient checkpointing
(TRL's default trades time for memory), float32, a constant learning rate, and batches
in order.  The text is already tokenized, so `_prepare_dataset` is skipped.
"""

import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from job import Job, Steps, in_order, read_job, read_pairs, write_steps
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer


class Clock(TrainerCallback):
    """Records the time at the start of training and at the end of each step."""

    def __init__(self, steps: Steps):
        self.steps = steps

    def on_train_begin(self, args, state, control, **kwargs):
        self.steps.ends.append(time.perf_counter())

    on_step_end = on_train_begin


def trainer_class(steps: Steps) -> type[DPOTrainer]:
    """TRL's trainer on token ids; it records its losses."""

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

        def compute_loss(self, *args, **kwargs):
            out = super().compute_loss(*args, **kwargs)
            loss = out[0] if isinstance(out, tuple) else out
            steps.losses.append(loss.item())
            return out

    return Trainer


def train(job: Job, out: Path) -> None:
    """Trains on the batches in order."""
    listed, folder = read_pairs(job), tempfile.mkdtemp(dir=out.parent)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    vocabulary = {"<pad>": 0, "<eos>": 1}
    steps = Steps(pairs=in_order(job))
    trainer = trainer_class(steps)(
        model=AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32),
        args=DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=job.batch_size,
            max_steps=job.warmup + job.steps,
            max_length=job.prompt_length + job.response_length,
            beta=job.beta,
            learning_rate=job.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=job.max_grad_norm,
            precompute_ref_log_probs=True,
            gradient_checkpointing=False,
            train_sampling_strategy="sequential",
            use_cpu=True,
            bf16=False,
            dataloader_pin_memory=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([dict(zip(names, row)) for row in listed]),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "<pad>")),
            pad_token="<pad>",
            eos_token="<eos>",
        ),
        callbacks=[Clock(steps)],
    )
    clip = trainer.accelerator.clip_grad_norm_

    def clip_and_note(*args, **kwargs):
        norm = clip(*args, **kwargs)
        steps.grad_norms.append(float(norm))
        return norm

    trainer.accelerator.clip_grad_norm_ = clip_and_note
    trainer.train()
    write_steps(out, job, steps, ["torch", "transformers", "trl"])


if __name__ == "__main__":
    job, out = read_job()
    torch.set_num_threads(job.threads)
    train(job, out)
