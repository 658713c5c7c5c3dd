"""The options of `jaxpref sample`."""

import dataclasses
import math
from typing import Literal

from jaxpref import data
from jaxpref.errors import InputError
from jaxpref.rewards import RewardOptions
from jaxpref.runtime.mesh import MeshConfig
from jaxpref.runtime.ranges import at_least
from jaxpref.train.options import Dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig(data.RecordOptions):
    """Options of `jaxpref sample`."""

    model: str
    """Hugging Face model folder (such as OUT/export of a run), OUT of a run, one of its
    checkpoints, or a Hub ID."""
    adapter: str | None = None
    """Folder or Hub ID of a LoRA adapter of the model, as peft writes it."""
    prompts: tuple[str, ...] = ()
    """Prompts, each in quotes.  If the model has a chat template, each is a user's
    turn, or a whole conversation as a JSON list of messages."""
    data: str | None = None
    """A file or dataset whose prompts are used instead of --prompts.  They are rendered
    as in training; texts without answers are user turns, as in --prompts."""
    raw: bool = False
    """Do not use the chat template for texts."""
    thinking: Literal["auto", "on", "off"] = "auto"
    """`enable_thinking` for chat templates that read it.  auto prompts as in training:
    for answers without thinking, unless --data has answers with it."""
    limit: int | None = None
    """Maximum number of prompts to take from --data (default: all)."""
    out: str | None = None
    """File for the completions (default: print them).  A name that ends in .jsonl gives
    a line for each prompt: its record, with `prompt` as it was rendered and
    `completions`, each with its `text`; any other name gives JSON in the format of
    AlpacaEval.  `logp` is the log-probability of a completion, in nats at temperature
    1; `ended` is false if it was cut off at --max-new-tokens."""
    n: int = 1
    """Number of completions of each prompt."""
    diverse: bool = False
    """Ask for the --n completions of a prompt in one reply, as answers that differ in
    the values they express, and split it.  The reply has --n times --max-new-tokens."""
    max_new_tokens: int = 128
    """Maximum tokens of a completion."""
    temperature: float = 1.0
    """Sampling temperature; 0 always takes the most likely token."""
    top_k: int = 0
    """Sample from the k most likely tokens only; 0 means all."""
    top_p: float = 1.0
    """Sample from the most likely tokens that together reach this probability only."""
    batch_size: int = 16
    """Completions sampled at once.  When one ends, the next takes its place."""
    seed: int = 0
    """Seed of the sampling.  The random numbers of a token depend only on this, the
    indices of the prompt and the completion, and the token's position."""
    compute_dtype: Dtype | None = None
    """Dtype of matrix products and activations (default: bfloat16 on TPU and GPU,
    float32 on CPU)."""
    mesh: MeshConfig = MeshConfig()
    """Layout of the devices of each process."""

    def __post_init__(self):
        super().__post_init__()
        at_least(1, self, "limit", "max_new_tokens", "n", "batch_size")
        at_least(0, self, "top_k", "seed")
        if not (self.temperature == 0 or 1e-6 <= self.temperature < math.inf):
            raise InputError(
                f"temperature {self.temperature}: "
                "must be 0, or finite and at least 1e-6"
            )
        if self.diverse and self.n < 2:
            raise InputError("--diverse: needs several completions; pass --n")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p {self.top_p}: must be above 0 and at most 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuideOptions:
    """Models that guide the sampling, token by token."""

    guide: tuple[str, ...] = ()
    """MODEL:WEIGHT: adds WEIGHT times the log-probabilities of MODEL to those of
    --model, at every token.  MODEL is a model as in --model, the folder of an adapter
    of it, or `base` for --model without --adapter; it needs the same vocabulary.  May
    be given several times.  docs/sampling.md has examples."""
    guide_system: tuple[str, ...] = ()
    """A system message that guides read in place of that of the prompt: one for all, or
    one for each --guide."""
    guide_min_p: float = 0.0
    """With --guide: sample only tokens with at least this fraction of the probability
    of the most likely token, under --model alone."""

    def __post_init__(self):
        if not 0 <= self.guide_min_p <= 1:
            raise InputError(f"guide_min_p {self.guide_min_p}: must be from 0 to 1")
        for name in ("guide_system", "guide_min_p"):
            if getattr(self, name) and not self.guide:
                raise InputError(f"--{name.replace('_', '-')}: give a --guide, too")
        if len(self.guide_system) not in (0, 1, len(self.guide)):
            raise InputError(
                f"--guide-system: {len(self.guide_system)} messages for "
                f"{len(self.guide)} guides; give one, or one for each"
            )

    @property
    def systems(self) -> tuple[str | None, ...]:
        """The system message of each guide."""
        count = len(self.guide)
        given = self.guide_system or (None,)
        return given if len(given) == count else given * count


