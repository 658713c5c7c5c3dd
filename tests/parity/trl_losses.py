"""Runs given tensors through TRL's own trainers and through jaxpref.

A trainer is made without its constructor, which wants a model, a tokenizer and a data
set: it gets the attributes that its `compute_loss` reads, from the defaults of its own
config class.  Its model is a stand-in that answers with numbers of the test's choosing,
token log-probs or logits.  Everything after the model is TRL's own code.

Log-probs are multiples of 2^-10, so that sums and differences of them are exact and a
disagreement is one of formulas.
"""

import collections
import contextlib
import dataclasses
import functools
import inspect
import os
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.tpo import TPOConfig, TPOTrainer
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.utils import FusedCausalLMOutput, selective_log_softmax

from jaxpref import losses

TORCH = {"float32": torch.float32, "float64": torch.float64}
DTYPES = tuple(TORCH)
RTOL = {"float32": 1e-6, "float64": 1e-12}
VOCABULARY = 7
SIDES = ("chosen", "rejected", "gold")
BATCHES = (
    {"seed": 0, "pairs": 1},
    {"seed": 1, "pairs": 2},
    {"seed": 2, "pairs": 8},
    {"seed": 3, "pairs": 8, "spread": 4.0},
    {"seed": 4, "pairs": 8, "spread": 0.25, "far": 3.3},
)
"""The last one mixes log-ratios of thousands of nats with ordinary ones."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One loss in TRL and in jaxpref."""

    trl: dict
    loss: str
    options: dict
    batches: tuple[int, ...] = (0, 1, 2, 3, 4)
    """The `BATCHES` on which TRL's formula is finite and accurate; see the table."""
    dtypes: tuple[str, ...] = DTYPES

    def __str__(self):
        return "-".join([self.loss, *(f"{k}={v}" for k, v in self.options.items())])


def dtypes_of(cases) -> list:
    return [
        pytest.param(case, dtype, id=f"{case}-{dtype}")
        for case in cases
        for dtype in case.dtypes
    ]


def exact(rng, low, high, shape) -> np.ndarray:
    """Uniform multiples of 2^-10."""
    return np.round(rng.uniform(low, high, shape) * 2**10) / 2**10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """A batch in TRL's layout: chosen rows first, then rejected, padded on the right.

    R rows, L tokens, V words; TPO has a third branch of rows, its gold answers.
    """

    ids: torch.Tensor  # [R, L]
    mask: torch.Tensor  # [R, L], 1 where completion
    attention: torch.Tensor  # [R, L], 1 where prompt or completion
    policy: torch.Tensor
    """Variables of the gradients: log-probs of tokens 1 to L-1, [R, L-1], or logits,
    [R, L, V]."""
    reference: torch.Tensor  # [R, L-1]
    log_squares: torch.Tensor  # [R, L-1], log sum_v pi(v)^2
    branches: int = 2

    @property
    def targets(self) -> torch.Tensor:
        return self.mask[:, 1:]

    @property
    def inputs(self) -> dict:
        return {
            "input_ids": self.ids,
            "attention_mask": self.attention,
            "completion_mask": self.mask,
        }

    @functools.cached_property
    def all_logps(self) -> torch.Tensor:
        if self.policy.ndim == 2:
            return self.policy
        return selective_log_softmax(self.policy[:, :-1], self.ids[:, 1:])

    @functools.cached_property
    def token_logps(self) -> torch.Tensor:
        """0 outside the completion, as in TRL."""
        return self.all_logps * self.targets

    @functools.cached_property
    def arrays(self) -> dict[str, torch.Tensor]:
        """The arrays that losses read, by name, connected to `policy`."""
        lengths = self.targets.sum(1)
        of_each = lengths.chunk(self.branches)
        shared = torch.minimum(*of_each[:2]).repeat(self.branches)
        first = (self.targets.cumsum(1) <= shared[:, None]) * self.targets
        weights = (self.token_logps.detach() - self.log_squares) * self.targets
        rows = {
            "policy_{}_logps": self.token_logps.sum(1),
            "reference_{}_logps": self.reference.sum(1),
            "policy_{}_prefix_logps": (self.token_logps * first).sum(1),
            "reference_{}_prefix_logps": (self.reference * first).sum(1),
            "{}_lengths": lengths,
            "{}_log_weights": weights.sum(1) / lengths.clamp(min=1),
            "whole_{}_logps": (self.all_logps * self.attention[:, 1:]).sum(1),
            "whole_{}_lengths": self.attention[:, 1:].sum(1),
        }
        return {
            name.format(side): part
            for name, values in rows.items()
            for side, part in zip(SIDES, values.chunk(self.branches))
        }


