"""Inputs that work, a finished run, and a command line that must be refused."""

import shutil
import sys

import pytest

from jaxpref import cli
from tests.bad_input.spoiled import Inputs, the_complaint
from tests.tiny import make_model_folder, make_pairs_file


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Inputs:
    """Never spoiled; copied for each test."""
    inputs = Inputs(tmp_path_factory.mktemp("sound"))
    make_model_folder(inputs.model)
    make_pairs_file(inputs.data)
    return inputs


@pytest.fixture
def inputs(sound, tmp_path) -> Inputs:
    shutil.copytree(sound.folder, tmp_path, dirs_exist_ok=True)
    return Inputs(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, sound) -> Inputs:
    """Inputs with a run of four steps, never spoiled either."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(sound.folder, folder, dirs_exist_ok=True)
    inputs = Inputs(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["jaxpref", *inputs.train()])
        cli.main()
    return inputs


@pytest.fixture
def resumable(finished) -> Inputs:
    """The finished run under its own name; what a test spoils is put back."""
    backup = finished.folder.with_suffix(".backup")
    shutil.copytree(finished.folder, backup)
    yield finished
    shutil.rmtree(finished.folder)
    backup.rename(finished.folder)


@pytest.fixture
def refuse(monkeypatch, capfd):
    """Runs a command line in this process and returns its one line of complaint."""

    def run(argv: list[str], *fragments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["jaxpref", *argv])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.main()
        assert exit.value.code not in (0, None)
        return the_complaint(capfd.readouterr().err, *fragments)

    return run
