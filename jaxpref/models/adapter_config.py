"""The adapter_config.json of a folder of `peft`."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from jaxpref.errors import InputError
from jaxpref.models.adapter_tensors import together
from jaxpref.models.config_json import ConfigFields
from jaxpref.models.families.family import StoredArray
from jaxpref.models.lora import Lora, matrices, module_name
from jaxpref.models.reward_head import HIDDEN, LAST

CONFIG = "adapter_config.json"
HARMLESS = frozenset(
    # Identification, and what the names of the stored tensors say as well.
    "base_model_name_or_path revision task_type peft_version auto_mapping "
    "inference_mode target_modules exclude_modules modules_to_save layers_pattern "
    "layers_to_transform "
    # Settings of training and of layers that the model does not have.
    "lora_dropout fan_in_fan_out loftq_config eva_config corda_config lora_ga_config "
    "megatron_core qalora_group_size runtime_config ephemeral_gpu_offload".split()
)
"""Fields of adapter_config.json that do not affect the function."""
PLAIN_STARTS = True, False, "gaussian", "orthogonal", "eva"
"""Values of `init_lora_weights` that leave the weights of the base as they are."""


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json says about the function."""

    rank: int
    alpha: float
    rank_stabilized: bool
    alphas: Mapping[str, float]
    """By pattern of a module's name."""
    dora: bool = False

    def scale(self, module: str, rank: int) -> float:
        """The scale alpha / r of a module whose factors have rank r."""
        alpha = self.alpha
        for pattern, value in self.alphas.items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                alpha = value
                break
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def read_adapter_config(fields: ConfigFields) -> AdapterConfig:
    """What the fields of an adapter_config.json say about the function.

    Raises:
        InputError: if they change it in a way that is not supported.
    """
    fields.require("peft_type", "LORA")
    fields.require("bias", "none")
    start = fields.get("init_lora_weights")
    if start is not None and start not in PLAIN_STARTS:
        raise InputError(
            f"{fields.source}: field init_lora_weights is {start!r}, which changes the "
            "weights of the base; convert the adapter to plain LoRA with peft first"
        )
    alphas = fields.read("alpha_pattern", dict, {})
    for pattern, alpha in alphas.items():
        try:
            re.compile(pattern)
        except re.error:
            raise InputError(
                f"{fields.source}: field alpha_pattern: {pattern!r} is not a pattern"
            ) from None
        if not (isinstance(alpha, int | float) and 0 < alpha < math.inf):
            raise InputError(
                f"{fields.source}: field alpha_pattern: {alpha!r} is not above 0"
            )
    fields.get("rank_pattern")  # the tensors have these ranks
    config = AdapterConfig(
        rank=fields.read("r", int),
        alpha=fields.read("lora_alpha", float),
        rank_stabilized=fields.read("use_rslora", bool, False),
        alphas=alphas,
        dora=fields.read("use_dora", bool, False),
    )
    fields.check_all_read(HARMLESS)
    if not (config.rank >= 1 and 0 < config.alpha < math.inf):
        raise InputError(f"{fields.source}: r and lora_alpha must be above 0")
    return config


def adapter_fields(
    lora: Lora,
    family: Any,
    arrays: Mapping[str, StoredArray],
    base: str,
    reward: bool,
) -> dict[str, Any]:
    """The fields of the adapter_config.json of an adapter.

    Args:
        lora: the structure of the adapter.
        family: the family of the model that it adapts.
        arrays: where the model's arrays are stored, by path.
        base: the name or folder of that model.
        reward: whether it is a reward model.
    """
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    module = lambda name: module_name(name) if name.stacked else name.template[:-7]
    # `peft` wraps the head as one module, whatever its layers.
    saved = lambda path: (
        LAST if path in (LAST, HIDDEN) else module(family.tensors[path])
    )
    fused = {
        module_name(arrays[paths[0]].name): len(paths)
        for paths in together(lora, arrays)
        if len(paths) > 1
    }
    scale = lambda n: alpha * (math.sqrt(n) if lora.rank_stabilized else n)
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if reward else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": alpha,
        "use_rslora": lora.rank_stabilized,
        "rank_pattern": {name: lora.rank * n for name, n in fused.items()},
        "alpha_pattern": {name: scale(n) for name, n in fused.items()},
        "fan_in_fan_out": any(arrays[p].name.input_major for p in lora.adapted),
        "target_modules": _target_modules(lora, family),
        "modules_to_save": list(dict.fromkeys(map(saved, lora.whole))) or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": lora.dora,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _target_modules(lora: Lora, family: Any) -> list[str] | str:
    """The names of the adapted modules: their last part, if that is enough.

    A pattern for a model that also has other parts, whose modules have such names too.
    """
    named = matrices(family)
    others = {module_name(n) for path, n in named.items() if path not in lora.adapted}
    found = {}
    for path in lora.adapted:
        last = module_name(named[path])
        parent = named[path].template.split(".")[-3]
        found[f"{parent}.{last}" if last in others else last] = None
    if not family.copied_tensors:
        return list(found)
    template = family.module_name(named[lora.adapted[0]].template)
    layers = re.escape(template.split(".{}")[0])
    return rf"{layers}\.\d+\.(.*\.)?({'|'.join(map(re.escape, found))})"
