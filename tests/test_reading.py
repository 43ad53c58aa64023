"""README.md and READING.md name only what exists: files, functions, commands with their options."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "READING.md")


def defined_in(file):
    """The names that a module defines at its top level, and those of its classes' methods."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
    return names


def commands():
    """Every python command in the pages, as (page, script, options)."""
    found = []
    for page in PAGES:
        text = (ROOT / page).read_text().replace("\\\n", " ")
        pattern = r"(?:python|torchrun[^\n`|]*?)\s+((?:\w+/)*\w+\.py)([^\n`|#&]*)"
        for match in re.finditer(pattern, text):
            options = re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", match[2])
            found.append((page, match[1], tuple(options)))
    return sorted(set(found))


@pytest.mark.parametrize("page", PAGES)
def test_every_named_file_exists(page):
    text = (ROOT / page).read_text()
    for name in set(re.findall(r"`((?:\w+/)*\w+\.(?:py|md))[`:]", text)):
        beside = ROOT / "exercises" / name
        assert (ROOT / name).is_file() or beside.is_file(), f"{page} names {name}"
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (ROOT / link).exists(), f"{page} links to {link}"


@pytest.mark.parametrize("page", PAGES)
def test_every_named_function_exists(page):
    for file, names in re.findall(r"`((?:\w+/)*\w+\.py): ([\w, ]+)`", (ROOT / page).read_text()):
        missing = set(names.split(", ")) - defined_in(file)
        assert not missing, f"{page} names {missing} of {file}"


@pytest.mark.parametrize("script", sorted({script for _, script, _ in commands()}))
def test_every_named_option_exists(script):
    """`--help` of each script names every option that the pages give it."""
    wanted = {option for _, name, options in commands() if name == script for option in options}
    if not wanted:
        assert (ROOT / script).is_file()
        return
    command = [sys.executable, script, "--help"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    known = set(re.findall(r"--[a-z][a-z0-9-]*", run.stdout))
    assert wanted <= known, f"{script} does not know {wanted - known}"


def test_every_exercise_is_in_the_reading_order():
    named = set(re.findall(r"`(\d\d_\w+\.py)`", (ROOT / "READING.md").read_text()))
    assert named == {path.name for path in (ROOT / "exercises").glob("[0-9]*.py")}


def test_the_claims_are_those_of_the_results():
    """READING.md has the table that experiments/claims.py makes of results/*.json, no other."""
    command = [sys.executable, "experiments/claims.py"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() in (ROOT / "READING.md").read_text()
