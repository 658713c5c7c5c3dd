"""The scorer of a model of which a part is trained: adapters, or some parameters."""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from jaxpref.data.batch import PreferenceBatch
from jaxpref.errors import InputError
from jaxpref.models import Model, RewardModel
from jaxpref.models.adapter_files import load_adapter, read_lora, save_adapter
from jaxpref.models.folder import load_params
from jaxpref.models.logprobs import REFERENCE
from jaxpref.models.lora import Lora, LoraOptions, lora_of
from jaxpref.models.partition import Partition, part_of
from jaxpref.models.paths import by_path, nested
from jaxpref.models.quantized import Quantization
from jaxpref.models.quantized_files import load_quantized, quantized_at_random
from jaxpref.models.soft_prompt import SoftPrompt
from jaxpref.models.soft_prompt_files import (
    load_soft_prompt,
    save_soft_prompt,
    soft_prompt_length,
)
from jaxpref.models.stored import stored_params
from jaxpref.models.weights import Weights, load_weights
from jaxpref.scoring.reward_scorer import RewardScorer
from jaxpref.scoring.scorer import (
    ExportOptions,
    Frozen,
    Params,
    PolicyScorer,
    Scorer,
    save_model,
    with_numerics,
)
from jaxpref.scoring.scores import Scored
from jaxpref.sharding import replicated


