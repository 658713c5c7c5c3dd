"""Which package may import which, read from the imports."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "jaxpref"

ARRAYS = {"jax", "jaxtyping"}
READERS = {
    "absl",
    "array_record",
    "datasets",
    "etils",
    "grain",
    "numpy",
    "tensorflow_datasets",
}
TOKENIZERS = {"jinja2", "tokenizers", "transformers"}
ALLOWED = {
    # package: (other packages of ours, and third-party ones, that it may import)
    "losses": ({"sharding"}, ARRAYS),
    "noise": ({"losses", "sharding"}, ARRAYS),
    "gradients": ({"losses", "sharding"}, ARRAYS),
    "runtime": (
        {"errors", "files", "sharding"},
        {"jax", "numpy", "orbax", "tensorboardX", "tqdm"}
        | {"wandb", "mlflow", "trackio"},
    ),
    "data": ({"errors", "files", "runtime"}, READERS | TOKENIZERS | {"jax", "tqdm"}),
    "models": (
        {"errors", "files", "runtime", "sharding"},
        ARRAYS | {"flax", "numpy", "safetensors", "ml_dtypes", "huggingface_hub"},
    ),
    "sampling": ({"errors", "files", "models", "sharding"}, ARRAYS | {"numpy"}),
    "scoring": (
        {"errors", "files", "losses", "data", "models", "runtime", "sharding"},
        ARRAYS | {"numpy", "safetensors", "scipy", "tqdm"},
    ),
    "rewards": (
        {"errors", "files", "losses", "noise", "data", "models", "runtime", "scoring"},
        {"jax", "jaxtyping", "numpy", "scipy"},
    ),
    "objectives": (
        {"errors", "losses", "noise", "gradients", "data", "scoring", "sharding"},
        ARRAYS,
    ),
    "train": (
        {
            "errors",
            "files",
            "losses",
            "noise",
            "gradients",
            "data",
            "models",
            "report",
            "rounding",
            "runtime",
            "sampling",
            "scoring",
            "objectives",
            "sharding",
        },
        ARRAYS | {"numpy", "optax", "safetensors", "tqdm"},
    ),
    "evaluate": (
        {
            "errors",
            "files",
            "losses",
            "noise",
            "data",
            "rewards",
            "sampling",
            "scoring",
            "models",
            "runtime",
            "sharding",
            "train",
        },
        ARRAYS | {"numpy", "safetensors", "scipy", "tqdm"},
    ),
    "online": (
        {
            "errors",
            "evaluate",
            "files",
            "losses",
            "data",
            "models",
            "rewards",
            "runtime",
            "sampling",
            "scoring",
            "sharding",
            "train",
        },
        ARRAYS | {"numpy"},
    ),
    "merge": (
        {
            "errors",
            "files",
            "data",
            "evaluate",
            "models",
            "runtime",
            "train",
        },
        {"jax", "jaxtyping", "numpy", "safetensors"},
    ),
    "report": ({"errors", "files"}, {"matplotlib"}),
    "plan": (
        {
            "errors",
            "files",
            "data",
            "models",
            "runtime",
            "sampling",
            "scoring",
            "objectives",
            "sharding",
            "train",
        },
        ARRAYS | {"numpy", "tqdm"},
    ),
    "select": (
        {
            "errors",
            "files",
            "losses",
            "data",
            "models",
            "runtime",
            "scoring",
            "sharding",
        },
        ARRAYS | {"numpy", "tqdm"},
    ),
    "sweep": (
        {
            "errors",
            "files",
            "data",
            "evaluate",
            "models",
            "report",
            "runtime",
            "scoring",
            "train",
        },
        {"jax", "numpy"},
    ),
    "errors": (set(), set()),
    "rounding": (set(), {"jax", "optax"}),
    "sharding": (set(), {"jax"}),
    "files": ({"errors"}, set()),
    "__init__": (set(), set()),
    # Nobody imports the last ones, and they may import every package above.
    "cli": (None, {"jax", "tyro", "yaml"}),
    "__main__": ({"cli"}, set()),
}


def package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, dotted name) of everything a file imports, inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found += [(node.lineno, f"{node.module}.{a.name}") for a in node.names]
    return found


FILES = sorted(PACKAGE.rglob("*.py"))
each_file = pytest.mark.parametrize(
    "path", FILES, ids=lambda path: str(path.relative_to(PACKAGE))
)


@each_file
def test_imports_are_allowed(path):
    package = package_of(path)
    assert package in ALLOWED, f"{package}: a new package needs a line in ALLOWED"
    ours, others = ALLOWED[package]
    if ours is None:
        ours = set(ALLOWED) - {"cli", "__main__"}
    for line, name in imports(path):
        top, _, rest = name.partition(".")
        if top == "jaxpref":
            target = rest.split(".")[0]
            # `from jaxpref import __version__` is always allowed.
            allowed = ours | {package, "__version__"}
            assert target in allowed, f"{path}:{line}: {package} must not import {name}"
        elif top not in sys.stdlib_module_names:
            assert top in others, f"{path}:{line}: {package} must not import {name}"


def test_data_knows_jax_only_to_register_the_batch():
    for path in (PACKAGE / "data").rglob("*.py"):
        for line, name in imports(path):
            if name.split(".")[0] == "jax":
                assert name.startswith("jax.tree_util"), f"{path}:{line}: {name}"


def test_nobody_imports_the_command_line_or_experiments():
    for path in FILES:
        for line, name in imports(path):
            where = f"{path}:{line}: {name}"
            assert name.split(".")[0] != "experiments", where
            if package_of(path) not in {"__main__", "cli"}:
                assert not f"{name}.".startswith("jaxpref.cli."), where
    for path in (ROOT / "experiments").rglob("*.py"):
        for line, name in imports(path):
            assert not f"{name}.".startswith("jaxpref.cli."), f"{path}:{line}: {name}"


def test_evaluate_scores_with_trains_pieces_but_never_runs_its_loop():
    for path in (PACKAGE / "evaluate").rglob("*.py"):
        for line, name in imports(path):
            where = f"{path}:{line}: {name}"
            assert not f"{name}.".startswith("jaxpref.train.fit."), where
            assert name not in {"jaxpref.train", "jaxpref.train.run"}, where


def test_objectives_know_no_model_and_no_mesh():
    """They read scores by name, whatever computes them."""
    forbidden = ("jaxpref.models", "jaxpref.runtime", "jaxpref.train", "jax.sharding")
    data = ("batch", "kinds", "columns")
    allowed = ("jaxpref.scoring.scores.", *(f"jaxpref.data.{name}." for name in data))
    for path in (PACKAGE / "objectives").rglob("*.py"):
        for line, name in imports(path):
            where = f"{path}:{line}: {name}"
            assert not name.startswith(forbidden), where
            if name.startswith(("jaxpref.scoring", "jaxpref.data")):
                assert name.startswith(allowed), where


def test_nnx_stays_in_two_files():
    """Flax NNX writes the model; everything else sees parameters and functions."""
    writers = {
        PACKAGE / "models" / name for name in ("transformer.py", "functional.py")
    }
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            name = getattr(node, "id", None) or getattr(node, "attr", None)
            if isinstance(node, ast.alias):
                name = node.name.split(".")[-1]
            if name == "nnx":
                assert path in writers, f"{path} mentions nnx"
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "nnx"
            ):
                where = f"{path}:{node.lineno}: nnx.{node.attr}"
                assert node.attr not in {"jit", "grad", "Optimizer"}, where
                if node.attr in {"split", "merge"}:
                    assert path.name == "functional.py", where


EXPERIMENTAL = (
    # Meshes over slices, talking between processes, kernels for TPU, and devices that
    # are elsewhere: none of them has another home in jax.
    "jax.experimental.mesh_utils",
    "jax.experimental.multihost_utils",
    "jax.experimental.pallas.ops",
    "jax.experimental.topologies",
)


def test_no_private_or_experimental_jax():
    for path in FILES:
        for line, name in imports(path):
            if not name.startswith(EXPERIMENTAL):
                where = f"{path}:{line}: {name}"
                assert not name.startswith(("jax._src", "jax.experimental")), where


def length(node: ast.stmt) -> int:
    return node.end_lineno - node.lineno + 1


@each_file
def test_files_and_functions_stay_readable(path):
    text = path.read_text("utf-8")
    assert len(text.splitlines()) < 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            docstring = node.body[:1] if ast.get_docstring(node) else []
            lines = length(node) - sum(map(length, docstring))
            assert lines < 80, f"{path}: {node.name} has {lines} lines"


LOADED = """
import sys
import jax, jaxtyping
before = set(sys.modules)
import jaxpref.losses
print(*sorted(set(sys.modules) - before))
print(*sorted(before))
"""
NEVER = {"flax", "optax", "orbax", "grain", "transformers", "torch", "beartype"}
WITH_JAX = {
    "jax",
    "jaxlib",
    "jaxtyping",
    "ml_dtypes",
    "numpy",
    "opt_einsum",
    "scipy",
    "wadler_lindig",
}


def test_losses_load_nothing_but_jax_and_jaxtyping():
    """In a process of its own, compared with what jax and jaxtyping load."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", LOADED],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        cwd=ROOT,
    )
    added, before = (set(line.split()) for line in done.stdout.splitlines())
    ours = {name for name in added if name.split(".")[0] == "jaxpref"}
    assert "jaxpref.losses" in ours
    for name in ours - {"jaxpref", "jaxpref.sharding"}:
        assert name.startswith("jaxpref.losses"), f"importing losses loads {name}"
    tops = {name.split(".")[0] for name in added - ours} - sys.stdlib_module_names
    assert tops <= WITH_JAX
    assert not NEVER & {name.split(".")[0] for name in added | before}


