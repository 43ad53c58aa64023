"""Tests of evaluate.py: losses by t, grids of settings, the whole command."""

import html
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from PIL import Image

import evaluate
import sample
from checkpoints import FROZEN, SHIPPED, fingerprint
from data import to_tensor
from evaluate import add_clip_drops, assigned_losses, draw_paths, measure_grid
from geneval import TASKS
from scenes import HELD_OUT_SEED, Scenes

ROOT = Path(__file__).parents[1]


# ---- Losses by t ---------------------------------------------------------------------------------

def test_mlperf_sees_each_sample_at_its_own_level_only():
    """A model that is wrong by t has the loss t^2: (k/8)^2 at level k. Sample i has level i mod 8,
    also where a batch begins; samples 0, 8, 16 are wrong by 1 more, so level 0 has 1."""
    latent = torch.arange(24.0).view(24, 1, 1, 1).expand(24, 2, 4, 4)
    seen = []

    def model(z_t, t, context, pooled):
        seen.append(len(z_t))
        return -context + t.view(-1, 1, 1, 1) + (context % 8 == 0)

    samples = []
    for part in latent.split([5, 8, 11]):
        samples.append((part, part, None, torch.zeros_like(part)))
    losses = assigned_losses(model, samples, torch.float32)
    assert losses.tolist() == pytest.approx([1, *[(k / 8) ** 2 for k in range(1, 8)]])
    assert sum(seen) == 24


def test_losses_are_those_of_the_same_samples_for_every_model(monkeypatch):
    pipeline = sample.load(SHIPPED, precision="fp32")
    source = Scenes(66, seed=4)
    pictures = [source.image(i, 64, 64) for i in range(66)]
    captions = [source.captions(i)[1] for i in range(66)]
    calls = []

    def validate(model, samples, precision):
        calls.append(samples)
        return torch.arange(8.0)

    monkeypatch.setattr(evaluate.flow, "validate", validate)
    monkeypatch.setattr(evaluate, "assigned_losses", validate)
    losses = evaluate.losses_by_level(pipeline, pictures, captions)
    assert losses["validation"] == 3 and losses["mlperf"] == 3.5       # 7 is the loss at t = 1
    evaluate.losses_by_level(pipeline, pictures[:64], captions[:64])
    (first, rest), _, (other,), _ = calls
    assert calls[0] is calls[1] and len(first[0]) == 64 and len(rest[0]) == 2
    assert all(torch.equal(a, b) for a, b in zip(first, other))
    latent, context, pooled, noise = rest
    images = torch.stack([to_tensor(picture) for picture in pictures[64:]])
    with torch.no_grad():
        torch.testing.assert_close(latent, pipeline.vae.encode(images))
    expected, expected_pooled = pipeline.text(captions[64:])
    torch.testing.assert_close(context, expected)
    torch.testing.assert_close(pooled, expected_pooled)
    assert first[3].std().item() == pytest.approx(1, abs=0.02)
    assert first[3][0].ne(first[3][1]).all() and noise.shape == latent.shape


# ---- Settings, the whole command -----------------------------------------------------------------

class Straight(nn.Module):
    """A velocity of 1 everywhere. Its path is as long as a vector of ones: sqrt(C H W)."""
    config = SimpleNamespace(latent_channels=4, patch_size=2, depth=1, downsampling=8,
                             pos_embed_max_size=8)

    def forward(self, z, t, context, pooled):
        return torch.ones_like(z)

    def decode(self, z):
        return z[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3) / 4


def test_a_straight_path_has_its_closed_form_and_pictures_follow_their_seeds():
    def text(prompts, without=()):
        return torch.zeros(len(prompts), 1, 1), torch.zeros(len(prompts), 1)

    defaults = {"height": 16, "width": 32, "guidance_scale": 1.0, "num_steps": 3}
    pipeline = sample.Pipeline(Straight(), Straight(), text, defaults)
    pictures, lengths = draw_paths(pipeline, ["a"] * 66, seed=7)
    assert lengths.tolist() == pytest.approx([(4 * 2 * 4) ** 0.5] * 66)
    for i in (0, 65):
        noise = torch.randn(4, 2, 4, generator=torch.Generator().manual_seed(7 + i))
        expected = ((noise[:3, 0, 0] - 1) / 4).clamp(-1, 1)
        found = to_tensor(pictures[i])[:, 0, 0]
        assert pictures[i].size == (32, 16) and (found - expected).abs().max() < 0.01


def test_lists_of_settings_become_all_their_combinations():
    options = evaluate.Options(num_steps=(5, 50), without=("none", "clip_l+t5"))
    assert options.grid() == [{"num_steps": 5, "without": ()},
                              {"num_steps": 5, "without": ("clip_l", "t5")},
                              {"num_steps": 50, "without": ()},
                              {"num_steps": 50, "without": ("clip_l", "t5")}]
    assert evaluate.Options().grid() == [{}]


