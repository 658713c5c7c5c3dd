"""Text from data and files cannot control the terminal."""

import ast
import io
import logging
import subprocess
import sys
import unicodedata
import warnings
from pathlib import Path

import pytest

from jaxpref.cli import config_file, main
from jaxpref.cli.options import Option
from jaxpref.errors import paint, show, visible, visible_line
from jaxpref.runtime import entry

ROOT = Path(__file__).resolve().parents[1]

SHOWN = {
    "plain": ("plain", "plain"),
    "lines and tabs stay": ("a\n\tb", "a\n\tb"),
    "clearing the screen": ("a\x1b[2Jb", r"a\x1b[2Jb"),
    "the title of the window": ("\x1b]0;root\x07", r"\x1b]0;root\x07"),
    "a hyperlink": ("\x1b]8;;http://e\x1b\\x", r"\x1b]8;;http://e\x1b\x"),
    "an answer typed back": ("\x1b[6n\x1bc", r"\x1b[6n\x1bc"),
    "overwriting the line": ("rm -rf /\rls", r"rm -rf /\rls".replace(r"\r", r"\x0d")),
    "overwriting characters": ("ab\b\bcd", r"ab\x08\x08cd"),
    "null, bell, form feed": ("\0\a\f\v", r"\x00\x07\x0c\x0b"),
    "delete": ("a\x7f", r"a\x7f"),
    "C1: CSI and OSC": ("\x9b2J\x9d0;x\x9c", r"\x9b2J\x9d0;x\x9c"),
    "C1: next line": ("a\x85b", r"a\x85b"),
    "right to left": ("a\u202etxt.exe", r"a\u202etxt.exe"),
    "isolates": ("\u2066\u2067\u2068\u2069", r"\u2066\u2067\u2068\u2069"),
    "direction marks": ("\u200e\u200f\u061c", r"\u200e\u200f\u061c"),
    "lines of Unicode": ("a\u2028b\u2029c", r"a\u2028b\u2029c"),
    "of no width": ("a\u200bb\u2060c\ufeff", r"a\u200bb\u2060c\ufeff"),
    "soft hyphen": ("a\u00adb", r"a\xadb"),
    "tags": ("a\U000e0041\U000e007f", r"a\U000e0041\U000e007f"),
    "plane 14, unassigned": ("\U000e0fff", r"\U000e0fff"),
    "annotations": ("\ufff9a\ufffab\ufffb", r"\ufff9a\ufffab\ufffb"),
    "a byte that is not UTF-8": ("a\udcffb\udc9b", r"a\xffb\x9b"),
    "half a pair": ("a\ud800", r"a\ud800"),
    "no-break and wide spaces": ("a\u00a0b\u3000", "a\u00a0b\u3000"),
    "emoji of several": ("👩\u200d🚀 ✈\ufe0f", "👩\u200d🚀 ✈\ufe0f"),
    "Persian": ("می\u200cخواهم", "می\u200cخواهم"),
    "Arabic sign": ("\u0600١", "\u0600١"),
    "accents by combination": ("e\u0301", "e\u0301"),
    "a font's own characters": ("\ue0b0", "\ue0b0"),
    "not text": (3.5, "3.5"),
}


@pytest.mark.parametrize("case", SHOWN)
def test_visible(case):
    text, expected = SHOWN[case]
    assert visible(text) == expected
    assert visible(expected) == expected
    assert visible_line(text) == expected.replace("\n", r"\n")


def test_visible_of_every_character():
    """Controls and format characters, by Unicode's own table, and nothing else."""
    kept = {"\n", "\t", "\u200c", "\u200d"}
    for code in [*range(0x3000), *range(0xD7F0, 0x10000), *range(0xE0000, 0xE01F0)]:
        character = chr(code)
        category, name = (
            unicodedata.category(character),
            unicodedata.name(character, ""),
        )
        changes = category in {"Cc", "Cf", "Cs", "Zl", "Zp"} and character not in kept
        if name.startswith(("ARABIC", "SYRIAC")) and name != "ARABIC LETTER MARK":
            changes = False  # signs that are drawn
        if category == "Cn" and code >= 0xE0000:
            changes = True
        assert (visible(character) != character) == changes, (hex(code), name)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_show_suits_the_encoding(encoding):
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding, newline="\n")
    show("né → \x1b[2J\ud800", file=file)
    expected = "né → " + r"\x1b[2J\ud800" + "\n"
    text = raw.getvalue().decode(encoding)
    assert text == expected.encode(encoding, "backslashreplace").decode(encoding)
    assert text.endswith("\\x1b[2J\\ud800\n")


def test_colors_are_the_only_escapes():
    file = io.StringIO()
    paint([("a\x1b[2J", "blue"), ("\x9b", "green")], file=file)
    assert file.getvalue() == "\x1b[34ma\\x1b[2J\x1b[0m\x1b[32m\\x9b\x1b[0m\n"


EVIL = "\x1b]0;owned\x07\x9b2J\u202e"
SAFE = r"\x1b]0;owned\x07\x9b2J\u202e"


