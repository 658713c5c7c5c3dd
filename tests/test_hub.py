"""Where a model comes from, and which tokens end its text."""

import json

import pytest

from jaxpref.data.end_of_turn import read_stop_tokens
from jaxpref.errors import InputError
from jaxpref.models.hub import resolve_folder


@pytest.fixture
def hub(monkeypatch):
    """Sets what the hub answers; nothing is asked of the network."""
    module = pytest.importorskip("huggingface_hub")

    def set_answer(answer):
        monkeypatch.setattr(module, "snapshot_download", answer)

    set_answer(lambda *args, **options: pytest.fail("the hub was asked"))
    return set_answer


def test_a_folder_is_itself(tmp_path, hub):
    assert resolve_folder(str(tmp_path)) == tmp_path


def test_an_id_is_downloaded_without_code_or_pickles(tmp_path, hub):
    asked = []

    def answer(name, *, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path)

    hub(answer)
    assert resolve_folder("someone/some-model") == tmp_path
    ((name, patterns),) = asked
    assert name == "someone/some-model"
    assert {"*.json", "*.safetensors"} <= set(patterns)
    assert not any(p.endswith((".py", ".bin", ".pt", "*")) for p in patterns)


@pytest.mark.parametrize("model", ["./absent", "/absent/model", "~/model", "a/b/c"])
def test_a_path_that_is_absent_is_never_asked_of_the_hub(model, hub):
    with pytest.raises(InputError, match=f"{model}: no such folder"):
        resolve_folder(model)


def test_a_file_is_not_a_folder(tmp_path, hub):
    path = tmp_path / "config.json"
    path.write_text("{}")
    with pytest.raises(InputError, match="is a file; pass the folder"):
        resolve_folder(str(path))


@pytest.mark.parametrize(
    "error, reason",
    [
        (ValueError("\nfirst\nsecond"), "(first)"),
        (ConnectionError(), "(ConnectionError)"),  # says nothing
        (RuntimeError("x" * 1000), f"({'x' * 200})"),
    ],
)
def test_what_the_hub_says_becomes_one_line(hub, error, reason):
    def answer(*args, **options):
        raise error

    hub(answer)
    with pytest.raises(InputError) as raised:
        resolve_folder("someone/some-model")
    message = str(raised.value)
    assert message.startswith("someone/some-model: no such folder")
    assert message.endswith(reason) and "\n" not in message


def write(folder, **files):
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}.json").write_text(text)


@pytest.mark.parametrize(
    "generation, config, expected",
    [
        ({"eos_token_id": 2}, {"eos_token_id": 3}, (2,)),
        ({"eos_token_id": [2, 1]}, {"eos_token_id": 3}, (2, 1)),
        ({"eos_token_id": 0}, {"eos_token_id": 3}, (0,)),
        ({"eos_token_id": None}, {"eos_token_id": 3}, (3,)),
        ({}, {"eos_token_id": [3, 4]}, (3, 4)),
        ({}, {}, ()),
    ],
)
def test_stop_tokens(tmp_path, generation, config, expected):
    write(tmp_path, generation_config=generation, config=config)
    assert read_stop_tokens(tmp_path) == expected


def test_stop_tokens_of_a_folder_with_fewer_files(tmp_path):
    assert read_stop_tokens(tmp_path) == ()
    write(tmp_path, config={"eos_token_id": 3})
    assert read_stop_tokens(tmp_path) == (3,)


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "not JSON"),
        ("[2]", "holds list, not a JSON object"),
        ({"eos_token_id": "</s>"}, "field eos_token_id is '</s>'; give a token id"),
        ({"eos_token_id": [2, 1.5]}, r"field eos_token_id is \[2, 1.5\]"),
        ({"eos_token_id": True}, "field eos_token_id is True"),
    ],
)
@pytest.mark.parametrize("name", ["generation_config", "config"])
def test_stop_tokens_that_cannot_be_read_are_named(tmp_path, name, content, words):
    write(tmp_path, **{name: content})
    with pytest.raises(InputError, match=words) as raised:
        read_stop_tokens(tmp_path)
    message = str(raised.value)
    assert message.startswith(str(tmp_path / f"{name}.json")) and "\n" not in message
