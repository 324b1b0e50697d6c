"""Do the pages lead where they say, and is every page of results listed?"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / ".github/CONTRIBUTING.md", *sorted(RESULTS.glob("*.md"))]


def anchors(page: Path) -> set[str]:
    """The names that headings have as targets of links."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files_and_headings(page):
    for link in links(page):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_every_page_of_results_is_listed():
    listed = set(links(RESULTS / "README.md"))
    assert {page.name for page in RESULTS.glob("*.md")} - {"README.md"} == listed


def test_every_picture_is_shown():
    shown = {link for page in RESULTS.glob("*.md") for link in links(page)}
    assert {picture.name for picture in RESULTS.glob("*.png")} <= shown


def commands() -> list[tuple[str, list[str]]]:
    """(program, flags) of every command of the README that runs one of ours."""
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    found = re.findall(r"^(?:python -m (experiments\.\w[\w.]*)|sbatch .*train\.sbatch)(.*)$", text, re.MULTILINE)
    return [(name or "experiments.train", re.findall(r"--(\w+)", rest.split("#")[0])) for name, rest in found]


@pytest.mark.parametrize("program, flags", commands())
def test_commands_of_the_readme_have_programs_and_flags(program, flags):
    source = (ROOT / program.replace(".", "/")).with_suffix(".py").read_text()
    if program == "experiments.launch.local":  # what it does not know goes to the run
        source += (ROOT / "experiments/train.py").read_text()
    missing = [flag for flag in flags if f'"{flag}"' not in source]
    assert not missing, f"{program} has no --{missing[0]}"


def test_configs_of_the_readme_exist():
    named = set(re.findall(r"--config=(\w+)", (ROOT / "README.md").read_text()))
    assert named and named <= {file.stem for file in (ROOT / "experiments/configs").glob("*.py")}
