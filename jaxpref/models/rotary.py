"""Rotary position embeddings.

Axes: B rows, T tokens, H heads, K head features.
"""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpref.errors import InputError

KINDS = ("linear", "llama3")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the pre-training context.

    `kind` is "linear" (every frequency divided by `factor`) or "llama3" (the
    frequencies of long wavelengths divided by `factor`, those of short ones unchanged,
    interpolated in between; the last three fields are read only there).
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self):
        if self.kind not in KINDS:
            raise InputError(
                f"rotary positions: rope_type is {self.kind!r}; only default, linear "
                "and llama3 are supported"
            )
        numbers = (self.factor, self.low_freq_factor, self.high_freq_factor)
        numbers += (self.original_max_position_embeddings,)
        if (
            not all(0 < number < math.inf for number in numbers)
            or self.low_freq_factor >= self.high_freq_factor
        ):
            raise InputError(
                f"rotary positions: factor={self.factor}, low_freq_factor="
                f"{self.low_freq_factor}, high_freq_factor={self.high_freq_factor}, "
                "original_max_position_embeddings="
                f"{self.original_max_position_embeddings}; "
                "they must be positive and finite, and low < high"
            )


def inverse_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[float, ...]:
    """Rotary frequencies in radians per position, one for each pair of features.

    f_i = theta^(-2i / head_dim), then scaled.  Sources: Su et al. 2021,
    arXiv:2104.09864, section 3.2.2; Chen et al. 2023, arXiv:2306.15595 (linear);
    Llama 3.1 (llama3: frequencies with a wavelength beyond context / low_freq_factor
    are divided, those below context / high_freq_factor unchanged, those between
    interpolated).
    """
    frequencies = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    s = scaling
    if s is None:
        return tuple(frequencies)
    if s.kind == "linear":
        return tuple(f / s.factor for f in frequencies)

    def llama3(f: float) -> float:
        turns = s.original_max_position_embeddings * f / (2 * math.pi)
        share = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        share = min(max(share, 0.0), 1.0)
        return share * f + (1 - share) * f / s.factor

    return tuple(llama3(f) for f in frequencies)


def rotary_angles(
    frequencies: tuple[float, ...], positions: Int[Array, "B T"], dtype: str
) -> tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]:
    """Cosines and sines of each position's angles, in `dtype` or float32 if wider."""
    wide = jnp.promote_types(dtype, jnp.float32)
    angles = positions[..., None, None].astype(wide) * jnp.asarray(frequencies, wide)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B T H K"],
    cos: Float[Array, "B T 1 half"],
    sin: Float[Array, "B T 1 half"],
) -> Float[Array, "B T H K"]:
    """Rotates features (i, i + K/2) of each head by the position's angles."""
    cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
