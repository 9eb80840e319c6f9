"""The demo on JAX, over host devices, and its sweep."""

from __future__ import annotations

import json

from demo_output import NORMS, OPTIONS, check_table, syncbn


def test_demo_shows_what_synchronising_does(tmp_path):
    code, text = syncbn("demo", "--backend", "jax", *OPTIONS, "--output", tmp_path)
    assert code == 0, text
    check_table(text)
    assert "Both are Keras layers." in text
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_sweep_keeps_rows_and_draws_them_again(tmp_path):
    words = ("demo", "--sweep", "--backend", "jax", "--replicas", 2, "--steps", 60, "--seeds", 2, "--output", tmp_path)
    code, text = syncbn(*words)
    assert code == 0, text
    path = tmp_path / "images-per-device.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {(r["norm"], r["images_per_device"], r["seed"]) for r in rows} == {
        (norm, size, seed) for norm in NORMS for size in (1, 2, 4, 8, 16) for seed in (0, 1)
    }
    assert {(r["steps"], r["devices"], r["backend"]) for r in rows} == {(60, 2, "jax")}
    # One value per channel after the dense layer: the local batch norm gives its offset, whatever the image.
    assert max(r["accuracy"] for r in rows if r["norm"] == "local" and r["images_per_device"] == 1) < 0.2
    assert min(r["accuracy"] for r in rows if r["norm"] != "local" and r["images_per_device"] == 16) > 0.5
    assert len({r["accuracy"] for r in rows if r["norm"] == "syncbn"}) > 5
    code, again = syncbn("demo", "--sweep", "--rows", path, "--output", tmp_path / "again")
    assert code == 0, again
    figure = "images-per-device.svg"
    assert (tmp_path / figure).read_text() == (tmp_path / "again" / figure).read_text()
    assert again.splitlines()[0].startswith("  1 images per device: local ")
    assert again.splitlines()[:5] == text.splitlines()[-7:-2]