@dataclasses.dataclass(frozen=True, kw_only=True)
class DirectionOptions:
    """Answers for preferences near the target (RPS)."""

    direction_prompt: str | None = None
    """With --pick best and several rewards, request each of the --n completions with a
    different direction near --weights.  This text takes the place of the user's message
    {prompt}, with the numbers of the direction, {1}, {2}, ..., times 100, rounded.  See
    docs/sampling.md."""
    max_angle: float = 30.0
    """For --direction-prompt: the largest angle to --weights, in degrees."""

    def __post_init__(self):
        if not 0 <= self.max_angle <= 180:
            raise InputError(f"max_angle {self.max_angle}: must be from 0 to 180")
        if self.direction_prompt is None and self.max_angle != 30:
            raise InputError("--max-angle: only --direction-prompt reads it")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignmentOptions:
    """Answers that are drawn, or chosen, by their rewards."""

    decode: Literal["sample", "qalign", "transfer-q"] = "sample"
    """qalign: --steps of Markov chain Monte Carlo from each sample, toward model *
    exp(reward / beta).  transfer-q: each token by the rewards of continuations after it
    by --baseline.  Both need --reward."""
    steps: int = 32
    """For qalign: steps of each chain, each of which draws part of the answer again."""
    beta: float = 1.0
    """For qalign and transfer-q: coefficient of the KL divergence from the model, in
    units of the reward."""
    baseline: str | None = None
    """For transfer-q: the model that continues the candidates, already aligned,
    possibly to a different reward; named as in --guide (default: --model)."""
    candidates: int = 8
    """For transfer-q: the number of most likely next tokens to choose from."""
    rollouts: int = 4
    """For transfer-q: continuations of each candidate."""
    pick: Literal["best", "majority", "best-of-majority", "mbr"] | None = None
    """Keep one of the --n completions of each prompt: the one with the largest reward;
    the one that is given most often; among answers given often enough
    (--min-frequency), the one with the largest mean reward; or, mbr (minimum Bayes
    risk), the one that has most words in common with all of them (ROUGE-1)."""
    vote_on: Literal["text", "number"] = "text"
    """When two completions are the same answer: if their texts are the same but for
    case and whitespace, or if their last numbers are."""
    min_frequency: float = 0.1
    """For best-of-majority: the share of the completions that must give an answer."""
    keep_candidates: bool = False
    """With --pick and --out: also write all completions, in the field `candidates`,
    each with the `score` used to choose, if there is one."""

    def __post_init__(self):
        at_least(1, self, "steps", "candidates", "rollouts")
        if not 0 < self.beta < math.inf:
            raise InputError(f"beta {self.beta}: must be above 0 and finite")
        if not 0 <= self.min_frequency <= 1:
            raise InputError(f"min_frequency {self.min_frequency}: must be from 0 to 1")

    @property
    def reads_reward(self) -> bool:
        """Whether there must be a reward."""
        return self.decode != "sample" or self.pick in ("best", "best-of-majority")

    @property
    def draws(self) -> int:
        """The most draws at once for each completion."""
        return self.candidates * self.rollouts if self.decode == "transfer-q" else 1

    def check(
        self,
        config: SampleConfig,
        rewards: RewardOptions,
        directions: DirectionOptions = DirectionOptions(),
    ) -> None:
        """Checks that options fit together.

        Args:
          config: how completions are sampled.
          rewards: the rewards and their combination.
          directions: what differs between the requests of a prompt.

        Raises:
          InputError: if they do not.
        """
        self._check_rewards(rewards)
        if config.diverse and self.decode != "sample":
            raise InputError(f"--decode {self.decode}: does not go with --diverse")
        if self.pick is not None and config.n < 2:
            raise InputError(f"--pick {self.pick}: needs several completions; pass --n")
        if config.temperature == 0:
            differ = config.diverse or directions.direction_prompt is not None
            if self.pick is not None and self.decode == "sample" and not differ:
                raise InputError(
                    f"--temperature 0: all completions of a prompt are equal, so that "
                    f"--pick {self.pick} has no choice; use a higher temperature"
                )
            if self.decode == "qalign":
                raise InputError(
                    "--temperature 0: --decode qalign draws its proposals from the "
                    "model; use a higher temperature"
                )
        default = AlignmentOptions()
        for name, (option, values) in READERS.items():
            if getattr(self, name) != getattr(default, name) and (
                getattr(self, option) not in values
            ):
                raise InputError(
                    f"--{name.replace('_', '-')}: only --{option} "
                    f"{' and '.join(values)} reads it"
                )
        if self.keep_candidates and config.out is None:
            raise InputError("--keep-candidates: is written to a file; pass --out")

    def _check_rewards(self, rewards: RewardOptions) -> None:
        """That rewards are there if they are read, and fit the way of decoding."""
        decodes = self.decode != "sample"
        asks = f"--decode {self.decode}" if decodes else f"--pick {self.pick}"
        if self.reads_reward and not rewards.reward:
            raise InputError(f"{asks}: needs a --reward, as in jaxpref score")
        if not self.reads_reward:
            default = RewardOptions()
            for field in dataclasses.fields(rewards):
                if getattr(rewards, field.name) != getattr(default, field.name):
                    raise InputError(
                        f"--{field.name.replace('_', '-')}: only --pick best, --pick "
                        "best-of-majority and --decode read rewards; to write rewards, "
                        "use jaxpref score"
                    )
        # A chain compares rewards of different calls, so that the reward of an answer
        # must not depend on the answers that are scored with it.
        if decodes and rewards.combine != "sum":
            raise InputError(
                f"--combine {rewards.combine}: depends on the answers that are scored "
                f"together, which {asks} changes in each step; use --combine sum"
            )
        judges = [x for x in rewards.reward if x.startswith("judge:")]
        if decodes and judges:
            raise InputError(
                f"--reward {judges[0]}: compares the answers that are scored together, "
                f"which {asks} changes in each step; use another reward"
            )


READERS = {
    "steps": ("decode", ("qalign",)),
    "beta": ("decode", ("qalign", "transfer-q")),
    "baseline": ("decode", ("transfer-q",)),
    "candidates": ("decode", ("transfer-q",)),
    "rollouts": ("decode", ("transfer-q",)),
    "vote_on": ("pick", ("majority", "best-of-majority")),
    "min_frequency": ("pick", ("best-of-majority",)),
    "keep_candidates": ("pick", ("best", "majority", "best-of-majority", "mbr")),
}
"""The option, and its values, that read another one."""
