"""Reading config.json of Hugging Face folders, and reporting unread fields."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from jaxpref.errors import InputError

HARMLESS = frozenset(
    # Identification.
    "architectures model_type torch_dtype dtype transformers_version "
    "_name_or_path tokenizer_class is_decoder finetuning_task "
    "task_specific_params unsloth_version unsloth_fixed transformers.js_config "
    "problem_type id2label label2id num_labels "
    # Token ids.
    "bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id mask_token_id "
    "decoder_start_token_id image_token_id "
    # Settings of transformers.
    "use_cache pretraining_tp _attn_implementation attn_implementation "
    "_attn_implementation_autoset _attn_implementation_internal _flash_attn_2_enabled "
    "gradient_checkpointing output_attentions output_hidden_states output_scores "
    "return_dict return_dict_in_generate torchscript use_bfloat16 tf_legacy_loss "
    "chunk_size_feed_forward "
    # Dropout, which is not used here.
    "attention_dropout hidden_dropout resid_dropout embd_dropout dropout "
    "classifier_dropout "
    # Generation defaults, which older versions wrote into this file.
    "max_length min_length max_new_tokens do_sample early_stopping num_beams "
    "num_beam_groups num_return_sequences temperature top_k top_p typical_p "
    "repetition_penalty length_penalty diversity_penalty no_repeat_ngram_size "
    "encoder_no_repeat_ngram_size bad_words_ids remove_invalid_values prefix "
    "exponential_decay_length_penalty suppress_tokens begin_suppress_tokens "
    "forced_bos_token_id forced_eos_token_id".split()
)
"""Fields of every family that do not affect a model's output."""


@dataclasses.dataclass(frozen=True)
class ConfigFields:
    """The fields of a config.json; records which ones are read.

    A field that is null counts as missing.
    """

    values: Mapping[str, Any]
    source: str
    """The source of the fields, for messages."""
    names_read: set[str] = dataclasses.field(default_factory=set)

    def get(self, name: str) -> Any:
        """A field's value without checks; None if it is missing."""
        self.names_read.add(name)
        return self.values.get(name)

    def read(self, name: str, kind: type, default: Any = None) -> Any:
        """Reads a field of the given type.

        Raises:
            InputError: if it is missing and has no default, or has another type.
        """
        value = self.get(name)
        value = default if value is None else value
        if value is None:
            raise InputError(
                f"{self.source}: field {name} is missing; copy the file again"
            )
        accepted = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or isinstance(value, bool) != (kind is bool):
            raise InputError(
                f"{self.source}: field {name} is {value!r}, not {kind.__name__}"
            )
        try:
            return kind(value)
        except OverflowError:  # a whole number beyond the range of float
            raise InputError(
                f"{self.source}: field {name} is out of range; check it"
            ) from None

    def require(self, name: str, supported: Any) -> None:
        """Raises InputError if a field is present and is not `supported`."""
        value = self.get(name)
        if value is not None and value != supported:
            raise InputError(
                f"{self.source}: field {name} is {value!r}; only {supported!r} is "
                "supported, use a model that has it"
            )

    def check_all_read(self, harmless: Collection[str]) -> None:
        """Raises InputError for an unread field that may affect the output.

        Fields that are null, false, or empty have no effect.
        """
        for name, value in self.values.items():
            known = name in self.names_read or name in harmless
            if not known and value not in (None, {}, [], "") and value is not False:
                raise InputError(
                    f"{self.source}: field {name} is {value!r}, which is not supported "
                    "and may change what the model computes; use another model, or "
                    "delete the field if it changes nothing"
                )
