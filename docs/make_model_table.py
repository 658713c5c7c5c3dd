"""Writes the table in docs/models.md: every family, and what it reads of config.json.

The fields are those that a family reads in the configs of `tests/family_cases.py`, on
which its tests run.

    python docs/make_model_table.py
"""

import sys
from pathlib import Path

# Before `import jaxpref`: describe the checkout of this file, not an installed version.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jaxpref.models.config_json import ConfigFields
from jaxpref.models.families import FAMILIES, Family
from jaxpref.plan.presets import PRESETS
from tests.family_cases import CASES, fields_of

PAGE = Path(__file__).with_name("models.md")
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"
EVERYWHERE = """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim max_position_embeddings tie_word_embeddings
    initializer_range rms_norm_eps rope_theta rope_scaling rope_parameters
    original_max_position_embeddings model_type quantization_config
""".split()
"""Fields that are not listed: the sizes, and the rotary fields."""


def fields_read(family: Family) -> list[str]:
    """The fields that a family reads, in addition to `EVERYWHERE`."""
    read: set[str] = set()
    for case in CASES:
        values = fields_of(case)
        if values["model_type"] == family.model_type:
            fields = ConfigFields(values, case)
            family.read_config(fields)
            read |= fields.names_read
    return sorted(read - set(EVERYWHERE))


def row(family: Family) -> str:
    """The row of a family."""
    presets = [name for name, a in PRESETS.items() if a.family == family]
    cases = [c for c in CASES if fields_of(c)["model_type"] == family.model_type]
    about = sys.modules[family.read_config.__module__].__doc__ or ""
    cells = (
        f"`{family.model_type}`",
        about.splitlines()[0].removesuffix("."),
        ", ".join(f"`{name}`" for name in fields_read(family)),
        str(len(cases)),
        ", ".join(f"`{name}`" for name in presets) or "–",
    )
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """The whole table."""
    head = "| `model_type` | what it is | fields read | configs tested | presets |"
    return "\n".join([head, "|---|---|---|--:|---|", *map(row, FAMILIES)]) + "\n"


def page() -> str:
    """The page with the table that belongs to this checkout."""
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page())
