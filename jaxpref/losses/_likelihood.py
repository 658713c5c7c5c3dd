"""Plain likelihood, and preference losses with a likelihood term beside them."""

from jaxpref.losses import _common
from jaxpref.losses._common import Pairs

__all__ = ["sft"]


def sft(policy_chosen_logps: Pairs) -> Pairs:
    """Negative log-likelihood of the chosen completion: supervised fine-tuning.

        loss = -log pi(y_w|x)

    Args:
      policy_chosen_logps: log pi(y_w|x) summed over completion tokens, nats; [*batch].

    Returns:
      One loss per completion in nats, [*batch], at least float32.  Divide the sum by
      the count of tokens, not of completions, to weigh every token alike.

    Raises:
      TypeError: if the array is not floating point.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import sft
      >>> logps, lengths = jnp.array([-12.0, -30.0]), jnp.array([4, 10])
      >>> print(sft(logps).sum() / lengths.sum())
      3.0

    References:
      Maximum likelihood; as the chosen-answer term of preference losses, Pang et al.,
      "Iterative Reasoning Preference Optimization", 2024, arXiv:2404.19733.
    """
    (chosen,) = _common.promoted(policy_chosen_logps=policy_chosen_logps)
    return -chosen
