"""Every function of `losses` and `noise` has a command, or a reason to have none."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "jaxpref"
TRAINED = "## How each loss is trained"
OWN_CODE = "## Functions for your own code"


def public_functions() -> dict[str, Path]:
    """The functions in `__all__` of each file, as `noise.em.fit` or `losses.dpo`."""
    found = {}
    for package in ("losses", "noise"):
        for path in sorted((PACKAGE / package).glob("*.py")):
            body = ast.parse(path.read_text("utf-8")).body
            names = [
                element.value
                for node in body
                if isinstance(node, ast.Assign)
                and ast.unparse(node.targets[0]) == "__all__"
                for element in node.value.elts
            ]
            defined = {x.name for x in body if isinstance(x, ast.FunctionDef)}
            module = "" if package == "losses" else f"{path.stem}."
            found |= {f"{package}.{module}{x}": path for x in names if x in defined}
    return found


def names_used(path: Path) -> set[tuple[str, str]]:
    """(module, name) of what a file reads from other modules, as it is written."""
    used, aliases = set(), {}
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".")[-1]
            aliases |= {x.asname: x.name for x in node.names if x.asname}
            used |= {(module, x.name) for x in node.names}
        elif isinstance(node, ast.Attribute):
            base = ast.unparse(node.value).split(".")[-1]
            used.add((base, node.attr))
    return used | {(aliases.get(module, module), name) for module, name in used}


def section(page: str, title: str) -> str:
    text = (ROOT / "docs" / page).read_text("utf-8").split(title)[1]
    return text.split("\n## ")[0]


def test_every_function_has_a_command_or_a_reason():
    trained = set(re.findall(r"^\| `(\w+)`", section("losses.md", TRAINED), re.M))
    explained = set(
        re.findall(r"`((?:losses|noise)\.[\w.]+)`", section("noise.md", OWN_CODE))
    )
    functions = public_functions()
    assert len(functions) > 150
    assert explained <= functions.keys(), explained - functions.keys()
    used = {path: names_used(path) for path in PACKAGE.rglob("*.py")}
    for name, own in functions.items():
        function = name.split(".")[-1]
        if function in trained or name in explained:
            continue
        modules = {name.split(".")[0], own.stem, own.stem.lstrip("_")}
        users = [
            path
            for path, names in used.items()
            if path not in (own, own.with_name("__init__.py"))
            and any((module, function) in names for module in modules)
        ]
        local = ast.walk(ast.parse(own.read_text("utf-8")))
        calls = [x for x in local if isinstance(x, ast.Name) and x.id == function]
        assert users or calls, f"{name}: name it in docs/noise.md, {OWN_CODE!r}"
