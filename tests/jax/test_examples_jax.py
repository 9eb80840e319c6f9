"""What docs/jax.md shows and the examples for JAX: each runs, and trains on several devices what it trains on one."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import jax
import keras
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = {"flax_nnx": "flax", "flax_linen": "flax", "haiku_module": "haiku", "equinox_module": "equinox"}


def arrays(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.filterwarnings("error:.*trains inside a map")
def test_an_example_on_4_devices_equals_one_device(name, capsys):
    pytest.importorskip(EXAMPLES[name])
    train = runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")["train"]
    found = re.fullmatch(r"8 devices and one device end up (\S+) apart\n", capsys.readouterr().out)
    assert float(found[1]) < 2e-5
    x = np.random.default_rng(0).normal(size=(32, 8)).astype("float32") * np.linspace(1, 3, 32)[:, None].astype("float32")
    y = np.sin(x.sum(1, keepdims=True))
    many, one, start = (arrays(train(*a)) for a in ((4, x, y), (1, x, y), (1, x, y, 0)))
    assert len(one) >= 8
    for a, b, c in zip(many, one, start, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
        assert not np.array_equal(b, c), "nothing was learned"


def test_the_blocks_of_the_page_run_in_order():
    text = (ROOT / "docs" / "jax.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    names = {}
    try:
        for block in blocks:
            exec(block, names)
    finally:
        keras.distribution.set_distribution(None)
    assert len(blocks) == 3
    assert names["count"].shape == (4,)
    assert names["count"][0] == names["mask"][:3].sum()
    assert len(names["statistics"]) == 2
    assert np.abs(names["statistics"][0]).min() > 0


def test_every_example_for_jax_is_run():
    shown = set(re.findall(r"\.\./examples/(\w+)\.py", (ROOT / "docs" / "jax.md").read_text()))
    assert shown == set(EXAMPLES)
