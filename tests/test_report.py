"""Figures show every arm; the report is one file that escapes what it is given."""

import base64
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest

from jaxpref import report
from jaxpref.errors import InputError
from jaxpref.report.style import PALETTE

ARMS = ("DPO, clean labels", "DPO, 40 % flipped", "rDPO", "forward DPO")
RECORDS = [
    {
        "arm": arm,
        "seed": seed,
        "step": step,
        "kl": 0.1 * step * (n + 1) + 0.05 * seed,
        "reward": n + 0.2 * step + 0.1 * seed,
        "rewards/margins": 0.3 * step - 0.1 * n,
    }
    for n, arm in enumerate(ARMS)
    for seed in range(3)
    for step in (0, 1, 2)
]


def shows(path, color) -> bool:
    """Whether some pixels of the picture have about this colour."""
    pixels = matplotlib.image.imread(path)[..., :3]
    distance = np.abs(pixels - matplotlib.colors.to_rgb(color)).max(-1)
    return np.sum(distance < 0.04) > 20


@pytest.mark.parametrize(
    "draw",
    [
        lambda path: report.reward_against_kl(path, RECORDS, title="Reward"),
        lambda path: report.reward_against_kl(
            path, [{k: r[k] for k in ("arm", "kl", "reward")} for r in RECORDS]
        ),
        lambda path: report.training_curves(path, RECORDS, ["reward", "kl"]),
        lambda path: report.training_curves(
            path, RECORDS, {"rewards/margins": "margin"}, x="seed", x_label="a sweep"
        ),
    ],
    ids=["frontier", "points", "curves", "sweep"],
)
def test_every_arm_is_drawn_in_its_colour(tmp_path, draw):
    draw(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG\r\n")
    for color in PALETTE[: len(ARMS)]:
        assert shows(tmp_path / "figure.png", color)
    assert not shows(tmp_path / "figure.png", PALETTE[len(ARMS)])


def test_bars_name_every_arm(tmp_path):
    """Bars are translucent, so the seeds' rings carry the pure colour."""
    path = tmp_path / "bars.png"
    records = [r for r in RECORDS if r["step"] == 2]
    report.bars(path, records, "reward", reference=1.0, reference_label="clean run")
    for color in PALETTE[: len(ARMS)]:
        assert shows(path, color)
    size = path.stat().st_size
    report.bars(path, records[:1], "reward")
    assert path.stat().st_size < size


def test_a_metric_only_some_records_have(tmp_path):
    """Evaluations are rarer than steps; an arm may lack a metric altogether."""
    records = [{"arm": "a", "step": 0, "loss": 1.0}, {"arm": "b", "step": 0}]
    records += [{"arm": "a", "step": 1, "loss": None}]
    report.training_curves(tmp_path / "figure.png", records, ["loss"])
    assert shows(tmp_path / "figure.png", PALETTE[0])


def test_numpy_numbers_are_numbers(tmp_path):
    records = [{"arm": "a", "kl": np.float32(1), "reward": np.int64(2)}]
    report.reward_against_kl(tmp_path / "figure.png", records)


def test_nothing_to_draw_is_an_error(tmp_path):
    path = tmp_path / "figure.png"
    with pytest.raises(InputError, match="no records to draw"):
        report.reward_against_kl(path, [])
    with pytest.raises(InputError, match="record 2 has no number 'kl' .*'reward'"):
        report.reward_against_kl(
            path, [{"arm": "a", "kl": 1.0, "reward": 1.0}, {"arm": "a", "reward": 1.0}]
        )
    with pytest.raises(InputError, match="cannot write the figure"):
        report.bars(tmp_path / "no" / "x.png", [{"arm": "a", "v": 1.0}], "v")


class Page(HTMLParser):
    """Checks that tags nest, and collects links, text and the content of cells."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.text, self.cells = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.links += [v for k, v in attrs if k in ("src", "href", "data", "action")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in {"meta", "img", "!doctype"}:
            self.open.append(tag)
        if tag in {"td", "th"}:
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data


@pytest.fixture
def picture(tmp_path):
    report.bars(tmp_path / "bars.png", [{"arm": "a", "v": 1.0}], "v")
    return tmp_path / "bars.png"


def test_report_is_one_file_with_everything_in_it(tmp_path, picture):
    path = tmp_path / "report.html"
    table = report.Table(
        ["arm", "reward", "KL", "note"],
        [["DPO", 1.23456, -2, None], ["rDPO", "0.50 ± 0.10", float("nan"), "a `b`"]],
        caption="Over 3 seeds.",
    )
    sections = [
        report.Section("Result", [table, report.Figure(picture, "The bars.")]),
        report.Section(
            "Protocol", ["One.\n\n    jaxpref train\n      --out x\n\nTwo."]
        ),
    ]
    report.write_html(path, "Title", sections, summary="In short.")
    text = path.read_text("utf-8")
    page = Page(text)
    (link,) = page.links
    kind, _, data = link.partition(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data) == picture.read_bytes()
    assert page.cells == [
        *("arm", "reward", "KL", "note"),
        *("DPO", "1.235", "−2", "–"),
        *("rDPO", "0.50 ± 0.10", "–", "a b"),
    ]
    assert "<pre>jaxpref train\n  --out x</pre>" in text
    assert "<p>One.</p>" in text and "<p>Two.</p>" in text
    assert "In short." in page.text and "Over 3 seeds." in page.text
    assert text.count('class="n"') == 2 * 3  # the two columns of numbers are aligned
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"https?://|@import|url\(|<script|<link", text)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bars.png", "report.html"]


def test_everything_given_is_escaped(tmp_path, picture):
    evil = '<script>alert("x")</script> & \'"> {css} `<b>`'
    path = tmp_path / "report.html"
    table = report.Table([evil], [[evil]], caption=evil)
    section = report.Section(evil, [evil, f"    {evil}", table,
                                    report.Figure(picture, evil)])  # fmt: skip
    report.write_html(path, evil, [section], summary=evil)
    text = path.read_text("utf-8")
    assert "<script" not in text and "<b>" not in text
    seen = "".join(Page(text).text)
    # Title, h1, summary, h2, p, pre, table caption, heading, cell, figure caption.
    assert seen.count('<script>alert("x")</script> & \'"> {css}') == 10


def test_report_errors_are_one_line(tmp_path, picture):
    page = tmp_path / "report.html"
    write = lambda *parts, path=page: report.write_html(
        path, "t", [report.Section("s", parts)]
    )
    with pytest.raises(InputError, match="absent.png: cannot read the figure"):
        write(report.Figure(tmp_path / "absent.png"))
    with pytest.raises(InputError, match="not a PNG, JPEG or SVG"):
        write(report.Figure(tmp_path / "notes.txt"))
    with pytest.raises(ValueError, match="Expected 2 cells .* got .*'x'"):
        write(report.Table(["a", "b"], [["x"]]))
    assert not page.exists()
    with pytest.raises(InputError, match="cannot write the report"):
        write("text", path=tmp_path / "absent" / "report.html")
    page.write_text("old")
    (tmp_path / "taken").mkdir()
    with pytest.raises(InputError, match="cannot write the report"):
        write("text", path=tmp_path / "taken")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "bars.png", "report.html", "taken",
    ]  # fmt: skip


def test_mean_spread():
    assert report.mean_spread([1.0, 2.0, 3.0]) == "2.00 ± 1.00"
    assert report.mean_spread([-0.5], digits=1) == "−0.5"
    assert report.mean_spread([]) == "–"


def test_report_loads_neither_jax_nor_pyplot():
    """It draws on machines without a display, in a process that may already use jax."""
    script = (
        "import sys, jaxpref.report; "
        "print(*{'jax', 'matplotlib.pyplot'} & set(sys.modules))"
    )
    root = Path(__file__).resolve().parents[1]
    loaded = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert loaded.stdout.strip() == ""