@dataclasses.dataclass(frozen=True)
class PartitionScorer:
    """A language or reward model of which a part is trained.

    What is trained is in the model's parameter dtype.  What is frozen is in the compute
    dtype, in which it is used: the function is the same.  Or it is quantized, and the
    function another one, also that of the reference if it is the base.  `frozen` has it
    under "base", and other models under their names, but no reference that is the base.
    """

    one: PolicyScorer | RewardScorer
    """The scorer of the whole model."""
    partition: Partition
    """What is trained."""
    adapter: Path | None = None
    """The folder of the adapter that training starts from; None for a new one."""
    reference_is_base: bool = False
    """Whether the reference is what is frozen: the model without its adapter."""
    quantization: Quantization | None = None
    """How the frozen matrices of the layers are held; None for the compute dtype."""
    dropout: float = 0.0
    """Share of the adapters' inputs that a train step drops."""
    seed: int = 0
    """Seed of the dropout."""

    @property
    def _base(self) -> Any:
        """The model with the dtype of frozen parameters."""
        model: Model | RewardModel = self.one.model
        return with_numerics(model, param_dtype=model.numerics.compute_dtype)

    @property
    def models(self) -> frozenset[str]:
        """See `Scorer`; without a reference that is the base."""
        return self.one.models - ({REFERENCE} if self.reference_is_base else set())

    def init(self, key: PRNGKeyArray) -> Params:
        """See `Scorer`."""
        return self.partition.trained(self.one.init(key), self.one.model, key)

    def load(self, folder: Path, key: PRNGKeyArray) -> Params:
        """See `Scorer`; new adapters, or those of the folder `adapter`."""
        model = self.one.model
        part = self.partition
        reads = part.reads if isinstance(part, SoftPrompt) else part.trains
        params = load_params(folder, model, key, only=reads)
        if isinstance(part, Lora) and part.dora and self.adapter is None:
            # Their norms are where training starts.
            base = load_quantized(
                folder,
                self._base,
                self.quantization,
                key,
                only=lambda path: path in part.adapted,
            )
            params = nested(by_path(params) | by_path(base))
        trained = self.partition.trained(params, model, key)
        if self.adapter is None:
            return trained
        if isinstance(part, SoftPrompt):
            return load_soft_prompt(self.adapter, model)
        _, stored = load_adapter(self.adapter, model)
        return nested(by_path(trained) | by_path(stored))

    def load_frozen(self, folder: Path, models: Mapping[str, Weights]) -> Frozen:
        """See `Scorer`."""
        key, only = jax.random.key(0), self.partition.freezes
        base = self.partition.frozen(
            load_quantized(folder, self._base, self.quantization, key, only=only)
        )
        if isinstance(self.partition, SoftPrompt):
            # The reference is the model before training.
            load = lambda weights: self.load(folder, key)
        else:
            load = lambda weights: load_weights(weights, self._base)
        return {"base": base} | {n: load(models[n]) for n in sorted(self.models)}

    def init_frozen(self, key: PRNGKeyArray) -> Frozen:
        """See `Scorer`."""
        params = self._base.init(key)
        soft = isinstance(self.partition, SoftPrompt)
        one = self.init(key) if soft and self.models else params
        family = self.one.model.architecture.family
        base = quantized_at_random(
            self.partition.frozen(params), family, self.quantization, key
        )
        return {"base": base} | dict.fromkeys(self.models, one)

    def reference_params(
        self, reference: Weights, frozen: Frozen, params: Params | None
    ) -> Params:
        """See `Scorer`; the base itself if it is the reference."""
        if self.reference_is_base:
            return frozen["base"]
        if params is None and isinstance(self.partition, SoftPrompt):
            # The one that training starts from is no part of the folder.
            params = self.load(reference.folder, jax.random.key(0))
        if params is None:
            return load_weights(reference, self._base)
        return self.partition.join(params, frozen["base"])

    def __call__(
        self,
        params: Params,
        frozen: Frozen,
        batch: PreferenceBatch,
        *,
        totals: Collection[str] = (),
        **heads: Any,
    ) -> Scored:
        """See `Scorer`; `heads` are those of the masks, as for `PolicyScorer`."""
        base = frozen["base"]
        models = {name: frozen[name] for name in self.models}
        if self.reference_is_base:
            models[REFERENCE] = base
        if isinstance(self.partition, SoftPrompt):
            models = {n: self.partition.join(x, base) for n, x in models.items()}
        if self.dropout and "step" in frozen and isinstance(self.partition, Lora):
            # The same in every pass over a micro-batch of a step, and after a restart.
            key = jax.random.fold_in(jax.random.key(self.seed), frozen["step"])
            key = jax.random.fold_in(key, replicated(jnp.sum(batch.pair_index)))
            whole = self.partition.join(params, base, dropout=self.dropout, key=key)
        else:
            whole = self.partition.join(params, base)
        read = models | {name: frozen[name] for name in ("step",) if name in frozen}
        return self.one(whole, read, batch, totals=totals, **heads)

    def policy(self, params: Params, frozen: Frozen) -> tuple[Model, Params]:
        """See `Scorer`."""
        whole = self.partition.join(params, frozen["base"])
        return self.one.policy(whole, frozen)

    def of_reference(self, stored: frozenset[str]) -> Scorer:
        """See `Scorer`."""
        return self.one.of_reference(stored)

    def with_scores(self, stored: frozenset[str]) -> Scorer:
        """See `Scorer`."""
        one: Any = self.one.with_scores(stored)
        return dataclasses.replace(self, one=one)

    def with_remat(self, policy: str) -> Scorer:
        """See `Scorer`."""
        one: Any = self.one.with_remat(policy)
        return dataclasses.replace(self, one=one)

    def export(self, params: Params, folder: Path, options: ExportOptions) -> None:
        """Writes the whole model to `folder`, and an adapter beside it.

        A soft prompt is written as an adapter only: the model is the initial one.
        What is frozen is read again from the initial model, without rounding.  The
        adapter's folder has `folder`'s name, with "adapter" for "export".
        """
        model = self.one.model
        beside = folder.with_name(folder.name.replace("export", "adapter"))
        if isinstance(self.partition, SoftPrompt):
            names = dict(base=options.name, dtype=options.dtype)
            save_soft_prompt(beside, model, params, **names)
            return
        stored: Any = stored_params(options.source, model)
        whole = self.partition.exported(params, stored)
        save_model(model, whole, folder, options)
        if isinstance(self.partition, Lora):
            save_adapter(
                beside,
                self.partition,
                model,
                params,
                base=options.name,
                dtype=options.dtype,
                reward=isinstance(model, RewardModel),
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """What is trained of a model: all of it, a part, or adapters."""

    train: str = "all"
    """See `partition.part_of`."""
    lora: LoraOptions = LoraOptions()
    """New adapters."""
    soft_prompt: tuple[int, ...] = ()
    """The tokens from which a new soft prompt starts."""
    start: Weights
    """The initial model, and maybe the adapter that training starts from."""
    reference: Weights | None = None
    """The reference, or None."""
    seed: int = 0
    """Seed of what train steps draw: the dropout, and tokens for `GoalStates`."""

    def __call__(self, one: PolicyScorer | RewardScorer) -> Scorer:
        """The scorer, from that of the whole model.

        Raises:
          InputError: if the model has no such parts.
        """
        if isinstance(one, RewardScorer):
            one = dataclasses.replace(one, seed=self.seed)
        partition = self.partition(one.model)
        if partition is None:
            return one
        if isinstance(partition, SoftPrompt) and one.models - {REFERENCE}:
            raise InputError(
                f"--soft-prompt: the models {', '.join(sorted(one.models))} would read "
                "it too; train adapters with --lora.rank"
            )
        start, base = self.start, isinstance(partition, Lora) and not partition.whole
        is_base = base and self.reference == dataclasses.replace(start, adapter=None)
        return PartitionScorer(
            one,
            partition,
            start.adapter,
            is_base,
            start.quantization,
            self.lora.dropout,
            self.seed,
        )

    def partition(self, model: Model | RewardModel) -> Partition | None:
        """What is trained; None for everything."""
        head = model.head.paths if isinstance(model, RewardModel) else ()
        if length := len(self.soft_prompt) or soft_prompt_length(self.start.adapter):
            self._check_soft_prompt()
            return SoftPrompt(length, self.soft_prompt, head)
        if (adapter := self.start.adapter) is not None:
            if self.lora.rank is not None:
                raise InputError(
                    f"--lora.rank {self.lora.rank}: the adapter in {adapter} has a "
                    "rank already; leave the option out"
                )
            lora = read_lora(adapter, model)
            whole = tuple(dict.fromkeys((*lora.whole, *head)))
            lora = dataclasses.replace(lora, whole=whole)
        elif self.lora.rank is not None:
            lora = lora_of(self.lora, model.architecture.family, whole=head)
        else:
            if self.lora.dropout:
                raise InputError(
                    f"--lora.dropout {self.lora.dropout}: has no effect without "
                    "adapters; also pass --lora.rank or --adapter"
                )
            if (kind := self.start.quantization) is not None:
                raise InputError(
                    f"--lora.base {kind}: quantized weights cannot be trained; train "
                    "new adapters with --lora.rank, or existing ones with --adapter"
                )
            return part_of(self.train, model)
        if self.train != "all":
            raise InputError(
                f"--train {self.train}: adapters are trained; leave the option out"
            )
        return lora

    def _check_soft_prompt(self) -> None:
        others = {
            "--adapter": self.start.adapter if self.soft_prompt else None,
            "--lora.rank": self.lora.rank,
            "--lora.dropout": self.lora.dropout or None,
            "--train": None if self.train == "all" else self.train,
        }
        for flag, value in others.items():
            if value is not None:
                raise InputError(
                    f"{flag} {value}: only the soft prompt is trained; leave it out"
                )
        if self.reference not in (None, self.start):
            raise InputError(
                "--reference: with a soft prompt, the reference is the model before "
                "training, with the initial one; leave it out, or use moving-average "
                "or none"
            )


def frozen_parts(frozen: Frozen) -> dict[str, Any]:
    """The frozen parameters by what they are: "frozen" weights, and other models."""
    return {"frozen" if name == "base" else name: x for name, x in frozen.items()}


def in_training(frozen: Frozen, step: Int[Array, ""]) -> Frozen:
    """What a scorer reads in a train step: what is frozen, and the step's number.

    The number is there in every train step, also without dropout, and in no other
    pass.  So it says that the pass is one of training, in which scorers drop inputs of
    adapters and compute what an objective asks of hidden states.
    """
    return {**frozen, "step": step}
