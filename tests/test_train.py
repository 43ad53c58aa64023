"""The training loop: resuming, splitting over processes, averaging, and one whole run."""

import dataclasses
import fcntl
import functools
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import train
from checkpoints import ENCODERS, SHIPPED, fingerprint
from data import Scenes
from encode import Batches, EncodedImages, pick_caption
from flow import RectifiedFlow, Shifted, Uniform, formulation
from mmdit import MMDiT, MMDiTConfig
from text_encoders import CLIPConfig, CLIPTextEncoder, T5Config, T5Encoder, TextConfig, TextEncoders
from train import (
    TrainConfig,
    complete,
    draw_losses,
    learning_rate,
    summarize,
    train_step,
    training_formulation,
    update_average,
)
from vae import VAE, VAEConfig

ROOT = Path(__file__).parents[1]
FP32 = lambda: torch.autocast("cpu", enabled=False)


class WordTokenizer:
    """Ids from letters: stands in for a trained vocabulary."""

    def __call__(self, prompts, length):
        rows = [[ord(letter) % 40 + 2 for letter in prompt][: length - 1] + [49] for prompt in prompts]
        return torch.tensor([row + [0] * (length - len(row)) for row in rows]), [len(row) for row in rows]


@pytest.fixture(scope="module")
def frozen():
    """A random autoencoder and random text encoders, small enough to make in no time."""
    torch.manual_seed(0)
    vae = VAE(VAEConfig(4, (32, 32, 32, 32), norm_groups=8)).eval().requires_grad_(False)
    config = TextConfig(clip_l_width=64, clip_g_width=64, t5_width=128, clip_length=8, t5_length=8)
    encoders = {"clip_l": CLIPTextEncoder(CLIPConfig(50, 64, 2, 8)), "clip_g": CLIPTextEncoder(CLIPConfig(50, 64, 2, 8)),
                "t5": T5Encoder(T5Config(50, 128, 64, 1, 2))}
    text = TextEncoders(encoders, {name: WordTokenizer() for name in encoders}, config).eval().requires_grad_(False)
    text.truncation_said = True
    return vae, text


def make_batches(frozen, rank=0, size=1, **settings):
    vae, text = frozen
    world = SimpleNamespace(rank=rank, size=size, device=torch.device("cpu"))
    images = EncodedImages(Scenes(40), vae, text, 32, world.device, FP32, quiet=True)
    return Batches(images, vae, text.config, TrainConfig(**{"batch_size": 8, **settings}), world)


def small_model():
    torch.manual_seed(1)
    model = MMDiT(MMDiTConfig(1, latent_channels=4, context_dim=128, pooled_dim=128, pos_embed_max_size=4,
                              pos_embed_base_size=4))
    for parameter in model.parameters():                                       # past the zero-initialised start
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


SMALL = ("--device", "cpu", "--precision", "fp32", "--num-scenes", "64", "--batch-size", "8", "--num-prompts", "0")


def command_of(*options, processes=1, depth=1, restarts=0):
    """train.py as a user starts it, on two scenes' worth of work."""
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node", processes, "--master_port", free_port(), "--max-restarts",
                restarts) if processes > 1 or restarts else ()
    return [str(word) for word in (sys.executable, *torchrun, "train.py", *SMALL, "--depth", depth, *options)]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_main(*options, **kwargs):
    """Run it to its end."""
    return subprocess.run(command_of(*options, **kwargs), cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=600)


