"""mutation_check.py: do the tests of flow.py notice when an equation is wrong?

Changes one thing in flow.py at a time (an arithmetic operator, a sign, a comparison, a constant), runs tests/test_flow.py
until the first failure, and lists the changes that no test noticed. Some of those are equivalent: they change no number that
the paper or a caller could see; the others ask for a test.

Run         python experiments/mutation_check.py                   every change; hours on one core
            python experiments/mutation_check.py --sample 60       60 of them, drawn by --seed
            python experiments/mutation_check.py --lines 150-220 --tests "eq19 or eq20"     in some lines, by some tests
"""

import argparse
import ast
import copy
import os
import random
import sys
import time
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
NOT_CHECKED = {"demonstrate", "main"}                                 # the demonstration's looks
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult, ast.MatMult: ast.Add,
             ast.Lt: ast.Gt, ast.Gt: ast.Lt, ast.LtE: ast.Lt, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}


def changes_of(node):
    """The nodes that may stand in a node's place: [(node, what changed)]."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return [ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return [node.operand]
    if isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
        return [ast.Compare(node.left, [OPERATORS[type(op)]() for op in node.ops], node.comparators)]
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return [ast.Constant(node.value + 1 if isinstance(node.value, int) else node.value * 1.1 or 0.1)]
    return []


def mutants(tree):
    """Paths to every node that can be changed, as (parent, field, index, new node, line): strings are left alone."""
    found = []

    def visit(node):
        for name, value in ast.iter_fields(node):
            for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if not isinstance(child, ast.AST) or isinstance(child, ast.JoinedStr):
                    continue
                if isinstance(child, ast.FunctionDef) and child.name in NOT_CHECKED:
                    continue
                found.extend((node, name, index, new, child) for new in changes_of(child))
                visit(child)
    visit(tree)
    return found


def mutate(tree, mutant):
    """(source of a copy of flow.py with one change, the changed line before and after)."""
    parent, name, index, new, old = mutant
    new = ast.copy_location(new, old)
    holder = getattr(parent, name)
    if index is None:
        setattr(parent, name, new)
    else:
        holder[index] = new
    changed = ast.fix_missing_locations(copy.deepcopy(tree))
    if index is None:
        setattr(parent, name, old)
    else:
        holder[index] = old
    return changed, f"{ast.unparse(old)}  ->  {ast.unparse(new)}"


def noticed(tree, limit_seconds: int, tests: str) -> bool:
    """Whether the tests (all, or those that `pytest -k tests` chooses) fail with this flow.py, in a process of its own, so that
    torch is loaded only once."""
    child = os.fork()
    if child == 0:
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        status = 1
        try:
            module = types.ModuleType("flow")
            module.__file__ = str(ROOT / "flow.py")
            sys.modules["flow"] = module
            exec(compile(tree, "flow.py", "exec"), module.__dict__)
            arguments = ["-x", "-q", "-p", "no:cacheprovider", "-k", tests, str(ROOT / "tests" / "test_flow.py")]
            status = int(pytest.main(arguments) != 0)
        finally:
            os._exit(status)
    end = time.time() + limit_seconds
    while time.time() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status != 0
        time.sleep(0.02)
    os.kill(child, 9)                                                             # an endless loop is noticed as well
    os.waitpid(child, 0)
    return True


def main():
    """Change, test, list the survivors."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sample", type=int, default=0, help="how many changes to try; 0: all")
    parser.add_argument("--lines", default="", help="FIRST-LAST: only changes in these lines of flow.py")
    parser.add_argument("--tests", default="", help="only these tests, as for pytest -k; a survivor may fall to others")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit-seconds", type=int, default=180, help="for one run of the tests")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    tree = ast.parse((ROOT / "flow.py").read_text())
    if noticed(tree, options.limit_seconds, options.tests):
        sys.exit("mutation_check.py: tests/test_flow.py fails as it is; mend that first")
    found = mutants(tree)
    if options.lines:
        first, last = map(int, options.lines.split("-"))
        found = [mutant for mutant in found if first <= mutant[-1].lineno <= last]
    total = len(found)
    if options.sample and options.sample < total:
        found = sorted(random.Random(options.seed).sample(found, options.sample), key=lambda mutant: mutant[-1].lineno)
    survivors = 0
    for mutant in found:
        changed, what = mutate(tree, mutant)
        if not noticed(changed, options.limit_seconds, options.tests):
            survivors += 1
            print(f"survived  flow.py:{mutant[-1].lineno}  {what}", flush=True)
    print(f"{len(found) - survivors} of {len(found)} changes noticed ({total} are possible)")


if __name__ == "__main__":
    main()
