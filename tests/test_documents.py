"""The documents beside the code: citation and hooks are valid, and what CONTRIBUTING and CHANGELOG name is there."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import yaml
from test_layout import APART, LAYERS

from pgp_hf import __version__

ROOT = Path(__file__).parents[1]
TOOLS = {"pre-commit"}  # commands that none of the package's extras brings


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


CONTRIBUTING, CHANGELOG = read("CONTRIBUTING.md"), read("CHANGELOG.md")
TEXT = re.sub(r"```.*?```", "", CONTRIBUTING, flags=re.DOTALL)
NAMED = sorted(set(re.findall(r"`([^`]+)`", TEXT)))
BLOCKS = re.findall(r"```bash\n(.*?)```", CONTRIBUTING, re.DOTALL)
PATHS = [one for one in NAMED if re.fullmatch(r"\.?[\w./-]+", one) and ("/" in one or one.startswith("."))]
STARTS = {"python", "ruff", "mypy", "pip", ".ci/run", ".ci/slow"}
COMMANDS = [one for one in NAMED if one.split()[0] in STARTS] + BLOCKS
IDENTIFIERS = [one for one in NAMED if re.fullmatch(r"_?[A-Za-z]\w*", one) and one not in STARTS]


@cache
def code() -> str:
    """All of the code but this file."""
    files = (file for folder in ("pgp_hf", "tests", "examples") for file in (ROOT / folder).rglob("*.py"))
    return "\n".join(file.read_text(encoding="utf-8") for file in files if file != Path(__file__))


def lacks(command: str) -> list[str]:
    """What a command line needs and does not find: programs, extras, files."""
    project = read("pyproject.toml")
    lacking = []
    for part in re.split(r"&&|\n", command):
        words = [word.removeprefix(".venv/bin/") for word in shlex.split(part)]
        if not words or words[0] in (".", "python3"):  # activating or making the environment
            continue
        program, *rest = words
        if program.startswith(".ci/"):
            lacking += [] if os.access(ROOT / program, os.X_OK) else [program]
        elif program not in TOOLS | {"pip", "python"} and f'"{program}>=' not in project:
            lacking.append(program)
        for word in rest:
            if extra := re.fullmatch(r"\.\[([\w-]+)\]", word):
                lacking += [] if f"\n{extra[1]} = [" in project else [word]
            elif "/" in word and not (ROOT / word).exists():
                lacking.append(word)
    return lacking


def test_what_is_missing_is_found():
    assert lacks("nosuchtool . && .ci/none") == ["nosuchtool", ".ci/none"]
    assert lacks("pip install -e '.[none]'\npython -m pytest tests/none") == [".[none]", "tests/none"]
    assert len(PATHS) > 30 and len(COMMANDS) > 8 and len(IDENTIFIERS) > 20


@pytest.mark.parametrize("path", PATHS)
def test_paths_exist(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist(command):
    assert not lacks(command)


def test_the_test_command_is_the_readmes():
    assert BLOCKS[0].strip() in read("README.md").splitlines()


def test_sections_that_are_named_exist():
    named = re.findall(r'"([^"]+)"\s+in\s+`([\w/]+\.md)`', CONTRIBUTING)
    assert named and not [(title, page) for title, page in named if f"\n## {title}\n" not in read(page)]
    assert "README's" not in CONTRIBUTING.replace("The README's command", "")


@pytest.mark.parametrize("name", IDENTIFIERS)
def test_names_are_those_of_the_code(name):
    if f'"{name.replace("_", "-")}' in read("pyproject.toml"):  # a dependency
        return
    assert re.search(rf"\b{name}\b", code())


def test_the_layout_is_the_tested_one():
    rows = re.search(r"## Layout\n.*?\n\| \| \|\n\|---\|---\|\n(.*?)\n\n", CONTRIBUTING, re.DOTALL)[1].splitlines()
    told = [{Path(one).stem for one in re.findall(r"`pgp_hf/([\w.]+)`", row)} for row in rows]
    alias, below = {"arguments"}, {"version", "fields", "push_options"}
    assert told[::-1] == [row for row in LAYERS if row not in (alias, below)]
    assert {"convert", "__init__", "__main__"} == APART and "`pgp_hf/convert.py` stands apart" in CONTRIBUTING


def test_bounded_dependencies_are_those_that_move_fast():
    bounded = re.search(r"^(.*?) move fast", CONTRIBUTING, re.DOTALL | re.MULTILINE)[1].rpartition("\n\n")[2]
    names = re.findall(r"`([\w-]+)`", bounded)
    assert len(names) == 5 and all(re.search(rf'"{name}>=[\d.]+,<[\d.]+"', read("pyproject.toml")) for name in names)


# ---- pages for users ---------------------------------------------------------------------------------------------------

PAGES = sorted(
    p for folder in ("", "examples", "model_cards") for p in (ROOT / folder).glob("**/*.md" if folder else "*.md")
)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "template.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:|#", link)]
    assert not [link for link in links if not (page.parent / link.partition("#")[0]).exists()]


def test_the_readme_is_read_in_five_minutes():
    assert len(read("README.md").split()) <= 1500


# ---- guarantees ------------------------------------------------------------------------------------------


def test_each_guarantee_has_its_test():
    page = read("examples/guides/guarantees.md")
    lines = [" ".join(item.split()) for item in re.findall(r"^- (?:.|\n(?=  ))*", page, re.MULTILINE)]
    assert 1 <= len(lines) <= 10
    for line in lines:
        file, _, test = re.fullmatch(r"- .*: `([\w/.]+)(::)(\w+)`", line).groups()
        assert re.search(rf"^def {test}\(", read(file), re.MULTILINE), line


# ---- the others ------------------------------------------------------------------------------------------------------


def test_citation():
    cited = yaml.safe_load(read("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors", "version", "license", "references"} <= cited.keys()
    assert (cited["cff-version"], cited["type"], cited["license"]) == ("1.2.0", "software", "Apache-2.0")
    assert str(cited["version"]) == __version__
    for paper in cited["references"]:
        assert paper["type"] == "conference-paper" and paper["conference"]["name"] and paper["year"] > 2020
        assert all(author.keys() == {"family-names", "given-names"} for author in paper["authors"])
    titles = [paper["title"] for paper in cited["references"]]
    assert [title.partition(":")[0] for title in titles] == [
        "Prompt Gradient Projection for Continual Learning",
        "Learning to Prompt for Continual Learning",
        "DualPrompt",
    ]


def test_hooks_run_what_ci_runs():
    hooks = [hook for repo in yaml.safe_load(read(".pre-commit-config.yaml"))["repos"] for hook in repo["hooks"]]
    assert all({"id", "name", "entry", "language"} <= hook.keys() for hook in hooks)
    assert {hook["language"] for hook in hooks} == {"system"} and not [hook for hook in hooks if lacks(hook["entry"])]
    ci = read(".ci/run")
    assert all(f'bin/{part}"' in ci for part in {hook["entry"].split()[0] for hook in hooks})
    strict = next(hook["entry"] for hook in hooks if "--strict" in hook["entry"])
    assert strict.removeprefix("mypy ") in ci and f"`{strict}`" in CONTRIBUTING


def test_moved_modules_are_where_the_changelog_says():
    rows = [row for row in re.findall(r"^  \| (.*) \| (.*) \|$", CHANGELOG, re.MULTILINE) if "pgp_hf." in row[1]]
    moved = [module for _, new in rows for module in re.findall(r"`(pgp_hf[\w.]+)`", new)]
    assert len(moved) > 30 and not [name for name in moved if importlib.util.find_spec(name) is None]


def test_the_changelog_tells_of_this_version():
    assert f"## [{__version__}]" in CHANGELOG
