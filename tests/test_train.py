"""The loop: its numbers against the paper's, its checkpoints, and whole runs of train.py."""

import dataclasses
import fcntl
import functools
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import devices
import run_folder
import train
from batches import Batch, Batches
from checkpoints import FROZEN, SHIPPED, fingerprint, load_components, save_networks
from encode import encoded
from flow import density
from mmdit import MMDiT, MMDiTConfig
from scenes import Scenes
from train import Run, TrainConfig, fit, read_config

ROOT = Path(__file__).parents[1]
SMALL = ("--device", "cpu", "--precision", "fp32", "--num-scenes", "64", "--batch-size", "8",
         "--depth", "1", "--every", "1000000")
# The paper's training, as App. B.3 and Sec. 5.3 print it.
PAPER = {"optimizer": "adamw", "lr": 1e-4, "warmup_steps": 1000, "batch_size": 1024, "ema": 0.99,
         "ema_every": 100, "encoder_dropout": 0.464, "resolution": 256, "qk_norm": True,
         "density": "lognorm(0, 1)", "cooldown": 0, "timestep_shift": 1}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A working folder."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def at_home(home, monkeypatch):
    monkeypatch.chdir(home)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell's & has it ignored.
    yield
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL          # No run leaves its own.
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    signal.signal(signal.SIGINT, before)


# --- A small experiment: five lines around fit ----------------------------------------------------

def line_loss(model, batch):
    """Squares of a line's errors, (B,)."""
    x, y = batch
    return (model(x) - y).square().mean(dim=1)


def line_batches(step):
    rng = torch.Generator().manual_seed(step)
    x = torch.randn(8, 3, generator=rng)
    return x, x @ torch.tensor([[1.0], [-2.0], [0.5]])


def small_model():
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def settings(**values):
    start = {"steps": 12, "optimizer": "adamw", "lr": 0.05, "device": "cpu", "every": 3,
             "batch_size": 8, "precision": "fp32"}
    return TrainConfig(**start | values)


def experiment(folder, model=None, batches=line_batches, loss=line_loss, began=0, **values):
    """Returns (the model, its average, the run)."""
    model = model or small_model()
    config = settings(**values)
    run = Run(folder, config, began=began, may_stop=True)
    return model, fit(model, loss, batches, config, run), run


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def killed_at(step):
    def batches(number):
        if number == step:
            raise Killed
        return line_batches(number)
    return batches


