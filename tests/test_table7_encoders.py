"""experiments/table7_encoders.py: what is exact, times by a false clock, verdicts, one tiny run."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

from mmdit import MMDiTConfig
from text_encoders import CLIPConfig, T5Config, TextConfig
from vae import VAEConfig

FILE = Path(__file__).parent.parent / "experiments" / "table7_encoders.py"
spec = importlib.util.spec_from_file_location("table7_encoders", FILE)
table7 = importlib.util.module_from_spec(spec)
spec.loader.exec_module(table7)


def test_storage_is_the_papers():
    """App. E.1, Table 7: 65.5, 121.3, 202.2 and 630.7 kB. The last is 630.784, cut off by them."""
    stored = table7.stored_bytes(VAEConfig(), TextConfig(), 256)
    assert stored == {"vae": 65536, "clip_l": 121344, "clip_g": 202240, "t5": 630784}


def test_memory_and_growth_are_the_papers():
    """Table 7 itself: 2.45 ms a sample and batch 32 are 13.8 % of a step of 568 ms."""
    networks = table7.papers_networks()
    stored = table7.stored_bytes(VAEConfig(), TextConfig(), 256)
    seconds = {}
    for name, numbers in table7.PAPER.items():
        seconds[name] = [32e-3 * numbers[1]]
    grown = table7.growth(seconds, [0.568])
    rows = table7.table(networks, stored, seconds, grown, 32)
    for name, row in rows.items():
        memory, milliseconds, storage, growth = table7.PAPER[name]
        assert row["memory_gb"] == pytest.approx(memory, abs=0.005)
        assert row["storage_kb"] == pytest.approx(storage, abs=0.1)
        assert row["ms_per_sample"] == pytest.approx(milliseconds)
        assert row["step_grows_percent"] == pytest.approx(growth, abs=0.1)
    assert grown["all"][0] == pytest.approx(130.3, abs=0.1)


def test_equal_layers_are_timed_by_the_difference_of_two_and_one():
    def seconds(num_layers):
        return [5.0 + 3.0 * num_layers, 7.0 + 2.0 * num_layers]

    assert table7.of_all_layers(seconds, 24) == [5 + 3 * 24, 7 + 2 * 24]


def test_a_batch_is_timed_without_its_first_pass(monkeypatch):
    clock = iter([0.0, 100.0, 200.0, 203.0, 300.0, 301.0, 400.0, 402.0])
    monkeypatch.setattr(table7.time, "process_time", lambda: next(clock))
    watch = table7.Stopwatch(table7.Options(device="cpu", repeats=3))
    calls = []
    assert watch.seconds(calls.append, 1) == [3.0, 1.0, 2.0] and len(calls) == 4


@pytest.mark.parametrize("interval, bounds, verdict", [
    ((70, 90), (65, math.inf), "held"),
    ((50, 60), (65, math.inf), "did not hold at this size"),
    ((60, 70), (65, math.inf), "cannot be told"),
    ((-0.0005, 0.0002), (-0.001, 0.001), "held"),
    ((0.002, 0.003), (-0.001, 0.001), "did not hold at this size"),
])
def test_a_verdict_follows_from_the_interval_and_the_bounds(interval, bounds, verdict):
    assert table7.judge("claim", "paper", "here", interval, bounds)["verdict"] == verdict


def test_half_precision_is_judged_on_the_texts_alone(monkeypatch):
    """A model whose velocity is one number of the context c: the loss is E (c - eps + x_0)^2, and
    it changes only where c is no fp16 number."""
    class Text(torch.nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, prompts):
            return torch.full((1, 2, 3), self.value), torch.full((1, 2), self.value)

    def mmdit(z_t, t, context, pooled):
        assert pooled[0, 0] == torch.tensor(value)       # It stays fp32. 1e-9 would be 0 in fp16.
        return context[0, 0, 0].expand(z_t.shape)

    changes = {}
    for value in (1000.0, 1000.2, 1e-9):
        parts = table7.load_components(table7.SHIPPED, ("vae",))
        parts.text = Text(value)
        parts.mmdit = torch.nn.Module()
        parts.mmdit.forward = mmdit
        monkeypatch.setattr(table7, "load_components", lambda checkpoint, parts=parts: parts)
        changes[value], _ = table7.half_precision_change(table7.Options(num_scenes=3), "cpu")
        monkeypatch.undo()
    assert changes[1000.0] == 0                                       # fp16 has steps of .5 here
    assert changes[1000.2] == pytest.approx((1000 / 1000.2) ** 2 - 1, rel=0.01)
    assert changes[1e-9] == pytest.approx(0, abs=1e-6)


def test_a_tiny_run_writes_both_tables(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(table7, "RESOLUTION", 32)
    monkeypatch.setattr(table7, "CLIP_L", CLIPConfig(32000, 64, 1))
    monkeypatch.setattr(table7, "CLIP_G", CLIPConfig(32000, 64, 1))
    monkeypatch.setattr(table7, "T5Config", lambda **given: T5Config(32000, 64, 64, num_heads=1)
                        if not given else T5Config(32000, 64, 64, given["num_layers"], 1))
    small = MMDiTConfig(depth=2, pos_embed_max_size=8)
    monkeypatch.setattr(table7, "MMDiTConfig", lambda depth: small)
    out = tmp_path / "table7.json"
    table7.main(["--batch-size", "1", "--repeats", "2", "--num-scenes", "2", "--out", str(out)])
    record = json.loads(out.read_text())
    assert list(record["tables"]) == ["fp32", "bf16"]
    for rows in record["tables"].values():
        assert list(rows) == list(table7.PAPER)
        for row in rows.values():
            growth = 100 * row["ms_per_sample"] / record["step_ms"]
            assert row["step_grows_percent"] == pytest.approx(growth, rel=0.5, abs=1)
    memory = record["claims"][2]
    assert memory["verdict"] == "did not hold at this size" and memory["paper"] == "22.46"
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert "(65.5)" in capsys.readouterr().out
