"""The processes that torch's tests run on."""

from __future__ import annotations

import contextlib
import time

from worlds import TorchWorld


def after(seconds, said):
    time.sleep(seconds)
    return said


def test_an_answer_that_comes_late_is_not_taken_for_the_next_one():
    with contextlib.closing(TorchWorld(1)) as world:
        patience, world.timeout = world.timeout, 0.1
        world.send(0, after, 1.0, "late")
        assert world.receive(0) == (False, "no answer")
        world.timeout = patience
        assert world.run(after, common=(0.0, "in time")) == ["in time"]
