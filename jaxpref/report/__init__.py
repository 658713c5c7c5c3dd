"""Reports: PNG figures and self-contained HTML pages from plain records.

Records are lists of dicts.
"""

from jaxpref.report.annotators import write_annotators as write_annotators
from jaxpref.report.audit import write_audit as write_audit
from jaxpref.report.comparison import power_in_words as power_in_words
from jaxpref.report.evaluation import write_evaluation as write_evaluation
from jaxpref.report.evaluation import write_model_card as write_model_card
from jaxpref.report.html import Browse as Browse
from jaxpref.report.html import Figure as Figure
from jaxpref.report.html import Link as Link
from jaxpref.report.html import Section as Section
from jaxpref.report.html import SideBySide as SideBySide
from jaxpref.report.html import Table as Table
from jaxpref.report.html import mean_spread as mean_spread
from jaxpref.report.html import write_html as write_html
from jaxpref.report.plots import frontiers as frontiers
from jaxpref.report.plots import grouped_bars as grouped_bars
from jaxpref.report.plots import reward_against_kl as reward_against_kl
from jaxpref.report.plots import training_curves as training_curves
from jaxpref.report.progress import evaluation_line as evaluation_line
from jaxpref.report.progress import summary_lines as summary_lines
from jaxpref.report.sweep import write_sweep as write_sweep
from jaxpref.report.training import write_training as write_training
from jaxpref.report.win_rates import write_comparison as write_comparison

__all__ = [
    "Browse",
    "Figure",
    "Section",
    "SideBySide",
    "Table",
    "evaluation_line",
    "frontiers",
    "grouped_bars",
    "mean_spread",
    "power_in_words",
    "reward_against_kl",
    "summary_lines",
    "training_curves",
    "write_audit",
    "write_comparison",
    "write_evaluation",
    "write_html",
    "write_model_card",
    "write_sweep",
    "write_training",
]
