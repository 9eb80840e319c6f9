"""The environment variables: what each value means."""

from __future__ import annotations

import pytest

from syncbn import settings


@pytest.mark.parametrize(
    ("function", "variable", "values"),
    [
        (settings.kernels, "SYNCBN_KERNELS", {None: "auto", "eager": "eager", "triton": "triton"}),
        (settings.debug, "SYNCBN_DEBUG", {None: False, "": False, "0": False, "1": True}),
        (settings.peer_memory, "SYNCBN_PEER_MEMORY", {None: True, "0": False, "1": True}),
        (settings.triton_interpreter, "TRITON_INTERPRET", {None: False, "0": False, "1": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_value(function, variable, values, monkeypatch):
    for value, expected in values.items():
        monkeypatch.delenv(variable, raising=False) if value is None else monkeypatch.setenv(variable, value)
        assert function() == expected


def test_kernels_that_there_are_not(monkeypatch):
    monkeypatch.setenv("SYNCBN_KERNELS", "fast")
    with pytest.raises(
        ValueError, match=r"SYNCBN_KERNELS must be one of \['auto', 'eager', 'triton'\].*Received: 'fast'\. Unset it"
    ):
        settings.kernels()
