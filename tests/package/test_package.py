"""What `python -m build` made: `make package` runs this."""

from __future__ import annotations

import email
import re
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import syncbn

ROOT = Path(__file__).parents[2]
VERSION = syncbn.__version__
HOME = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Homepage"]
SOURCES = {f"syncbn/{p.relative_to(ROOT / 'src' / 'syncbn')}" for p in (ROOT / "src" / "syncbn").rglob("*.py")} | {
    "syncbn/py.typed"
}


def only(pattern):
    found = list((ROOT / "dist").glob(pattern))
    assert len(found) == 1, f"{pattern}: {found}. `make package` makes it."
    return found[0]


@pytest.fixture(scope="module")
def wheel():
    with zipfile.ZipFile(only("*.whl")) as file:
        yield file


@pytest.fixture(scope="module")
def sdist():
    with tarfile.open(only("*.tar.gz")) as file:
        yield {name.partition("/")[2] for name in file.getnames()}


@pytest.fixture(scope="module")
def metadata(wheel):
    return email.message_from_string(wheel.read(f"syncbn-{VERSION}.dist-info/METADATA").decode())


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    info = f"syncbn-{VERSION}.dist-info/"
    about = {info + name for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    assert set(wheel.namelist()) == SOURCES | about


def test_the_sdist_holds_the_source_and_the_pages(sdist):
    assert {f"src/{name}" for name in SOURCES} <= sdist
    others = {name for name in sdist if not name.startswith("src/")}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "SECURITY.md", "pyproject.toml", "PKG-INFO"} <= others
    allowed = re.compile(
        r"(docs/[\w/.-]+\.(md|css|py)|examples/\w+\.(py|md)|[A-Z]+\.md|LICENSE|CITATION\.cff|PKG-INFO|pyproject\.toml|\.gitignore)$"
    )
    assert not [name for name in others if not allowed.match(name)]


def test_every_link_of_the_text_is_absolute(metadata):
    text = metadata.get_payload()
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert links
    assert not [link for link in links if not link.startswith(("https://", "#"))]
    assert not [link for link in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text) if link.endswith(".svg")]


def test_what_links_lead_to_is_there(metadata):
    for link in re.findall(r"\]\(([^)\s]+)\)", metadata.get_payload()):
        for base in (f"{HOME}/blob/main/", HOME.replace("github.com", "raw.githubusercontent.com") + "/main/"):
            if link.startswith(base):
                assert (ROOT / link.removeprefix(base).partition("#")[0]).exists(), link


def test_the_metadata(metadata):
    assert (metadata["Version"], metadata["License-Expression"], metadata["Requires-Python"]) == (VERSION, "Apache-2.0", ">=3.11")
    assert {url.partition(",")[0] for url in metadata.get_all("Project-URL")} >= {
        "Homepage",
        "Documentation",
        "Changelog",
        "Issues",
    }
    assert {"Typing :: Typed", *(f"Programming Language :: Python :: 3.{n}" for n in (11, 12, 13))} <= set(
        metadata.get_all("Classifier")
    )
    assert not [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r], "nothing is needed without an extra"


def test_the_version_stands_in_one_place_and_in_the_changelog():
    assert re.search(rf"^## {re.escape(VERSION)}\b", (ROOT / "CHANGELOG.md").read_text(), re.M)
    for name in ("pyproject.toml", "CITATION.cff", "README.md"):
        assert not re.search(rf"(?<![\d.]){re.escape(VERSION)}(?![\d.])", (ROOT / name).read_text()), name
    assert (ROOT / "CITATION.cff").read_text().count(HOME) == 2


def test_the_floors_are_those_of_the_oldest_environments():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for framework in ("tensorflow", "jax", "torch"):
        pins = dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "constraints" / f"oldest-{framework}.txt").read_text(), re.M))
        for package, floor in (requirement.split(">=") for requirement in extras[framework]):
            pin = pins.get(package) or pins[f"{package}-cpu"]
            assert pin == floor or pin.startswith(f"{floor}."), (framework, package, pin, floor)
