"""What a process apart answers is read as data, whoever wrote it."""

from __future__ import annotations

import os
import pickle
from typing import Any

import pytest

from deployments.engine.warm.forkserver import _read


class Planted:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> Any:
        return os._exit, (1,)


@pytest.mark.parametrize("value", [None, "a reason", (None, ["a", "b"]), {"a": [1.5, True]}], ids=repr)
def test_plain_data_is_read(value: object) -> None:
    """Nothing is lost, also the difference between a list and a tuple."""
    assert _read(pickle.dumps((True, value))) == (True, value)


@pytest.mark.parametrize(
    "answer",
    [pickle.dumps((True, Planted())), pickle.dumps((True, os.system)), b"", b"no pickle", pickle.dumps(1)],
    ids=["call", "function", "empty", "noise", "other shape"],
)
def test_anything_else_is_refused(answer: bytes) -> None:
    """The code of a checkpoint may write the answer: nothing in it is called or looked up."""
    with pytest.raises(RuntimeError, match="the answer of the process can't be read"):
        _read(answer)
