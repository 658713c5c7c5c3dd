"""A lower bound on the time of a step, from the sizes of the model and the batch.

    seconds >= max(FLOPs / peak, bytes of memory / its bandwidth,
                   bytes received / ICI, bytes from other slices / DCN)

Products are counted here, because the compiler's `cost_analysis` counts the body of a
loop only once, and the layers are a loop.
"""

import dataclasses
import functools
import math

import jax

from jaxpref.models import Architecture, Model, build
from jaxpref.models.cache import slots_of
from jaxpref.models.families.mixtral import ExpertsArchitecture
from jaxpref.models.logprobs import default_chunk
from jaxpref.models.lora import matrices
from jaxpref.models.quantized import BITS, Quantization
from jaxpref.plan.chips import Chip
from jaxpref.sharding import ROWS

ASSUMPTIONS = (
    "products only, at the peak bfloat16 rate",
    "causal attention whose scores never reach memory",
    "each weight, activation, and logit passes through memory once per product",
    "all links of a chip are busy, and communication overlaps with everything else",
)
"""Assumptions that make the estimate a lower bound: real steps are slower."""
MULTISLICE_ASSUMPTION = "the network between slices is not shared with other jobs"
"""An additional assumption for several slices."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """The computation of a step, over all devices."""

    model: Model
    """Sizes, and `remat`, which determines the recomputation."""
    mesh: dict[str, int]
    """Number of devices on each mesh axis."""
    slices: int = 1
    """Number of slices, connected by a slower network."""
    sequences: int
    """Sequences per step, over all micro-batches."""
    length: int
    """T, tokens per sequence."""
    predictions: int
    """P, predicted tokens per sequence."""
    seen: float
    """Number of (query, key) token pairs that attend, over all sequences."""
    accumulation: int = 1
    """Micro-batches per step."""
    extra_passes: int = 0
    """Forward passes over the batch without gradients: for losses that couple pairs
    across micro-batches, and for a reference model that is evaluated in the step."""
    head: bool = True
    """Whether log-probs are computed; a reward model has no vocabulary head."""
    logit_chunk: int | None = None
    """Completion tokens whose logits exist at the same time."""
    models: int = 1
    """Number of models of these sizes that are trained together."""
    adapter_weights: int | None = None
    """Number of weights of each model's adapters; None if all weights are trained."""
    quantization: Quantization | None = None
    """How the frozen matrices of the layers are held; None for the compute dtype."""

    @property
    def devices(self) -> int:
        """Number of devices."""
        return math.prod(self.mesh.values())


@functools.cache
def layer_weights(model: Architecture) -> int:
    """Number of weights in the matrices of the layers, of all experts."""
    return sum(_layer_matrices(model).values())


@functools.cache
def active_weights(model: Architecture) -> float:
    """Number of those that a token is multiplied with; of experts, only its own."""
    tensors, share = model.family.tensors, 1.0
    if isinstance(model, ExpertsArchitecture):
        share = model.experts_per_token / model.num_experts
    return sum(
        count * (share if tensors[path].stacked > 1 else 1)
        for path, count in _layer_matrices(model).items()
    )


@functools.cache
def expert_weights(model: Architecture) -> int:
    """Number of weights in the matrices of experts."""
    tensors = model.family.tensors
    return sum(
        count
        for path, count in _layer_matrices(model).items()
        if tensors[path].stacked > 1
    )


@functools.cache
def quantized_weights(model: Architecture) -> int:
    """Number of weights in the matrices that `--lora.base` quantizes."""
    names = matrices(model.family)
    counts = _layer_matrices(model).items()
    return sum(count for path, count in counts if path in names)


def _layer_matrices(model: Architecture) -> dict[str, int]:
    """The number of weights of each array of matrices, by path."""
    shapes = jax.eval_shape(build(model).init, jax.random.key(0))
    counts = {f"layers.{n}": math.prod(x.shape) for n, x in shapes["layers"].items()}
    tensors = model.family.tensors
    return {path: count for path, count in counts.items() if tensors[path].inputs}


def forward_flops(load: Load) -> dict[str, float]:
    """FLOPs of one forward pass over a step's batch: `layers`, `attention`, `head`.

    With adapters, also `adapters`.  Two per weight and token; in attention, four per
    head feature and pair of tokens; two per weight of the vocabulary head and predicted
    token.
    """
    m = load.model.architecture
    vocabulary = m.hidden_size * m.vocab_size if load.head else m.hidden_size
    flops = {
        "layers": 2.0 * active_weights(m) * load.sequences * load.length,
        "attention": 4.0 * m.num_layers * m.num_heads * m.head_dim * load.seen,
        "head": 2.0 * vocabulary * load.sequences * load.predictions,
    }
    if load.adapter_weights:
        per_token = 2.0 * load.adapter_weights
        flops["adapters"] = per_token * load.sequences * load.length
    return {name: load.models * count for name, count in flops.items()}


