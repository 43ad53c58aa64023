"""experiments/table1_2_fig3_formulations.py: ranks by hand, the paper's numbers, one tiny run."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

FILE = Path(__file__).parents[1] / "experiments" / "table1_2_fig3_formulations.py"

# Table 1 and Table 2 as the paper prints them, in its words and its order.
TABLE_1 = """rf/lognorm(0.00,1.00) 1.54 1.25 1.50
rf/lognorm(1.00,0.60) 2.08 3.50 2.00
rf/lognorm(0.50,0.60) 2.71 8.50 1.00
rf/mode(1.29) 2.75 3.25 3.00
rf/lognorm(0.50,1.00) 2.83 1.50 2.50
eps/linear 2.88 4.25 2.75
rf/mode(1.75) 3.33 2.75 2.75
rf/cosmap 4.13 3.75 4.00
edm(0.00,0.60) 5.63 13.25 3.25
rf 5.67 6.50 5.75
v/linear 6.83 5.75 7.75
edm(0.60,1.20) 9.00 13.00 9.00
v/cos 9.17 12.25 8.75
edm/cos 11.04 14.25 11.25
edm/rf 13.04 15.25 13.25
edm(-1.20,1.20) 15.58 20.25 15.00"""
TABLE_2 = """rf 0.247 49.70 0.217 94.90
edm(-1.20,1.20) 0.236 63.12 0.200 116.60
eps/linear 0.245 48.42 0.222 90.34
v/cos 0.244 50.74 0.209 97.87
v/linear 0.246 51.68 0.217 100.76
rf/lognorm(0.50,0.60) 0.256 80.41 0.233 120.84
rf/mode(1.75) 0.253 44.39 0.218 94.06
rf/lognorm(1.00,0.60) 0.254 114.26 0.234 147.69
rf/lognorm(-0.50,1.00) 0.248 45.64 0.219 89.70
rf/lognorm(0.00,1.00) 0.250 45.78 0.224 89.91"""


@pytest.fixture(scope="module")
def table1():
    spec = importlib.util.spec_from_file_location("table1", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["table1"] = module                                    # dataclasses look it up there
    spec.loader.exec_module(module)
    return module


def test_the_papers_numbers_are_those_it_prints(table1):
    for printed, ours in ((TABLE_1, table1.PAPER_RANKS), (TABLE_2, table1.PAPER_METRICS)):
        expected = {}
        for line in printed.splitlines():
            name, *numbers = line.split()
            expected[name.replace(",", ", ")] = tuple(float(number) for number in numbers)
        assert ours == expected and list(ours) == list(expected)
    assert set(table1.PAPER_RANKS) | set(table1.PAPER_METRICS) < set(table1.FORMULATIONS)


def test_the_samplers_are_the_six_of_app_b3(table1):
    """50 steps with guidance 1.0, 2.5 and 5.0; 5, 10 and 25 steps with 5.0."""
    assert sorted(table1.SAMPLERS) == [(5, 5), (10, 5), (25, 5), (50, 1), (50, 2.5), (50, 5)]


def test_fronts_are_peeled_off_one_by_one(table1):
    """Score up, FID down: (3, 1) beats all, then two that beat each other in one thing each."""
    ranks = table1.non_dominated_ranks
    assert ranks([(3, 1), (2, 2), (1, 1.5), (1, 3)]) == [1, 2, 2, 3]
    assert ranks([(1, 1), (2, 2), (3, 3)]) == [1, 1, 1]
    assert ranks([(1, 3), (2, 2), (3, 1)]) == [3, 2, 1]
    assert ranks([(1, 2), (1, 1), (2, 2)]) == [2, 1, 1]
    assert ranks([(1, 1), (1, 1)]) == [1, 1] and ranks([]) == []


def test_ranks_are_means_over_settings_and_over_those_with_5_and_50_steps(table1):
    scores = {("0", "ema", 5, 5.0): {"a": (1, 2), "b": (2, 1)},
              ("0", "ema", 50, 5.0): {"a": (2, 1), "b": (1, 2)},
              ("0", "ema", 10, 5.0): {"a": (2, 1), "b": (1, 2)}}
    ranks = table1.mean_ranks(scores)
    assert list(ranks) == ["a", "b"]
    assert ranks["a"] == pytest.approx((4 / 3, 2, 1)) and ranks["b"] == pytest.approx((5 / 3, 1, 2))


# Ranks (all, 5 steps, 50 steps) in the order of the paper's Table 1.
AS_IN_THE_PAPER = {"rf/lognorm(0.00, 1.00)": (1.5, 1, 1.5), "rf/lognorm(0.50, 0.60)": (2.5, 5, 1),
                   "eps/linear": (3, 4, 3), "rf": (4, 3, 4), "edm(-1.20, 1.20)": (6, 6, 6)}
SLOPES = {"rf/lognorm(0.00, 1.00)": 0.1, "rf/lognorm(0.50, 0.60)": 0.2, "rf": 0.3,
          "eps/linear": 0.7, "edm(-1.20, 1.20)": 2.0}


def test_the_gains_of_the_claims_by_hand(table1):
    gains = {claim: gain for claim, _, gain in table1.gains(AS_IN_THE_PAPER, SLOPES)}
    assert gains == {
        "logit-normal ranks before uniform": 4 - 1.5,
        "rf/lognorm(0.00, 1.00) ranks first": 2.5 - 1.5,
        "only reweighted rf ranks before eps/linear": min(3 - 1.5, 4 - 3),
        "rectified flows degrade least with few steps": pytest.approx(0.7 - 0.3),
        "rf/lognorm(0.50, 0.60) is better with 50 steps than with 5": 5 - 1,
        "edm(-1.20, 1.20) ranks last": 6 - 4}
    turned = AS_IN_THE_PAPER | {"rf": (1, 1, 1), "edm(-1.20, 1.20)": (2, 2, 2)}
    gains = [gain for _, _, gain in table1.gains(turned, SLOPES | {"rf": 0.9})]
    assert gains == pytest.approx([-0.5, -0.5, -2, -0.2, 4, -1])
    assert list(table1.gains({"rf": (1, 1, 1)}, {"rf": 0})) == []


def test_a_verdict_needs_two_seeds_that_agree(table1):
    """FID doubles with 5 steps for rf and quadruples for eps/cos: the gain is one doubling."""
    def run(few):
        metrics = {f"ema {steps} {scale:g}": (0.3, 10) for steps, scale in table1.SAMPLERS}
        return {"metrics": metrics | {"ema 5 5": (0.3, few)}}
    runs = {"rf | 0": run(20), "eps/cos | 0": run(40)}
    claim, = table1.claims(runs)
    assert claim["claim"] == "rectified flows degrade least with few steps"
    assert (claim["here"], claim["interval"], claim["verdict"]) == ("gain +1.00", [1, 1],
                                                                   "cannot be told")
    claim, = table1.claims(runs | {"rf | 1": run(10), "eps/cos | 1": run(80)})
    assert (claim["interval"], claim["verdict"]) == ([1, 3], "held")
    claim, = table1.claims(runs | {"rf | 1": run(20), "eps/cos | 1": run(10)})
    assert (claim["interval"], claim["verdict"]) == ([-1, 1], "cannot be told")
    runs = {"eps/cos | 0": run(20), "rf | 0": run(40), "eps/cos | 1": run(20), "rf | 1": run(80)}
    claim, = table1.claims(runs)
    assert (claim["interval"], claim["verdict"]) == ([-2, -1], "did not hold at this size")


def test_the_loss_draws_t_from_the_density_of_the_formulation(table1):
    """The median of rf/lognorm(1.00, 0.60) is sigmoid(1) = .731."""
    seen = []

    def model(z, t, context, pooled):
        seen.append(t)
        assert (context, pooled) == ("context", "pooled")
        return torch.zeros_like(z)
    latent = torch.ones(2, 1, 2, 2)
    batch = SimpleNamespace(latent=latent, noise=-latent, context="context", pooled="pooled",
                            uniform=torch.full((2,), 0.5))
    form = table1.formulation("rf/lognorm(1.00, 0.60)")
    loss = table1.formulation_loss(model, batch, form)
    assert loss.tolist() == [4, 4]                                    # |eps - x_0|^2 = 2^2
    assert seen[0].tolist() == pytest.approx([0.731, 0.731], abs=5e-4)


def test_the_weights_kept_are_those_of_the_lowest_loss_of_the_average(table1):
    """The average has the losses 3, 1, 2 at steps 10, 20, 30. The model itself has others."""
    class Constant(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.value = torch.nn.Parameter(torch.zeros(()))

    def loss(network, latent, context, pooled, t, noise):
        at_the_end = 1000.0 * (t == 1)                                # t = 1 must not count
        return network.value.detach() + at_the_end + 0 * t
    model, average = Constant(), Constant()
    latent = torch.zeros(2, 1, 2, 2)
    unseen = SimpleNamespace(validation=lambda count: [(latent, None, None, latent)])
    best = table1.BestWeights(model, unseen, SimpleNamespace(loss=loss), torch.float32)
    for step, mean, raw in ((10, 3.0, 0.5), (20, 1.0, 7.0), (30, 2.0, 0.1)):
        average.value.data.fill_(mean)
        model.value.data.fill_(raw)
        entries, picture = best(average, step)
        assert entries == {"validation": mean} and picture is None
    assert (best.step, best.loss) == (20, 1.0)
    assert best.weights["ema"]["value"] == 1 and best.weights["raw"]["value"] == 7


def test_tables_leave_out_settings_that_some_formulation_lacks(table1, capsys):
    metrics = {}
    for weights in ("ema", "raw"):
        for steps, scale in table1.SAMPLERS:
            metrics[f"{weights} {steps} {scale:g}"] = [0.3, 40.0]
    better = {sampler: [0.4, 30.0] for sampler in metrics} | {"ema 5 5 literal": [0.4, 12.5]}
    runs = {"rf | 0": {"metrics": metrics}, "eps/cos | 0": {"metrics": better},
            "rf | 1": {"metrics": metrics}}
    assert len(table1.settings_of(runs)) == 12
    table1.print_tables(runs)
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert first.split() == ["eps/cos", *["1.00"] * 3, *["nan"] * 3, "0.400", *["30"] * 4, "12.5"]
    assert second.split() == ["rf", *["2.00"] * 3, "5.67", "6.50", "5.75", "0.300", *["40"] * 4,
                              "nan", "0.247", "49.7", "0.217", "94.9"]


def test_the_command_line(table1):
    def read(words):
        presets = {"quick": table1.QUICK, "full": table1.FULL}
        return table1.read_options(table1.Options, "", words, **presets)

    assert read([]).formulations == tuple(table1.PAPER_RANKS)
    assert read(["--quick", "--steps", "7"]).steps == 7
    assert read(["--quick"]).formulations == table1.QUICK["formulations"]
    assert len(read(["--formulations", "all"]).formulations) == 61
    assert read(["--full"]).batch_size == 256
    with pytest.raises(ValueError, match="no formulation is called 'rf/magic'"):
        read(["--formulations", "rf/magic"])
    with pytest.raises(ValueError, match="--samples 1 must be"):
        read(["--samples", "1"])


@pytest.mark.slow
def test_a_tiny_run_trains_samples_ranks_and_goes_on_where_it_stopped(tmp_path):
    def run(*formulations, steps=2):
        return subprocess.run(
            [sys.executable, FILE, "--formulations", *formulations, "--steps", str(steps),
             "--samples", "3", "--depth", "1", "--num-scenes", "64", "--batch-size", "4",
             "--device", "cpu", "--out", tmp_path / "t.json"], capture_output=True, text=True)
    result = run("v/cos")
    assert result.returncode == 0, result.stderr
    first = json.loads((tmp_path / "t.json").read_text())["runs"]
    assert len(first["v/cos | 0"]["metrics"]) == 12 + 4      # and 4 by literal Euler
    result = run("v/cos", "edm(0.00, 0.60)")
    assert result.returncode == 0 and "edm(0.00, 0.60) | 0: best step" in result.stdout
    assert "v/cos | 0: best" not in result.stdout
    second = json.loads((tmp_path / "t.json").read_text())["runs"]
    assert second["v/cos | 0"] == first["v/cos | 0"] and len(second) == 2
    assert (tmp_path / "t.png").read_bytes()[1:4] == b"PNG"
    result = run("rf", steps=3)
    assert result.returncode == 1 and "another --out" in result.stderr
