"""experiments/table6_steps.py: its columns by hand, its bootstrap, one run on the shipped model."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sample

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import table6_steps as table6


def test_columns_by_hand():
    """Scores .20, .24, .25, .25: 20 %, 4 % and 0 % below the last. A path of 12 over 10."""
    numbers = torch.tensor([0.20, 0.24, 0.25, 0.25, 12, 10], dtype=torch.float64)
    assert table6.columns(numbers).tolist() == pytest.approx([20, 4, 0, 12, 1.2])


def test_bootstrap_draws_the_same_prompts_for_all_depths():
    rng = torch.Generator().manual_seed(0)
    numbers = 1 + torch.rand(6, 40, generator=rng, dtype=torch.float64)
    longer = numbers.clone()
    longer[4] += 1
    samples = table6.bootstrap({2: numbers, 1: longer}, seed=0, repetitions=50)
    torch.testing.assert_close(samples[1][3] - samples[2][3], torch.ones(50, dtype=torch.float64))
    assert samples[1][3].std() > 0


def test_bootstrap_spreads_like_the_standard_error_of_a_mean():
    rng = torch.Generator().manual_seed(1)
    numbers = torch.ones(6, 100, dtype=torch.float64)
    numbers[4] = 50 + 3 * torch.randn(100, generator=rng, dtype=torch.float64)
    lengths = table6.bootstrap({1: numbers}, seed=0)[1][3]
    assert lengths.std().item() == pytest.approx(numbers[4].std().item() / 10, rel=0.05)
    low, high = table6.interval(lengths)
    assert high - low == pytest.approx(2 * 1.96 * numbers[4].std().item() / 10, rel=0.08)


def test_the_verdict_follows_the_interval_of_small_minus_large():
    table = {1: [4.0, 1, 0, 50], 3: [2.0, 2, 0, 40]}
    ones = torch.ones(5, 100)
    samples = {1: ones * torch.tensor([[4.0], [1], [0], [50], [1]]),
               3: ones * torch.tensor([[2.0], [2], [0], [40], [1]])}
    rows = table6.claims(table, samples)
    verdicts = [row["verdict"] for row in rows]
    assert verdicts == ["held", "did not hold at this size", "cannot be told", "held"]
    assert rows[3]["paper"] == "191.13 at depth 15, 185.96 at 38"


@pytest.fixture(scope="module")
def pipeline():
    return sample.load(device="cpu", precision="fp32")


@pytest.mark.parametrize("num_steps", [1, 7])
def test_a_constant_velocity_has_a_straight_path_of_its_own_length(pipeline, num_steps):
    """v is 0.5 everywhere: from t = 1 to 0 the path is |v| = .5 sqrt(16 * 8 * 8) = 16 long."""
    class Constant:
        config = pipeline.mmdit.config

        def __call__(self, z, t, context, pooled):
            return torch.full_like(z, 0.5)

    settings = replace(sample.Settings(**pipeline.defaults), num_steps=num_steps)
    straight = replace(pipeline, mmdit=Constant())
    pictures, lengths, distances = table6.draw(straight, ["a red circle"], 0, settings)
    assert pictures[0].size == (64, 64)
    assert lengths.item() == pytest.approx(16, rel=1e-4)
    assert distances.item() == pytest.approx(16, rel=1e-4)


def test_pictures_are_those_that_sample_draws_and_their_paths_are_bent(pipeline):
    settings = replace(sample.Settings(**pipeline.defaults), num_steps=4)
    prompts = ["a red circle", "two blue squares"]
    pictures, lengths, distances = table6.draw(pipeline, prompts, 5, settings)
    expected = sample.generate(pipeline, prompts, 5, num_steps=4)
    for ours, theirs in zip(pictures, expected, strict=True):
        assert ours.tobytes() == theirs.tobytes()
    assert (lengths > distances).all()


def test_no_models_end_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="fig8_table5_scaling.py first"):
        table6.main(["--quick"])


def test_main_measures_the_shipped_model(tmp_path, monkeypatch, capsys):
    shipped = str(table6.ROOT / "pretrained" / "tiny")
    monkeypatch.chdir(tmp_path)
    table6.main(["--checkpoints", shipped, "--num-prompts", "2", "--out", "found.json"])
    found = json.loads(Path("found.json").read_text())
    assert len(found["table"]["4"]) == len(found["intervals"]["4"]) == 5
    assert found["table"]["4"][4] > 1                                 # longer than a straight line
    assert [row["verdict"] for row in found["claims"]] == ["cannot be told"] * 4
    assert Path("found.png").stat().st_size > 5000
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert "paper, 38 2.71 0.14 0.08 185.96".split() in rows          # Table 6
