"""Nothing from the data or the current folder is run."""

import importlib.metadata
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from jaxpref.data import open_source
from jaxpref.data.sources import prepared
from jaxpref.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
CORE = "tensorflow_datasets.core.features"
TEXT = {"pythonClassName": f"{CORE}.text_feature.Text", "text": {}}


def features(**inside) -> dict:
    """`features.json` as TFDS writes it today."""
    return {
        "pythonClassName": f"{CORE}.features_dict.FeaturesDict",
        "featuresDict": {"features": {"prompt": TEXT} | inside},
    }


def old(content: dict, name: str = "features_dict.FeaturesDict") -> dict:
    """As TFDS wrote it before it used protocol buffers."""
    return {"type": f"{CORE}.{name}", "content": content}


EVIL = {"pythonClassName": "evil.Evil", "text": {}}
OLD_EVIL = {"type": "evil.Evil", "content": {}}
SEQUENCE = f"{CORE}.sequence_feature.Sequence"
FOREIGN = {
    "at the top": EVIL,
    "in a dictionary": features(chosen=EVIL),
    "in a sequence": features(
        chosen={"pythonClassName": SEQUENCE, "sequence": {"feature": EVIL}}
    ),
    "by the other name of the field": features(chosen={"python_class_name": "evil.E"}),
    "as old files name it": OLD_EVIL,
    "in an old dictionary": old({"prompt": OLD_EVIL}),
    "in an old sequence": old({"feature": OLD_EVIL}, "sequence_feature.Sequence"),
    "in a string": features(
        chosen={
            "pythonClassName": f"{CORE}.features_dict.FeaturesDict",
            "jsonFeature": {"json": json.dumps({"x": OLD_EVIL})},
        }
    ),
    "in a string in a string": features(
        chosen={"jsonFeature": {"json": json.dumps({"x": json.dumps(OLD_EVIL)})}}
    ),
    "in a message as text": {
        "type": f"{CORE}.features_dict.FeaturesDict",
        "proto_cls": "tensorflow_datasets.FeaturesDict",
        "content": json.dumps({"features": {"x": EVIL}}),
    },
    "in a list": [EVIL],
    "of a package like ours": features(
        chosen={"pythonClassName": "tensorflow_datasets_.x.Text"}
    ),
    "of TFDS, but elsewhere": features(
        chosen={"pythonClassName": "tensorflow_datasets.testing.Text"}
    ),
    "of TFDS, with a decoder": features(
        chosen={"pythonClassName": f"{CORE}.video_feature.Video"}
    ),
    "with a space": features(chosen={"pythonClassName": f"{CORE}.text_feature.Text "}),
    "not a string": features(chosen={"type": ["evil.Evil"], "content": {}}),
}


def write_set(folder: Path, content) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "features.json").write_text(text, "utf-8")
    (folder / "dataset_info.json").write_text('{"name": "x", "version": "1.0.0"}')
    return folder


@pytest.fixture
def evil_module(tmp_path, monkeypatch):
    """A module that notes that it was imported."""
    marker = tmp_path / "imported"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    yield
    assert not marker.exists()
    assert "evil" not in sys.modules


@pytest.mark.parametrize("case", FOREIGN)
def test_a_tfds_folder_brings_no_code(case, tmp_path, evil_module):
    pytest.importorskip("etils", reason="needs the tfds extra")
    folder = write_set(tmp_path / "set", FOREIGN[case])
    with pytest.raises(InputError, match="feature class '?.*bring its own code"):
        prepared.check_features(folder)


def test_a_repeated_key_hides_nothing(tmp_path):
    pytest.importorskip("etils", reason="needs the tfds extra")
    good = json.dumps(features())
    name = '"pythonClassName": "evil.Evil"'
    for text in (f"{{{name}, {good[1:]}", f"{good[:-1]}, {name}}}"):
        folder = write_set(tmp_path / "set", text)
        with pytest.raises(InputError, match="names the feature class 'evil.Evil'"):
            prepared.check_features(folder)


@pytest.mark.parametrize(
    "content",
    [
        features(),
        features(type=TEXT, pythonClassName=TEXT),  # fields with these names
        features(label={"pythonClassName": f"{CORE}.class_label_feature.ClassLabel"}),
        features(x={"pythonClassName": SEQUENCE, "sequence": {"feature": TEXT}}),
        features(x=TEXT | {"description": '"quoted" and {not JSON}'}),
        old({"prompt": old({}, "text_feature.Text")}),
    ],
    ids=range(6),
)
def test_features_of_tfds_are_read(content, tmp_path):
    pytest.importorskip("etils", reason="needs the tfds extra")
    prepared.check_features(write_set(tmp_path / "set", content))


@pytest.mark.parametrize(
    "text", ["", "{", "\xff", "[" * 10**5, "{" + " " * 10**7 + "}"]
)
def test_a_damaged_features_file_is_one_line(text, tmp_path):
    pytest.importorskip("etils", reason="needs the tfds extra")
    write_set(tmp_path, "").joinpath("features.json").write_text(text, "latin-1")
    with pytest.raises(InputError, match="features.json: cannot be read") as error:
        prepared.check_features(tmp_path)
    assert "\n" not in str(error.value)


