"""A process of `benchmarks.end_to_end`: a whole run of TRL's plain DPOTrainer.

It starts from a preference file and ends with a saved model.  It uses TRL's defaults (a
live reference, gradient checkpointing, padding to the longest sequence of a batch, a
checkpoint at the end), except for what the comparison fixes: CPU, float32, batch size,
steps, maximum length, and no reports to trackers.
"""

import json
import sys
import time
from pathlib import Path

import torch
from datasets import load_dataset
from trl import DPOConfig, DPOTrainer

LOSSES = {"dpo": "sigmoid", "rdpo": "robust"}
"""TRL's names of jaxpref's losses."""


def main() -> None:
    """Trains, and writes the duration of each phase."""
    source, found = map(Path, sys.argv[1:])
    job = json.loads(source.read_text("utf-8"))
    torch.set_num_threads(job["threads"])
    marks = {"start": time.time()}
    arguments = DPOConfig(
        output_dir=job["out"],
        per_device_train_batch_size=job["batch"],
        max_steps=job["steps"],
        max_length=job["max_length"],
        loss_type=[LOSSES[job["loss"]]],
        label_smoothing=job["flip_rate"],
        model_init_kwargs={"dtype": "float32"},
        use_cpu=True,
        bf16=False,
        dataloader_pin_memory=False,
        report_to="none",
    )
    data = load_dataset("json", data_files=job["data"], split="train")
    adapters = {}
    if job["lora_rank"]:
        from peft import LoraConfig

        rank = job["lora_rank"]
        # All matrices of the layers, and twice the rank, as in jaxpref.
        config = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        adapters = {"peft_config": config}
    trainer = DPOTrainer(
        model=job["model"], args=arguments, train_dataset=data, **adapters
    )
    marks["tokenize"] = time.time()
    trainer.train()
    marks["steps"] = time.time()
    trainer.save_model(str(Path(job["out"]) / "export"))
    marks["export"] = time.time()
    ends = [job["started"], *marks.values()]
    seconds = [end - begin for begin, end in zip(ends, ends[1:])]
    found.write_text(json.dumps(dict(zip(marks, seconds))), encoding="utf-8")


if __name__ == "__main__":
    main()
