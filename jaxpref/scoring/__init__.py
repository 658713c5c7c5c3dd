"""Scores of a batch under a model, and the stored scores of the reference."""

from jaxpref.scoring.reward_scorer import RewardScorer as RewardScorer
from jaxpref.scoring.scorer import ExportOptions as ExportOptions
from jaxpref.scoring.scorer import PolicyScorer as PolicyScorer
from jaxpref.scoring.scorer import Scorer as Scorer
from jaxpref.scoring.scores import Scored as Scored
from jaxpref.scoring.twin import TwinScorer as TwinScorer
from jaxpref.scoring.twin import make_scorer as make_scorer