def draw(
    seed,
    pairs,
    dtype="float32",
    *,
    spread=0.5,
    far=0.0,
    logits=False,
    prompts=(1, 4),
    lengths=(1, 8),
    branches=2,
):
    """A random batch whose log-ratios are up to `spread` nats per token.

    Rows are up to 10^`far` times further from the reference.  `prompts` and `lengths`
    are the least and the most tokens of a prompt and of a completion.
    """
    rng = np.random.default_rng(seed)
    rows, dtype = branches * pairs, TORCH[dtype]
    prompt = np.tile(rng.integers(*prompts, pairs, endpoint=True), branches)
    completion = rng.integers(*lengths, rows, endpoint=True)
    position = np.arange((prompt + completion).max())
    attention = position < (prompt + completion)[:, None]
    mask = attention & (position >= prompt[:, None])
    tokens = mask[:, 1:]
    logps = exact(rng, -3, -0.25, tokens.shape)
    ratios = exact(rng, -spread, spread, tokens.shape)
    ratios = np.round(ratios * 10 ** rng.uniform(0, far, (rows, 1)) * 2**10) / 2**10
    # Above every log-prob, so that no answer is more likely than a sampled one.
    squares = exact(rng, -0.25, 0, tokens.shape)
    policy = torch.tensor(logps * tokens, dtype=dtype)
    if logits:
        shape = (*mask.shape, VOCABULARY)
        policy = torch.tensor(exact(rng, -2, 2, shape), dtype=dtype)
    return Tokens(
        ids=torch.tensor(rng.integers(0, VOCABULARY, mask.shape)),
        mask=torch.tensor(mask.astype(np.int64)),
        attention=torch.tensor(attention.astype(np.int64)),
        policy=policy.requires_grad_(),
        reference=torch.tensor((logps - ratios) * tokens, dtype=dtype),
        log_squares=torch.tensor(squares * tokens, dtype=dtype),
        branches=branches,
    )


@functools.cache
def batch(index, dtype, **options) -> Tokens:
    """Drawn once, because the tests only read it."""
    return draw(dtype=dtype, **BATCHES[index], **options)


class FixedOutput(torch.nn.Module):
    """A model that returns given tensors for any input.

    Asked for the mismatched sequences of a KTO batch, it answers with theirs.
    """

    is_gradient_checkpointing = False

    def __init__(self, mismatched=None, **outputs):
        super().__init__()
        self.mismatched, self.outputs = mismatched, outputs

    def forward(self, input_ids=None, **_):
        if "logits" in self.outputs:
            return types.SimpleNamespace(**self.outputs)
        outputs = self.outputs
        if self.mismatched is not None and input_ids is self.mismatched.ids:
            outputs = {"log_probs": self.mismatched.token_logps}
        zeros = torch.zeros_like(outputs["log_probs"].detach())
        fields = {"entropy": zeros, "mean_logits": zeros, "is_top1": zeros.bool()}
        return FusedCausalLMOutput(**fields, **outputs)


