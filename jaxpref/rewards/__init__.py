"""Rewards of answers: of models, of rules, and of the user's own functions.

`read_answered` reads prompts with their answers, and a `Reward` is a function of these.
`reward_of` makes one from a word on the command line.
"""

from jaxpref.rewards.answered import Answered as Answered
from jaxpref.rewards.answered import read_answered as read_answered
from jaxpref.rewards.answered import with_rewards as with_rewards
from jaxpref.rewards.choice import reward_of as reward_of
from jaxpref.rewards.code import CodeTests as CodeTests
from jaxpref.rewards.combine import log_sigmoid_centered as log_sigmoid_centered
from jaxpref.rewards.combine import lower_bound as lower_bound
from jaxpref.rewards.combine import weighted_sum as weighted_sum
from jaxpref.rewards.combined import Combined as Combined
from jaxpref.rewards.combined import combined_reward as combined_reward
from jaxpref.rewards.constrained import lagrange_multipliers as lagrange_multipliers
from jaxpref.rewards.follow_up import FollowUp as FollowUp
from jaxpref.rewards.functions import FunctionReward as FunctionReward
from jaxpref.rewards.judge import Judge as Judge
from jaxpref.rewards.models import LogRatio as LogRatio
from jaxpref.rewards.models import ModelOptions as ModelOptions
from jaxpref.rewards.models import ModelReward as ModelReward
from jaxpref.rewards.options import RewardOptions as RewardOptions
from jaxpref.rewards.preference import PreferenceReward as PreferenceReward
from jaxpref.rewards.reward import Reward as Reward
from jaxpref.rewards.rules import ReferenceRule as ReferenceRule
from jaxpref.rewards.rules import TextRule as TextRule