def test_steps_are_compared_with_all_else_equal(monkeypatch):
    """By hand: .30 is 25 % below .40, .45 is 10 % below .50."""
    grid = evaluate.Options(num_steps=(5, 50), without=("none", "t5")).grid()
    scores = iter((0.30, 0.45, 0.40, 0.50, 0.2))
    asked = []

    def draw(pipeline, prompts, seed, **settings):
        asked.append(settings)
        return ["picture"], torch.tensor([1.0, 3.0])

    monkeypatch.setattr(evaluate, "draw_paths", draw)
    pipeline = SimpleNamespace(defaults={"num_steps": 28})

    def measure(pictures):
        assert pictures == ["picture"]
        return {"clip_score": next(scores)}

    rows = [row for _, row in measure_grid(pipeline, [], measure, 0, grid)]
    add_clip_drops(rows)
    assert [row["clip_drop"] for row in rows] == pytest.approx([25, 10, 0, 0])
    assert [row["path_length"] for row in rows] == [2] * 4 and asked == grid
    assert [row["settings"] for row in rows] == grid
    (_, alone), = measure_grid(pipeline, [], measure, 0, [{}])
    assert alone["settings"] == {"num_steps": 28}


def test_a_model_gets_numbers_and_a_report_that_needs_no_other_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [
        "evaluate.py", str(SHIPPED), "--num-prompts", "1", "--num-pictures", "9", "--num-steps",
        "1", "2", "--height", "32", "--width", "32", "--out", str(tmp_path / "scores.json")])
    evaluate.main()
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "scores.json").read_text())
    assert list(record["rows"])[-3:] == ["untrained", "model, {'num_steps': 1}",
                                         "model, {'num_steps': 2}"]
    assert [row["settings"] for row in record["measures"]] == [{"num_steps": 1}, {"num_steps": 2}]
    assert record["measures"][1]["clip_drop"] == 0 and record["measures"][0]["path_length"] > 0
    by_t = record["losses"]["validation_by_t"]
    assert record["losses"]["validation"] == pytest.approx(sum(by_t[:7]) / 7)
    assert record["losses"]["mlperf_by_t"][0] > 0 and len(record["losses"]["mlperf_by_t"]) == 8
    page = html.unescape((tmp_path / "report.html").read_text())
    assert all(line in page and line in printed for line in record["printed"])
    assert page.count("<polyline") == 1 and page.count("<img") == 4
    assert "CLIP score 0.00 % lower than with the most steps" in record["printed"][-1]


@pytest.mark.parametrize("data, named", [("", "4 unseen pictures"),
                                         ("photos", "4 pictures of --data")])
def test_only_scenes_are_called_unseen(data, named, tmp_path, monkeypatch, capsys):
    """--data may name what the model was trained on."""
    row = {"settings": {"num_steps": 1}, "clip_score": 1, "clip_error": 0, "fid": 0, "kid": 0,
           "path_length": 1}
    monkeypatch.setattr(evaluate, "losses_by_level", lambda *given: {"validation": 1.0})
    monkeypatch.setattr(evaluate, "measure_grid", lambda *given: [(["drawn"], row)])
    record = {"measures": [], "printed": [], "out": str(tmp_path / "x.json")}
    options = evaluate.Options(data=data)
    evaluate.measure_model(None, options, record, ["picture"] * 4, ["caption"] * 4, None)
    assert f"validation loss of {named}: 1.0" in capsys.readouterr().out


def test_a_run_is_compared_with_the_scenes_of_its_own_training(tmp_path, capsys):
    file = SHIPPED / "model.safetensors"
    encoders = {"path": str(file), "fingerprint": fingerprint(file, FROZEN)}
    parts = SimpleNamespace(file=tmp_path / "model.safetensors")
    pipeline = SimpleNamespace(parts=parts, text=sample.load(SHIPPED).text, device="cpu")
    for data in ("", "some/photos"):
        config = {"train": {"seed": 5, "data": data}, "encoders": encoders}
        (tmp_path / "config.json").write_text(json.dumps(config))
        options = evaluate.Options(num_pictures=8, height=32, width=32)
        pictures, captions, measure, known, training = evaluate.sources(pipeline, options)
        assert (known, training.seed) == (("scenes", 0) if data else ("training pictures", 5))
        assert len(pictures) == len(measure.real) == 8
        unseen = Scenes(8, HELD_OUT_SEED)
        assert captions == [unseen.captions(i)[1] for i in range(8)]
        assert (pictures[7] == unseen.image(7, 32, 32)).all()
        assert ("some/photos trained it" in capsys.readouterr().err) == bool(data)
    for wrong in ({"seed": "5"}, {}, None):
        (tmp_path / "config.json").write_text(json.dumps({"train": wrong, "encoders": encoders}))
        with pytest.raises(ValueError, match="config.json: (seed|train)"):
            evaluate.sources(pipeline, options)