def test_tfds_never_sees_a_foreign_class(tmp_path, evil_module, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets", reason="needs the tfds extra")
    pytest.importorskip("array_record", reason="needs the tfds extra")
    write_set(tmp_path / "x" / "1.0.0", features(chosen=EVIL))
    monkeypatch.setattr(tfds, "builder_from_directory", lambda folder: 1 / 0)
    for data in (f"tfds:x?data_dir={tmp_path}", str(tmp_path / "x" / "1.0.0")):
        with pytest.raises(InputError, match="'evil.Evil'"):
            open_source(data)
    # TFDS itself would import it: this test would fail without the check.
    with pytest.raises(ValueError, match="no_such_module"):
        tfds.features.FeatureConnector.from_json(
            {"pythonClassName": "no_such_module.X", "text": {}}
        )


VERSIONS = ["1.0.0", "1.10.0", "1.9.0", "2.0.0", "incomplete.3.0.0", "3.0.0.tmp"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain", "plain/2.0.0"),
        ("plain:1.*.*", "plain/1.10.0"),
        ("plain:1.9.0", "plain/1.9.0"),
        ("one", "one/only/2.0.0"),
        ("one/only:1.*.*", "one/only/1.10.0"),
        ("many", "many/b/2.0.0"),
        ("many/a", "many/a/2.0.0"),
        ("several", "choose one of tfds:several/a, tfds:several/b"),
        ("plain:4.0.0", "holds no prepared version"),
        ("plain:1.0", "holds no prepared version"),
        ("absent", "holds no prepared version"),
        ("many/c", "holds no prepared version"),
        ("kaggle:plain", "; expected tfds:NAME"),
        ("huggingface:o__n", "; expected tfds:NAME"),
        ("plain/a=1,b=2", "; expected tfds:NAME"),
        ("../plain", "; expected tfds:NAME"),
        ("plain/..", "; expected tfds:NAME"),
        ("", "; expected tfds:NAME"),
    ],
)
def test_a_name_means_a_folder(name, expected, tmp_path):
    pytest.importorskip("etils", reason="needs the tfds extra")
    for parent in ("plain", "one/only", "many/a", "many/b", "several/a", "several/b"):
        for version in VERSIONS:
            (tmp_path / parent / version).mkdir(parents=True)
    (tmp_path / "one" / "empty").mkdir()
    (tmp_path / "many" / ".config").mkdir()
    note = '{"default_config_name": "b"}'
    (tmp_path / "many" / ".config" / "metadata.json").write_text(note)
    if " " not in expected:
        assert str(prepared.prepared_folder(name, str(tmp_path))) == str(
            tmp_path / expected
        )
        return
    with pytest.raises(InputError, match=expected) as error:
        prepared.prepared_folder(name, str(tmp_path))
    assert str(error.value).startswith(f"tfds:{name}: cannot be opened")


MODULES = ["json", "yaml", "jax", "numpy", "tyro", "difflib", "textwrap", "mmap"]


def test_the_current_folder_is_not_imported(tmp_path):
    """Neither by `python -m`, nor by an empty or relative entry of PYTHONPATH."""
    for name in [*MODULES, "tensorflow_datasets", "datasets", "matplotlib"]:
        (tmp_path / f"{name}.py").write_text("open('imported', 'a')")
    (tmp_path / "set").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "jaxpref", "train", "--loss", "rdpo", "--help"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f":.:{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "flip-rate" in done.stdout
    assert not (tmp_path / "imported").exists()


PATHS = """
import os, subprocess, sys
os.chdir(sys.argv[1])
sys.path.insert(0, sys.argv[2])
import jaxpref.__main__
print(sys.argv[2] in sys.path, os.environ.get("PYTHONSAFEPATH"))
if sys.argv[1] != sys.argv[3]:  # a child imports nothing from here either
    child = [sys.executable, "-S", "-c", "import evil"]
    assert subprocess.run(child, stderr=subprocess.DEVNULL).returncode
"""


@pytest.mark.parametrize(
    ("here", "entry", "named", "expected"),
    [
        ("data", "data", "", "False 1"),
        ("data", "", "", "False 1"),
        ("data", ".", "", "False 1"),
        ("data", "data/../data", "", "False 1"),
        ("data", "link", "", "False 1"),
        ("data", "other", "", "True 1"),
        ("data", "data", "data", "True 1"),
        (str(ROOT), str(ROOT), "", "True None"),
    ],
)
def test_which_entries_are_left(here, entry, named, expected, tmp_path):
    for name in ("data", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "evil.py").touch()
    place = lambda x: x if x in ("", ".") else str(tmp_path / x)
    path = [str(ROOT), place(named or "other")] + ([] if named else ["", ".", "gone"])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    environment.pop("PYTHONSAFEPATH", None)
    done = subprocess.run(
        [sys.executable, "-S", "-c", PATHS, *map(place, (here, entry, named or "-"))],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.strip()) == (0, expected), done.stderr


FLOORS = {
    "jinja2": "3.1.6",  # CVE-2025-27516: |attr left the sandbox
    "safetensors": "0.6",
    "transformers": "5",
    "tokenizers": "0.22",
    "huggingface-hub": "1.0",
    "pyyaml": "6.0.1",
    "datasets": "4",  # 3 ran scripts of a dataset
    "pyarrow": "23.0.1",  # CVE-2023-47248 ran code, CVE-2026-25087
    "protobuf": "6.33.5",  # CVE-2026-0994
    "tensorflow-datasets": "4.9",
    "array-record": "0.5",
}


@pytest.mark.parametrize("name", FLOORS)
def test_what_reads_foreign_files_has_a_floor(name):
    """A lower version cannot be installed, and is not installed here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = sum(project["optional-dependencies"].values(), project["dependencies"])
    (found,) = (r for r in map(Requirement, lines) if r.name == name)
    below = [".".join([*FLOORS[name].split(".")[:-1], "0.dev0"]), "0.1"]
    assert found.specifier.contains(FLOORS[name])
    assert not any(found.specifier.contains(x, prereleases=True) for x in below)
    try:
        installed = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("not installed")
    assert Version(installed) >= Version(FLOORS[name])
