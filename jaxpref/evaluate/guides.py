"""The model that is sampled from and its guides: weights, vocabularies, prompts."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxpref import data
from jaxpref.errors import InputError
from jaxpref.evaluate.sample_options import GuideOptions
from jaxpref.models import Architecture, Model, Numerics, build
from jaxpref.models.folder_config import read_architecture
from jaxpref.models.hub import adapter_digest, model_digests
from jaxpref.models.soft_prompt import with_placeholders
from jaxpref.models.soft_prompt_files import soft_prompt_length
from jaxpref.models.weights import Weights, is_reward, load_weights
from jaxpref.sampling.mixture import LanguageModel, Mixed, Mixture
from jaxpref.scoring.run_weights import reference_weights


@dataclasses.dataclass(frozen=True)
class SampledModel:
    """One model of a mixture."""

    flag: str
    """As the user wrote it."""
    weights: Weights
    weight: float
    """The exponent of its probabilities."""
    system: str | None = None
    """A system message in place of that of the prompt; None for the prompt as it is."""

    @functools.cached_property
    def architecture(self) -> Architecture:
        """Read from its folder."""
        return read_architecture(self.weights.folder)

    @functools.cached_property
    def placeholders(self) -> int:
        """The tokens of its soft prompt."""
        return soft_prompt_length(self.weights.adapter)

    def digests(self) -> dict[str, str]:
        """Of everything that its probabilities depend on."""
        found = model_digests(self.weights.folder)
        if self.weights.adapter is not None:
            found["adapter"] = adapter_digest(self.weights.adapter)
        if self.weights.saved is not None:
            found["checkpoint"] = self.weights.saved.digest
        return found


@dataclasses.dataclass(frozen=True)
class SampledModels:
    """The models that are sampled from together."""

    model: SampledModel
    guides: tuple[SampledModel, ...] = ()
    min_p: float = 0.0
    """See `Mixed`."""
    baseline: "SampledModels | None" = None
    """That of Transfer Q*, if it is another model."""

    @property
    def all(self) -> tuple[SampledModel, ...]:
        """The model, and then its guides."""
        return self.model, *self.guides

    @property
    def with_baseline(self) -> tuple[SampledModel, ...]:
        """`all`, and then those of the baseline."""
        return (*self.all, *(self.baseline.with_baseline if self.baseline else ()))

    @property
    def is_mixture(self) -> bool:
        """Whether there is anything but the model."""
        return bool(self.guides or self.min_p or self.model.weight != 1)

    @property
    def context_length(self) -> int:
        """The tokens that all models can read, without their soft prompts."""
        rest = [
            x.architecture.context_length - x.placeholders for x in self.with_baseline
        ]
        return min(rest)

    def build(self, numerics: Numerics) -> LanguageModel:
        """The model, without parameters."""
        models = tuple(build(part.architecture, numerics) for part in self.all)
        return Mixture(models) if self.is_mixture else models[0]

    def load(self, model: LanguageModel) -> Any:
        """Its parameters."""
        if isinstance(model, Model):
            return load_weights(self.model.weights, model)
        return self.mixed([
            load_weights(part.weights, own)
            for part, own in zip(self.all, model.models, strict=True)
        ])  # fmt: skip

    def mixed(self, params: Sequence[Any]) -> Mixed:
        """The parameters of the mixture from those of its models."""
        weights = jnp.asarray([part.weight for part in self.all], jnp.float32)
        return Mixed(tuple(params), weights, jnp.float32(self.min_p))

    def prompts(
        self, prompt: data.Prompt, tokenizer: Any, max_length: int
    ) -> list[list[int]]:
        """The prompt as each model reads it.

        Raises:
          InputError: if a guide's system message has no place.
        """
        return [
            with_placeholders(
                prompt.tokens
                if part.system is None
                else data.encode_prompt(
                    tokenizer,
                    data.with_system(prompt, part.system, "--guide-system"),
                    max_prompt_length=max_length,
                ),
                part.placeholders,
            )
            for part in self.all
        ]


def resolve_models(
    model: str, weights: Weights, options: GuideOptions
) -> SampledModels:
    """The model and the guides that options name.

    A guide that is the model itself, and reads the same prompt, needs no computation:
    its weight is added to that of the model.

    Raises:
      InputError: if one cannot be found or is a reward model, or its vocabulary
        differs from that of the model.
    """
    main, guides = SampledModel(f"--model {model}", weights, 1.0), []
    check_language_model(main)
    for word, system in zip(options.guide, options.systems, strict=True):
        name, weight = _read(word)
        found = reference_weights(name, weights, flag="--guide")
        guide = SampledModel(f"--guide {name}", found, weight, system)
        if guide.weights == main.weights and system is None:
            main = dataclasses.replace(main, weight=main.weight + weight)
            continue
        check_language_model(guide)
        guides.append(guide)
    _check_vocabularies(main, guides)
    return SampledModels(main, tuple(guides), options.guide_min_p)


def resolve_baseline(name: str | None, models: SampledModels) -> SampledModels | None:
    """The baseline of Transfer Q*; None for the model with its guides.

    Raises:
      InputError: as `resolve_models`.
    """
    if name is None:
        return None
    weights = reference_weights(name, models.model.weights, flag="--baseline")
    baseline = SampledModel(f"--baseline {name}", weights, 1.0)
    check_language_model(baseline)
    if baseline.placeholders != models.model.placeholders:
        raise InputError(
            f"--baseline {name}: has another soft prompt than the model; name a model "
            "without one"
        )
    _check_vocabularies(models.model, [baseline])
    return SampledModels(baseline)


def check_language_model(part: SampledModel) -> None:
    """Raises an InputError for a reward model."""
    if is_reward(part.weights):
        raise InputError(
            f"{part.flag}: is a reward model, which writes no text; pass a language "
            "model"
        )


def _read(word: str) -> tuple[str, float]:
    name, _, number = word.rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not name or not math.isfinite(weight):
        raise InputError(
            f"--guide {word}: expected MODEL:WEIGHT, such as runs/arm/export:1.0 or "
            "base:-0.5"
        )
    return name, weight


def _check_vocabularies(main: SampledModel, guides: Sequence[SampledModel]) -> None:
    """Checks that every token of the model has the same ID in all guides."""
    folders = {main.weights.folder}
    others = [x for x in guides if x.weights.folder not in folders]
    if not others:
        return
    ours = _vocabulary(main)
    for guide in others:
        theirs = _vocabulary(guide)
        for token, number in sorted(ours.items(), key=lambda item: item[1]):
            if theirs.get(token) != number:
                which = f"{theirs[token]} in" if token in theirs else "not in"
                raise InputError(
                    f"{guide.flag}: token {token!r} is {which} its vocabulary, but "
                    f"{number} in that of {main.flag}; guides need the same tokenizer"
                )


def _vocabulary(part: SampledModel) -> Mapping[str, int]:
    return data.load_tokenizer(part.weights.folder).get_vocab()
