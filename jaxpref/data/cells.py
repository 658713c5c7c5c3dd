"""Numbers and booleans that are written as text, as all are in CSV files."""

from typing import Any


def from_cell(value: Any) -> Any:
    """What a text means if it is a number or a boolean; None if it is empty.

    Any other value is returned as it is, so the caller still has to check the type.
    """
    if not isinstance(value, str):
        return value
    text = value.strip()
    words = {"": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    for number in (int, float) if "_" not in text else ():  # Python reads "1_000"
        try:
            return number(text)
        except ValueError:
            continue
    return value
