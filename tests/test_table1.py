"""experiments/table1_flows.py: ranks on hand-made fronts, the tables of a small record, and one tiny run of the whole."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "experiments" / "table1_flows.py"


@pytest.fixture(scope="module")
def table1():
    spec = importlib.util.spec_from_file_location("table1_flows", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_fronts_are_peeled_off_one_by_one(table1):
    """Score up, FID down: (3, 1) beats all, then two that beat each other in one thing each, then the rest."""
    assert table1.non_dominated_ranks([(3, 1), (2, 2), (1, 1.5), (1, 3)]) == [1, 2, 2, 3]
    assert table1.non_dominated_ranks([(1, 1), (2, 2), (3, 3)]) == [1, 1, 1]
    assert table1.non_dominated_ranks([(1, 3), (2, 2), (3, 1)]) == [3, 2, 1]
    assert table1.non_dominated_ranks([(1, 2), (1, 1), (2, 2)]) == [2, 1, 1]
    assert table1.non_dominated_ranks([(1, 1), (1, 1)]) == [1, 1]
    assert table1.non_dominated_ranks([]) == []
    assert table1.non_dominated_ranks([(float("nan"), 1), (1, 2), (0.5, float("inf"))]) == [2, 1, 2]


def test_the_order_is_compared_with_the_papers_pair_by_pair(table1):
    """Paper: rf/lognorm(0.00, 1.00), eps/linear, rf. Here rf is first: two of three pairs are the other way."""
    ranks = {"rf": (1,), "rf/lognorm(0.00, 1.00)": (2,), "eps/linear": (3,), "eps/cos": (4,)}
    assert table1.agreement(ranks).startswith("rf/lognorm(0.00, 1.00) is number 2 of 4; 1 of 3 pairs")
    assert table1.agreement({"rf": (1,), "eps/linear": (1,)}) == \
        "rf/lognorm(0.00, 1.00) is not among them; 0 of 0 pairs of variants come in the paper's order."


def test_ranks_are_means_over_settings_and_over_those_with_5_and_50_steps(table1):
    setting = lambda steps, kind="ema": ("scenes", kind, steps, "5", "0")
    scores = {setting(5): {"a": (1, 2), "b": (2, 1)}, setting(50): {"a": (2, 1), "b": (1, 2)},
              setting(10): {"a": (2, 1), "b": (1, 2)}}
    ranks = table1.rank_table(scores)
    assert list(ranks) == ["a", "b"]
    assert ranks["a"] == pytest.approx((4 / 3, 2, 1)) and ranks["b"] == pytest.approx((5 / 3, 1, 2))


def test_the_paper_prints_16_rows_and_we_know_their_names(table1):
    from flow import FORMULATIONS
    assert len(table1.PAPER_RANKS) == 16 and set(table1.PAPER_RANKS) | set(table1.PAPER_METRICS) < set(FORMULATIONS)
    order = [ranks[0] for ranks in table1.PAPER_RANKS.values()]
    assert order == sorted(order) and len(table1.SAMPLERS) == 6


def test_tables_leave_out_settings_that_some_formulation_lacks(table1, tmp_path):
    seconds = {"training_seconds": 30, "sampling_seconds": 10}
    metrics = {f"{kind} {steps} {scale:g}": [0.3, 40.0] for kind in table1.WEIGHTS for steps, scale in table1.SAMPLERS}
    better = {name: [0.4, 30.0] for name in metrics}
    runs = {"scenes | rf | 0": {"metrics": metrics, **seconds}, "scenes | eps/cos | 0": {"metrics": better, **seconds},
            "x | rf | 0": {"metrics": metrics, **seconds}}
    record = {"runs": runs, "command": "c", "settings": {"steps": 1, "batch_size": 2, "depth": 1, "samples": 4}}
    table1.write_tables(record, tmp_path / "t.md")
    text = (tmp_path / "t.md").read_text()
    assert "2 formulations, 12 control settings (scenes; 1 seed(s))" in text
    assert "2 minutes on ?: 30 s of training and 10 s of sampling" in text
    assert "| eps/cos | 1.00 | 1.00 | 1.00 |  |  |  |" in text
    assert "| rf | 2.00 | 2.00 | 2.00 | 5.67 | 6.50 | 5.75 |" in text
    assert "| rf | 0.300 | 40 | 0.247, 49.7, 0.217, 94.9 |" in text


@pytest.mark.slow
def test_a_tiny_run_trains_samples_ranks_and_goes_on_where_it_stopped(tmp_path):
    def run(*formulations):
        return subprocess.run([sys.executable, FILE, "--formulations", *formulations, "--steps", "2", "--samples", "3", "--depth",
                               "1", "--num-scenes", "16", "--batch-size", "4", "--out", tmp_path / "t.json"],
                              capture_output=True, text=True)
    assert run("rf").returncode == 0
    first = json.loads((tmp_path / "t.json").read_text())["runs"]
    result = run("rf", "edm(0.00, 0.60)")
    assert result.returncode == 0 and "scenes | edm(0.00, 0.60) | 0: best step" in result.stdout
    assert "scenes | rf" not in result.stdout
    second = json.loads((tmp_path / "t.json").read_text())["runs"]
    assert second["scenes | rf | 0"] == first["scenes | rf | 0"] and len(second) == 2