def run(*options, cwd):
    command = [sys.executable, ROOT / "evaluate.py", *map(str, options)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize("options, sentence", [
    (["--height", "63"], "must be multiples of 16 px"), (["--num-prompts", "0"], "--num-prompts 0"),
    (["--without", "t6"], "--without 't6' must be one of"), (["--height", "1"], "from 16 to"),
    (["--out", "/proc/no/x"], "give the name of a file"),
    (["--without", "none", "t5", "--prompts", ROOT / "requirements.txt"], "one value of each"),
    (["--prompts", ROOT / "requirements.txt"], "and --out FOLDER"),
    (["--prompts", "none.txt"], "none.txt"), (["--tower", "none"], "none: no such file"),
    (["--data", "none"], "none does not exist"), (["--out", "."], "give the name of a file"),
    (["--guidance-scale", "nan"], "nan must be"), (["--device", "foo"], "--device foo is not on"),
    (["--out", "x" * 201], "cannot be written"), (["--out", "/dev/null"], "cannot be written"),
    (["--prompts", ROOT / "requirements.txt", "--out", ROOT / "tests"], "give an empty folder"),
    (["--out", "/proc/x.json"], "give the name of a file"),
    (["--prompts", ROOT / "requirements.txt", "--out", "/proc/new"], "give an empty folder")])
def test_wrong_options_are_named_before_the_work(tmp_path, monkeypatch, capsys, options, sentence):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(SHIPPED), *map(str, options)])
    with pytest.raises((ValueError, OSError), match=re.escape(sentence)):
        evaluate.main()
    assert capsys.readouterr().out == ""


def test_a_wrong_option_is_one_sentence(tmp_path):
    done = run(SHIPPED, "--seed", "-1", cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.startswith("evaluate.py: --seed -1 must be")


def test_the_command_stores_every_row_with_its_intervals(tmp_path):
    done = run("--num-prompts", "2", "--out", "new/scores.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "new/scores.json").read_text())
    assert record["command"].endswith("evaluate.py --num-prompts 2 --out new/scores.json")
    assert list(record["rows"]) == ["ground truth", "shuffled captions"]
    truth = record["rows"]["ground truth"]
    assert truth["overall"] == 1
    assert truth["intervals"]["word"] == [pytest.approx(0.3424, abs=1e-3), 1]      # of 2 in 2


def test_what_was_scored_is_kept_when_it_stops(tmp_path, monkeypatch):
    def stops(*given):
        yield "first", {"overall": 1, "overall_lax": 1, "n": 4, "strict": dict.fromkeys(TASKS, 1.0),
                        "intervals": dict.fromkeys(TASKS, (0.5, 1))}
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "geneval_rows", stops)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--out", str(tmp_path / "x.json")])
    with pytest.raises(KeyboardInterrupt, match="x.json holds what was done until then"):
        evaluate.main()
    assert list(json.loads((tmp_path / "x.json").read_text())["rows"]) == ["first"]


def test_pictures_that_were_drawn_are_kept_when_it_stops(tmp_path, monkeypatch):
    def generate(pipeline, prompts, seed, **settings):
        if seed > 5:
            raise KeyboardInterrupt
        return [Image.new("RGB", (8, 8))]

    monkeypatch.setattr(sample, "generate", generate)
    (tmp_path / "two.txt").write_text("a cat\na dog")
    monkeypatch.setattr(sys, "argv", [
        "evaluate.py", str(SHIPPED), "--prompts", str(tmp_path / "two.txt"), "--per-prompt", "1",
        "--seed", "5", "--out", str(tmp_path / "new")])
    with pytest.raises(KeyboardInterrupt, match="new holds what was done until then"):
        evaluate.main()
    kept = [path.name for path in (tmp_path / "new").rglob("*") if path.is_file()]
    assert kept == ["a cat_000000.png"]


def test_a_stop_before_anything_is_measured_promises_nothing(tmp_path, monkeypatch):
    """An older file of the same name stays as it was."""
    def stops(*given):
        raise KeyboardInterrupt

    (tmp_path / "x.json").write_text("old")
    monkeypatch.setattr(evaluate, "geneval_rows", stops)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--out", str(tmp_path / "x.json")])
    with pytest.raises(KeyboardInterrupt) as stopped:
        evaluate.main()
    assert not stopped.value.args and (tmp_path / "x.json").read_text() == "old"
