"""How long a step takes at least, counted from the sizes of model and batch.

    seconds >= max(FLOPs / peak, bytes of memory / its bandwidth,
                   bytes received / ICI, bytes of other slices / DCN)

The compiler's own `cost_analysis` counts the body of a loop once, and the layers are a
loop; so products are counted here.
"""

import dataclasses
import math

from jaxpref.models import Architecture, Model
from jaxpref.models.logprobs import default_chunk
from jaxpref.plan.chips import Chip

ASSUMPTIONS = (
    "peak bfloat16 rate, products only",
    "attention to earlier tokens only, scores not in memory",
    "every weight, activation and logit through memory once for each product",
    "all links of a chip busy, collectives behind everything else",
)
"""What makes the estimate a bound: real steps are slower."""
OF_SLICES = "the network between slices is this job's alone"
"""One more, where there are several."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """What a step computes, over all devices."""

    model: Model
    """Sizes; `remat` says what is computed twice."""
    mesh: dict[str, int]
    """Devices by axis."""
    slices: int = 1
    """Between which the network is slower."""
    sequences: int
    """Sequences of a step, over all micro-batches."""
    length: int
    """T, tokens of a sequence."""
    predictions: int
    """P, predicted tokens of a sequence."""
    seen: float
    """Pairs of a token and one that it attends to, over all sequences."""
    accumulation: int = 1
    """Micro-batches."""
    passes_ahead: int = 0
    """Passes without gradient over the batch: of losses that couple pairs over several
    micro-batches, and of a reference whose weights are there."""
    head: bool = True
    """Whether there are log-probs; a reward needs no vocabulary."""
    logit_chunk: int | None = None
    """Completion tokens whose logits exist at the same time."""
    models: int = 1
    """Models of these sizes that are trained side by side."""

    @property
    def devices(self) -> int:
        """How many."""
        return math.prod(self.mesh.values())


def layer_weights(model: Architecture) -> int:
    """Weights of the layers that are factors of products."""
    m = model
    attention = m.hidden_size * m.head_dim * 2 * (m.num_heads + m.num_kv_heads)
    return m.num_layers * (attention + 3 * m.hidden_size * m.intermediate_size)


def forward_flops(load: Load) -> dict[str, float]:
    """FLOPs of one pass over a step's batch: `layers`, `attention`, `head`.

    Two for a weight and a token; in attention four for a feature of a head and a pair
    of tokens; two for a weight of the head and a predicted token.
    """
    m = load.model.architecture
    vocabulary = m.hidden_size * m.vocab_size if load.head else m.hidden_size
    found = {
        "layers": 2.0 * layer_weights(m) * load.sequences * load.length,
        "attention": 4.0 * m.num_layers * m.num_heads * m.head_dim * load.seen,
        "head": 2.0 * vocabulary * load.sequences * load.predictions,
    }
    return {name: load.models * flops for name, flops in found.items()}


def step_flops(load: Load) -> tuple[float, float]:
    """FLOPs of a step: what the mathematics asks for, and what is computed.

    A gradient takes two passes more.  Computed again are, by `remat`, the layers but
    their last product ("full") or attention ("dots"), and the logits where they come in
    several chunks.
    """
    forward = forward_flops(load)
    once = sum(forward.values())
    again = {
        "none": 0.0,
        "dots": forward["attention"],
        "full": forward["layers"] + forward["attention"],
    }[load.model.numerics.remat]
    if chunks(load) > 1:
        again += forward["head"]
    return 3 * once, 3 * once + again + load.passes_ahead * once


def chunks(load: Load) -> int:
    """In how many parts the logits of a micro-batch are computed."""
    size = load.logit_chunk or default_chunk(
        _rows(load), load.model.architecture.hidden_size, math.ceil(_vocabulary(load))
    )
    return -(-load.predictions // size)


def _rows(load: Load) -> int:
    """Sequences of a micro-batch on one device."""
    shards = load.mesh["data"] * load.mesh["fsdp"]
    return -(-load.sequences // (load.accumulation * shards))


def _vocabulary(load: Load) -> float:
    """Tokens of the vocabulary on one device."""
    return load.model.architecture.vocab_size / load.mesh["tensor"] if load.head else 1


def memory_traffic(load: Load, held: dict[str, int]) -> float:
    """Bytes that one device reads and writes in a step.

    Weights: gathered (written), and read for each pass, in the compute dtype; their
    gradients, in float32.  AdamW, which is computed twice (once for the norm of what it
    does): parameters, moments and gradients read twice, written once.  Activations: a
    dozen arrays of the hidden size for a layer, and those of heads and feed-forward.
    Logits in float32: written and read.

    Args:
      load: of the step.
      held: bytes of `parameters` and `optimizer` on one device.
    """
    m, tensor = load.model.architecture, load.mesh["tensor"]
    width = 2 if "16" in load.model.numerics.compute_dtype else 4
    passes = 2 + (load.model.numerics.remat == "full") + load.passes_ahead
    gathered = load.mesh["fsdp"] > 1
    weights = layer_weights(m) + (_vocabulary(load) * tensor * m.hidden_size)
    of_weights = weights / tensor * (width * (passes + 2 * gathered) + 4)
    states = 2 * (2 * held["parameters"] + held["optimizer"])
    states += held["parameters"] + held["optimizer"]
    heads = 4 * m.head_dim * (m.num_heads + m.num_kv_heads) / tensor
    features = 6 * m.intermediate_size / tensor
    tokens = _rows(load) * load.length * load.accumulation
    activations = m.num_layers * (12 * m.hidden_size + heads + features) * width
    logits = _rows(load) * load.predictions * load.accumulation * _vocabulary(load)
    several = 4 + 2 * (chunks(load) > 1)
    of_one = (
        load.accumulation * of_weights
        + (passes + 1) * tokens * activations
        + several * 4 * logits
    )
    return load.models * of_one + states


def ideal_wire_bytes(load: Load) -> float:
    """What a device must receive in a step for FSDP alone.

    For each micro-batch, weights gathered twice in the compute dtype, and once more for
    a pass without gradient; gradients reduced and scattered once in float32, in which
    they are summed; (fsdp - 1) / fsdp of each.
    A tied head is the embedding: one matrix with one gradient.
    """
    m, fsdp, tensor = load.model.architecture, load.mesh["fsdp"], load.mesh["tensor"]
    width = 2 if "16" in load.model.numerics.compute_dtype else 4
    matrices = 1 if m.tie_word_embeddings or not load.head else 2
    weights = layer_weights(m) + matrices * m.vocab_size * m.hidden_size
    bytes_of = load.models * (2 * width + 4) * weights / tensor
    bytes_of += load.passes_ahead * width * weights / tensor
    return load.accumulation * (fsdp - 1) / fsdp * bytes_of


def ideal_dcn_bytes(load: Load) -> float:
    """What a device must receive of other slices in a step.

    Its share of the float32 gradients, summed over S slices once, in a ring: 2 (S - 1)
    / S of it.  (The step sums those of each micro-batch.)
    """
    m, shards = load.model.architecture, load.mesh["fsdp"] * load.mesh["tensor"]
    matrices = 1 if m.tie_word_embeddings or not load.head else 2
    weights = layer_weights(m) + matrices * m.vocab_size * m.hidden_size
    share = 2 * (load.slices - 1) / load.slices
    return load.models * share * 4 * weights / shards


def of_a_token(load: Load, chip: Chip, received: float | None) -> dict:
    """The bound on the time in which the sampler draws a token for every prompt.

    Bytes of memory: weights in the compute dtype, those of the layers written too where
    they are gathered for each token; the cache, every slot of which is read, filled or
    not; float32 logits of the whole vocabulary, written and read.

    Args:
      load: `sequences` prompts, and `length` slots in the cache of each.
      chip: the devices.
      received: bytes that a device receives of others for a token; None takes what it
        is to gather the layers once.

    Returns:
      `compute_seconds`, `memory_seconds`, `ici_seconds`, `seconds_per_token` (the
      largest), `bound` (which of them), and `tokens_per_second` of all prompts.
    """
    m, fsdp, tensor = load.model.architecture, load.mesh["fsdp"], load.mesh["tensor"]
    width = 2 if "16" in load.model.numerics.compute_dtype else 4
    layers, head = layer_weights(m), m.vocab_size * m.hidden_size
    slots = load.sequences * load.length
    cache = 2 * m.num_layers * m.num_kv_heads * m.head_dim * _rows(load) * load.length
    memory = width / tensor * (layers * (1 + (fsdp > 1)) + head + cache)
    memory += 8 * _rows(load) * m.vocab_size
    flops = 2 * (layers + head) * load.sequences
    flops += 4 * m.num_layers * m.num_heads * m.head_dim * slots
    if received is None:
        received = (fsdp - 1) / fsdp * width * layers / tensor
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
    of_slices: float | None,
) -> dict:
    """The bound on a step's time, and what it is made of.

    Args:
      load: of the step.
      chip: the devices.
      held: bytes of `parameters` and `optimizer` on one device.
      received: bytes that a device receives of others on its slice; None takes
        `ideal_wire_bytes`.
      of_slices: and of those on other slices; None takes `ideal_dcn_bytes`.

    Returns:
      `flops_per_step` (of the mathematics, over all devices), `computed_flops`,
      `compute_seconds`, `memory_seconds`, `ici_seconds`, `dcn_seconds`,
      `roofline_seconds`, `bound` (which of them), and `mfu_estimate`: flops_per_step /
      (devices peak seconds).
    """
    flops, computed = step_flops(load)
    received = ideal_wire_bytes(load) if received is None else received
    of_slices = ideal_dcn_bytes(load) if of_slices is None else of_slices
    seconds = {
        "compute": computed / load.devices / chip.flops,
        "memory": memory_traffic(load, held) / chip.hbm_bandwidth,
        "ici": received / chip.ici_bandwidth,
        "dcn": of_slices / chip.dcn_bandwidth,
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
