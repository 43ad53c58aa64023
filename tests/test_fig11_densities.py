"""experiments/fig11_densities.py: distribution functions and the test by hand, and one run."""

import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from flow import LogitNormal, density

FILE = Path(__file__).parents[1] / "experiments" / "fig11_densities.py"
spec = importlib.util.spec_from_file_location("fig11", FILE)
fig11 = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fig11)


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("name, t, share", [
    ("lognorm(0, 1)", 0.5, 0.5),
    ("lognorm(0, 1)", 0.7310586, 0.8413447),           # sigmoid(1), Phi(1)
    ("lognorm(1, 0.5)", 0.6224593, 0.1586553),         # sigmoid(.5), Phi(-1)
    ("cosmap", 0.5, 0.5),
    ("cosmap", 0.2928932, 0.25),                       # 1 - 1 / (tan(pi / 8) + 1)
    ("mode(1)", 0.6464466, 0.75),                      # f(.25; 1) = .75 - (.8535534 - .75)
    ("mode(0)", 0.3, 0.3),
])
def test_the_distribution_function_has_its_closed_form(name, t, share):
    assert fig11.distribution(density(name), numbers(t)).item() == pytest.approx(share, abs=1e-6)


def test_a_formula_that_is_one_per_cent_off_is_found():
    @dataclass(frozen=True)
    class Wrong(LogitNormal):
        def pdf(self, t):
            return 1.01 * super().pdf(t)
    assert fig11.formula_error(Wrong()) == pytest.approx(0.01 / 1.01, rel=1e-3)
    assert fig11.formula_error(LogitNormal()) < 1e-7


def test_chi_squared_of_a_coin_by_hand():
    """60 heads of 100: (10^2 + 10^2) / 50 = 4 with one degree of freedom, p = .0455."""
    largest, p_value = fig11.chi_squared(numbers(60, 40), numbers(0.5, 0.5))
    assert largest == pytest.approx(10 / 50**0.5)
    assert p_value == pytest.approx(0.0455, abs=5e-5)


def test_bins_that_expect_fewer_than_five_are_one_bin():
    """Expected 90, 4, 4 and 2 of 100: the last three make 10, where 15 were seen. p = .0956."""
    counts, shares = numbers(85, 5, 5, 5), numbers(0.9, 0.04, 0.04, 0.02)
    largest, p_value = fig11.chi_squared(counts, shares)
    assert largest == pytest.approx(5 / 10**0.5)
    assert p_value == pytest.approx(0.0956, abs=5e-5)                 # 25 / 90 + 25 / 10 = 2.78
    largest, _ = fig11.chi_squared(numbers(98, 1, 1), numbers(0.98, 0.01, 0.01))
    assert largest == 0                                               # 2 are too few for a bin


@pytest.mark.parametrize("name", ["mode(1.29)", "cosmap", "lognorm(0.5, 0.6)"])
def test_samples_pass_and_those_of_another_density_fail(name):
    rng = torch.Generator().manual_seed(3)
    counts = fig11.count_samples(density(name), 20000, 20, rng)
    assert counts.sum() == 20000
    shares = fig11.bin_shares(density(name), 20)
    assert shares.sum().item() == pytest.approx(1)
    assert fig11.chi_squared(counts, shares)[1] > 1e-3
    others = fig11.bin_shares(density("lognorm(0.1, 1)"), 20)
    assert fig11.chi_squared(counts, others)[1] < 1e-6


def test_claims_about_m_and_s_follow_the_samples():
    """With the two means exchanged, and equal spreads, both statements are false."""
    found = {"lognorm(-0.5, 1)": {"mean": 0.4}, "lognorm(0.5, 1)": {"mean": 0.6, "std": 0.2},
             "lognorm(0.5, 0.6)": {"std": 0.1}}
    assert [row[-1] for row in fig11.logit_normal_claims(found, 10**4)] == [True, True, True]
    found["lognorm(-0.5, 1)"]["mean"], found["lognorm(0.5, 1)"]["mean"] = 0.6, 0.4
    found["lognorm(0.5, 0.6)"]["std"] = 0.2
    assert [row[-1] for row in fig11.logit_normal_claims(found, 10**4)] == [True, False, False]


def test_a_wrong_density_and_wrong_samples_are_told():
    right = {"formula_error": 1e-8, "p_value": 0.5}
    for wrong, holds in (({}, [True, True]), ({"formula_error": 0.1}, [False, True]),
                         ({"p_value": 1e-6}, [True, False])):
        found = {"a": right, "b": right | wrong}
        assert [row[-1] for row in fig11.check_claims(found)] == holds


def test_a_run_writes_numbers_claims_and_the_figure(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", ["fig11_densities.py"])
    out = tmp_path / "fig11.json"
    fig11.main(["--quick", "--samples", "2000", "--out", str(out)])
    record = json.loads(out.read_text())
    assert len(record["densities"]) == 13 and len(record["claims"]) == 9
    assert {row["verdict"] for row in record["claims"]} == {"held"}
    assert record["densities"]["lognorm(0, 1)"]["mean"] == pytest.approx(0.5, abs=0.02)
    assert out.with_suffix(".png").read_bytes()[1:4] == b"PNG"
    with pytest.raises(ValueError, match="--samples 1 must be"):
        fig11.main(["--samples", "1"])