def start_main(*options, **kwargs):
    """Start it in a process group of its own, and come back at once."""
    return subprocess.Popen(command_of(*options, **kwargs), cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def start_nodes(processes, *options):
    """Two torchruns that meet, as on two machines."""
    end = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--nproc_per_node", processes,
               "--rdzv-backend", "c10d", "--rdzv-endpoint", end, "--max-restarts", 3, "train.py", *SMALL, "--depth", 1, *options]
    return [subprocess.Popen([str(word) for word in command], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(2)]


def wait_for(condition, process, seconds=300):
    """Until the condition holds or the process has ended."""
    deadline = time.time() + seconds
    while not condition() and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    assert time.time() < deadline


def losses_of(folder):
    return [entry["loss"] for entry in log_of(folder) if "loss" in entry]


def same_weights(one, other):
    ours, expected = (load_file(folder / "model.safetensors") for folder in (one, other))
    return ours.keys() == expected.keys() and all(torch.equal(ours[key], expected[key]) for key in expected)


def log_of(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------- batches


def test_a_batch_split_over_two_ranks_is_the_same_batch(frozen):
    """Every draw is keyed by the index in the global batch, never by the rank."""
    whole = make_batches(frozen)(3)
    parts = [make_batches(frozen, rank, 2)(3) for rank in range(2)]
    for field in dataclasses.fields(whole):
        joined = torch.cat([getattr(part, field.name) for part in parts])
        torch.testing.assert_close(joined, getattr(whole, field.name), rtol=1e-5, atol=1e-5)


def test_the_order_of_pictures_is_a_new_permutation_every_epoch(frozen):
    batches = make_batches(frozen)
    first, second = ([batches.index(0, epoch * 40 + i) for i in range(40)] for epoch in range(2))
    assert sorted(first) == sorted(second) == list(range(40)) and first != second
    assert [batches.index(0, i) for i in range(40)] == first                      # asking for a later epoch changed nothing


def test_encoders_are_dropped_independently_at_the_given_rate(frozen):
    """App. B.3: 0.464 each, so about 10 % of the samples have no text at all."""
    batches = make_batches(frozen, batch_size=1000)
    pooled = batches(0).pooled
    dropped_l, dropped_g = (part.abs().sum(dim=1) == 0 for part in pooled.chunk(2, dim=1))
    assert abs(dropped_l.float().mean() - 0.464) < 0.05
    assert abs((dropped_l & dropped_g).float().mean() - 0.464**2) < 0.05


def test_two_captions_are_mixed_and_five_are_drawn_evenly():
    """Sec. 5.2.2: half original, half full captions."""
    draws = torch.linspace(0, 0.999, 1000).tolist()
    assert sum(pick_caption(("short", "full"), u, 0.5) == "full" for u in draws) == pytest.approx(500, abs=2)
    assert [sum(pick_caption(tuple("abcde"), u, 0.5) == letter for u in draws) for letter in "abcde"] == [
        pytest.approx(200, abs=2)] * 5


# ---------------------------------------------------------------------------------------------- one step


@pytest.mark.parametrize("accumulate", [2, 4])
def test_gradient_accumulation_changes_nothing(frozen, accumulate):
    results = []
    for parts in (1, accumulate):
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss, t, norm = train_step(model, [optimizer], make_batches(frozen)(0), RectifiedFlow(),
                                   TrainConfig(accumulate=parts), FP32)
        results.append((loss, t, norm, model.final_layer.linear.weight.detach()))
    for ours, expected in zip(results[1], results[0]):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_a_non_finite_gradient_does_not_touch_the_weights(frozen):
    model, batch = small_model(), make_batches(frozen)(0)
    batch.latent[0, 0, 0, 0] = float("nan")
    before = model.final_layer.linear.weight.detach().clone()
    _, _, norm = train_step(model, [torch.optim.AdamW(model.parameters())], batch, RectifiedFlow(), TrainConfig(), FP32)
    assert not math.isfinite(norm) and torch.equal(model.final_layer.linear.weight, before)


def test_one_batch_can_be_overfitted(frozen):
    model, batch = small_model(), make_batches(frozen, batch_size=4, encoder_dropout=0.0)(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = [train_step(model, [optimizer], batch, RectifiedFlow(), TrainConfig(), FP32)[0].mean() for _ in range(150)]
    assert losses[-1] < 0.35 * losses[0]


def test_learning_rate_rises_stays_and_falls_to_zero():
    config = TrainConfig(warmup=0.1, cooldown=0.2)
    rates = [learning_rate(step, 1000, config) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01) and rates[99] == rates[799] == 1.0
    assert rates[899] == pytest.approx(0.505) and 0 < rates[999] < 0.01


def test_the_average_forgets_the_initial_weights_within_a_short_run():
    """The paper's 0.99 every 100 steps would still hold 89 % of them after 1,270 steps."""
    model, average = small_model(), small_model()
    start = average.final_layer.linear.bias.clone()
    model.final_layer.linear.bias.data = start + 1
    for step in range(300):
        update_average(average, model, step, 300, TrainConfig())
    torch.testing.assert_close(average.final_layer.linear.bias, start + 1, rtol=0, atol=1e-3)


# ---------------------------------------------------------------------------------------------- logs and refusals


def test_a_log_line_sorts_losses_by_tenth_of_t():
    entry = summarize(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0.05, 0.07, 0.95]), torch.tensor([1.0]))
    assert entry["loss"] == 3 and entry["loss_by_t"] == [2, *[None] * 8, 5]


def test_a_log_line_means_what_is_finite_and_counts_the_rest():
    nan = float("nan")
    entry = summarize(torch.tensor([1.0, nan]), torch.tensor([0.5, 0.5]), torch.tensor([1.0, 1.0, 1.0, 9.0, nan]))
    assert entry["loss"] == 1 and entry["grad_norm"] == 3 and entry["skipped"] == 1 and entry["spikes"] == 1
    assert summarize(torch.tensor([nan]), torch.tensor([0.5]), torch.tensor([nan]))["loss"] is None


def test_a_log_that_a_kill_cut_in_the_middle_is_read_up_to_there(tmp_path):
    run = object.__new__(train.Run)
    run.folder = tmp_path
    assert run.logged() == []
    (tmp_path / "log.jsonl").write_text('{"step": 20, "loss": 1.0}\n{"step": 40, "lo')
    assert run.logged() == [{"step": 20, "loss": 1.0}]


def test_the_loss_curve_is_drawn_also_from_one_entry():
    picture = draw_losses([{"step": 20, "loss": 1.0, "loss_by_t": [1.0, *[None] * 9]}])
    assert picture.size == (720, 440) and len(picture.getcolors(1 << 20)) > 5


@pytest.mark.parametrize("settings, words", [
    ({"resolution": 100}, "multiple of 16"), ({"batch_size": 10, "accumulate": 4}, "multiple of"),
    ({"data": "/no/such/path"}, "no such file or folder"), ({"weight_sets": 4}, "weight sets are 2 or 3"),
    ({"batch_size": 0}, "greater than 0"), ({"steps": -1}, "0 or greater"), ({"precision": "fp8"}, "auto, bf16, fp32"),
    ({"out": "tests"}, "exists already"), ({"parallel": "fsdp"}, "torchrun"),
    ({"formulation": "eps/linear"}, "not on the straight path"), ({"formulation": "rf/moed(1.29)"}, "choose one of rf"),
    ({"formulation": "rf", "logit_mean": 0.5}, "leave out --logit-mean")])
def test_settings_that_cannot_work_are_refused_in_one_sentence(settings, words):
    with pytest.raises(ValueError, match=words):
        complete(TrainConfig(**settings))


def test_the_density_of_t_is_the_named_one_or_the_logit_normal_of_the_settings_shifted():
    drawn = lambda **settings: training_formulation(TrainConfig(**settings))
    assert drawn() == RectifiedFlow() and drawn(formulation="rf/mode(1.29)") == formulation("rf/mode(1.29)")
    assert drawn(logit_mean=0.5, logit_std=0.6) == formulation("rf/lognorm(0.50, 0.60)")
    assert drawn(formulation="rf", timestep_shift=3.0) == RectifiedFlow(Shifted(Uniform(), 3.0))


def test_small_models_train_on_64_px_and_large_ones_on_256():
    assert complete(TrainConfig()).resolution == 64 and complete(TrainConfig(depth=38)).resolution == 256


# ---------------------------------------------------------------------------------------------- whole runs


def test_a_killed_and_resumed_run_ends_with_the_same_weights_bit_for_bit(tmp_path):
    """SIGKILL at some moment after the first checkpoint, then --resume, against a run that nothing disturbed."""
    settings = ("--steps", 12, "--save-every", 0.25, "--sample-every", 0)
    assert run_main("--out", tmp_path / "whole", *settings).returncode == 0
    process = start_main("--out", tmp_path / "killed", *settings)
    wait_for(lambda: list((tmp_path / "killed").glob("checkpoints/0000000[369]")), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = run_main("--resume", tmp_path / "killed")
    assert resumed.returncode == 0, resumed.stderr
    assert same_weights(tmp_path / "killed", tmp_path / "whole")


def test_a_run_that_is_told_to_stop_saves_and_can_go_on(tmp_path):
    """SIGTERM, as a cluster sends it before it takes the machine away."""
    settings = ("--steps", 40, "--save-every", 0, "--sample-every", 0, "--log-every", 1, "--optimizer", "muon")
    process = start_main("--out", tmp_path / "run", *settings)
    wait_for(lambda: (tmp_path / "run" / "log.jsonl").is_file(), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 0
    done = log_of(tmp_path / "run")[-1]["step"]
    assert done < 40 and [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"{done:08}"]
    assert run_main("--resume", tmp_path / "run").returncode == 0
    assert [entry["step"] for entry in log_of(tmp_path / "run") if "loss" in entry] == list(range(1, 41))


def test_the_last_checkpoints_are_kept_and_milestones(tmp_path):
    """Made at 2, 4, 6, 8, 10 and 11 by --save-every, at 3, 6 and 9 by --keep-every."""
    settings = ("--steps", 11, "--save-every", 0.2, "--keep-last", 2, "--keep-every", 3, "--sample-every", 0)
    assert run_main("--out", tmp_path / "run", *settings).returncode == 0
    assert sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()) == [3, 6, 9, 10, 11]


@pytest.mark.parametrize("parallel, optimizer, steps", [("ddp", "adamw", 50), ("fsdp", "adamw", 50), ("ddp", "muon", 6)])
def test_two_processes_have_the_losses_of_one(tmp_path, parallel, optimizer, steps):
    """torchrun with gloo: every random number is keyed by the sample, so only rounding may differ (Muon, which makes singular
    values equal, makes it grow: 5e-5 after 50 steps)."""
    settings = ("--steps", steps, "--log-every", 1, "--sample-every", 0.5, "--save-every", 0, "--accumulate", 2,
                "--optimizer", optimizer)
    assert run_main("--out", tmp_path / "one", *settings, depth=2).returncode == 0
    two = run_main("--out", tmp_path / "two", "--parallel", parallel, *settings, processes=2, depth=2)
    assert two.returncode == 0, two.stderr
    assert len(losses_of(tmp_path / "one")) == steps
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), abs=1e-5)


