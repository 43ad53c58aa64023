"""mutation_check.py: do the tests notice when one line of a module is wrong?

Changes one thing in a module at a time (an arithmetic operator, a sign, a comparison, a constant),
runs the module's tests until the first failure, and lists the changes that no test noticed. Some of
those change no number that a caller could see. The others ask for a test. Tests that start another
process run the file as it is on the disk, so they notice nothing here.

Run         python bench/mutation_check.py flow                  every change; hours on one core
            python bench/mutation_check.py train --sample 60     60 of them, drawn by --seed
            python bench/mutation_check.py flow --lines 150-220 --tests "eq19 or eq20"
"""

import argparse
import ast
import os
import random
import sys
import time
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
NOT_CHECKED = {"demonstrate", "main"}                                 # Their output is to look at.

# The test files of a module, where tests/test_MODULE.py is not all.
TESTS = {
    "flow": ["flow", "formulations", "sample"],
    "formulations": ["formulations", "table1"],
    "mmdit": ["mmdit", "golden"],
    "vae": ["vae", "golden"],
    "text_encoders": ["text_encoders", "golden"],
    "checkpoints": ["checkpoints", "convert", "golden"],
    "convert": ["convert", "golden"],
    "data": ["data", "encode", "train"],
    "devices": ["devices", "train"],
    "train": ["train"],
}
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.MatMult: ast.Add, ast.Lt: ast.Gt,
    ast.Gt: ast.Lt, ast.LtE: ast.Lt, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
}


def changed(node):
    """The node that stands in a node's place, or None where nothing is changed."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return node.operand
    if isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
        others = [OPERATORS.get(type(op), type(op))() for op in node.ops]
        return ast.Compare(node.left, others, node.comparators)
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return ast.Constant(node.value + 1)
    if isinstance(node, ast.Constant) and type(node.value) is float:
        return ast.Constant(node.value * 1.1 or 0.1)
    return None


def places(node):
    """[(parent, field, index or None, child)] of all children that can be changed, in the order of
    the file. Formatted strings and the functions of NOT_CHECKED are left alone."""
    found = []
    for field, value in ast.iter_fields(node):
        several = isinstance(value, list)
        for index, child in enumerate(value if several else [value]):
            if not isinstance(child, ast.AST) or isinstance(child, ast.JoinedStr):
                continue
            if isinstance(child, ast.FunctionDef) and child.name in NOT_CHECKED:
                continue
            if changed(child) is not None:
                found.append((node, field, index if several else None, child))
            found += places(child)
    return found


def mutate(source: str, number: int):
    """(the module's tree with change `number`, its line, what was changed)."""
    tree = ast.parse(source)
    parent, field, index, old = places(tree)[number]
    new = ast.copy_location(changed(old), old)
    before = ast.unparse(old)
    if index is None:
        setattr(parent, field, new)
    else:
        getattr(parent, field)[index] = new
    return ast.fix_missing_locations(tree), old.lineno, f"{before}  ->  {ast.unparse(new)}"


def run_tests(name: str, tree, tests: str):
    """In a forked process: the tests with this tree as the module. Exits with 0 if they pass."""
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    status = 1
    try:
        module = types.ModuleType(name)
        module.__file__ = str(ROOT / f"{name}.py")
        sys.modules[name] = module
        exec(compile(tree, module.__file__, "exec"), module.__dict__)
        files = [str(ROOT / "tests" / f"test_{test}.py") for test in TESTS.get(name, [name])]
        options = ["-x", "-q", "-p", "no:cacheprovider", "-k", tests]
        status = int(pytest.main([*options, *files]) != 0)
    finally:
        os._exit(status)


def noticed(name: str, tree, limit_seconds: int, tests: str) -> bool:
    """Whether the tests fail with this tree as the module. A process is forked for it, so that
    torch is loaded once for all. A test that does not end is a failure too."""
    child = os.fork()
    if child == 0:
        run_tests(name, tree, tests)
    end = time.time() + limit_seconds
    while time.time() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status != 0
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return True


def main():
    """Change, test, list the survivors."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("module", help="a module of the project, for example flow")
    parser.add_argument("--sample", type=int, default=0, help="how many changes to try; 0: all")
    parser.add_argument("--lines", default="", help="FIRST-LAST: only changes in these lines")
    parser.add_argument("--tests", default="", help="only these tests, as for pytest -k")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit-seconds", type=int, default=300, help="for one run of the tests")
    options = parser.parse_args()
    name = options.module.removesuffix(".py")
    if not (ROOT / f"{name}.py").is_file():
        parser.error(f"there is no module {name}; give one such as flow, mmdit, train or data")
    torch.set_num_threads(1)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    source = (ROOT / f"{name}.py").read_text()
    if noticed(name, ast.parse(source), options.limit_seconds, options.tests):
        sys.exit(f"mutation_check.py: the tests of {name}.py fail, or last longer than "
                 f"--limit-seconds, before anything is changed; mend that first")
    all_places = places(ast.parse(source))
    numbers = list(range(len(all_places)))
    if options.lines:
        first, last = map(int, options.lines.split("-"))
        numbers = [n for n in numbers if first <= all_places[n][3].lineno <= last]
    total = len(numbers)
    if 0 < options.sample < total:
        numbers = sorted(random.Random(options.seed).sample(numbers, options.sample))
    survivors = 0
    for number in numbers:
        tree, line, what = mutate(source, number)
        if not noticed(name, tree, options.limit_seconds, options.tests):
            survivors += 1
            print(f"survived  {name}.py:{line}  {what}", flush=True)
    print(f"{len(numbers) - survivors} of {len(numbers)} changes noticed ({total} are possible)")


if __name__ == "__main__":
    main()