def public_functions(
    node: ast.AST, prefix: str = ""
) -> list[tuple[str, ast.FunctionDef]]:
    """Functions and methods of a file that have no underscore before their names."""
    found = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            found += public_functions(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.FunctionDef) and not child.name.startswith("_"):
            found.append((prefix + child.name, child))
        elif isinstance(child, (ast.If, ast.Try)):
            found += public_functions(child, prefix)
    return found


def without_annotation(function: ast.FunctionDef, *, is_method: bool) -> list[str]:
    """The arguments without an annotation, and "return" if that has none."""
    given = function.args
    arguments = [*given.posonlyargs, *given.args]
    static = any(ast.unparse(x) == "staticmethod" for x in function.decorator_list)
    if is_method and not static:
        arguments = arguments[1:]  # self or cls
    arguments += [*given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
    missing = [x.arg for x in arguments if x.annotation is None]
    return missing + ([] if function.returns else ["return"])


@each_file
def test_public_functions_are_annotated(path):
    parts = [name.removesuffix(".py") for name in path.relative_to(PACKAGE).parts]
    if any(x.startswith("_") and not x.startswith("__") for x in parts):
        return
    for name, function in public_functions(ast.parse(path.read_text("utf-8"))):
        missing = without_annotation(function, is_method="." in name)
        assert not missing, f"{path}: {name}: no annotation of {', '.join(missing)}"
