"""Adapters of other record formats, which rewrite records in the names of `parse`.

To add a format, write its adapter and add it to `ADAPTERS`.
"""

from jaxpref.data.records.adapters import (
    alpaca,
    annotation_tools,
    arena,
    benchmarks,
    compared,
    crowds,
    openai,
    orca,
    questions,
    ranked_lists,
    trl,
    ultrafeedback,
)
from jaxpref.data.records.adapters.adapter import Adapter as Adapter
from jaxpref.data.records.adapters.adapter import PairRules as PairRules
from jaxpref.data.records.adapters.benchmarks import AS_LISTS as AS_LISTS
from jaxpref.data.records.adapters.benchmarks import SEVERAL as SEVERAL
from jaxpref.data.records.adapters.ranked_lists import SCORED_LISTS as SCORED_LISTS

ADAPTERS: tuple[Adapter, ...] = (
    openai.OPENAI,
    arena.ARENA,
    arena.LMARENA,
    arena.MT_BENCH,
    crowds.MULTIPREF,
    crowds.UKP,
    crowds.COMMUNITY,
    annotation_tools.LABEL_STUDIO,
    annotation_tools.LABEL_STUDIO_MIN,
    annotation_tools.ARGILLA,
    compared.SAFE_RLHF,
    compared.WEBGPT,
    compared.SHP,
    compared.HELPSTEER,
    compared.HELPSTEER_ROWS,
    compared.EDITS,
    benchmarks.SEVERAL,
    benchmarks.JUDGE_BENCH,
    benchmarks.LLMBAR,
    benchmarks.HHH,
    benchmarks.PREFEVAL,
    ultrafeedback.ULTRAFEEDBACK,
    ultrafeedback.GENERATIONS,
    ranked_lists.SCORED_LISTS,
    ranked_lists.NECTAR,
    ranked_lists.FINEGRAINED,
    alpaca.ALPACA,
    orca.ORCA,
    questions.HALUEVAL,
    questions.DOLLY,
    questions.QUESTION,
    questions.RESPONSE,
    trl.CHAT,
    trl.CONVERSATION,
    trl.TEXT,
    trl.IMPLICIT,
)
"""All adapters; the first that matches a record rewrites it."""