@pytest.mark.parametrize(
    "argv",
    [
        [EVIL],
        ["train", f"--{EVIL}", "x"],
        ["train", EVIL],
        ["train", "--config", f"{EVIL}.yaml"],
        ["train", "--loss", EVIL],
        ["train", "--max-steps", EVIL, "--model", "m", "--data", "d", "--out", "o"],
        ["sample", "--model", f"/{EVIL}", "--prompts", "x"],
        ["sample", f"--help-{EVIL}"],
        ["audit", "--model", "m", "--data", EVIL, "--out", "o", "--folds", EVIL],
        ["evaluate", "--model", f"/{EVIL}", "--data", "d", "--out", "o"],
        ["data", EVIL],
        ["data", "inspect", EVIL, "--model", f"/{EVIL}"],
        ["data", "convert", EVIL, "--out", "o.jsonl"],
        ["plan", "--model", "m", "--batch", "1", "--seq", "8", "--topology", EVIL],
        ["--completion", EVIL],
    ],
    ids=str,
)
def test_errors_of_the_command_line(argv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert printed.err.count("\n") == 1 and visible(printed.err) == printed.err
    assert SAFE[:12] in printed.err


def test_logs_and_warnings_of_any_package():
    factory, before = logging.getLogRecordFactory(), warnings.formatwarning
    try:
        entry._filter_logs()
        entry._filter_logs()  # once is enough
        for name in ("jaxpref", "transformers", "some.package"):
            record = logging.getLogger(name).makeRecord(
                name, logging.WARNING, "f", 1, "%s: %d", (EVIL, 3), None
            )
            assert logging.Formatter().format(record) == f"{SAFE}: 3"
        try:
            raise ValueError(EVIL)
        except ValueError:
            failed = logging.getLogger("x").makeRecord(
                "x", logging.ERROR, "f", 1, "y", (), sys.exc_info()
            )
        printed = logging.Formatter().format(failed)
        assert f"ValueError: {SAFE}" in printed and visible(printed) == printed
        printed = warnings.formatwarning(EVIL, UserWarning, "f", 1, line=EVIL)
        assert f"UserWarning: {SAFE}\n" in printed and visible(printed) == printed
    finally:
        logging.setLogRecordFactory(factory)
        warnings.formatwarning = before


@pytest.mark.parametrize("value", ["plain", "né", EVIL, "\u202e", "a\nb\x85"])
def test_printed_configs_are_visible_and_can_be_read_back(value, tmp_path):
    options = {"data": Option("data", str, None, "")}
    text = config_file.write(options, {"data": value})
    assert visible(text) == text
    path = tmp_path / "config.yaml"
    path.write_text(text, "utf-8")
    assert config_file.read(str(path)) == {"data": [value]}


def calls(path: Path) -> list[tuple[int, ast.Call]]:
    tree = ast.parse(path.read_text("utf-8"))
    return [(n.lineno, n) for n in ast.walk(tree) if isinstance(n, ast.Call)]


def is_visible(node: ast.expr) -> bool:
    if isinstance(node, ast.Call):
        return ast.unparse(node.func) in {"visible", "visible_line"}
    return isinstance(node, ast.Constant)


def test_only_show_prints():
    """Every place that prints text goes through `visible`."""
    known = {
        # JSON, for the parent process.
        "jaxpref/data/template_child.py: sys.stdout.write",
        # A byte for each test that passes, for the parent process.
        "jaxpref/rewards/code_child.py: os.write",
        # Names and figures of our own code.
        "jaxpref/evaluate/draw.py: desc=title",
        "jaxpref/runtime/late_metrics.py: desc=name",
        "jaxpref/train/outputs.py: tqdm.write",
    }
    found = set()
    for path in sorted((ROOT / "jaxpref").rglob("*.py")):
        short = path.relative_to(ROOT).as_posix()
        for _, call in calls(path):
            name = ast.unparse(call.func)
            passed = [ast.unparse(x) for x in call.args]
            if name.startswith(("sys.stdout.write", "sys.stderr.write", "os.write")):
                found.add(f"{short}: {name}")
            if (name == "print" or "print" in passed) and path.name != "errors.py":
                found.add(f"{short}: print")
            if "tqdm.write" in passed:
                found.add(f"{short}: tqdm.write")
            if name == "tqdm.write" and not is_visible(call.args[0]):
                found.add(f"{short}: tqdm.write")
            if name == "tqdm":
                for word in call.keywords:
                    if word.arg == "desc" and not is_visible(word.value):
                        found.add(f"{short}: desc={ast.unparse(word.value)}")
    assert found == known


def test_the_supervisor_names_its_command_visibly():
    done = subprocess.run(
        [sys.executable, "-m", "jaxpref.runtime.supervise", "--", f"/no/{EVIL}\nx"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 2
    expected = f"supervise: error: /no/{SAFE}\\nx: No such file or directory\n"
    assert done.stderr == expected
