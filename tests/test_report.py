"""Figures show every arm; reports are single files with all inputs escaped."""

import base64
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.colors
import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest

from jaxpref import report
from jaxpref.errors import InputError
from jaxpref.report.style import PALETTE

ARMS = ("DPO, clean labels", "DPO, 40% flipped", "rDPO", "forward DPO")
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
    """Whether the image has pixels of approximately this color."""
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
        lambda path: report.frontiers(
            path,
            RECORDS,
            setting="step",
            best=[{"kl": 0.0, "reward": 0.0}, {"kl": 0.5, "reward": 5.0}],
            new=RECORDS[:3],
        ),
        lambda path: report.grouped_bars(path, RECORDS, value="kl", group="seed"),
        lambda path: report.training_curves(path, RECORDS, ["reward", "kl"]),
        lambda path: report.training_curves(
            path, RECORDS, {"rewards/margins": "margin"}, x="seed", x_label="a sweep"
        ),
    ],
    ids=["frontier", "points", "frontiers", "bars", "curves", "sweep"],
)
def test_every_arm_is_drawn_in_its_color(tmp_path, draw):
    draw(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG\r\n")
    for color in PALETTE[: len(ARMS)]:
        assert shows(tmp_path / "figure.png", color)
    assert not shows(tmp_path / "figure.png", PALETTE[len(ARMS)])


@pytest.fixture
def drawn(monkeypatch):
    """All figures that are saved, in order."""
    figures, savefig = [], matplotlib.figure.Figure.savefig

    def record(figure, *args, **options):
        figures.append(figure)
        return savefig(figure, *args, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", record)
    return figures


def legend(figure):
    (box,) = figure.legends
    return [text.get_text() for text in box.get_texts()]


def segments(lines):
    return [segment.tolist() for segment in lines.get_segments()]


def test_reward_against_kl_shows_runs_means_and_deviations(tmp_path, drawn):
    run = lambda seed, *at: [
        {"arm": "a", "seed": seed, "step": step, "kl": x, "reward": y}
        for step, x, y in at
    ]
    # Last points: kl 1, 2, 3 and reward 10, 20, 60; the first run is out of order.
    records = run(0, (2, 1.0, 10.0), (0, 0.0, 5.0), (1, 4.0, 80.0))
    records += run(1, (2, 2.0, 20.0)) + run(2, (2, 3.0, 60.0))
    records += [{"arm": "b", "kl": 7.0, "reward": -1.0}]
    report.reward_against_kl(tmp_path / "x.png", records, title="Title")
    (figure,) = drawn
    (axes,) = figure.axes
    assert figure.get_suptitle() == "Title" and legend(figure) == ["a", "b"]
    assert axes.get_xlabel() == "KL to the reference (nats)"
    assert axes.get_ylabel() == "gold reward"
    assert axes.lines[0].get_xydata().tolist() == [[0, 5], [4, 80], [1, 10]]
    means = [c for c in axes.collections if not c.get_label().startswith("_")]
    assert [c.get_offsets().tolist() for c in means] == [[[2, 30]], [[7, -1]]]
    across, up = axes.containers[0].lines[2]
    assert segments(across) == [[[1, 30], [3, 30]]]
    deviation = 700**0.5  # of 10, 20, 60
    np.testing.assert_allclose(
        segments(up), [[[2, 30 - deviation], [2, 30 + deviation]]]
    )
    for bar in axes.containers[1].lines[2]:  # a single seed has no deviation
        assert segments(bar) == [[[7, -1], [7, -1]]]


def test_curves_show_means_and_standard_deviations(tmp_path, drawn):
    values = {0: (1.0, 2.0, 6.0), 1: (5.0, 5.0, 5.0), 2: (8.0,)}
    records = [
        {"arm": "a", "step": step, "loss": value, "kl": 10 * value}
        for step in (2, 0, 1)
        for value in values[step]
    ]
    records += [{"arm": "b", "step": 0, "loss": 4.0}, {"arm": "b", "step": 1}]
    report.training_curves(
        tmp_path / "x.png", records, {"loss": "the loss", "kl": "KL"}, title="Title"
    )
    (figure,) = drawn
    assert figure.get_suptitle() == "Title" and legend(figure) == ["a", "b"]
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in panels] == ["the loss", "KL"]
    assert {axes.get_xlabel() for axes in panels} == {"step"}
    loss, kl = panels
    assert loss.lines[0].get_xydata().tolist() == [[0, 3], [1, 5], [2, 8]]
    assert loss.lines[1].get_xydata().tolist() == [[0, 4]]
    assert kl.lines[0].get_xydata().tolist() == [[0, 30], [1, 50], [2, 80]]
    assert len(kl.lines[1].get_xydata()) == 0
    (band,) = loss.collections[0].get_paths()
    edge = lambda choose: [
        choose(y for x, y in band.vertices if x == step) for step in (0, 1, 2)
    ]
    deviation = 7**0.5  # of 1, 2, 6
    np.testing.assert_allclose(edge(min), [3 - deviation, 5, 8])
    np.testing.assert_allclose(edge(max), [3 + deviation, 5, 8])


@pytest.mark.parametrize("count, shape", [(1, (1, 1)), (3, (1, 3)), (4, (2, 3))])
def test_every_metric_has_a_panel(tmp_path, drawn, count, shape):
    metrics = [f"m{n}" for n in range(count)]
    records = [{"arm": "a", "step": 0} | dict.fromkeys(metrics, 1.0)]
    report.training_curves(tmp_path / "x.png", records, metrics, x_label="a sweep")
    (figure,) = drawn
    titles = [a.get_title(loc="left") for a in figure.axes if a.get_visible()]
    assert titles == metrics
    grid = figure.axes[0].get_subplotspec().get_gridspec()
    assert (grid.nrows, grid.ncols) == shape
    assert figure.axes[0].get_xlabel() == "a sweep"


def test_a_metric_may_be_missing_in_some_records(tmp_path):
    """Evaluations are rarer than steps, and an arm may lack a metric."""
    records = [{"arm": "a", "step": 0, "loss": 1.0}, {"arm": "b", "step": 0}]
    records += [{"arm": "a", "step": 1, "loss": None}]
    report.training_curves(tmp_path / "figure.png", records, ["loss"])
    assert shows(tmp_path / "figure.png", PALETTE[0])


def test_numpy_numbers_are_accepted(tmp_path):
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
    with pytest.raises(InputError, match="no records to draw"):
        report.training_curves(path, [], ["loss"])
    with pytest.raises(InputError, match="no metrics to draw"):
        report.training_curves(path, RECORDS, [])
    with pytest.raises(InputError, match="no record has a number 'rewrad'"):
        report.training_curves(path, RECORDS, ["reward", "rewrad"])
    with pytest.raises(InputError, match="no record has a number 'v'"):
        report.training_curves(path, [{"arm": "a", "step": 0, "v": None}], ["v"])
    assert not path.exists()


@pytest.mark.parametrize("value", ["0.5", float("nan"), float("inf"), [1.0]])
def test_values_that_are_not_finite_are_reported(tmp_path, value):
    path = tmp_path / "figure.png"
    good = {"arm": "a", "step": 0, "kl": 1.0, "reward": 1.0}
    for name in ("kl", "reward", "step"):
        words = f"record 2: '{name}' is .*; only finite numbers"
        with pytest.raises(InputError, match=words):
            report.reward_against_kl(path, [good, good | {name: value}])
    for name in ("step", "kl"):
        words = f"figure.png: record 2: '{name}' is .*; only finite numbers"
        with pytest.raises(InputError, match=words):
            report.training_curves(path, [good, good | {name: value}], ["kl"])
    assert not path.exists()


def test_figures_are_written_atomically(tmp_path, monkeypatch):
    path = tmp_path / "figure.png"
    draw = lambda path: report.training_curves(path, RECORDS, ["kl"])
    path.write_text("old")
    with monkeypatch.context() as patch:

        def full(source, target):
            assert path.read_text() == "old"
            raise OSError(28, "No space left on device")

        patch.setattr(os, "replace", full)
        with pytest.raises(InputError, match="be written .No space left"):
            draw(path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    draw(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(InputError, match="cannot be written"):
        draw(tmp_path / "no" / "x.png")


class Page(HTMLParser):
    """Checks that tags nest, and collects links, text, and cell contents."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.text, self.cells = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.links += [v for k, v in attrs if k in ("src", "href", "data", "action")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in {"meta", "img", "input", "!doctype"}:
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
    path = tmp_path / "curve.png"
    report.training_curves(path, [{"arm": "a", "step": 0, "v": 1.0}], ["v"])
    return path


def test_a_report_is_self_contained(tmp_path, picture):
    path = tmp_path / "report.html"
    table = report.Table(
        ["arm", "reward", "KL", "note"],
        [["DPO", 1.23456, -2, None], ["rDPO", "0.50 ± 0.10", float("nan"), "a `b`"]],
        caption="Over 3 seeds.",
    )
    sections = [
        report.Section("Result", [table, report.Figure(picture, "The curve.")]),
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
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curve.png", "report.html"]


def test_all_inputs_are_escaped(tmp_path, picture):
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


def test_errors_of_reports(tmp_path, picture):
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
    with pytest.raises(InputError, match="cannot be written"):
        write("text", path=tmp_path / "absent" / "report.html")
    page.write_text("old")
    (tmp_path / "taken").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        write("text", path=tmp_path / "taken")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "curve.png", "report.html", "taken",
    ]  # fmt: skip


def test_mean_spread():
    assert report.mean_spread([1.0, 2.0, 3.0]) == "2.00 ± 1.00"
    assert report.mean_spread([-0.5], digits=1) == "−0.5"
    assert report.mean_spread([1.0, 1.0]) == "1.00 ± 0.00"
    assert report.mean_spread([]) == report.mean_spread(np.array([])) == "–"
    assert report.mean_spread(np.array([-1, 0, 1], np.float32)) == "0.00 ± 1.00"


def test_reports_import_neither_jax_nor_pyplot():
    """Figures need no display and no jax."""
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