@pytest.mark.slow
def test_a_run_goes_on_with_other_processes_and_another_strategy(tmp_path):
    """2 FSDP -> 1 -> 2 DDP, 17 steps each, against one process throughout."""
    settings = ("--steps", 51, "--log-every", 1, "--sample-every", 0, "--save-every", 0.3333, "--keep-last", 9,
                "--optimizer", "adamw")
    assert run_main("--out", tmp_path / "one", *settings).returncode == 0
    assert run_main("--out", tmp_path / "run", "--parallel", "fsdp", *settings, processes=2).returncode == 0
    for parallel, processes in (("ddp", 1), ("ddp", 2)):
        newest = sorted((tmp_path / "run" / "checkpoints").iterdir())
        for late in newest[1 if processes == 1 else 2 :]:
            shutil.rmtree(late)
        resumed = run_main("--resume", tmp_path / "run", "--parallel", parallel, processes=processes)
        assert resumed.returncode == 0, resumed.stderr
    assert len(losses_of(tmp_path / "one")) == 51
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(tmp_path / "one"), abs=1e-5)


@pytest.mark.slow
def test_two_nodes_of_two_processes_have_the_losses_of_one(tmp_path):
    """HSDP: shards within a node, copies between nodes."""
    settings = ("--steps", 4, "--log-every", 1, "--sample-every", 0, "--save-every", 0, "--optimizer", "adamw")
    assert run_main("--out", tmp_path / "one", *settings).returncode == 0
    nodes = start_nodes(2, "--parallel", "hsdp", "--out", tmp_path / "four", *settings)
    assert [node.wait(timeout=600) for node in nodes] == [0, 0]
    assert losses_of(tmp_path / "four") == pytest.approx(losses_of(tmp_path / "one"), abs=1e-5)