def trainer(kind, config, model, **options):
    """A trainer without its constructor, with only what `compute_loss` reads."""
    fields = {field.name: field for field in dataclasses.fields(config)}
    unknown = set(options) - set(fields)
    assert not unknown, unknown
    value = lambda name: options.get(name, default(fields[name]))
    args = types.SimpleNamespace(**{name: value(name) for name in fields})
    args.device = torch.device("cpu")
    same = lambda values: values
    made = object.__new__(kind)
    vars(made).update(
        vars(args),
        args=args,
        model=model,
        accelerator=types.SimpleNamespace(
            device=args.device, gather=same, gather_for_metrics=same
        ),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        is_encoder_decoder=False,
        pad_token_id=0,
        padding_value=0,
        _peft_has_been_casted_to_bf16=False,
        _metrics={mode: collections.defaultdict(list) for mode in ("train", "eval")},
        _stored_metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    return made


def default(field):
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None


def dpo_trainer(tokens: Tokens, loss_type="sigmoid", **options) -> DPOTrainer:
    names = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    model = FixedOutput(
        log_probs=tokens.token_logps, log_sum_sq_probs=tokens.log_squares
    )
    made = trainer(DPOTrainer, DPOConfig, model, loss_type=names, **options)
    made.loss_types = names
    made.loss_weights = options.get("loss_weights") or [1.0] * len(names)
    made.ref_model = FixedOutput(log_probs=tokens.reference)
    return made


def kto_trainer(tokens: Tokens, mismatched: Tokens, **options) -> KTOTrainer:
    model = FixedOutput(mismatched, log_probs=tokens.token_logps)
    made = trainer(KTOTrainer, KTOConfig, model, **options)
    made.calculate_KL = made.loss_type == "kto"
    reference = dataclasses.replace(mismatched, policy=mismatched.reference)
    made.ref_model = FixedOutput(reference, log_probs=tokens.reference)
    return made


def kto_inputs(tokens: Tokens, mismatched: Tokens, desirable: torch.Tensor) -> dict:
    second = {f"KL_{name}": tensor for name, tensor in mismatched.inputs.items()}
    return tokens.inputs | second | {"label": desirable}


def kto_arrays(tokens: Tokens, mismatched: Tokens, desirable: torch.Tensor) -> dict:
    return {
        "policy_logps": tokens.token_logps.sum(1),
        "reference_logps": tokens.reference.sum(1),
        "desirable": desirable,
        "policy_mismatched_logps": mismatched.token_logps.sum(1).detach(),
        "reference_mismatched_logps": mismatched.reference.sum(1),
    }


def reference_free(kind: str, tokens: Tokens, **options):
    """A CPO or ORPO trainer on logits, and its batch."""
    trainers = {"cpo": (CPOTrainer, CPOConfig), "orpo": (ORPOTrainer, ORPOConfig)}
    made = trainer(*trainers[kind], FixedOutput(logits=tokens.policy), **options)
    inputs = {}
    for row, side in enumerate(("chosen", "rejected")):
        ids, mask, attention = (
            rows.chunk(2)[row] for rows in (tokens.ids, tokens.mask, tokens.attention)
        )
        inputs[f"{side}_input_ids"] = ids
        inputs[f"{side}_attention_mask"] = attention
        inputs[f"{side}_labels"] = ids.masked_fill(mask == 0, -100)
    return made, inputs


def tpo_trainer(tokens: Tokens, **options) -> TPOTrainer:
    return trainer(TPOTrainer, TPOConfig, FixedOutput(logits=tokens.policy), **options)


def reward_trainer(rewards: torch.Tensor, **options) -> RewardTrainer:
    """`rewards`: chosen first, then rejected, [2B, 1]."""
    return trainer(RewardTrainer, RewardConfig, FixedOutput(logits=rewards), **options)


def theirs(made, inputs, leaf) -> tuple[float, np.ndarray]:
    """TRL's loss and its gradient at `leaf`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = made.compute_loss(made.model, dict(inputs))
    (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    return loss.item(), gradient.numpy()


def reads(loss) -> list[str]:
    parameters = inspect.signature(loss).parameters.values()
    return [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]


def mean(loss, **options):
    """The mean over pairs, as a function of the arrays that the loss reads."""

    @functools.wraps(loss)
    def objective(*arrays):
        return jnp.mean(loss(*arrays, **options))

    return objective


def likelihood(logps, lengths):
    """As in TRL: the mean over all tokens of the batch."""
    return jnp.sum(losses.sft(logps)) / jnp.sum(lengths)


def ours(objective, arrays: dict[str, torch.Tensor], leaf) -> tuple[float, np.ndarray]:
    """jaxpref's loss on `arrays` and its gradient at `leaf`, through torch."""
    tensors = [arrays[name] for name in reads(objective)]
    moving = [i for i, tensor in enumerate(tensors) if tensor.requires_grad]
    double = leaf.dtype == torch.float64
    with jax.enable_x64(True) if double else contextlib.nullcontext():
        values = [jnp.asarray(tensor.detach().numpy()) for tensor in tensors]
        value, gradients = jax.value_and_grad(objective, moving)(*values)
        gradients = [torch.tensor(np.asarray(gradient)) for gradient in gradients]
    (gradient,) = torch.autograd.grad(
        [tensors[i] for i in moving], leaf, gradients, retain_graph=True
    )
    return float(value), gradient.numpy()


def our_loss(tokens: Tokens, objective) -> tuple[float, np.ndarray]:
    return ours(objective, tokens.arrays, tokens.policy)


def assert_agree(left, right, dtype="float32", rtol=None):
    """Compares values relatively, and gradients relative to their largest entry.

    1e-6 in float32; 1e-12 in float64, where a formula that differs has no excuse.
    """
    rtol = rtol or RTOL[dtype]
    (value, gradient), (wanted, wanted_gradient) = left, right
    assert np.isfinite(wanted), wanted
    np.testing.assert_allclose(value, wanted, rtol=rtol, atol=0)
    scale = np.abs(wanted_gradient).max()
    np.testing.assert_allclose(gradient, wanted_gradient, rtol=rtol, atol=rtol * scale)
