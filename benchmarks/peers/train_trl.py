"""A process of `benchmarks.end_to_end`: a whole run of TRL's plain DPOTrainer.

From a preference file to a saved model, with TRL's own defaults (a live reference,
gradient checkpointing, padding to the longest sequence of a batch, a checkpoint at the
end), but for what the comparison fixes: the processor, float32, the batch, the steps,
the longest sequence, and no reports to trackers.
"""

import json
import sys
import time
from pathlib import Path

import torch
from datasets import load_dataset
from trl import DPOConfig, DPOTrainer

LOSSES = {"dpo": "sigmoid", "rdpo": "robust"}
"""jaxpref's losses by TRL's names."""


def main() -> None:
    """Trains, and writes how long each phase took."""
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
    trainer = DPOTrainer(model=job["model"], args=arguments, train_dataset=data)
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
