"""experiments/table7_encoders.py: the two columns that are exact, the delta, one quick run."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from text_encoders import TextConfig
from vae import VAEConfig

FILE = Path(__file__).parent.parent / "experiments" / "table7_encoders.py"
spec = importlib.util.spec_from_file_location("table7_encoders", FILE)
table7 = importlib.util.module_from_spec(spec)
spec.loader.exec_module(table7)


def test_storage_is_the_papers():
    """App. E.1, Table 7: 65.5, 121.3, 202.2 and 630.7 kB. The last is 630.784, cut off by them."""
    stored = table7.stored_bytes(VAEConfig(), TextConfig(), 256)
    assert stored == {"vae": 65536, "clip_l": 121344, "clip_g": 202240, "t5": 630784}


def test_memory_is_the_papers_and_a_step_grows_by_the_passes_of_a_batch():
    """Table 7 itself: 2.45 ms a sample and batch 32 are 13.8 % of a step of 568 ms."""
    with torch.device("meta"):
        networks = {"vae": table7.VAE().encoder, "t5": table7.T5Encoder(table7.T5Config())}
    seconds = {"vae": 32 * 2.45e-3, "t5": 32 * 17.46e-3}
    rows = table7.table(networks, seconds, {"vae": 65536, "t5": 630784}, 32, 0.568)
    for row in rows:
        memory, milliseconds, storage, growth = table7.PAPER[row["encoder"]]
        assert row["memory_gb"] == pytest.approx(memory, abs=0.005)
        assert row["storage_kb"] == pytest.approx(storage, abs=0.1)
        assert row["ms_per_sample"] == pytest.approx(milliseconds)
        assert row["step_grows_percent"] == pytest.approx(growth, abs=0.1)


def test_equal_layers_are_timed_by_the_difference_of_two_and_one(monkeypatch):
    def time_of(network, inputs, watch):
        return 5.0 + 3.0 * len(network.layers)

    monkeypatch.setattr(table7, "encoder_seconds", time_of)
    config = table7.T5Config(32, 64, 64, num_layers=24, num_heads=1)
    assert table7.layered_seconds(table7.T5Encoder, config, None, None) == 5 + 3 * 24


def test_a_batch_is_timed_without_its_first_pass(monkeypatch):
    clock = iter([0.0, 100.0, 200.0, 203.0, 300.0, 301.0, 400.0, 402.0])
    monkeypatch.setattr(table7.time, "perf_counter", lambda: next(clock))
    watch = table7.Stopwatch(table7.Options(device="cpu", precision="fp32", repeats=3))
    calls = []
    assert watch.seconds(calls.append, 1) == 2.0 and len(calls) == 4


def test_quick_writes_both_tables(tmp_path, monkeypatch, capsys):
    out = tmp_path / "table7.json"
    arguments = ["table7_encoders.py", "--quick", "--resolution", "64", "--out", str(out)]
    monkeypatch.setattr("sys.argv", arguments)
    table7.main()
    result = json.loads(out.read_text())
    assert [row["encoder"] for row in result["papers_encoders"]] == list(table7.PAPER)
    for row in result["checkpoint_encoders"]:
        growth = 100 * row["ms_per_sample"] * result["batch_size"] / result["checkpoint_step_ms"]
        assert row["step_grows_percent"] == pytest.approx(growth)
    assert "% of a step" in capsys.readouterr().out
