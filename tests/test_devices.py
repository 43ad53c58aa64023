"""Devices, precisions, several processes, and what a user sees when something goes wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import devices

ROOT = Path(__file__).parents[1]


def torchrun(script: str, *options, **environment):
    """The script on two processes. Returns what they printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--standalone", *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([*command, script], env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("name", ["cuda", "cuda:9", "foo", "cpu:x", "meta", ""])
def test_a_device_that_is_not_there_is_refused_by_name(name, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    sentence = f"--device {name} is not on this machine; --device auto is cpu$"
    with pytest.raises(ValueError, match=sentence):
        devices.pick_device(name)


def test_auto_takes_the_accelerator_and_the_cpu_stays_possible(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator",
                        lambda **_: torch.device("cuda"))
    names = ("auto", "cuda", "cpu")
    assert [str(devices.pick_device(name)) for name in names] == ["cuda", "cuda", "cpu"]
    with pytest.raises(ValueError, match="mps is not on this machine; --device auto is cuda"):
        devices.pick_device("mps")


def test_auto_precision_is_bf16_only_where_the_processor_multiplies_it(monkeypatch):
    cpu = torch.device("cpu")
    for found, wanted in (({"avx512_bf16": True}, torch.bfloat16), ({}, torch.float32),
                          ({"amx_bf16": True}, torch.bfloat16), ({"avx2": True}, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found)
        assert devices.pick_precision("auto", cpu) == wanted
    assert devices.pick_precision("fp16", cpu) == torch.float16


def test_autocast_changes_products_and_nothing_in_fp32():
    x = torch.ones(2, 2)
    for precision in (torch.bfloat16, torch.float32):
        with devices.autocast(torch.device("cpu"), precision):
            assert (x @ x).dtype == precision


def test_one_process_needs_no_torchrun():
    world = devices.World("cpu")
    assert (world.rank, world.size, world.parallel) == (0, 1, "ddp")
    assert world.gather("x") == ["x"] and world.same(5) == 5
    model = torch.nn.Linear(2, 2)
    assert world.wrap(model) is model
    world.close()


@pytest.mark.parametrize("parameters, parallel", [(10**9, "ddp"), (10**9 + 1, "fsdp")])
def test_auto_shards_models_of_more_than_a_billion_parameters(parameters, parallel, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("init_process_group", "init_device_mesh"):
        monkeypatch.setattr(devices.dist, name, lambda *_, **__: None)
    with pytest.raises(ValueError, match="start with torchrun"):       # not by another launcher
        devices.World("cpu", parameters=parameters)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert devices.World("cpu", parameters=parameters).parallel == parallel


def test_one_process_cannot_hold_shards():
    for parallel in ("fsdp", "hsdp"):
        with pytest.raises(ValueError, match=f"--parallel {parallel} needs several processes"):
            devices.World("cpu", parallel)


@pytest.mark.parametrize("problem, sentence", [
    (ValueError("--depth 0 must\n be 1"), "verb.py: --depth 0 must be 1"),
    (ValueError("two files:\n  a.png: no\n  b.png: no"),
     "verb.py: two files:\n  a.png: no\n  b.png: no"),
    (OSError(28, "No space left on device"), "verb.py: [Errno 28] No space left on device"),
    (RuntimeError("CUDA out of memory"), "verb.py: CUDA out of memory"),
    (MemoryError(), "verb.py: MemoryError"),
    (ImportError("No module named 'matplotlib'"), "verb.py: No module named 'matplotlib'; run pip "
                                                  "install -r requirements-dev.txt")])
def test_what_a_user_can_get_wrong_ends_in_one_sentence(problem, sentence, monkeypatch):
    def main():
        raise problem

    monkeypatch.setattr(sys, "argv", ["/some/where/verb.py"])
    with pytest.raises(SystemExit) as end:
        devices.command(main)
    assert end.value.code == sentence                  # Python prints it and exits with 1.


def test_our_own_mistakes_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        devices.command(lambda: 1 / 0)


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(monkeypatch, capsys):
    def main():
        raise KeyboardInterrupt("the same command goes on")

    monkeypatch.setattr(sys, "argv", ["encode.py"])
    with pytest.raises(SystemExit) as end:
        devices.command(main)
    assert end.value.code == 130
    assert capsys.readouterr().err == "encode.py: stopped; the same command goes on\n"


TWO_RANKS = """
import sys, torch, devices
from pathlib import Path
folder = Path(sys.argv[0]).parent
torch.manual_seed(0)

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.joint_blocks = torch.nn.ModuleList([torch.nn.Linear(5, 5)])
        self.out = torch.nn.Linear(5, 3)
    def forward(self, x):
        return self.out(self.joint_blocks[0](x).tanh())

def gradient(model, x):
    for part in (x[0::2], x[1::2]):                   # two parts of a step
        model(part).square().mean().backward()

def check(world, x):
    alone = Model()
    gradient(alone, x)
    model = Model()
    world.shard(model, torch.float32)
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), alone.parameters()):
            devices.assign(ours, theirs)
    gradient(world.wrap(model), x.chunk(2)[world.rank])
    for ours, theirs in zip(model.parameters(), alone.parameters()):
        assert torch.equal(devices.whole(ours.detach()), theirs)
        torch.testing.assert_close(devices.whole(ours.grad), theirs.grad)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    wanted = [devices.whole(p.detach()).clone() for p in model.parameters()]
    def state():
        return {"model": model.state_dict(), "step": 0,
                "optimizer": devices.get_optimizer_state_dict(model, [optimizer])}
    devices.save_state({**state(), "step": 7}, folder / world.parallel)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    loaded = state()
    devices.load_state(loaded, folder / world.parallel)
    assert loaded["step"] == 7
    for ours, value in zip(model.parameters(), wanted):
        assert torch.equal(devices.whole(ours.detach()), value)

world = devices.World("cpu", "hsdp")
assert world.gather(world.rank) == [0, 1] and world.same(world.rank) == 0
for world.parallel in ("ddp", "fsdp", "hsdp"):
    check(world, torch.randn(8, 5))
    sys.stdout.write(f"good {world.parallel}\\n")               # One write: lines never mix.
world.close()
"""


def test_two_processes_have_the_gradients_of_one(tmp_path):
    """Of a step in two parts. Whole weights come back from shards, and from a saved state."""
    script = tmp_path / "two.py"
    script.write_text(TWO_RANKS)
    result = torchrun(str(script))
    for parallel in ("ddp", "fsdp", "hsdp"):
        assert result.stdout.count(f"good {parallel}") == 2, result.stderr[-3000:]


def test_a_store_that_outlives_restarts_brings_a_warning(tmp_path):
    script = tmp_path / "meet.py"
    script.write_text("import devices\ndevices.World('cpu').close()")
    warned = torchrun(str(script), "--max-restarts", "1", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="0")
    quiet = torchrun(str(script), "--max-restarts", "1", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    assert warned.returncode == quiet.returncode == 0, warned.stderr + quiet.stderr
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun" in warned.stderr
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" not in quiet.stderr


def test_a_full_disk_and_a_damaged_file_are_an_oserror(tmp_path, monkeypatch):
    """torch's CheckpointException is a BaseException, which `except Exception` lets pass."""
    state = {"weight": torch.ones(3), "step": 1}
    devices.save_state(state, tmp_path / "whole")
    next((tmp_path / "whole").glob("*.distcp")).write_bytes(b"")
    with pytest.raises(OSError, match="whole cannot be read"):
        devices.load_state(state, tmp_path / "whole")
    (tmp_path / "file").write_text("a file where a folder should be")
    with pytest.raises(OSError, match="could not save"):
        devices.save_state(state, tmp_path / "file" / "new")


def test_no_other_file_knows_torch_distributed():
    files = [path for path in ROOT.glob("*.py") if "torch.distributed" in path.read_text()]
    assert [path.name for path in files] == ["devices.py"]
