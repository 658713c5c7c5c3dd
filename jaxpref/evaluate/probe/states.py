"""The frozen features of a probe: hidden states of answers and of prompts."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxpref.data import PreferenceDataset
from jaxpref.evaluate import features
from jaxpref.evaluate.probe.config import ProbeConfig
from jaxpref.models import Numerics, RewardModel
from jaxpref.models.folder import load_params, save
from jaxpref.models.folder_config import is_reward_model, read_architecture, read_head
from jaxpref.models.hub import weights_digest
from jaxpref.models.layout import SPECS, reshard
from jaxpref.models.reward import Padding
from jaxpref.models.reward_head import LAST, Head, without_head
from jaxpref.runtime.mesh import check_rows, make_mesh, rows_for
from jaxpref.scoring.checks import check_fits
from jaxpref.sharding import replicated


@dataclasses.dataclass(frozen=True)
class States:
    """Final hidden states of N pairs; index 0 is the preferred answer."""

    answers: Float[np.ndarray, "pairs 2 D"]
    """At the last token of the answer, where a reward model reads its score."""
    prompts: Float[np.ndarray, "pairs D"]
    """The mean over the tokens of the prompt."""


@dataclasses.dataclass(frozen=True)
class Backbone:
    """The model whose states are the features."""

    folder: Path
    model: RewardModel
    params: Any
    mesh: jax.sharding.Mesh
    dtype: str

    def states(self, pairs: PreferenceDataset, config: ProbeConfig) -> States:
        """The states of all pairs, cached as those of an audit."""
        width = self.model.architecture.hidden_size
        with jax.set_mesh(self.mesh):
            values = features.compute(
                pairs,
                make_state_step(self.model),
                self.params,
                source=config.data,
                folder=Path(config.features or Path(config.out) / "features"),
                digest=weights_digest(self.folder, f"{self.dtype} states of a probe"),
                width=2 * width,
                batch_size=rows_for(2 * len(pairs), config.batch_size, self.mesh),
                mesh=self.mesh,
            )
        return States(values[..., :width], values[:, 0, width:])

    def save(
        self, folder: Path, head: Float[np.ndarray, " D"], padding: Padding | None
    ) -> None:
        """Writes the backbone with a linear head as the folder of a reward model."""
        model = dataclasses.replace(self.model, head=Head())
        with jax.set_mesh(self.mesh):
            params = without_head(self.params)
            params[LAST] = jnp.asarray(head[:, None], jnp.float32)
            save(folder, model, params, self.folder, padding=padding)


def open_backbone(
    folder: Path, pairs: PreferenceDataset, config: ProbeConfig, dtype: str
) -> Backbone:
    """Loads the model.

    Raises:
      InputError: if it cannot be read, or does not fit the records.
    """
    architecture = read_architecture(folder)
    check_fits([config.data], pairs, str(folder), architecture)
    mesh = make_mesh(config.mesh)
    check_rows(config.batch_size, 1, mesh)
    head = read_head(folder) if is_reward_model(folder) else Head()
    with jax.set_mesh(mesh):
        model = RewardModel(architecture, Numerics(compute_dtype=dtype), head)
        params = load_params(folder, model, jax.random.key(0))
    return Backbone(folder, model, params, mesh, dtype)


def make_state_step(model: RewardModel) -> Callable:
    """Returns the jitted `(params, batch) -> (states [A * R, 2 D], pairs [A, R, 1])`.

    The columns are the final hidden state at the completion's last token, and the mean
    of those of the prompt.  Batches have one completion per row.
    """

    def of_micro(params, batch):
        tokens, lengths = batch.tokens[:, 0], batch.lengths[:, 0]
        hidden = model.hidden(params, tokens)
        states = reshard(hidden, SPECS.hidden).astype(jnp.float32)
        position = jnp.arange(tokens.shape[1])[None]
        prompt = lengths - batch.completion_lengths[:, 0, 0]
        last = (position == (lengths - 1)[:, None]).astype(jnp.float32)
        inside = (position < prompt[:, None]) / jnp.maximum(prompt, 1)[:, None]
        sums = lambda weights: jnp.einsum("btd,bt->bd", states, weights)
        return jnp.concatenate([sums(last), sums(inside)], axis=1)

    def state_step(params, batch):
        out = jax.lax.map(lambda micro: of_micro(params, micro), batch)
        return jax.tree.map(replicated, (out, batch.pair_index))

    return jax.jit(state_step)
