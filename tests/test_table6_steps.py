"""experiments/table6_steps.py: its columns by hand, its bootstrap, one run on the shipped model."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import table6_steps as table6


def test_models_of_two_commands_are_not_compared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, steps in (("d1-0", 160), ("d2-0", 160), ("d12-0", 3000)):
        folder = tmp_path / "runs" / "fig8" / name
        folder.mkdir(parents=True)
        (folder / "model.safetensors").touch()
        (folder / "config.json").write_text(json.dumps({"train": {"steps": steps}}))
    with pytest.raises(ValueError, match="models of several commands"):
        table6.find_checkpoints(table6.Options())
    (folder / "model.safetensors").unlink()
    assert table6.find_checkpoints(table6.Options()) == ["runs/fig8/d1-0", "runs/fig8/d2-0"]


def test_columns_by_hand():
    """Scores .20, .24, .26, .25: 20 % and 4 % below the last, 4 % above it. A path of 12."""
    numbers = torch.tensor([0.20, 0.24, 0.26, 0.25, 12], dtype=torch.float64)
    assert table6.columns(numbers).tolist() == pytest.approx([20, 4, -4, 12])


def test_bootstrap_draws_the_same_prompts_for_all_depths():
    rng = torch.Generator().manual_seed(0)
    numbers = 1 + torch.rand(5, 40, generator=rng, dtype=torch.float64)
    longer = numbers.clone()
    longer[4] += 1
    samples = table6.bootstrap({2: numbers, 1: longer}, seed=0, repetitions=50)
    torch.testing.assert_close(samples[1][3] - samples[2][3], torch.ones(50, dtype=torch.float64))
    assert samples[1][3].std() > 0


def test_bootstrap_spreads_like_the_standard_error_of_a_mean():
    rng = torch.Generator().manual_seed(1)
    numbers = torch.ones(5, 100, dtype=torch.float64)
    numbers[4] = 50 + 3 * torch.randn(100, generator=rng, dtype=torch.float64)
    lengths = table6.bootstrap({1: numbers}, seed=0)[1][3]
    assert lengths.std().item() == pytest.approx(numbers[4].std().item() / 10, rel=0.05)
    low, high = table6.interval(lengths)
    assert high - low == pytest.approx(2 * 1.96 * numbers[4].std().item() / 10, rel=0.08)


def test_the_verdict_follows_the_interval_of_small_minus_large():
    table = {1: [4.0, 1, 0, 50], 3: [2.0, 2, 0, 40]}
    samples = {}
    for depth, row in table.items():
        samples[depth] = torch.tensor(row)[:, None].expand(4, 100)
    rows = table6.claims(table, samples)
    verdicts = [row["verdict"] for row in rows]
    assert verdicts == ["held", "did not hold at this size", "cannot be told", "held"]
    assert rows[3]["paper"] == "191.13 at depth 15, 185.96 at 38"


def test_no_models_end_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="fig8_table5_scaling.py first"):
        table6.main(["--quick"])


def test_main_measures_the_shipped_model(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    shipped = str(table6.ROOT / "pretrained" / "tiny")
    monkeypatch.chdir(tmp_path)
    table6.main(["--checkpoints", shipped, "--num-prompts", "2", "--out", "found.json"])
    found = json.loads(Path("found.json").read_text())
    assert len(found["table"]["4"]) == len(found["intervals"]["4"]) == 4
    assert found["table"]["4"][3] > 25             # The noise has the norm sqrt(16 * 8 * 8) = 32.
    assert [row["verdict"] for row in found["claims"]] == ["cannot be told"] * 4
    assert Path("found.png").stat().st_size > 5000
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert "paper, 38 2.71 0.14 0.08 185.96".split() in rows          # Table 6
