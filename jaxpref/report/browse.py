"""Searching, filtering and sorting on a page, by a script that needs no network.

The policy of a page allows this script alone, by its hash.  So texts of the data can
never run as scripts, whatever they contain.  Without scripts, everything is shown.
"""

import base64
import hashlib

SCRIPT = """
for (const box of document.querySelectorAll(".browse")) {
  const controls = box.querySelector(".controls");
  const rows = [...box.querySelectorAll("[data-by]")];
  const search = controls.querySelector("input");
  const select = controls.querySelector("select");
  const shown = controls.querySelector("output");
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const update = () => {
    const words = search.value.toLowerCase().split(/\\s+/);
    let count = 0;
    rows.forEach((row, n) => {
      const by = !select || !select.value || row.dataset.by === select.value;
      row.hidden = !by || !words.every((word) => texts[n].includes(word));
      count += !row.hidden;
    });
    shown.textContent = `${count} of ${rows.length}`;
  };
  const value = (row, column) => {
    const text = row.cells[column].textContent.replace("\\u2212", "-");
    const number = parseFloat(text.replace(/^[+]/, ""));
    return Number.isNaN(number) ? text : number;
  };
  // Numbers come before other texts, in both directions.
  const compare = (a, b, sign) => {
    const numbers = (typeof a === "number") - (typeof b === "number");
    if (numbers) return -numbers;
    return sign * (typeof a === "number" ? a - b : a.localeCompare(b));
  };
  for (const heading of box.querySelectorAll("thead th")) {
    const button = document.createElement("button");
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const down = heading.ariaSort === "descending";
      for (const other of heading.parentElement.cells) other.ariaSort = null;
      heading.ariaSort = down ? "ascending" : "descending";
      const sign = down ? 1 : -1;
      const sorted = [...rows].sort((a, b) =>
        compare(value(a, heading.cellIndex), value(b, heading.cellIndex), sign));
      rows[0].parentElement.append(...sorted);
    });
  }
  search.addEventListener("input", update);
  if (select) select.addEventListener("change", update);
  controls.hidden = false;
  update();
}
"""

CSS = """
.controls { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; align-items: baseline;
  margin: 1rem 0 .4rem; font-size: .92rem; }
.controls[hidden], [data-by][hidden] { display: none; }
.controls label { color: var(--faint); }
.controls input, .controls select { font: inherit; color: var(--ink);
  background: var(--soft); border: 1px solid var(--line); border-radius: 6px;
  padding: .25rem .5rem; margin-left: .3rem; max-width: 16rem; }
.controls output { color: var(--faint); }
.browse td { white-space: nowrap; }
.browse th button { font: inherit; color: inherit; background: none; border: 0;
  padding: 0; cursor: pointer; text-align: inherit; }
.browse th button:hover { color: var(--ink); }
.browse th button:focus-visible, .controls :focus-visible {
  outline: 2px solid var(--accent); outline-offset: 2px; }
th[aria-sort=ascending] button::after { content: " ↑"; }
th[aria-sort=descending] button::after { content: " ↓"; }
@media print { .controls { display: none; } }
"""


def policy() -> str:
    """The source that the page's policy allows for scripts."""
    digest = hashlib.sha256(SCRIPT.encode()).digest()
    return f"; script-src 'sha256-{base64.b64encode(digest).decode()}'"