@pytest.mark.slow
def test_nodes_start_again_together_when_a_process_of_one_of_them_dies(tmp_path):
    """The other node's torchrun counts no restart: what a process does may not depend on its own count."""
    settings = ("--steps", 60, "--save-every", 0.1, "--sample-every", 0, "--batch-size", 8)
    assert [node.wait(timeout=600) for node in start_nodes(1, "--out", tmp_path / "whole", *settings)] == [0, 0]
    nodes = start_nodes(1, "--out", tmp_path / "run", *settings)
    for count, victim in ((1, nodes[0]), (3, nodes[1])):
        wait_for(lambda: len(list((tmp_path / "run").glob("checkpoints/*0*"))) > 0
                 and int(max(p.name[:8] for p in (tmp_path / "run" / "checkpoints").iterdir())) >= 12 * count, nodes[0])
        rank = subprocess.run(["pgrep", "-P", str(victim.pid)], capture_output=True, text=True).stdout.split()[0]
        os.kill(int(rank), signal.SIGKILL)
    assert [node.wait(timeout=600) for node in nodes] == [0, 0]
    assert same_weights(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_ranks_that_are_killed_again_and_again_do_not_change_the_result(tmp_path, kills=20):
    """kill -9 of a random rank at a random moment; torchrun starts all of them again from the last checkpoint."""
    settings = ("--steps", 1200, "--save-every", 0.005, "--sample-every", 0)
    assert run_main("--out", tmp_path / "whole", *settings, processes=2).returncode == 0
    process, random = start_main("--out", tmp_path / "run", *settings, processes=2, restarts=kills), Random(0)
    for _ in range(kills):
        time.sleep(random.uniform(8, 25))
        ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        if process.poll() is None and ranks:
            os.kill(int(random.choice(ranks)), signal.SIGKILL)
    assert process.wait(timeout=600) == 0 and same_weights(tmp_path / "run", tmp_path / "whole")


def test_two_runs_never_write_into_one_folder(tmp_path):
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        config = dataclasses.asdict(TrainConfig(out=str(tmp_path / "run"), depth=1, batch_size=8, num_scenes=64, steps=2))
        named = {"path": "pretrained/tiny", "fingerprint": fingerprint(SHIPPED / "model.safetensors", ENCODERS)}
        (tmp_path / "run" / "config.json").write_text(json.dumps({"train": config, "encoders": named}))
        result = run_main("--resume", tmp_path / "run")
    assert result.returncode != 0 and "another process is writing" in result.stderr


@pytest.mark.parametrize("ours, theirs", [(True, True), (True, False)])
def test_a_run_can_start_from_another_model_and_gain_qk_norm(ours, theirs):
    sizes = lambda qk_norm: MMDiTConfig(1, latent_channels=4, context_dim=128, pooled_dim=128, qk_norm=qk_norm)
    model, weights = MMDiT(sizes(ours)), MMDiT(sizes(theirs))
    weights.final_layer.linear.weight.data.normal_()
    train.load_weights(model, weights, "FILE", 64, 64)
    assert torch.equal(model.final_layer.linear.weight, weights.final_layer.linear.weight)
    assert torch.equal(model.joint_blocks[0].x_block.attn.ln_q.weight, torch.ones(64))
    with pytest.raises(ValueError, match="--init FILE is a model of other sizes"):
        train.load_weights(model, MMDiT(dataclasses.replace(sizes(ours), context_dim=64)), "FILE", 64, 64)


def test_compilation_and_recomputation_change_no_gradient(frozen, monkeypatch):
    """And a block that is computed again is compiled as well: the compiler gives up on what a checkpoint wraps."""
    monkeypatch.setattr(train.torch, "compile", functools.partial(torch.compile, backend="aot_eager"))  # needs no C++ compiler
    world, gradients, graphs = train.World("cpu"), [], []
    for config in (TrainConfig(), TrainConfig(recompute=True), TrainConfig(compile=True, recompute=True)):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = train.make_model(small_model().config, config, world, torch.float32, trained=True)
        model.load_state_dict(small_model().state_dict())
        batch = make_batches(frozen)(0)
        with train.compute_context(world.device, torch.bfloat16):                  # which backward() is not inside of
            loss = RectifiedFlow().loss(model, batch.latent, batch.context, batch.pooled, batch.uniform, batch.noise).mean()
        loss.backward()
        gradients.append(model.joint_blocks[0].x_block.attn.qkv.weight.grad)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)
    torch.testing.assert_close(gradients[2], gradients[0], rtol=1e-2, atol=1e-4)
    assert graphs[:2] == [0, 0] and graphs[2] > 0


