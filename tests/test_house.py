"""The order of the files: who may import whom, and how wide a line may be."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(ROOT.glob("*.py"))
LAYERS = [{"flow", "mmdit", "vae", "text_encoders", "scenes", "devices", "options"},
          {"formulations", "data", "checkpoints", "batches"},
          {"convert", "encode", "recipe", "run_folder", "metrics"},
          {"sample", "report"},
          {"geneval"},
          {"train", "evaluate"}]


def imported(file):
    """Names of the modules that a file imports, also within functions."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def layer(name):
    """The number of its layer. KeyError where the table above does not know it."""
    for number, names in enumerate(LAYERS):
        if name in names:
            return number
    raise KeyError(f"{name}.py is in no layer; add it to LAYERS")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_imports_only_what_lies_below_it(file):
    ours = {other.stem for other in FILES}
    lowest = layer(file.stem)
    for name in imported(file) & ours:
        assert layer(name) < lowest, f"{file.stem} imports {name}"


def test_train_and_sample_never_import_what_only_the_study_needs():
    for name in ("train", "sample"):
        assert not imported(ROOT / f"{name}.py") & {"formulations", "evaluate", "metrics", "report"}


def test_the_parts_of_the_paper_know_nothing_of_each_other():
    ours = {other.stem for other in FILES}
    for name in LAYERS[0]:
        assert not imported(ROOT / f"{name}.py") & ours, name


def test_only_devices_knows_torch_distributed():
    knowing = [file.stem for file in FILES if "torch.distributed" in file.read_text()]
    assert knowing == ["devices"]


def test_lines_have_at_most_100_columns():
    for folder in (".", "tests", "experiments", "bench", "exercises", "pretrained"):
        for file in (ROOT / folder).glob("*.py"):
            for number, line in enumerate(file.read_text().splitlines(), 1):
                assert len(line) <= 100, f"{file.name}:{number}"
