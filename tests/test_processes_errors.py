"""What the other processes are told of an error on process 0."""

import jax
import pytest

from jaxpref.errors import InputError
from jaxpref.runtime import processes


@pytest.mark.parametrize("error", [OSError("no file\nmore"), SystemExit(3)])
def test_other_errors_are_broadcast_and_raised_again(monkeypatch, error):
    sent = []
    monkeypatch.setattr(processes, "broadcast_text", lambda x: sent.append(x) or x)

    def fails():
        raise error

    with pytest.raises(type(error)) as found:
        processes.together(fails)
    assert found.value is error
    assert sent == [f"{type(error).__name__}: {str(error).splitlines()[0]}"]


@pytest.mark.parametrize(
    "message, error", [("InputError: a\nb", InputError), ("OSError: a", RuntimeError)]
)
def test_only_errors_of_input_are_final_on_the_others(monkeypatch, message, error):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(processes, "broadcast_text", lambda x: x or message)
    with pytest.raises(error) as found:
        processes.together(lambda: 1 / 0)
    assert str(found.value) in ("a\nb", "process 0: OSError: a")