def test_a_run_leaves_everything_the_readme_promises_and_refuses_to_be_overwritten(tmp_path):
    out = tmp_path / "run"
    result = run_main("--out", out, "--steps", 4)
    assert result.returncode == 0, result.stderr
    files = {path.name for path in out.iterdir()}
    assert {"config.json", "log.jsonl", "loss.png", "samples-000004.png", "model.safetensors", "checkpoints"} <= files
    validation = next(entry for entry in log_of(out) if "validation" in entry)
    levels = validation["validation_by_t"]
    assert len(levels) == 8 and validation["validation"] == pytest.approx(sum(levels[:-1]) / 7, abs=1e-4)   # without t = 1
    again = run_main("--out", out, "--steps", 4)
    assert again.returncode != 0 and "exists already" in again.stderr and "Traceback" not in again.stderr


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    def no_space(state, checkpoint_id, **_):
        checkpoint_id.mkdir(parents=True)
        (checkpoint_id / "half").write_text("x")
        raise OSError(28, "No space left on device")

    run = object.__new__(train.Run)
    run.folder, run.world, run.saving = tmp_path, train.World("cpu"), None
    good = tmp_path / "checkpoints" / "00000001"
    good.mkdir(parents=True)
    monkeypatch.setattr(train.dcp, "async_save", no_space)
    model = small_model()
    setup = SimpleNamespace(model=model, average=model, optimizers=[torch.optim.AdamW(model.parameters())])
    with pytest.raises(OSError, match="last good checkpoint is untouched"):
        run.save(setup, 2)
    assert [path.name for path in good.parent.iterdir()] == ["00000001"]


def test_depth_cannot_change_when_resuming(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"train": dataclasses.asdict(TrainConfig(depth=4))}))
    result = run_main("--resume", tmp_path)                                    # run_main asks for depth 1
    assert result.returncode != 0 and "cannot change within a run" in result.stderr
