"""Style of reports: colors, figure settings, and the style sheet."""

from typing import Any

PALETTE = (
    "#3b6fb6",  # blue
    "#c8553d",  # brick
    "#2f8f6f",  # green
    "#d49a2a",  # ochre
    "#7b5ea7",  # violet
    "#5b6770",  # slate
    "#b85c8e",  # rose
    "#4aa3b8",  # teal
    "#26292e",  # ink
)
"""Colors of the arms, in order; distinguishable with red-green color blindness."""

INK, FAINT, GRID = "#26292e", "#6b7280", "#e6e8eb"

MATPLOTLIB: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#b8bdc4",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": "#b8bdc4",
    "ytick.color": "#b8bdc4",
    "xtick.labelcolor": FAINT,
    "ytick.labelcolor": FAINT,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "savefig.dpi": 160,
    "figure.facecolor": "white",
}

CSS = """
:root { --ink: #26292e; --faint: #6b7280; --line: #dfe2e6; --page: #fcfcfb;
  --soft: #f3f4f2; --accent: #3b6fb6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6e9; --faint: #9aa1ab; --line: #363b43; --page: #17191d;
    --soft: #22252b; --accent: #8ab0e6; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans",
  sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 50rem; margin: 0 auto; padding: 3.5rem 1.25rem 5rem; }
h1 { font-size: 1.75rem; line-height: 1.25; font-weight: 650; letter-spacing: -.01em;
  margin: 0 0 .6rem; text-wrap: balance; }
h2 { font-size: 1.15rem; font-weight: 650; margin: 3rem 0 .8rem; padding-top: 1rem;
  border-top: 1px solid var(--line); }
p { margin: 0 0 1rem; }
a { color: var(--accent); }
.lead { font-size: 1.08rem; color: var(--faint); }
.scroll { overflow-x: auto; margin: 1.2rem 0 1.6rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem;
  font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; color: var(--faint);
  font-size: .85rem; padding-top: .6rem; }
th, td { padding: .45rem .9rem .45rem 0; text-align: left; vertical-align: baseline; }
th:last-child, td:last-child { padding-right: 0; }
thead th { color: var(--faint); font-weight: 500; font-size: .85rem;
  border-bottom: 1px solid var(--ink); vertical-align: bottom; }
tbody th { font-weight: 500; }
tbody td, tbody th { border-bottom: 1px solid var(--line); }
.n { text-align: right; }
td.n { white-space: nowrap; }
figure { margin: 1.4rem 0 1.8rem; }
figure img { display: block; width: 100%; height: auto; background: #fff;
  border: 1px solid var(--line); border-radius: 6px; padding: .6rem; }
figcaption { color: var(--faint); font-size: .85rem; padding-top: .6rem; }
pre { background: var(--soft); border-radius: 6px; padding: .8rem 1rem;
  margin: 0 0 1rem; overflow-x: auto; line-height: 1.5; }
pre, code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono",
  monospace; font-size: .86em; }
p code, li code, td code, caption code { background: var(--soft); border-radius: 4px;
  padding: .1em .3em; }
pre { font-size: .84rem; }
.beside { margin: 0 0 2rem; font-size: .92rem; line-height: 1.5;
  overflow-wrap: anywhere; }
.beside h3 { font-size: .92rem; font-weight: 500; margin: 0 0 .5rem; }
.beside h4 { font-size: .85rem; font-weight: 500; color: var(--faint); margin: 0;
  white-space: normal; }
.above, .columns > div { white-space: pre-wrap; }
.above, summary { color: var(--faint); margin: 0 0 .5rem; }
.columns { display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); }
.columns > div { background: var(--soft); border-radius: 6px; padding: .7rem .9rem;
  max-height: 24rem; overflow-y: auto; }
@media print { body { background: #fff; } h2 { break-after: avoid; }
  figure, .scroll { break-inside: avoid; } .columns > div { max-height: none; } }
"""
