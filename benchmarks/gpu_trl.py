"""TRL's DPO trainer on given token ids, started by `gpu.py` with another interpreter.

    python gpu_trl.py JOB.json

Prints a line of JSON: the seconds of every step, including loading, and peak memory.
"""

import json
import os
import sys
import tempfile
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
with open(sys.argv[1]) as file:
    JOB = json.load(file)
if JOB["device"] == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import datasets
import torch
import transformers
import trl
from tokenizers import Tokenizer, models, pre_tokenizers


def word_tokenizer(size: int):
    """A tokenizer whose words are numbers: token ids can be passed to it as text."""
    vocab = {str(n): n for n in range(size)}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="0", eos_token="2", unk_token="0"
    )


class Clock(transformers.TrainerCallback):
    """Records the time at the end of every step."""

    def __init__(self):
        self.times = []

    def on_train_begin(self, args, state, control, **_):
        self.on_step_end(args, state, control)

    def on_step_end(self, args, state, control, **_):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


class InOrder(trl.DPOTrainer):
    """A trainer that keeps the order of the pairs."""

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def main() -> None:
    """Trains, and prints the results."""
    if JOB["folder"] is None:
        config = transformers.LlamaConfig(**JOB["config"])
        model = transformers.LlamaForCausalLM(config).float()
    else:
        load = transformers.AutoModelForCausalLM.from_pretrained
        model = load(JOB["folder"], dtype=torch.float32)
    text = lambda tokens: " ".join(map(str, tokens))
    # Answers already end with EOS; otherwise TRL would append it.
    rows = [
        {
            "prompt": text(prompt) + " ",
            "chosen": text([*chosen[:-1], 2]),
            "rejected": text([*rejected[:-1], 2]),
        }
        for prompt, chosen, rejected in JOB["pairs"]
    ]
    on_cpu = JOB["device"] == "cpu"
    with tempfile.TemporaryDirectory() as out:
        arguments = trl.DPOConfig(
            output_dir=out,
            use_cpu=on_cpu,
            bf16=True,
            gradient_checkpointing=JOB["remat"],
            per_device_train_batch_size=JOB["batch_size"] // JOB["accumulation"],
            gradient_accumulation_steps=JOB["accumulation"],
            max_steps=JOB["steps"],
            learning_rate=1e-6,
            optim="adamw_torch" if on_cpu else "adamw_torch_fused",
            max_length=None,
            precompute_ref_log_probs=True,
            logging_steps=10_000,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        clock = Clock()
        trainer = InOrder(
            model=model,
            args=arguments,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=word_tokenizer(JOB["config"]["vocab_size"]),
            callbacks=[clock],
        )
        if not on_cpu:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    peak = None if on_cpu else torch.cuda.max_memory_allocated() / 2**20
    seconds = [after - before for before, after in zip(clock.times, clock.times[1:])]
    versions = {"trl": trl.__version__, "torch": torch.__version__}
    print(json.dumps({"seconds": seconds, "peak_mib": peak, "versions": versions}))


main()
