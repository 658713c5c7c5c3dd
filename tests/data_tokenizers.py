"""Tiny tokenizers made in memory, and records to feed them."""

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "[INST] {{ m['content'] | trim }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] | trim }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant roles') }}{% endif %}"
    "{% endfor %}"
)


def byte_tokenizer(
    *,
    bos="<s>",
    eos="</s>",
    first=(),
    merges=(("a", "b"), ("ab", "c")),
    adds=None,
    template=None,
):
    """Bytes, a few merges, no pre-tokenizer: merges cross any boundary.

    `first` names the special tokens that get ids 0, 1, ...; the others come last.
    `adds` is what the tokenizer itself writes around a text, e.g. "<s> $A </s>".
    """
    special = [bos, eos, "<|im_start|>", "<|im_end|>"]
    special = list(dict.fromkeys(x for x in special if x is not None))
    ordered = [*first, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    ordered += ["".join(pair) for pair in merges]
    ordered += [x for x in special if x not in first]
    vocab = {token: n for n, token in enumerate(ordered)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    if adds:
        backend.post_processor = processors.TemplateProcessing(
            single=adds, special_tokens=[(x, vocab[x]) for x in special]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=eos
    )
    tokenizer.chat_template = template
    return tokenizer


def ids(tokenizer, *tokens):
    """Vocabulary ids, looked up one by one: the oracle never tokenizes."""
    return [tokenizer.get_vocab()[token] for token in tokens]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def synthetic_pairs(count, prompts=None):
    prompts = prompts or count
    return [
        {
            "prompt": f"question {n % prompts}",
            "chosen": f" good {n}",
            "rejected": f" bad {n}",
        }
        for n in range(count)
    ]
