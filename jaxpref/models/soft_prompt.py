"""Soft prompts: embeddings that are trained and stand before every prompt.

The weights of the model are frozen.  A text x is read as

    p_1, ..., p_N, e(x_1), e(x_2), ...

with p [N, D] trained and e the embedding that the model's module has in `transformers`:
Gemma's scales it by sqrt(D), so p is in the same units and is not scaled again.
Positions begin at p_1.  Source: Lester et al. 2021, arXiv:2104.08691, section 2.

Texts hold N placeholder tokens where the soft prompt stands
(`PreferenceDataset.prefixed`), so layouts, packed rows and caches need nothing of their
own: the embeddings of the first N positions of each text are replaced.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxpref.errors import InputError
from jaxpref.models.layout import SPECS, on_mesh, reshard
from jaxpref.models.linear import dense_einsum
from jaxpref.runtime.ranges import at_least

PROMPT = "prompt"
"""The soft prompt's path among the parameters."""
MOST = 4096
"""The longest soft prompt."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftPromptOptions:
    """A soft prompt, trained instead of the weights."""

    length: int | None = None
    """Embeddings to train before every prompt; the weights are frozen (default: none,
    or as many as --soft-prompt.text has tokens).  docs/adapters.md has more."""
    text: str | None = None
    """Text whose embeddings the soft prompt starts from, repeated or cut to its length
    (default: those of tokens drawn from the vocabulary)."""

    def __post_init__(self):
        at_least(1, self, "length")
        if self.length is not None and self.length > MOST:
            raise InputError(
                f"--soft-prompt.length {self.length}: must be at most {MOST}"
            )

    @property
    def given(self) -> bool:
        """Whether a soft prompt is trained."""
        return self != SoftPromptOptions()


def start_tokens(
    options: SoftPromptOptions, tokenizer: Any, vocab_size: int, *, seed: int
) -> tuple[int, ...]:
    """The tokens whose embeddings a new soft prompt starts from; none without one.

    Args:
        options: its length, or its text.
        tokenizer: a `transformers` tokenizer.
        vocab_size: rows of the embedding.
        seed: of the draw, if there is no text.

    Raises:
        InputError: if the text has no tokens.
    """
    if not options.given:
        return ()
    if (text := options.text) is not None:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not tokens:
            raise InputError(f"--soft-prompt.text {text!r}: has no tokens")
        length = options.length or len(tokens)
        return tuple(tokens[n % len(tokens)] for n in range(length))
    special = set(tokenizer.all_special_ids)
    usable = [n for n in range(min(len(tokenizer), vocab_size)) if n not in special]
    draw, size = np.random.default_rng(seed).choice, options.length
    return tuple(draw(usable, size, replace=(size or 0) > len(usable)).tolist())


@dataclasses.dataclass(frozen=True)
class SoftPrompt:
    """The partition of a model whose soft prompt alone is trained."""

    length: int
    """N."""
    start: tuple[int, ...] = ()
    """The N tokens whose embeddings it starts from; empty if it is read from a file."""
    whole: tuple[str, ...] = ()
    """Paths of parameters that are trained beside it, such as a reward head."""

    def reads(self, path: str) -> bool:
        """Whether what is trained starts from the parameter at a path."""
        return self.trains(path) or (bool(self.start) and path == "embed")

    def trains(self, path: str) -> bool:
        """Whether the parameter itself is trained."""
        return path in self.whole

    def freezes(self, path: str) -> bool:
        """Whether the parameter is frozen."""
        return path not in self.whole

    def trained(self, params: Any, model: Any, key: PRNGKeyArray) -> Any:
        """What is trained at the start; a soft prompt from a file is 0 until then."""
        del key
        architecture = model.architecture
        if not self.start:
            dtype = jnp.dtype(model.numerics.param_dtype)
            prompt = jnp.zeros((self.length, architecture.hidden_size), dtype)
        else:
            at = params["embed"].at[jnp.array(self.start)]
            prompt = at.get(out_sharding=on_mesh(P(None, None)))
            prompt *= jnp.asarray(architecture.embedding_scale, prompt.dtype)
        whole = {path: params[path] for path in self.whole}
        return {PROMPT: reshard(prompt, P(None, None)), **whole}

    def frozen(self, params: Any) -> Any:
        """The model's parameters but those that are trained."""
        return {path: x for path, x in params.items() if self.freezes(path)}

    def join(self, trained: Any, frozen: Any) -> Any:
        """The model's parameters, with the soft prompt."""
        return frozen | trained

    def exported(self, trained: Any, stored: dict[str, Any]) -> Any:
        """Nothing: a model's folder has no place for a soft prompt."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Prompted:
    """An embedding table, with a soft prompt for the first positions of each text."""

    table: Float[Array, "*N V D"]
    prompt: Float[Array, "n D"]

    def replaced(
        self, x: Float[Array, "B T D"], positions: Int[Array, "#B T"]
    ) -> Float[Array, "B T D"]:
        """The embeddings x of tokens, those of the first n positions replaced."""
        place = positions[..., None]
        # A product, because its gradient needs no scatter under Explicit axes.
        is_place = place == jnp.arange(len(self.prompt))
        shape = (*x.shape[:2], len(self.prompt))
        is_place = reshard(jnp.broadcast_to(is_place, shape), SPECS.hidden)
        own = dense_einsum(
            "btn,nd->btd", is_place.astype(x.dtype), self.prompt, spec=SPECS.hidden
        )
        return jnp.where(place < len(self.prompt), own, x)


def with_placeholders(tokens: list[int], length: int) -> list[int]:
    """A prompt's tokens after `length` placeholders."""
    return [0] * length + tokens
