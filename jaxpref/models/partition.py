"""Which parameters are trained.  Frozen ones cost no gradient and no optimizer state.

A partition splits a model's parameters into trained and frozen ones, and joins them to
what the model's functions read.  `Lora` is another one.
"""

import dataclasses
from typing import Any, Protocol

import jax
from jaxtyping import PRNGKeyArray

from jaxpref.errors import InputError
from jaxpref.models.architecture import Architecture
from jaxpref.models.functional import Params
from jaxpref.models.layout import one_of
from jaxpref.models.paths import by_path, nested
from jaxpref.models.reward_head import HIDDEN, LAST
from jaxpref.models.stored import PerLayer

LAYERS = "layers."
ROUTER = "layers.router"
"""The weights that choose the experts of a token."""


class Partition(Protocol):
    """Which parameters are trained; hashable."""

    def trains(self, path: str) -> bool:
        """Whether any of the parameter at a path is trained itself."""
        ...

    def freezes(self, path: str) -> bool:
        """Whether any of it is frozen."""
        ...

    def trained(self, params: Params, model: Any, key: PRNGKeyArray) -> Params:
        """What is trained at the start.

        Args:
            params: the parameters for which `trains` is true, and maybe others.
            model: the model, whose parameter dtype new parameters get.
            key: a random key for new parameters.
        """
        ...

    def frozen(self, params: Params) -> Params:
        """What is frozen, of the parameters for which `freezes` is true."""
        ...

    def join(self, trained: Params, frozen: Params) -> Params:
        """The model's parameters."""
        ...

    def exported(self, trained: Params, stored: dict[str, Any]) -> Params:
        """The model's parameters for `folder.save`.

        Args:
            trained: what is trained.
            stored: the initial model's parameters, from `stored_params`.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Part:
    """Some parameters, and the last layers."""

    whole: tuple[str, ...]
    """Paths of parameters that are trained: "norm"."""
    first: int | None = None
    """The first layer that is trained, > 0; None for layers as in `whole`."""

    def trains(self, path: str) -> bool:
        """See `Partition`."""
        return path in self.whole or self._splits(path)

    def freezes(self, path: str) -> bool:
        """See `Partition`."""
        return path not in self.whole

    def _splits(self, path: str) -> bool:
        return self.first is not None and path.startswith(LAYERS)

    def trained(self, params: Params, model: Any, key: PRNGKeyArray) -> Params:
        """See `Partition`."""
        del model, key
        leaves = by_path(params).items()
        part = lambda path, x: x[self.first :] if self._splits(path) else x
        return nested({path: part(path, x) for path, x in leaves if self.trains(path)})

    def frozen(self, params: Params) -> Params:
        """See `Partition`."""
        leaves = by_path(params).items()
        part = lambda path, x: x[: self.first] if self._splits(path) else x
        return nested({path: part(path, x) for path, x in leaves if self.freezes(path)})

    def join(self, trained: Params, frozen: Params) -> Params:
        """See `Partition`."""
        if self.first is None:
            return nested(by_path(frozen) | by_path(trained))
        return frozen | trained | {"layers": (frozen["layers"], trained["layers"])}

    def exported(self, trained: Params, stored: dict[str, Any]) -> Params:
        """See `Partition`."""
        found: dict[str, Any] = dict(stored)
        for path, values in by_path(trained).items():
            found[path] = values
            if self._splits(path):
                found[path] = self._both(stored[path], values)
        return nested(found)

    def _both(self, stored: PerLayer, values: jax.Array) -> PerLayer:
        first = self.first or 0

        def layer(i: int, *expert: int) -> Any:
            if i < first:
                return stored[i, *expert]
            return one_of(values, (i - first, *expert))

        return PerLayer(stored.shape, layer)


def part_of(train: str, model: Any) -> Part | None:
    """The partition that `--train` names; None for all parameters.

    Args:
        train: "all" (but the routers of experts, whose choices then stay those of the
            initial model); "with-router" (everything); "head" (a reward model's head,
            or an LM head that is not tied); "last:N" (the last N layers, the final norm
            and that head); "no-embeddings" (everything but the routers, the embedding
            and, if it is tied, the LM head).
        model: a language model or reward model.

    Raises:
        InputError: if it names nothing, or no part of this model.
    """
    architecture: Architecture = model.architecture
    paths = list(by_path(jax.eval_shape(model.init, jax.random.key(0))))
    heads = tuple(path for path in paths if path in ("head", LAST, HIDDEN))
    kind, _, number = train.partition(":")
    if train == "with-router" or (train == "all" and ROUTER not in paths):
        return None
    if train == "all":
        return Part(tuple(path for path in paths if path != ROUTER))
    if train == "head":
        if not heads:
            raise InputError(
                "--train head: this model's LM head is its embedding; use last:N, or "
                "train all"
            )
        return Part(heads)
    if train == "no-embeddings":
        frozen = lambda path: _is_embedding(path) or path == ROUTER
        return Part(tuple(path for path in paths if not frozen(path)))
    if kind == "last" and number.isdecimal():
        layers, last = architecture.num_layers, int(number)
        if not 1 <= last <= layers:
            raise InputError(f"--train {train}: the model has {layers} layers")
        above = tuple(
            p for p in paths if not (_is_embedding(p) or p.startswith(LAYERS))
        )
        if last == layers:
            return Part(tuple(path for path in paths if not _is_embedding(path)))
        return Part(above, layers - last)
    raise InputError(
        f"--train {train}: use all, head, last:N (layers), no-embeddings or with-router"
    )


def _is_embedding(path: str) -> bool:
    return path.split(".")[0] in ("embed", "positions")