def step_flops(load: Load) -> tuple[float, float]:
    """FLOPs of a step: without recomputation (as in MFU), and in total.

    The backward pass costs two forward passes.  That of frozen weights costs one: they
    have no gradients.  `remat` recomputes the layers ("full") or attention ("dots").
    Logits are recomputed if there are several chunks.
    """
    forward = forward_flops(load)
    once = sum(forward.values())
    frozen = 0.0
    if load.adapter_weights is not None:
        frozen = forward["layers"] + forward["head"]
    recomputed = {
        "none": 0.0,
        "dots": forward["attention"],
        "full": forward["layers"] + forward["attention"],
    }[load.model.numerics.remat]
    if chunks(load) > 1:
        recomputed += forward["head"]
    needed = 3 * once - frozen
    return needed, needed + recomputed + load.extra_passes * once


def chunks(load: Load) -> int:
    """Number of chunks in which the logits of a micro-batch are computed."""
    size = load.logit_chunk or default_chunk(
        _rows(load), load.model.architecture.hidden_size, math.ceil(_vocabulary(load))
    )
    return -(-load.predictions // size)


def _rows(load: Load) -> int:
    """Sequences of a micro-batch on one device."""
    shards = math.prod(load.mesh.get(axis, 1) for axis in ROWS)
    return -(-load.sequences // (load.accumulation * shards))


def _vocabulary(load: Load) -> float:
    """Vocabulary entries on one device."""
    return load.model.architecture.vocab_size / load.mesh["tensor"] if load.head else 1


def memory_traffic(load: Load, held: dict[str, int]) -> float:
    """Bytes that one device reads and writes in a step.

    - Weights in the compute dtype: written when gathered, and read in each pass.
      Their gradients in float32.
    - AdamW, which is computed twice (once for the norm of the update): parameters,
      moments, and gradients are read twice and written once.
    - Activations: a dozen arrays of the hidden size per layer, and the arrays of the
      heads and the feed-forward layer.
    - Logits in float32: written and read.

    Args:
      load: the step.
      held: bytes of `parameters` and `optimizer` on one device.
    """
    m, tensor = load.model.architecture, load.mesh["tensor"]
    width = 2 if "16" in load.model.numerics.compute_dtype else 4
    passes = 2 + (load.model.numerics.remat == "full") + load.extra_passes
    gathered = load.mesh["fsdp"] > 1
    of_others = expert_weights(m) * (1 - 1 / load.mesh.get("expert", 1))
    weights = layer_weights(m) - of_others
    weights += _vocabulary(load) * tensor * m.hidden_size
    weight_bytes = weights / tensor * (width * (passes + 2 * gathered))
    weight_bytes += 4 * _with_gradients(load, weights) / tensor
    states = 2 * (2 * held["parameters"] + held["optimizer"])
    states += held["parameters"] + held["optimizer"]
    heads = 4 * m.head_dim * (m.num_heads + m.num_kv_heads) / tensor
    features = 6 * m.intermediate_size / tensor
    tokens = _rows(load) * load.length * load.accumulation
    activations = m.num_layers * (12 * m.hidden_size + heads + features) * width
    logits = _rows(load) * load.predictions * load.accumulation * _vocabulary(load)
    several = 4 + 2 * (chunks(load) > 1)
    per_model = (
        load.accumulation * weight_bytes
        + (passes + 1) * tokens * activations
        + several * 4 * logits
    )
    return load.models * per_model + states


def ideal_wire_bytes(load: Load) -> float:
    """Bytes that a device must receive in a step for FSDP and for experts.

    For each micro-batch, FSDP gathers the weights twice in the dtype in which they are
    held, plus once per extra pass, and reduce-scatters the gradients once in float32.
    A device gets (n - 1) / n of each, over the n devices of fsdp and expert; of the
    matrices of experts, (fsdp - 1) / fsdp of its own part.  A tied embedding and head
    are one matrix with one gradient.

    Over the axis expert, each layer gathers the tokens for both passes and their
    cotangents in the compute dtype, and reduce-scatters outputs and the tokens'
    gradients in float32.
    """
    m, fsdp, tensor = load.model.architecture, load.mesh["fsdp"], load.mesh["tensor"]
    expert = load.mesh.get("expert", 1)
    width = 2 if "16" in load.model.numerics.compute_dtype else 4
    tables = 1 if m.tie_word_embeddings or not load.head else 2
    of_experts = expert_weights(m)
    others = layer_weights(m) + tables * m.vocab_size * m.hidden_size - of_experts

    def received(held: float, gradients: float, devices: int) -> float:
        bytes_of = load.models * (2 * held + 4 * gradients) + load.extra_passes * held
        return bytes_of / tensor * (devices - 1) / devices

    adapters, held = load.adapter_weights, width * others
    if load.quantization is not None:
        held -= (width - BITS[load.quantization] / 8) * quantized_weights(m)
    total = received(held, others if adapters is None else adapters, fsdp * expert)
    own = of_experts / expert
    total += received(width * own, own if adapters is None else 0, fsdp)
    moved = load.models * (3 * width + 8) + load.extra_passes * (width + 4)
    tokens = _rows(load) * load.length * m.num_layers
    total += (expert - 1) * tokens * m.hidden_size * moved
    return load.accumulation * total


def ideal_dcn_bytes(load: Load) -> float:
    """Bytes that a device must receive from other slices in a step.

    2 (S - 1) / S of its share of the float32 gradients, for one ring all-reduce over S
    slices.  (The actual step reduces the gradients of every micro-batch.)
    """
    m = load.model.architecture
    shards = math.prod(load.mesh.values()) // load.mesh["data"]
    tables = 1 if m.tie_word_embeddings or not load.head else 2
    weights = layer_weights(m) + tables * m.vocab_size * m.hidden_size
    share = 2 * (load.slices - 1) / load.slices
    return load.models * share * 4 * _with_gradients(load, weights) / shards


def _with_gradients(load: Load, weights: float) -> float:
    """The number of weights that have gradients."""
    return weights if load.adapter_weights is None else load.adapter_weights


def token_estimate(load: Load, chip: Chip, received: float | None) -> dict:
    """A lower bound on the time to sample one token for every prompt.

    Memory traffic: the weights in the compute dtype, written too if they are gathered
    for each token; every slot of each layer's cache, filled or not; and float32 logits
    of the whole vocabulary, written and read.

    Args:
      load: `sequences` is the number of prompts, `length` the cache slots of each.
      chip: the devices.
      received: bytes that a device receives per token; None for gathering the layers
        once.

    Returns:
      `compute_seconds`, `memory_seconds`, `ici_seconds`, `seconds_per_token` (the
      largest of these), `bound` (which one it is), and `tokens_per_second` over all
      prompts.
    """
    m, fsdp, tensor = load.model.architecture, load.mesh["fsdp"], load.mesh["tensor"]
    expert = load.mesh.get("expert", 1)
    width = 2 if "16" in load.model.numerics.compute_dtype else 4
    own = expert_weights(m) / expert
    others = layer_weights(m) - expert_weights(m)
    layers = others + own
    head = m.vocab_size * m.hidden_size
    sliding = m.sliding_layers or (True,) * m.num_layers
    slots = sum(slots_of(m.sliding_window if x else None, load.length) for x in sliding)
    cache = 2 * m.num_kv_heads * m.head_dim * _rows(load) * slots
    memory = width / tensor * (layers * (1 + (fsdp > 1)) + head + cache)
    memory += 8 * _rows(load) * m.vocab_size
    flops = 2 * (active_weights(m) + head) * load.sequences
    flops += 4 * m.num_heads * m.head_dim * load.sequences * slots
    if received is None:
        received = others * (1 - 1 / (fsdp * expert)) + own * (1 - 1 / fsdp)
        received *= width / tensor
    seconds = {
        "compute": flops / load.devices / chip.flops,
        "memory": memory / chip.hbm_bandwidth,
        "ici": received / chip.ici_bandwidth,
    }
    bound = max(seconds, key=seconds.__getitem__)
    return {
        **{f"{name}_seconds": value for name, value in seconds.items()},
        "seconds_per_token": seconds[bound],
        "bound": bound,
        "tokens_per_second": load.sequences / seconds[bound],
    }


def estimate(
    load: Load,
    chip: Chip,
    held: dict[str, int],
    received: float | None,
    received_from_slices: float | None,
) -> dict:
    """A lower bound on the time of a step, and its components.

    Args:
      load: the step.
      chip: the devices.
      held: bytes of `parameters` and `optimizer` on one device.
      received: bytes that a device receives within its slice; None for
        `ideal_wire_bytes`.
      received_from_slices: bytes that it receives from other slices; None for
        `ideal_dcn_bytes`.

    Returns:
      `flops_per_step` (without recomputation, over all devices), `computed_flops`,
      `compute_seconds`, `memory_seconds`, `ici_seconds`, `dcn_seconds`,
      `roofline_seconds` (the largest of these), `bound` (which one it is), and
      `mfu_estimate`, flops_per_step / (devices x peak x seconds).
    """
    flops, computed = step_flops(load)
    received = ideal_wire_bytes(load) if received is None else received
    if received_from_slices is None:
        received_from_slices = ideal_dcn_bytes(load)
    seconds = {
        "compute": computed / load.devices / chip.flops,
        "memory": memory_traffic(load, held) / chip.hbm_bandwidth,
        "ici": received / chip.ici_bandwidth,
        "dcn": received_from_slices / chip.dcn_bandwidth,
    }
    bound = max(seconds, key=seconds.__getitem__)
    return {
        "flops_per_step": flops,
        "computed_flops": computed,
        **{f"{name}_seconds": value for name, value in seconds.items()},
        "roofline_seconds": seconds[bound],
        "bound": bound,
        "mfu_estimate": flops / (load.devices * chip.flops * seconds[bound]),
    }
