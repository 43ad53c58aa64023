"""experiments/fig5_qk_norm.py: what is seen of the attention, by closed forms, and one tiny run."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch

import mmdit
from mmdit import MMDiT, MMDiTConfig
from train import make_optimizers

FILE = Path(__file__).parents[1] / "experiments" / "fig5_qk_norm.py"
spec = importlib.util.spec_from_file_location("fig5", FILE)
fig5 = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fig5)

SIZES = dict(latent_channels=4, context_dim=8, pooled_dim=8, pos_embed_max_size=4)


def inputs(seed=0):
    """latent, t, context, pooled: 4 image tokens and 3 text tokens."""
    rng = torch.Generator().manual_seed(seed)
    return (torch.randn(2, 4, 4, 4, generator=rng), torch.tensor([0.2, 0.7]),
            torch.randn(2, 3, 8, generator=rng), torch.randn(2, 8, generator=rng))


def model(depth, qk_norm=True):
    network = MMDiT(MMDiTConfig(depth, qk_norm=qk_norm, **SIZES))
    network.initialize(torch.Generator().manual_seed(1))
    return network


@pytest.mark.parametrize("qk_norm", [True, False])
def test_hooks_catch_what_the_attention_of_the_last_blocks_gets(qk_norm, monkeypatch):
    given = []

    def attend(q, k, v):
        given.append((q, k))
        return v[:, :, : q.shape[2]]
    monkeypatch.setattr(mmdit, "attend", attend)
    network = model(3, qk_norm)
    pairs = fig5.queries_and_keys(network, 2, *inputs())
    assert len(pairs) == 2 and len(given) == 3
    for (q, k), (wanted_q, wanted_k) in zip(pairs, given[1:], strict=True):
        assert torch.equal(q, wanted_q) and torch.equal(k, wanted_k)
    assert pairs[0][0].shape == (2, 3, 7, 64) and pairs[1][0].shape == (2, 3, 4, 64)
    for module in network.modules():
        assert not module._forward_hooks                              # They are gone.


def test_logit_and_entropy_by_hand():
    """Logits log 3 and 0 are shares of .75 and .25. Equal ones have the entropy log(keys)."""
    q, k = torch.zeros(1, 1, 1, 64), torch.zeros(1, 1, 2, 64)
    q[..., 5], k[0, 0, 0, 5] = 8, math.log(3)
    logit, entropy = fig5.largest_logit_and_entropy(q, k)
    assert logit == pytest.approx(math.log(3))
    assert entropy == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    logit, entropy = fig5.largest_logit_and_entropy(torch.zeros(2, 3, 4, 64),
                                                    torch.randn(2, 3, 7, 64))
    assert logit == 0 and entropy == pytest.approx(math.log(7))


def test_qk_norm_bounds_logits_whatever_the_weights_are():
    """RMSNorm makes |q| = |k| = 8: q k / 8 is at most 8. Without, 10 x weights: 100 x logits."""
    largest = {}
    for qk_norm in (True, False):
        for factor in (1, 10):
            network = model(1, qk_norm)
            for name, parameter in network.named_parameters():
                if "qkv.weight" in name:
                    parameter.data *= factor
            q, k = fig5.queries_and_keys(network, 1, *inputs())[0]
            largest[qk_norm, factor] = fig5.largest_logit_and_entropy(q, k)[0]
    assert largest[True, 10] == pytest.approx(largest[True, 1], rel=1e-3)
    assert largest[True, 10] <= 8.0001
    assert largest[False, 10] == pytest.approx(100 * largest[False, 1], rel=1e-4)


def test_epsilon_halves_a_step_whose_gradient_has_its_size():
    """Gradients 1e-8 and 3e-8: epsilon 1e-8 takes 1/2 and 1/4 of the steps, 3/8 on average."""
    network = torch.nn.ParameterList([torch.zeros(1), torch.zeros(1), torch.zeros(5)])
    for epsilon, share in ((1e-8, 3 / 8), (1e-15, 0)):
        losses = torch.stack([2e-8 * network[0], 6e-8 * network[1]])  # their mean has half of it
        assert fig5.shortened_by(network, losses, epsilon) == pytest.approx(share, abs=1e-6)


def test_an_arm_trains_with_its_epsilon_and_the_resolution_doubles():
    options = fig5.Options(base_steps=7, steps=9, lr=0.5, base_lr=0.1)
    first = fig5.training_config(options, 3, 1e-15, doubled=False)
    later = fig5.training_config(options, 3, 1e-8, doubled=True)
    assert (first.resolution, first.steps, first.lr, first.seed) == (64, 7, 0.1, 3)
    assert (later.resolution, later.steps, later.lr) == (128, 9, 0.5)
    assert first.precision == later.precision == "bf16"
    for config, epsilon in ((first, 1e-15), (later, 1e-8)):
        optimizer, = make_optimizers(model(1), config)
        assert optimizer.defaults["eps"] == epsilon


def points(*values):
    return [dict(zip(("logit", "entropy", "validation"), value)) for value in values]


def seed(without, added, usual, normed=(8, 3.0, 1.0)):
    """What run_seed returns, with the last points of the arms."""
    found = {}
    for arm, last in zip(fig5.ARMS, (without, normed, added, usual), strict=True):
        first = (4 if arm == "without" else 2, 3.0, 1.5)
        found[arm] = {"points": points(first, last), "shortened_by": 1e-4}
    return found


@pytest.mark.parametrize("gains, verdict", [
    ([1.0, 1.5], "held"),
    ([1.0, 4.0], "cannot be told"),                                   # mean 2.5, but 3 between them
    ([-1.0, -1.5], "did not hold at this size"),
    ([-0.1, 3.0], "cannot be told"),
    ([2.0], "cannot be told"), ([math.nan, math.nan], "cannot be told"),
])
def test_seeds_must_agree_and_lie_closer_than_their_mean_is_large(gains, verdict):
    assert fig5.judge(gains) == verdict


def test_verdicts_by_hand():
    """Logits of 4 become 64 and 128: 4 and 5 doublings. With QK-norm they end at 8."""
    found = [seed((64, 2.0, 1.5), (16, 3, 1.1), (8, 3, 0.9)),
             seed((128, 1.9, 1.6), (16, 3, 1.0), (8, 3, 1.1))]
    rows = fig5.claims(found)
    assert [row["interval"] for row in rows] == [[4, 5], [3, 4], [1, 1.1], [0.5, 0.6], [2, 3],
                                                 [0.4, 0.6], [-0.1, 0.1]]
    assert [row["verdict"] for row in rows] == ["held"] * 6 + ["cannot be told"]
    assert rows[0]["here"] == "it doubles 4.50 times" and "0.01 %" in rows[6]["here"]
    calm = seed((7, 3.1, 0.9), (9, 3, 1.6), (8, 3, 1.3))
    verdicts = [row["verdict"] for row in fig5.claims([calm, calm])]
    assert verdicts == ["did not hold at this size"] * 6 + ["held"]
    assert {row["verdict"] for row in fig5.claims([calm])} == {"cannot be told"}


def test_a_model_that_diverged_has_the_loss_of_predicting_nothing():
    """Its last loss before that, .7, was lower than the 1.0 with QK-norm."""
    diverged = seed((64, 2.0, 0.7), (16, 3, 1.1), (8, 3, 0.9))
    assert fig5.claims([diverged] * 2)[3]["verdict"] == "did not hold at this size"
    diverged["without"]["stopped"] = "not finite at step 95"
    stability, _, adapted = fig5.claims([diverged] * 2)[3:6]
    assert (stability["interval"], stability["verdict"]) == ([1, 1], "held")
    assert adapted["interval"] == [0.9, 0.9]              # 1.5 - 1.1 - (1.5 - 2)


def test_a_tiny_run_writes_numbers_claims_and_the_figure(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", ["fig5_qk_norm.py"])
    out = tmp_path / "fig5.json"
    fig5.main(["--depth", "1", "--last-blocks", "1", "--resolution", "16", "--base-steps", "1",
               "--steps", "2", "--batch-size", "4", "--num-scenes", "64", "--seeds", "1",
               "--device", "cpu", "--out", str(out)])
    record = json.loads(out.read_text())
    arms = record["seeds"][0]
    assert list(arms) == list(fig5.ARMS) and len(record["claims"]) == 7
    for arm in arms.values():
        assert [point["step"] for point in arm["points"]] == [0, 1, 2] and not arm["stopped"]
        for point in arm["points"]:
            assert 0 < point["entropy"] <= math.log(44) + 1e-3        # 40 text tokens and 4 others
    assert out.with_suffix(".png").read_bytes()[1:4] == b"PNG"
    with pytest.raises(ValueError, match="--last-blocks 3 of --depth 2"):
        fig5.main(["--depth", "2", "--last-blocks", "3"])


def test_a_run_whose_numbers_stop_being_finite_is_a_result(monkeypatch):
    def diverge(model, loss, batches, config, run):
        run.done = 17
        raise RuntimeError("loss, gradient or weights are not finite at step 17")
    monkeypatch.setattr(fig5, "observe", lambda *_: {"logit": 1.0})
    monkeypatch.setattr(fig5, "fit", diverge)
    network = torch.nn.Linear(1, 1)
    world = fig5.World("cpu")
    config = fig5.training_config(fig5.Options(), 0, 1e-8, doubled=False)
    fake = type("Inputs", (), {"unseen": None, "batches": None})
    found, stopped = fig5.train(network, config, fake, world, 1)
    assert found == [{"step": 0, "logit": 1.0}] and stopped == "not finite at step 17"
