"""experiments/fig6_shift.py: verdicts by hand, the shifts reach loss and sampler, one tiny run."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

FILE = Path(__file__).parents[1] / "experiments" / "fig6_shift.py"
spec = importlib.util.spec_from_file_location("fig6", FILE)
fig6 = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fig6)


def rows(plain, shifted, geneval=0.1):
    """What run_seed returns for the shifts 1, 1.5, 2, 3: CLIP score c, FID 10 - c, one GenEval."""
    found = []
    for trained, scores in ((1.0, plain), (3.0, shifted)):
        for shift, score in zip((1.0, 1.5, 2.0, 3.0), scores, strict=True):
            measures = {"clip_score": score, "fid": 10 - score, "geneval": geneval}
            found.append((trained, shift, measures))
    return found


def test_verdicts_by_hand():
    """Means above 1.5 less means up to it: 5.5 - 2 and 7.5 - 3, with the other seed 5.5 - 2.5."""
    seeds = [rows((1, 3, 5, 6), (2, 4, 7, 8)), rows((2, 3, 5, 6), (3, 4, 7, 8))]
    table = fig6.claims(seeds)
    assert [row["interval"] for row in table] == [
        [3, 4.5], [6, 7],                   # 8 - 1 and 8 - 2
        [3, 4.5], [6, 7],
        [0, 0], [0, 0],
        [2.5, 3.5]]                         # 5.5 - 1 - (6 - 5), and 5.5 - 2 - 1
    assert [row["verdict"] for row in table] == [*["held"] * 4, *["cannot be told"] * 2, "held"]
    assert table[0]["here"] == "gain +3.7500"
    fallen = [rows((6, 5, 3, 1), (8, 7, 4, 2)), rows((6, 5, 3, 1), (1, 2, 3, 9))]
    verdicts = [row["verdict"] for row in fig6.claims(fallen)]
    assert verdicts == [*["cannot be told"] * 6, "did not hold at this size"]      # 2 - 6 - 2
    fallen = [rows((6, 5, 3, 1), (8, 7, 4, 2))] * 2
    assert fig6.claims(fallen)[0]["verdict"] == "did not hold at this size"
    assert fig6.claims(seeds[:1])[0]["verdict"] == "held"        # two models with one seed
    assert fig6.claims(seeds[:1])[1]["verdict"] == "cannot be told"


def test_nothing_is_told_by_fog():
    """The same scores from pictures none of which shows what is asked."""
    seeds = [rows((1, 3, 5, 6), (2, 4, 7, 8), geneval=0.0)] * 2
    assert {row["verdict"] for row in fig6.claims(seeds)} == {"cannot be told"}


def test_training_draws_t_that_is_shifted_by_equation_23(monkeypatch):
    """u = 1/2 is t = 1/2 for the logit-normal, and 3 t / (1 + 2 t) = 3/4."""
    seen = []

    def fit(model, loss, batches, config, run):
        def network(z, t, context, pooled):
            seen.append(t.item())
            return z
        loss(network, batches)
    monkeypatch.setattr(fig6, "fit", fit)
    one = torch.ones(1, 1, 2, 2)
    batch = SimpleNamespace(latent=one, noise=-one, context=None, pooled=None,
                            uniform=torch.tensor([0.5]))
    for shift in (1.0, 3.0):
        config = fig6.TrainConfig(timestep_shift=shift, steps=1)
        fig6.train(None, SimpleNamespace(batches=batch), config, fig6.World("cpu"))
    assert seen == pytest.approx([0.5, 0.75])


def test_sampling_takes_its_steps_at_shifted_times():
    """Two steps visit t = 1 and 1/2, which alpha = 3 makes 3/4; guidance asks twice each time."""
    seen = []

    class Network(torch.nn.Module):
        config = SimpleNamespace(latent_channels=4, patch_size=2, pos_embed_max_size=8, depth=1)

        def forward(self, z, t, context, pooled, skip_layers=()):
            seen.append(t[0].item())
            return torch.zeros_like(z)

    class Text(torch.nn.Module):
        def forward(self, prompts, without=()):
            return torch.zeros(len(prompts), 1, 8), torch.zeros(len(prompts), 8)

        def unconditional(self, count):
            return self([""] * count)

    vae = SimpleNamespace(config=SimpleNamespace(downsampling=8),
                          decode=lambda z: torch.zeros(len(z), 3, 32, 32))
    inputs = SimpleNamespace(vae=vae, text=Text())
    options = fig6.Options(num_steps=2)
    for shift in (1.0, 3.0):
        drawn = fig6.draw(Network(), inputs, ["a", "b"], 32, shift, options, fig6.World("cpu"))
        assert np.shape(drawn) == (2, 32, 32, 3)
    assert seen == pytest.approx([1, 0.5, 1, 0.75])


def test_a_tiny_run_writes_numbers_claims_and_pictures(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", ["fig6_shift.py"])
    out = tmp_path / "fig6.json"
    fig6.main(["--depth", "1", "--resolution", "32", "--base-steps", "1", "--steps", "1",
               "--batch-size", "4", "--num-scenes", "64", "--num-prompts", "1", "--num-steps", "1",
               "--shifts", "1", "3", "--seeds", "1", "--device", "cpu", "--out", str(out)])
    record = json.loads(out.read_text())
    pairs = [[trained, shift] for trained, shift, _ in record["seeds"][0]]
    assert pairs == [[1, 1], [1, 3], [3, 1], [3, 3]] and len(record["claims"]) == 7
    for _, _, measures in record["seeds"][0]:
        assert -1 < measures["clip_score"] < 1 and measures["fid"] > 0
    for name in ("fig6.png", "fig6_samples.png"):
        assert (tmp_path / name).read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize("words, message", [
    (["--trained", "1", "1.5", "--shifts", "1", "1.5"], "some above it"),
    (["--shifts", "1", "2"], "two or more of"),
    (["--trained", "3"], "two or more of"),
])
def test_what_cannot_be_compared_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        fig6.read_options(fig6.Options, "", words, quick=fig6.QUICK, full=fig6.FULL)
