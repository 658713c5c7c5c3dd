"""The most likely next tokens of texts."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxpref.sampling.batch import pad
from jaxpref.sampling.continuous import Request
from jaxpref.sampling.mixture import LanguageModel, next_logits


def likely_tokens(
    model: LanguageModel,
    params: Any,
    texts: Sequence[Request],
    k: int,
    *,
    batch_size: int,
    width: int,
) -> tuple[Int[np.ndarray, "n k"], Float[np.ndarray, "n k"], Float[np.ndarray, "n k"]]:
    """The k most likely next tokens of each text.

    Args:
        model: the model, or a `Mixture`.
        params: from `slots.prepare`.
        texts: the texts that the model and its guides have read.
        k: how many; at most the vocabulary.
        batch_size: texts at once; under a mesh, a multiple of data * fsdp (* expert).
        width: the texts' maximum length.  With the same one, calls share a program.

    Returns:
        Their tokens, their log-probabilities by which a token is chosen, and those of
        the model alone, in nats.
    """
    found = []
    for start in range(0, len(texts), batch_size):
        group = [*texts[start : start + batch_size]]
        full = group + group[-1:] * (batch_size - len(group))
        each = [pad(own, width) for own in zip(*(x.texts for x in full), strict=True)]
        prompts, lengths = each[0] if len(each) == 1 else zip(*each)
        arrays = jax.device_get(_likely(model, params, prompts, lengths, k=k))
        found.append([x[: len(group)] for x in arrays])
    tokens, logps, own = (np.concatenate(x) for x in zip(*found, strict=True))
    return tokens, logps, own


@functools.partial(jax.jit, static_argnames=("model", "k"))
def _likely(
    model: LanguageModel, params: Any, prompts: Any, lengths: Any, *, k: int
) -> tuple[Int[Array, "B k"], Float[Array, "B k"], Float[Array, "B k"]]:
    hidden, _ = model.prefill(params, prompts, lengths)
    logits, own = next_logits(model, params, hidden)
    logps, tokens = jax.lax.top_k(jax.nn.log_softmax(logits), k)
    own = jnp.take_along_axis(jax.nn.log_softmax(own), tokens, axis=-1)
    return tokens, logps, own