def log_of(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def losses_of(folder):
    return [entry["loss"] for entry in log_of(folder) if "loss" in entry]


def steps_of(folder):
    return [int(path.name) for path in train.checkpoints_of(Path(folder))]


def same_model(model, other):
    return all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


def test_an_experiment_is_a_model_a_loss_and_batches(tmp_path):
    model = small_model()
    run = Run(tmp_path / "run", settings(steps=300, every=300))
    average = fit(model, line_loss, line_batches, run.config, run)
    torch.testing.assert_close(average.weight, torch.tensor([[1, -2, 0.5]]), rtol=0, atol=0.02)
    assert not average.weight.requires_grad and not same_model(model, average)


def test_a_killed_run_goes_on_to_the_same_weights_bit_for_bit(tmp_path):
    whole, average, _ = experiment(tmp_path / "whole")
    with pytest.raises(Killed):
        experiment(tmp_path / "run", batches=killed_at(8))
    assert steps_of(tmp_path / "run") == [3, 6]
    model, again, run = experiment(tmp_path / "run")
    assert run.first == 6 and same_model(model, whole) and same_model(again, average)
    assert [entry["step"] for entry in log_of(tmp_path / "run")] == list(range(1, 13))


DAMAGES = {
    "a cut file": lambda folder: next(folder.glob("*.distcp")).write_bytes(b"PK\x03\x04"),
    "an empty file": lambda folder: next(folder.glob("*.distcp")).write_bytes(b""),
    "a missing file": lambda folder: next(folder.glob("*.distcp")).unlink(),
    "cut metadata": lambda folder: (folder / ".metadata").write_bytes(
        (folder / ".metadata").read_bytes()[:100]),
    "empty metadata": lambda folder: (folder / ".metadata").write_bytes(b""),
    "no metadata": lambda folder: (folder / ".metadata").unlink(),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_newest_checkpoint_is_passed_over(name, tmp_path, capsys):
    whole, average, _ = experiment(tmp_path / "whole")
    with pytest.raises(Killed):
        experiment(tmp_path / "run", batches=killed_at(8))
    DAMAGES[name](tmp_path / "run" / "checkpoints" / "00000006")
    (tmp_path / "run" / "checkpoints" / "9foo").mkdir()                # It is no checkpoint.
    model, again, run = experiment(tmp_path / "run")
    assert run.first == 3 and same_model(model, whole) and same_model(again, average)
    assert "00000006 cannot be read" in capsys.readouterr().out
    assert steps_of(tmp_path / "run") == [9, 12]


def test_without_any_whole_checkpoint_a_run_does_not_start_over(tmp_path):
    experiment(tmp_path / "run", every=100)
    DAMAGES["an empty file"](tmp_path / "run" / "checkpoints" / "00000012")
    with pytest.raises(OSError, match="00000012 cannot be read"):
        experiment(tmp_path / "run")


def test_a_full_disk_keeps_the_checkpoints_that_are_there(tmp_path, monkeypatch):
    """What was half written, then or at a kill, goes when the run goes on."""
    def no_space(state, checkpoint_id, **_):
        checkpoint_id.mkdir(parents=True)
        (checkpoint_id / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(Killed):
        experiment(tmp_path / "run", batches=killed_at(4))
    with monkeypatch.context() as patched:
        patched.setattr(devices.dcp, "save", no_space)
        with pytest.raises(OSError, match="older ones are untouched .*No space left on device"):
            experiment(tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["00000003", "00000006.partial"]
    assert experiment(tmp_path / "run", steps=3)[2].first == 3
    assert [path.name for path in checkpoints.iterdir()] == ["00000003"]


@pytest.mark.parametrize("every, steps, last", [(0, 30, [27, 30]), (4, 11, [8, 11])])
def test_checkpoints_come_every_tenth_or_as_often_as_told_and_the_last_two_stay(
        every, steps, last, tmp_path):
    made = []
    model, config = small_model(), settings(steps=steps, every=every)
    def report(average, step):
        made.append(step)
        return {}, None
    run = Run(tmp_path / "run", config, report=report)
    fit(model, line_loss, line_batches, config, run)
    assert steps_of(tmp_path / "run") == last
    assert made == [*range(every or 3, steps, every or 3), steps]


def test_a_run_that_is_told_to_stop_saves_and_goes_on_later(tmp_path):
    def batches(step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)       # as a cluster that needs the machine back
        return line_batches(step)

    whole, *_ = experiment(tmp_path / "whole")
    _, _, run = experiment(tmp_path / "run", batches=batches, every=100)
    assert run.stopping and run.done == 5 and steps_of(tmp_path / "run") == [5]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL          # A second one ends it.
    assert same_model(experiment(tmp_path / "run")[0], whole)


def test_ctrl_c_ends_a_program_that_needs_the_whole_training(tmp_path):
    """An experiment would judge what is half trained and write it down as if it were whole."""
    def batches(step):
        if step == 4:
            signal.raise_signal(signal.SIGINT)
        return line_batches(step)

    with pytest.raises(KeyboardInterrupt, match="5 of 12 steps are no result"):
        fit(small_model(), line_loss, batches, settings(), Run(tmp_path / "run", settings()))
    fit(small_model(), line_loss, line_batches, settings(), Run(tmp_path / "whole", settings()))


def test_ctrl_c_saves_and_a_second_one_kills(tmp_path):
    def batches(step):
        if step == 4:
            signal.raise_signal(signal.SIGINT)
        return line_batches(step)

    before = signal.getsignal(signal.SIGINT)
    _, _, run = experiment(tmp_path / "run", batches=batches, every=100)
    assert run.stopping and run.done == 5 and steps_of(tmp_path / "run") == [5]
    assert signal.getsignal(signal.SIGINT) == before

    def twice(step):
        if step == 7:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return line_batches(step)

    with pytest.raises(KeyboardInterrupt):
        experiment(tmp_path / "run", batches=twice, every=100)


def test_a_step_is_saved_before_anything_is_done_with_it(tmp_path):
    """Validation may run out of memory. Then a restart would never get past it."""
    def report(average, step):
        raise MemoryError

    run = Run(tmp_path / "run", settings(), report=report)
    with pytest.raises(MemoryError):
        fit(small_model(), line_loss, line_batches, run.config, run)
    assert steps_of(tmp_path / "run") == [3]


def test_the_average_is_what_is_validated_and_drawn(tmp_path):
    seen = []

    def report(average, step):
        seen.append(average.weight.detach().clone())
        return {}, None

    run = Run(tmp_path / "run", settings(steps=3, ema=0.5), report=report)
    model = small_model()
    average = fit(model, line_loss, line_batches, run.config, run)
    assert torch.equal(seen[-1], average.weight) and not torch.equal(seen[-1], model.weight)


def test_what_a_kill_left_half_written_goes(tmp_path):
    experiment(tmp_path / "run")
    half = tmp_path / "run" / "model.safetensors.0f.partial"
    half.write_text("half")
    experiment(tmp_path / "run")
    assert not half.exists()


def test_a_finished_run_ends_at_once_and_more_steps_go_on(tmp_path):
    experiment(tmp_path / "run", steps=4)
    model, _, run = experiment(tmp_path / "run", steps=4, batches=killed_at(4))
    assert run.done == run.first == 4
    assert experiment(tmp_path / "run", steps=6)[2].done == 6


def test_a_finished_run_gets_its_score_once(monkeypatch, capsys):
    """Also if it was killed between its last step and its score."""
    counts = []
    monkeypatch.setattr(train, "format_scores", str)
    monkeypatch.setattr(train, "geneval", lambda pipeline, count, **_: counts.append(count))
    world = SimpleNamespace(close=list)
    run = SimpleNamespace(done=400, stopping=False, entries=[], config=TrainConfig(), say=print,
                          folder="runs/mine", world=world)
    run.log = lambda **entry: run.entries.append(entry)
    for _ in range(2):
        train.conclude(run, None, "a heart")
    assert counts == [20]                              # a prompt of each task for 20 steps
    said = "runs/mine has done its 400 steps; to go on, give more --steps or --minutes"
    assert capsys.readouterr().out.count(said) == 2


def test_two_runs_never_write_into_one_folder(tmp_path):
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="is in use"):
            experiment(tmp_path / "run")


# --- What is not finite ---------------------------------------------------------------------------

def nan_from(step):
    def batches(number):
        x, y = line_batches(number)
        return x, y * (math.nan if number >= step else 1)
    return batches


@pytest.mark.parametrize("steps, start, end", [(3, 0, 3), (3, 2, 3), (40, 17, 27)])
def test_a_run_whose_loss_is_not_finite_ends_with_an_error(steps, start, end, tmp_path):
    """After ten steps, or at the end of a shorter run. What was saved before is whole."""
    with pytest.raises(RuntimeError, match=f"not finite at step {end};.*lower --lr"):
        experiment(tmp_path / "run", batches=nan_from(start), steps=steps, every=1)
    assert steps_of(tmp_path / "run") == list(range(1, start + 1))[-2:]
    model = small_model()
    run = Run(tmp_path / "run", settings(steps=max(1, start)))
    average = fit(model, line_loss, line_batches, run.config, run)
    assert all(p.isfinite().all() for p in (*model.parameters(), *average.parameters()))


def test_one_step_that_is_not_finite_is_left_out_and_counted(tmp_path):
    def batches(step):
        x, y = line_batches(step)
        return x, y * (math.inf if step == 5 else 1)

    model, average, _ = experiment(tmp_path / "run", batches=batches)
    assert model.weight.isfinite().all() and average.weight.isfinite().all()
    assert [entry["skipped"] for entry in log_of(tmp_path / "run")] == [0] * 5 + [1] + [0] * 6
    assert log_of(tmp_path / "run")[5]["loss"] is None


def test_ctrl_c_saves_also_after_a_step_that_was_left_out(tmp_path):
    def batches(step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)
        x, y = line_batches(step)
        return x, y * (math.inf if step == 5 else 1)

    experiment(tmp_path / "run", batches=batches, every=50)
    assert steps_of(tmp_path / "run") == [6]


def test_ruined_weights_are_neither_averaged_nor_saved(tmp_path):
    """Their gradient was finite: only the weights themselves tell."""
    model = small_model()

    def batches(step):
        if step == 7:
            with torch.no_grad():
                model.weight.fill_(1e30)               # as a huge rate would
        return line_batches(step) if step < 7 else (torch.zeros(8, 3), torch.zeros(8, 1))

    with pytest.raises(RuntimeError, match="weights are not finite at step 8"):
        experiment(tmp_path / "run", model, batches, every=1)
    assert steps_of(tmp_path / "run") == [6, 7]
    assert experiment(tmp_path / "run", steps=7)[1].weight.abs().max() < 10


# --- The log --------------------------------------------------------------------------------------

def test_a_log_line_sorts_losses_by_tenth_of_t_and_counts_pictures(tmp_path):
    config = settings(steps=2, batch_size=3)
    run = Run(tmp_path / "run", config, times=lambda batch: torch.tensor([0.05, 0.07, 0.95]))
    def loss(model, batch):
        return model(batch).sum() * 0 + torch.tensor([1.0, 3.0, 5.0])
    fit(small_model(), loss, lambda step: torch.ones(1, 3), config, run)
    first, second = log_of(tmp_path / "run")
    assert first["loss"] == 3 and first["loss_by_t"] == [2, *[None] * 8, 5]
    assert [first["images_seen"], second["images_seen"]] == [3, 6]
    assert first["grad_norm"] == 0
    assert {"memory_gb", "images_per_second", "skipped"} <= first.keys()


def test_lines_are_means_over_twenty_steps_after_the_first_twenty(tmp_path):
    def loss(model, step):
        return model(torch.ones(1, 3))[0] * 0 + step
    experiment(tmp_path / "run", batches=lambda step: float(step), loss=loss, steps=45)
    entries = log_of(tmp_path / "run")
    assert [entry["step"] for entry in entries] == [*range(1, 21), 40, 45]
    assert entries[20]["loss"] == 29.5 and entries[21]["loss"] == 42


def test_what_is_no_entry_in_the_log_is_passed_over(tmp_path):
    with pytest.raises(Killed):
        experiment(tmp_path / "run", batches=killed_at(8))
    with open(tmp_path / "run" / "log.jsonl", "a") as file:
        file.write("null\n[1]\n{}\n" + "[" * 100000 + '\n{"step": "x"}\n{"step": 2, "loss": "x"}\n'
                   '{"step": 2, "validation": [1]}\n{"step": 2, "loss": NaN}\n{"step": 2, "lo')
    experiment(tmp_path / "run")
    assert [entry["step"] for entry in log_of(tmp_path / "run")] == list(range(1, 13))


def test_the_curves_of_the_loss_are_on_a_log_scale():
    """4, 2, 1 is a straight line there. The validation loss is a second, red curve."""
    entries = [{"step": step, "loss": 2 ** (2 - step / 50), "loss_by_t": [None] * 10}
               for step in (0, 50, 100)]
    entries += [{"step": step, "validation": 2.0, "validation_by_t": [2.0] * 8}
                for step in (50, 100)]
    pixels = np.array(run_folder.draw_losses(entries))[20:430]         # without words and numbers

    def height(color, column):
        rows, = np.nonzero((pixels[:, column] == color).all(axis=-1))
        return rows.mean()

    left, middle, right = (height((0, 0, 0), column) for column in (62, 370, 678))
    assert left < middle < right and middle == pytest.approx((left + right) / 2, abs=2)
    assert height((255, 0, 0), 400) == height((255, 0, 0), 678) == pytest.approx(middle, abs=6)
    run_folder.draw_losses([{"step": 1, "loss": None}, {"step": 2, "loss": 0.0}, {"step": 3}])


# --- Minutes --------------------------------------------------------------------------------------

@pytest.mark.parametrize("seconds, minutes, least, most", [
    (1, 4, 205, 216), (10, 2, 9, 11), (600, 3, 1, 1)])
def test_minutes_are_kept_whatever_a_step_takes(seconds, minutes, least, most, tmp_path,
                                                monkeypatch, capsys):
    """Nine tenths of them are for steps. The clock is one that each batch moves on."""
    clock = SimpleNamespace(now=1000.0)

    def batches(step):
        clock.now += seconds * (2 if step == 0 else 1)                 # The first one is slow.
        return line_batches(step)

    monkeypatch.setattr(time, "time", lambda: clock.now)
    options = {"batches": batches, "began": 1000.0, "steps": 0, "minutes": minutes}
    _, _, run = experiment(tmp_path / "run", **options)
    assert least <= run.done <= most and clock.now - 1000 <= max(60 * minutes, 2 * seconds)
    assert ("teaches next to nothing" in capsys.readouterr().out) == (run.done < 100)
    again = experiment(tmp_path / "run", **options)[2]
    assert again.done == run.done
    assert 1 <= len(steps_of(tmp_path / "run")) <= 2


def test_a_restart_keeps_the_planned_end_until_steps_are_timed(tmp_path, monkeypatch):
    """Else the rate, which falls towards that end, would jump up for a few steps."""
    clock = SimpleNamespace(now=1000.0)
    rates = {}
    real = train.learning_rate

    def rate(step, steps, config):
        rates.setdefault(step, []).append(real(step, steps, config))
        return rates[step][-1]

    def batches(step):
        clock.now += 1
        if step == 190 and len(rates[190]) == 1:
            raise Killed
        return line_batches(step)

    monkeypatch.setattr(time, "time", lambda: clock.now)
    monkeypatch.setattr(train, "learning_rate", rate)
    options = {"batches": batches, "began": 1000.0, "steps": 0, "minutes": 4, "every": 20}
    with pytest.raises(Killed):
        experiment(tmp_path / "run", **options)
    experiment(tmp_path / "run", **options | {"began": clock.now})
    twice = [found for found in rates.values() if len(found) == 2]
    assert len(twice) >= 5
    for first, second in twice:
        assert second == pytest.approx(first, abs=0.05)


def test_a_run_without_time_for_a_step_says_so(tmp_path):
    with pytest.raises(ValueError, match="over before the first step; give more"):
        experiment(tmp_path / "run", steps=0, minutes=1.0, began=time.time() - 55)


# --- The paper's numbers --------------------------------------------------------------------------

def test_the_papers_preset_is_appendix_b3_and_the_default_of_large_models():
    for arguments in (["--depth", "38"], ["--depth", "15"], ["--preset", "paper"]):
        config = read_config(arguments)
        assert PAPER.items() <= dataclasses.asdict(config).items()
        assert train.departures(config).endswith("none")
    assert read_config(["--depth", "14"]).optimizer == "muon"
    assert read_config(["--depth", "38", "--lr", "3e-4"]).lr == 3e-4
    assert "lr 0.0003 (0.0001)" in train.departures(TrainConfig(lr=3e-4))


def test_the_tiny_preset_is_what_a_config_is_without_one():
    assert read_config([]) == TrainConfig() == TrainConfig(**train.PRESETS["tiny"])
    assert "optimizer muon (adamw)" in train.departures(TrainConfig())


def test_defaults_are_what_the_help_says_and_the_limits_themselves_are_allowed():
    config = TrainConfig()
    assert config.full_captions == 0.5                       # Sec. 5.2.2
    assert config.every == config.warmup_steps == config.steps == 0
    assert (config.batch_size, config.minutes, config.depth) == (64, 10, 4)
    lowest = {"depth": 1, "batch_size": 1, "encoder_dropout": 0.0, "full_captions": 0.0,
              "lr": 1e-12, "timestep_shift": 0.01, "steps": 0, "every": 0, "warmup_steps": 0}
    highest = {"depth": 128, "encoder_dropout": 1.0, "full_captions": 1.0, "lr": 1.0,
               "timestep_shift": 100.0, "cooldown": 1.0, "ema": 0.999999, "seed": 2**31,
               "steps": 10**9, "every": 10**9, "warmup_steps": 10**9, "batch_size": 10**6}
    for allowed in (lowest, highest):
        assert allowed.items() <= dataclasses.asdict(TrainConfig(**allowed)).items()
    for name, value in (("depth", 129), ("encoder_dropout", 1.01), ("full_captions", 1.01),
                        ("timestep_shift", 101), ("lr", 1.01), ("batch_size", 0),
                        ("seed", 2**31 + 1), ("steps", 10**9 + 1), ("warmup_steps", 10**9 + 1)):
        with pytest.raises(ValueError, match=name.replace("_", "-")):
            TrainConfig(**{name: value})


def test_the_papers_rate_rises_over_1000_steps_and_stays():
    config = TrainConfig(**train.PRESETS["paper"])
    rates = [train.learning_rate(step, 500_000, config) for step in (0, 499, 999, 1000, 499_999)]
    assert rates == pytest.approx([0.001, 0.5, 1, 1, 1]) and config.lr == 1e-4


def test_a_short_runs_rate_rises_over_3_percent_and_falls_over_80():
    rates = [train.learning_rate(step, 1000, TrainConfig()) for step in (0, 29, 200, 600, 999)]
    assert rates == pytest.approx([1 / 30, 1, 1, 1 / 2, 1 / 800])
    assert train.learning_rate(0, 1, TrainConfig()) == 1


def averaged(config, steps, of=0):
    """The average, after `steps` steps (`of` so many), of a weight that was 0 and is 1 since the
    first one."""
    model, average = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    average.weight.data.fill_(0.0)
    for done in range(1, steps + 1):
        train.update_average(average, model, done, of or steps, config)
    return average.weight.item()


def test_the_papers_average_keeps_99_percent_every_100_steps():
    """After 1,270 steps it still holds 89 % of the first weights."""
    config = TrainConfig(**train.PRESETS["paper"])
    assert averaged(config, 99) == 0 and averaged(config, 100) == pytest.approx(0.01)
    assert 1 - averaged(config, 1270) == pytest.approx(0.99**12) == pytest.approx(0.886, abs=1e-3)


def test_a_short_runs_average_remembers_3_percent_of_it():
    assert averaged(TrainConfig(), 20, of=1000) == pytest.approx(1 - (29 / 30) ** 20)
    assert averaged(TrainConfig(ema=0.5), 3) == pytest.approx(0.875)
    assert averaged(TrainConfig(), 2) == pytest.approx(0.75)


def test_the_average_of_a_run_is_the_one_that_was_asked_for(tmp_path):
    """By hand: the average of three steps with decay one half, from the weights after each."""
    seen = []

    def loss(model, batch):
        seen.append(model.weight.detach().clone())
        return line_loss(model, batch)

    model, average, _ = experiment(tmp_path / "run", loss=loss, steps=3, ema=0.5)
    w0, w1, w2, w3 = [*seen, model.weight.detach()]
    torch.testing.assert_close(average.weight, w0 / 8 + w1 / 8 + w2 / 4 + w3 / 2)


@pytest.mark.parametrize("qk_norm, share", [(True, 1.0), (False, 1e-4)])
def test_adamw_has_the_papers_epsilon_beside_qk_norm(qk_norm, share):
    """Adam's first step is lr g / (|g| + eps): for g = 1e-12 a whole one with eps = 1e-15."""
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.zero_()
    optimizer, = train.make_optimizers(layer, settings(qk_norm=qk_norm))
    layer.weight.grad = torch.full((1, 1), 1e-12)
    optimizer.step()
    assert -layer.weight.item() / 0.05 == pytest.approx(share, rel=2e-3)


def test_adamw_averages_gradients_by_09_and_squares_by_099():
    """By hand, for the gradients 1 and 0: m = .9 * .1 / (1 - .9^2), v = .99 * .01 / (1 - .99^2)."""
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.zero_()
    optimizer, = train.make_optimizers(layer, settings())
    for gradient in (1.0, 0.0):
        before = layer.weight.item()
        layer.weight.grad = torch.full((1, 1), gradient)
        optimizer.step()
    second = (0.09 / 0.19) / math.sqrt(0.0099 / 0.0199)
    decay = 0.01 * before                                              # AdamW's, of the weights
    assert before - layer.weight.item() == pytest.approx(0.05 * (second + decay), rel=1e-4)


def test_muon_takes_the_matrices_of_the_blocks_at_16_times_the_rate(tmp_path):
    sizes = MMDiTConfig(2, latent_channels=4, context_dim=64, pooled_dim=64, pos_embed_max_size=4)
    model = MMDiT(sizes)
    names = {id(p): name for name, p in model.named_parameters()}
    adamw, muon = train.make_optimizers(model, settings(optimizer="muon"))
    inside = {names[id(p)] for p in muon.param_groups[0]["params"]}
    assert "joint_blocks.0.x_block.attn.qkv.weight" in inside and len(inside) == 2 * 2 * 4 - 3 + 0
    for word in ("adaLN", "embedder", "final", "bias"):
        assert word not in " ".join(inside)
    assert len(inside) + len(adamw.param_groups[0]["params"]) == len(names)
    rates = []

    def loss(network, batch):
        rates.append([o.param_groups[0]["lr"] for o in (run.optimizers)])
        return sum(p.sum() for p in network.parameters()) * torch.ones(8)

    run = Run(tmp_path / "run", settings(optimizer="muon", steps=4, every=9))
    real = train.make_optimizers
    train.make_optimizers = lambda *args: setattr(run, "optimizers", real(*args)) or run.optimizers
    try:
        fit(model, loss, lambda step: None, run.config, run)
    finally:
        train.make_optimizers = real
    shares = (1, 3 / 3.2, 2 / 3.2, 1 / 3.2)            # It falls over 80 % of the four steps.
    assert rates == [pytest.approx([0.05 * share, 0.8 * share]) for share in shares]


# --- The loss -------------------------------------------------------------------------------------

def some_batch(uniform):
    rng = torch.Generator().manual_seed(0)
    B = len(uniform)
    latent, noise = torch.randn(2, B, 4, 4, 4, generator=rng)
    context, pooled = torch.randn(B, 3, 64, generator=rng), torch.randn(B, 64, generator=rng)
    return Batch(latent, context, pooled, noise, torch.tensor(uniform))


def test_the_loss_is_eq_19_then_eq_23_then_eq_8():
    """u = .5 is t = .5; u = Phi(1) is sigmoid(1) = .731. A shift of 3 makes them .75 and .8908."""
    seen = {}

    def model(z_t, t, context, pooled):
        seen.update(z_t=z_t, t=t, context=context, pooled=pooled)
        return torch.zeros_like(z_t)

    batch = some_batch([0.5, 0.8413447])
    loss = train.flow_loss(model, batch, density("lognorm(0, 1)"), 3.0)
    torch.testing.assert_close(seen["t"], torch.tensor([0.75, 0.890768]), rtol=1e-5, atol=0)
    torch.testing.assert_close(seen["z_t"][0], 0.25 * batch.latent[0] + 0.75 * batch.noise[0])
    torch.testing.assert_close(loss, (batch.noise - batch.latent).square().mean(dim=(1, 2, 3)))
    assert seen["context"] is batch.context and seen["pooled"] is batch.pooled
    train.flow_loss(model, batch, density("uniform"), 1.0)
    torch.testing.assert_close(seen["t"], torch.tensor([0.5, 0.8413447]))


def test_at_most_six_functions_lie_between_a_batch_and_its_loss():
    """The network is not counted."""
    entered = set()

    def trace(frame, event, _):
        if event == "call" and Path(frame.f_code.co_filename).parent == ROOT:
            entered.add(frame.f_code.co_name)

    batch, model = some_batch([0.5]), lambda z_t, t, context, pooled: z_t
    logit_normal = density("lognorm(0, 1)")
    sys.setprofile(trace)
    try:
        train.flow_loss(model, batch, logit_normal, 3.0)
    finally:
        sys.setprofile(None)
    assert "rectified_flow_loss" in entered and len(entered) <= 6, entered


def test_validation_has_eight_equally_spaced_levels_and_weighs_pictures_alike():
    """App. B.3. Two sizes, three pictures: the mean is over pictures."""
    seen = []

    def loss(model, latent, context, pooled, t, noise):
        seen.append(t.tolist())
        return latent.flatten(1).mean(dim=1) + t

    sizes = [torch.tensor([1.0, 3.0]).view(2, 1, 1, 1), torch.tensor([8.0]).view(1, 1, 1, 1)]
    samples = [(latent, None, None, None) for latent in sizes]
    levels = train.validate(None, samples, torch.float32, loss)
    wanted = [0, 1 / 7, 2 / 7, 3 / 7, 4 / 7, 5 / 7, 6 / 7, 1]
    assert [t[0] for t in seen] == pytest.approx(wanted * 2)
    assert levels.tolist() == pytest.approx([4 + t for t in wanted])


@pytest.mark.parametrize("parts", [2, 4])
def test_gradient_accumulation_changes_nothing(parts):
    results = []
    for accumulate in (1, parts):
        torch.manual_seed(1)
        model = MMDiT(MMDiTConfig(1, latent_channels=4, context_dim=64, pooled_dim=64,
                                  pos_embed_max_size=4))
        for parameter in model.parameters():                           # past the zeros of the start
            parameter.data += 0.02 * torch.randn_like(parameter)
        batch = some_batch([0.1, 0.3, 0.5, 0.9])
        sizes = []

        def loss(model, batch, sizes=sizes):
            sizes.append(len(batch.latent))
            return train.flow_loss(model, batch, density("uniform"), timestep_shift=1.0)
        config = settings(accumulate=accumulate)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses, norm = train.train_step(model, [optimizer], loss, batch, config)
        assert sizes == [4 // accumulate] * accumulate
        results.append((losses, torch.tensor(norm), model.final_layer.linear.weight.detach()))
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)


def test_longer_gradients_are_scaled_to_the_limit():
    """By hand: the gradient of w is (3, 4), its norm 5, and a rate of 1 moves w by (.6, .8)."""
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data.zero_()
    def loss(model, batch):
        return model(torch.tensor([[3.0, 4.0]]))[0]
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    _, norm = train.train_step(layer, [optimizer], loss, None, settings())
    assert norm == pytest.approx(5)
    torch.testing.assert_close(layer.weight.detach(), torch.tensor([[-0.6, -0.8]]))


def test_compilation_and_recomputation_change_no_gradient(monkeypatch):
    """And a block that is computed again is compiled: the compiler gives up inside a checkpoint."""
    compiler = functools.partial(torch.compile, backend="aot_eager")   # It needs no C++ compiler.
    monkeypatch.setattr(train.torch, "compile", compiler)
    sizes = MMDiTConfig(1, latent_channels=4, context_dim=64, pooled_dim=64, pos_embed_max_size=8)
    gradients, graphs = [], []
    for names in ((), ("recompute",), ("compile", "recompute")):
        config = settings(precision="bf16", **dict.fromkeys(names, True))
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = train.make_model(sizes, config, devices.World("cpu"), trained=True)
        model.initialize(torch.Generator().manual_seed(0))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        loss = functools.partial(train.flow_loss, density=density("uniform"), timestep_shift=1.0)
        train.train_step(model, [optimizer], loss, some_batch([0.1, 0.9]), config)
        gradients.append(model.joint_blocks[0].x_block.attn.qkv.weight.detach())
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)
    torch.testing.assert_close(gradients[2], gradients[0], rtol=1e-2, atol=1e-4)
    assert graphs[:2] == [0, 0] and graphs[2] > 0


# --- The command line -----------------------------------------------------------------------------

@pytest.mark.parametrize("words", [
    "--lr inf", "--lr nan", "--lr -1", "--ema nan", "--ema 1", "--full-captions 7", "--every -1",
    "--cooldown -3", "--minutes inf", "--minutes 0", "--depth 0", "--depth 100000",
    "--batch-size 0", "--steps -1", "--timestep-shift nan", "--resolution 100",
    "--precision fp16", "--parallel tp", "--optimizer sgd",
    "--encoder-dropout 1.1", "--density eps/linear", "--buckets 2",
    "--density mode(9)", "--qk-norm maybe"])
def test_settings_that_cannot_work_are_refused_by_name(words, capsys):
    name, value = words.split()
    with pytest.raises((ValueError, SystemExit)) as problem:
        read_config([name, value])
    sentence = f"{problem.value} {capsys.readouterr().err}"
    assert name in sentence or (name == "--density" and value[:4] in sentence)


@pytest.mark.parametrize("words", ["--buckets --resolution 48", "--buckets --data pictures"])
def test_mixed_proportions_are_for_scenes_whose_sides_stay_multiples_of_16(words):
    with pytest.raises(ValueError, match="--buckets is for scenes of a multiple of 32 px"):
        read_config(words.split())
    assert read_config(["--buckets", "--resolution", "96"]).buckets


def test_help_says_what_going_on_with_a_run_does(capsys):
    with pytest.raises(SystemExit):
        read_config(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "only your own, because resuming unpickles" in text and "--timestep-shift" in text


def finished_run(folder, **train_values):
    """A run folder with a checkpoint that nobody will open."""
    (folder / "checkpoints" / "00000002").mkdir(parents=True)
    stored = dataclasses.asdict(TrainConfig(steps=2, depth=3)) | train_values
    file = SHIPPED / "model.safetensors"
    encoders = {"path": str(file), "fingerprint": fingerprint(file, FROZEN)}
    content = {"train": stored, "encoders": encoders}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def test_a_run_keeps_its_encoders(tmp_path, monkeypatch):
    """Others given with --out of a run are refused; the same ones, under any name, are not."""
    folder = finished_run(tmp_path / "run")
    same = read_config(["--out", str(folder), "--encoders", str(SHIPPED)])
    assert same.encoders == str(SHIPPED / "model.safetensors")
    monkeypatch.setattr(train, "fingerprint", lambda path, parts: str(path))
    with pytest.raises(ValueError, match="--encoders cannot change within a run"):
        read_config(["--out", str(folder), "--encoders", str(SHIPPED)])


def test_a_run_goes_on_with_its_own_settings(tmp_path, capsys):
    folder = finished_run(tmp_path / "run", lr=2e-4, num_scenes=100)
    config = read_config(["--out", str(folder), "--steps", "9", "--num-scenes", "999"])
    assert (config.depth, config.lr, config.steps, config.num_scenes) == (3, 2e-4, 9, 100)
    assert config.out == str(folder) and config.encoders == str(SHIPPED / "model.safetensors")
    for words in ("--depth 4", "--seed 1", "--batch-size 2", "--optimizer adamw",
                  "--qk-norm false", "--resolution 128", "--buckets",
                  "--preset paper", "--init someone/model"):
        with pytest.raises(ValueError, match="cannot change within a run"):
            read_config(["--out", str(folder), *words.split()])
    assert read_config(["--out", str(folder), "--lr", "1e-4"]).lr == 1e-4
    assert capsys.readouterr().err == "note: lr was 0.0002, now it is 0.0001\n"


def test_data_of_another_size_does_not_go_into_a_run(tmp_path, monkeypatch):
    """Positions follow from the size, so the checkpoint would not fit."""
    folder = finished_run(tmp_path / "run")
    inputs = SimpleNamespace(training=SimpleNamespace(resolution=128))
    monkeypatch.setattr(train, "read_inputs", lambda *_: inputs)
    with pytest.raises(ValueError, match="--data has 128 px, but the run 64; change --out"):
        train.main(["--out", str(folder), "--device", "cpu"])


def test_out_is_tried_before_anything_is_encoded(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "read_inputs", None)
    (tmp_path / "file").write_text("")
    for place in ("/proc/x", tmp_path / "file" / "run"):
        with pytest.raises(OSError):
            train.main(["--out", str(place), "--device", "cpu"])


def test_paths_of_a_run_hold_in_any_working_folder(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("mine", "~/mine", "./mine/../mine"):
        config = read_config([f"--data={path}", f"--init={path}"])
        assert config.data == config.init == str(tmp_path / "mine")
    assert read_config(["--init", "someone/model"]).init == "someone/model"       # on the hub


def test_a_folder_without_checkpoints_does_not_bind_the_next_command(tmp_path):
    folder = finished_run(tmp_path / "run")
    shutil.rmtree(folder / "checkpoints")
    assert read_config(["--out", str(folder), "--depth", "1"]).depth == 1
    with pytest.raises(ValueError, match="is no run folder"):
        read_config(["--out", str(ROOT / "tests")])
    killed = tmp_path / "killed"                                       # before its config.json
    (killed / "checkpoints").mkdir(parents=True)
    for name in ("lock", "config.json.0f.partial"):
        (killed / name).touch()
    assert read_config(["--out", str(killed)]).out == str(killed)
    (folder / "model.safetensors").touch()
    with pytest.raises(ValueError, match="has a model, but no checkpoints; choose another"):
        read_config(["--out", str(folder)])
    (folder / "checkpoints").mkdir()                                   # Somebody saved space.
    with pytest.raises(ValueError, match="has a model, but no checkpoints; choose another"):
        read_config(["--out", str(folder)])
    (folder / "checkpoints" / "00000003.partial").mkdir()              # killed in its first save
    assert read_config(["--out", str(folder)]).out == str(folder)


@pytest.mark.parametrize("text", [
    "", "[]", "{}", '{"train": 5, "encoders": {}}', '{"train": {"de', "[" * 100000,
    '{"train": {}, "encoders": {}}',
    '{"train": {"num_scenes": 64, "colour": 1}, "encoders": {}}',
    '{"train": {"num_scenes": "64"}, "encoders": {}}'])
def test_a_damaged_config_is_named(text, tmp_path):
    folder = finished_run(tmp_path / "run")
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json|--num-scenes"):
        read_config(["--out", str(folder)])


def test_encoders_that_a_strangers_run_names_never_reach_the_network(tmp_path, monkeypatch):
    def no_network(*_):
        raise AssertionError("the network was asked")

    folder = finished_run(tmp_path / "run", encoders="someone/repository")
    content = json.loads((folder / "config.json").read_text())
    content["encoders"] = {"path": "someone/repository", "fingerprint": "0"}
    (folder / "config.json").write_text(json.dumps(content))
    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    with pytest.raises(ValueError, match="someone/repository: no such file or folder"):
        train.main(["--out", str(folder)])


# --- Whole runs -----------------------------------------------------------------------------------

def command_of(*options, processes=1, restarts=0):
    """train.py as a user starts it."""
    torchrun = ()
    if processes > 1 or restarts:
        torchrun = ("-m", "torch.distributed.run", "--nproc_per_node", processes, "--standalone",
                    "--max-restarts", restarts)
    return [str(word) for word in (sys.executable, *torchrun, ROOT / "train.py", *SMALL, *options)]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def run_main(*options, **kwargs):
    """Runs it to its end."""
    return subprocess.run(command_of(*options, **kwargs), env=ENVIRONMENT, capture_output=True,
                          text=True, timeout=900)


def start_main(*options, **kwargs):
    """Starts it and comes back at once."""
    return subprocess.Popen(command_of(*options, **kwargs), env=ENVIRONMENT,
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def start_nodes(processes, *options):
    """Two torchruns that meet, as on two machines."""
    words = (sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--nproc_per_node",
             processes, "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}",
             "--max-restarts", 3, ROOT / "train.py", *SMALL, *options)
    command = [str(word) for word in words]
    return [subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL) for _ in range(2)]


def wait_for(condition, process, seconds=300):
    """Until the condition holds or the process has ended."""
    deadline = time.time() + seconds
    while not condition() and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    assert time.time() < deadline


def same_weights(one, other):
    ours, expected = (load_file(folder / "model.safetensors") for folder in (one, other))
    return ours.keys() == expected.keys() and all(torch.equal(ours[k], expected[k]) for k in ours)


def test_a_run_leaves_everything_the_readme_promises(tmp_path, monkeypatch, capsys):
    """t comes from the named density: logit-normal around 3 is above .9. Of 5,000 scenes no more
    are encoded than three steps of 8 need, and one validation."""
    seen = []
    real = train.rectified_flow_loss
    monkeypatch.setattr(train, "rectified_flow_loss",
                        lambda m, z, c, p, t, n: seen.append(t) or real(m, z, c, p, t, n))
    out = tmp_path / "run"
    train.main([*SMALL, "--out", str(out), "--steps", "3", "--num-scenes", "5000",
                "--density", "lognorm(3, 0.2)"])
    assert {"config.json", "log.jsonl", "loss.png", "samples-000003.png", "model.safetensors",
            "checkpoints"} <= {path.name for path in out.iterdir()}
    assert len(seen) == 3 and torch.cat(seen).min() > 0.9
    lines = [entry for entry in log_of(out) if "loss" in entry]
    assert lines[0]["loss"] == pytest.approx(2, abs=0.8)               # of predicting nothing
    assert all(entry["loss_by_t"][:9] == [None] * 9 for entry in lines)
    validation, = [entry for entry in log_of(out) if "validation" in entry]
    levels = validation["validation_by_t"]
    assert len(levels) == 8 and len(set(levels)) > 1
    assert validation["validation"] == pytest.approx(sum(levels[:-1]) / 7, abs=1e-5)
    assert "GenEval" not in capsys.readouterr().out

    with safe_open(out / "model.safetensors", "pt") as file:
        about = json.loads(file.metadata()["config"])
    assert about["sampling"] == {
        "num_steps": 28, "guidance_scale": 2.5, "schedule": "shifted", "timestep_shift": 1.0,
        "unconditional": "zeros", "height": 64, "width": 64}           # App. B.3: zeros
    assert about["mmdit"] == {"position_start": -8.0, "position_step": 4.0}
    assert about["words"] == sorted(about["words"]) and "circle" in about["words"]
    assert about["sizes"] == ["64x64"]
    assert len(list((tmp_path / "cache").iterdir())) >= 2
    assert json.loads((out / "config.json").read_text())["train"]["num_scenes"] == 64

    train.main(["--out", str(out), "--steps", "20"])       # One prompt a task for every 20 steps.
    said = capsys.readouterr().out
    assert "has done its 20 steps; to go on, give more --steps or --minutes" in said
    scores, = [entry for entry in log_of(out) if "geneval" in entry]
    assert scores["num_prompts"] == 1 and "GenEval" in said


def test_scenes_that_never_come_again_are_not_encoded_before_and_a_run_goes_on_with_them(tmp_path):
    """--num-scenes 0: only the 64 held-out scenes are encoded, and a stop changes no weight."""
    endless = [*SMALL, "--num-scenes", "0", "--buckets"]
    train.main([*endless, "--out", str(tmp_path / "whole"), "--steps", "4"])
    train.main([*endless, "--out", str(tmp_path / "halves"), "--steps", "4", "--every", "2"])
    shutil.rmtree(tmp_path / "halves" / "checkpoints" / "00000004")
    train.main(["--out", str(tmp_path / "halves")])
    assert same_weights(tmp_path / "whole", tmp_path / "halves")
    assert len(list((tmp_path / "cache").iterdir())) == 1
    with safe_open(tmp_path / "whole" / "model.safetensors", "pt") as file:
        about = json.loads(file.metadata()["config"])
    assert about["sizes"] == ["64x64", "64x96", "96x64"]


def test_what_a_run_is_made_of_is_what_was_asked_for(tmp_path, monkeypatch):
    """--shift reaches the loss, the log and the sampler; --init the weights. Held-out scenes are
    what is validated, and a precision of "auto" is settled before it is stored."""
    given = {}

    def fit(model, loss, batches, config, run):
        given.update(model=model, loss=loss, config=config, run=run)

    monkeypatch.setattr(train, "fit", fit)
    monkeypatch.setattr(train, "conclude", lambda *rest: None)
    train.main([*SMALL, "--depth", "4", "--init", str(SHIPPED), "--timestep-shift", "3",
                "--steps", "1", "--precision", "auto", "--out", str(tmp_path / "run")])
    run, loss = given["run"], given["loss"].keywords
    assert loss["timestep_shift"] == run.metadata["sampling"]["timestep_shift"] == 3
    uniform = torch.tensor([0.2, 0.5, 0.7])
    t = torch.sigmoid(torch.special.ndtri(uniform))                    # Eq. 19
    expected = 3 * t / (1 + 2 * t)                                     # Eq. 23
    torch.testing.assert_close(run.times(SimpleNamespace(uniform=uniform)), expected)
    assert loss["density"] == density("lognorm(0, 1)")

    from checkpoints import load_components
    shipped = load_components(SHIPPED, ("mmdit",)).mmdit.state_dict()
    for model in (given["model"], run.average):
        for name, value in model.named_parameters():
            assert torch.equal(value, shipped[name])
    parts = run.report.keywords
    assert parts["pipeline"].mmdit is run.average
    unseen = parts["unseen"].folder
    scored = Scenes(64, seed=1_000_003)
    assert [unseen.captions(i) for i in range(64)] == [scored.captions(i) for i in range(64)]
    assert given["config"].precision in ("bf16", "fp32")
    with pytest.raises(ValueError, match="draws the scenes that score"):
        TrainConfig(seed=1_000_003)


@pytest.mark.parametrize("words, count", [
    ("--minutes 10", 16_000), ("--minutes 30", 48_000), ("--minutes 600", 65_536),
    ("--minutes 0.01", 64), ("--steps 900", 14_400), ("--steps 3", 64),
    ("--steps 900 --num-scenes 0", 0), ("--steps 900 --num-scenes 99", 99),
    ("--steps 3 --num-scenes 5000", 192), ("--minutes 1 --num-scenes 9000", 6400)])
def test_a_longer_run_encodes_more_scenes(words, count, tmp_path, monkeypatch):
    """Without --num-scenes a scene comes four times: 900 steps of 64 pictures have 14,400 scenes.
    Ten minutes on two cores have 57,000 to 110,000 pictures, which is four to seven times."""
    def encoded(config, world, found, until):
        assert found == count
        raise Killed

    monkeypatch.setattr(train, "encoded", encoded)
    with pytest.raises(Killed):
        train.main(["--device", "cpu", *words.split(), "--out", str(tmp_path / "run")])


@pytest.mark.parametrize("words, least, most", [
    (["--minutes", "8"], 120, 120), (["--steps", "5"], math.inf, math.inf)])
def test_encoding_takes_a_quarter_of_the_minutes(words, least, most, tmp_path, monkeypatch):
    def encoded(config, world, count, until):
        assert least <= until - train.STARTED <= most
        raise Killed

    monkeypatch.setattr(train, "encoded", encoded)
    with pytest.raises(Killed):
        train.main([*SMALL, *words, "--out", str(tmp_path / "run")])


def test_a_run_that_could_not_begin_leaves_its_name_free(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="nothing does not exist"):
        train.main([*SMALL, "--data", "nothing"])
    assert train.pick_folder(TrainConfig()) == Path("runs/d4-1")


def test_automatic_restarts_need_a_folder_to_go_on_with(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(ValueError, match="give --out as well"):
        train.main([*SMALL])


def test_init_from_a_run_with_other_frozen_networks_is_refused(tmp_path):
    """Its latents and texts would mean something else."""
    frozen = load_components(SHIPPED)
    networks = {"mmdit": frozen.mmdit, "vae": frozen.vae, **frozen.text.encoders}
    networks["vae"].encoder.conv_in.bias.data.add_(1)
    other = tmp_path / "other" / "model.safetensors"
    other.parent.mkdir()
    save_networks(other, networks, frozen.text.config)
    run = tmp_path / "run"
    run.mkdir()
    save_networks(run / "model.safetensors", {"mmdit": frozen.mmdit})
    encoders = {"path": str(other), "fingerprint": fingerprint(other, FROZEN)}
    (run / "config.json").write_text(json.dumps({"encoders": encoders}))
    config = TrainConfig(init=str(run))
    with pytest.raises(ValueError, match=f"give --encoders {other}"):
        train.read_start(config)
    start = train.read_start(dataclasses.replace(config, encoders=str(other)))
    assert start.config.depth == frozen.mmdit.config.depth


def test_a_run_that_goes_on_no_longer_needs_the_file_of_init(tmp_path):
    """Its weights are in the checkpoint. Its positions, those of the released files here, are not
    what a run without --init would have."""
    parts = load_components(SHIPPED)
    parts.mmdit.config = dataclasses.replace(parts.mmdit.config, position_start=0.0)
    networks = {"mmdit": parts.mmdit, "vae": parts.vae, **parts.text.encoders}
    save_networks(tmp_path / "old.safetensors", networks, parts.text.config)
    out = ("--out", str(tmp_path / "run"))
    depth = str(parts.mmdit.config.depth)
    train.main([*SMALL, *out, "--depth", depth, "--init", str(tmp_path / "old.safetensors"),
                "--steps", "1"])
    (tmp_path / "old.safetensors").unlink()
    train.main([*out, "--steps", "2"])
    sizes = json.loads((tmp_path / "run" / "config.json").read_text())["model"]
    assert sizes == dataclasses.asdict(parts.mmdit.config)
    assert [entry["step"] for entry in log_of(tmp_path / "run") if "loss" in entry] == [1, 2]


@pytest.mark.parametrize("name, value", [("position_step", None), ("depth", "4")])
def test_the_sizes_of_a_run_are_checked(tmp_path, name, value):
    stored = dataclasses.asdict(MMDiTConfig(depth=2)) | {name: value}
    (tmp_path / "config.json").write_text(json.dumps({"model": stored}))
    with pytest.raises(ValueError, match=f"config.json: {name}"):
        train.sizes_of(tmp_path)


def test_all_three_encoders_are_dropped_independently_at_the_given_rate():
    """App. B.3: 46.4 % each, so .464^3 = 10 % of the samples have no text at all."""
    config = TrainConfig(device="cpu", precision="fp32", num_scenes=64,
                         encoder_dropout=0.464)
    world = devices.World("cpu")
    training, _ = encoded(config, world, 64)
    from checkpoints import load_components
    parts = load_components(SHIPPED, ("vae", "text"))
    text = parts.text.config
    batches = Batches(training, parts.vae.config, text, config, world)
    dropped = []
    for step in range(40):
        batch = batches(step)
        L, l, g = text.clip_length, text.clip_l_width, text.clip_g_width
        columns = [batch.context[:, :L, :l], batch.context[:, :L, l : l + g], batch.context[:, L:],
                   batch.pooled[:, :l], batch.pooled[:, l:]]
        dropped.append(torch.stack([(part.flatten(1) == 0).all(dim=1) for part in columns], dim=1))
    dropped = torch.cat(dropped)                                       # (2560, 5)
    assert torch.equal(dropped[:, :2], dropped[:, 3:])                 # pooled with its sequence
    rates = dropped[:, :3].float().mean(dim=0)
    torch.testing.assert_close(rates, torch.full((3,), 0.464), rtol=0, atol=0.04)
    assert dropped[:, :3].all(dim=1).float().mean() == pytest.approx(0.464**3, abs=0.02)


def test_a_killed_and_resumed_run_ends_with_the_same_weights_bit_for_bit(tmp_path):
    """SIGKILL at some moment after the first checkpoint, against a run that nothing disturbed."""
    options = ("--steps", "19", "--every", "3", "--optimizer", "muon")
    process = start_main("--out", tmp_path / "killed", *options)
    wait_for(lambda: steps_of(tmp_path / "killed"), process)
    process.kill()
    process.wait()
    assert run_main("--out", tmp_path / "whole", *options).returncode == 0
    resumed = run_main("--out", tmp_path / "killed", *options)
    assert resumed.returncode == 0, resumed.stderr
    assert same_weights(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("optimizer, steps, within, strategies", [
    ("adamw", 50, 1e-3, ("ddp", "fsdp")), ("muon", 6, 3e-3, ("ddp",))])
def test_two_processes_have_the_losses_of_one(tmp_path, optimizer, steps, within, strategies):
    """Every random number belongs to a sample, so only rounding differs (Muon makes it grow: a
    weight moves by about .01 a step)."""
    options = ("--steps", steps, "--accumulate", 2, "--optimizer", optimizer,
               "--depth", 2)
    assert run_main("--out", tmp_path / "one", *options).returncode == 0
    for parallel in strategies:
        two = run_main("--out", tmp_path / parallel, "--parallel", parallel, *options, processes=2)
        assert two.returncode == 0, two.stderr
        expected = losses_of(tmp_path / "one")
        assert losses_of(tmp_path / parallel) == pytest.approx(expected, abs=1e-5)
        ours = load_file(tmp_path / parallel / "model.safetensors")
        theirs = load_file(tmp_path / "one" / "model.safetensors")
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=0, atol=within)


@pytest.mark.slow
def test_a_run_goes_on_with_other_processes_and_another_strategy(tmp_path):
    """2 FSDP -> 1 -> 2 DDP, 20 steps each, against one process throughout."""
    options = ("--warmup-steps", 1, "--cooldown", 0, "--optimizer", "adamw")
    assert run_main("--out", tmp_path / "one", "--steps", 60, *options).returncode == 0
    for steps, parallel, processes in ((20, "fsdp", 2), (40, "ddp", 1), (60, "ddp", 2)):
        part = run_main("--out", tmp_path / "run", "--steps", steps, "--parallel", parallel,
                        *options, processes=processes)
        assert part.returncode == 0, part.stderr
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(tmp_path / "one"), abs=1e-5)


@pytest.mark.slow
def test_two_nodes_of_two_processes_have_the_losses_of_one(tmp_path):
    """HSDP: shards within a node, copies between nodes."""
    options = ("--steps", 4, "--optimizer", "adamw")
    assert run_main("--out", tmp_path / "one", *options).returncode == 0
    nodes = start_nodes(2, "--parallel", "hsdp", "--out", tmp_path / "four", *options)
    assert [node.wait(timeout=600) for node in nodes] == [0, 0]
    assert losses_of(tmp_path / "four") == pytest.approx(losses_of(tmp_path / "one"), abs=1e-5)


@pytest.mark.slow
def test_nodes_start_again_together_when_a_process_of_one_of_them_dies(tmp_path):
    """The other node's torchrun counts no restart: the store must be a new one each time."""
    options = ("--steps", 60, "--every", 6)
    nodes = start_nodes(1, "--out", tmp_path / "whole", *options)
    assert [node.wait(timeout=600) for node in nodes] == [0, 0]
    nodes = start_nodes(1, "--out", tmp_path / "run", *options)
    for count, victim in ((1, nodes[0]), (3, nodes[1])):
        def far_enough(steps=12 * count):
            return max(steps_of(tmp_path / "run"), default=0) >= steps
        wait_for(far_enough, nodes[0])
        found = subprocess.run(["pgrep", "-P", str(victim.pid)], capture_output=True, text=True)
        os.kill(int(found.stdout.split()[0]), signal.SIGKILL)
    assert [node.wait(timeout=600) for node in nodes] == [0, 0]
    assert same_weights(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_ranks_that_are_killed_again_and_again_do_not_change_the_result(tmp_path, kills=20):
    """kill -9 of a random rank at a random moment; torchrun starts all again from the last save."""
    options = ("--steps", 1200, "--every", 6)
    assert run_main("--out", tmp_path / "whole", *options, processes=2).returncode == 0
    process = start_main("--out", tmp_path / "run", *options, processes=2, restarts=kills)
    rng = random.Random(0)
    for _ in range(kills):
        time.sleep(rng.uniform(8, 25))
        found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
        ranks = found.stdout.split()
        if process.poll() is None and ranks:
            os.kill(int(rng.choice(ranks)), signal.SIGKILL)
    assert process.wait(timeout=600) == 0 and same_weights(tmp_path / "run", tmp_path / "whole")
