"""Rotary position embeddings.

Axes: B rows, T tokens, H heads, K head features, R rotated features of a head.
"""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpref.errors import InputError

Frequencies = tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies change so that a model reads longer texts.

    Each kind is a subclass.  Its fields have the names they have in config.json.
    """

    factor: float = 1.0
    """How many times as long the texts become."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            values = value if isinstance(value, tuple) else (value,)
            numbers = [x for x in values if x is not None and not isinstance(x, bool)]
            if not all(0 < x < math.inf for x in numbers):
                raise InputError(
                    f"rotary positions: {field.name}={value}; must be positive and "
                    "finite"
                )

    def scale(self, frequencies: Frequencies, theta: float) -> Frequencies:
        """The scaled frequencies, from those of the base `theta`."""
        raise NotImplementedError

    @property
    def attention_scale(self) -> float:
        """The factor of the cosines and sines, and so of queries and keys."""
        return 1.0

    @property
    def longest(self) -> int | None:
        """The longest text for which the frequencies hold, if there is a limit."""
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling(RopeScaling):
    """Every frequency divided by `factor`.

    Source: Chen et al. 2023, arXiv:2306.15595.
    """

    def scale(self, frequencies: Frequencies, theta: float) -> Frequencies:
        """See `RopeScaling`."""
        return tuple(f / self.factor for f in frequencies)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling(RopeScaling):
    """Long wavelengths stretched by `factor`, short ones unchanged.

    Frequencies with a wavelength beyond context / low_freq_factor are divided, those
    below context / high_freq_factor unchanged, those between interpolated.

    Source: Llama 3.1, arXiv:2407.21783.
    """

    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self):
        super().__post_init__()
        if self.low_freq_factor >= self.high_freq_factor:
            raise InputError(
                f"rotary positions: low_freq_factor={self.low_freq_factor}, "
                f"high_freq_factor={self.high_freq_factor}; must be low < high"
            )

    def scale(self, frequencies: Frequencies, theta: float) -> Frequencies:
        """See `RopeScaling`."""
        low, high = self.low_freq_factor, self.high_freq_factor

        def scaled(f: float) -> float:
            turns = self.original_max_position_embeddings * f / (2 * math.pi)
            share = min(max((turns - low) / (high - low), 0.0), 1.0)
            return share * f + (1 - share) * f / self.factor

        return tuple(scaled(f) for f in frequencies)


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnScaling(RopeScaling):
    """Features that turn often unchanged, those that turn rarely stretched by `factor`.

    Feature i turns n = context theta^(-2i / R) / 2 pi times within the original
    context.  The share of the unchanged frequency falls linearly in i, from 1 at
    n = beta_fast to 0 at n = beta_slow.  Queries and keys grow by `attention_factor`,
    by default 0.1 log(factor) + 1.

    Source: Peng et al. 2023, arXiv:2309.00071, eq. 17 to 22.
    """

    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """Whether the bounds of the ramp are rounded to whole features."""
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def scale(self, frequencies: Frequencies, theta: float) -> Frequencies:
        """See `RopeScaling`."""
        half = len(frequencies)

        def feature(turns: float) -> float:
            ratio = self.original_max_position_embeddings / (2 * math.pi * turns)
            return half * math.log(ratio) / math.log(theta)

        low, high = feature(self.beta_fast), feature(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        width = high - low or 0.001
        shares = [1 - min(max((i - low) / width, 0), 1) for i in range(half)]
        return tuple(
            share * f + (1 - share) * f / self.factor
            for share, f in zip(shares, frequencies, strict=True)
        )

    @property
    def attention_scale(self) -> float:
        """See `RopeScaling`."""
        if self.attention_factor is not None:
            return self.attention_factor

        def grown(scale: float) -> float:
            more = 0.1 * scale * math.log(self.factor) if self.factor > 1 else 0.0
            return more + 1

        if self.mscale is not None and self.mscale_all_dim is not None:
            return grown(self.mscale) / grown(self.mscale_all_dim)
        return grown(1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicScaling(RopeScaling):
    """A base that grows with texts beyond `max_position_embeddings`.

    Texts are never longer than that here, and up to there nothing changes.
    """

    def scale(self, frequencies: Frequencies, theta: float) -> Frequencies:
        """See `RopeScaling`."""
        return frequencies


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRopeScaling(RopeScaling):
    """Each frequency divided by a factor of its own.

    There are two lists of factors, for texts up to the original context and for longer
    ones.  With the second, a text's length would change the states of all its tokens,
    and so the log-probs of a shorter answer.  So only the first is used, and texts are
    limited to the original context.

    Source: Ding et al. 2024, arXiv:2402.13753.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    attention_factor: float | None = None

    def scale(self, frequencies: Frequencies, theta: float) -> Frequencies:
        """See `RopeScaling`."""
        for name in ("short_factor", "long_factor"):
            if len(getattr(self, name)) != len(frequencies):
                raise InputError(
                    f"rotary positions: {name} has {len(getattr(self, name))} numbers "
                    f"for {len(frequencies)} frequencies"
                )
        pairs = zip(frequencies, self.short_factor, strict=True)
        return tuple(f / factor for f, factor in pairs)

    @property
    def attention_scale(self) -> float:
        """See `RopeScaling`."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.factor <= 1:
            return 1.0
        context = self.original_max_position_embeddings
        return math.sqrt(1 + math.log(self.factor) / math.log(context))

    @property
    def longest(self) -> int | None:
        """See `RopeScaling`."""
        return self.original_max_position_embeddings


def inverse_frequencies(
    rotated: int, theta: float, scaling: RopeScaling | None = None
) -> Frequencies:
    """Rotary frequencies in radians per position, one for each pair of features.

    f_i = theta^(-2i / R), then scaled.  Source: Su et al. 2021, arXiv:2104.09864,
    section 3.2.2.

    Args:
        rotated: R.
        theta: the base.
        scaling: by default none.
    """
    frequencies = tuple(theta ** (-2 * i / rotated) for i in range(rotated // 2))
    return frequencies if scaling is None else scaling.scale(frequencies, theta)


def rotary_angles(
    frequencies: Frequencies,
    positions: Int[Array, "B T"],
    dtype: str,
    scale: float = 1.0,
) -> tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]:
    """Cosines and sines of each position's angles, times `scale`.

    They are in `dtype`, or float32 if wider.
    """
    wide = jnp.promote_types(dtype, jnp.float32)
    angles = positions[..., None, None].astype(wide) * jnp.asarray(frequencies, wide)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(
    x: Float[Array, "B T H K"],
    cos: Float[Array, "B T 1 half"],
    sin: Float[Array, "B T 1 half"],
) -> Float[Array, "B T H K"]:
    """Rotates features (i, i + R/2) of each head by the position's angles.

    R is twice the number of angles; features from R on stay as they are.
    """
    cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = [a * cos - b * sin, b * cos + a * sin]
    return jnp.concatenate(turned + [rest] * (rest.shape[-1] > 0), axis=-1)
