"""devices.py: where a program runs: its device, its precision, and the other processes.

Read with   Sec. 5.3 (training at scale), Sec. 5.3.2 (mixed precision in bf16)
Not here    what is computed. No other file knows torch.distributed
"""

import os
import sys
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (  # noqa: F401
    StateDictOptions, get_model_state_dict, get_optimizer_state_dict, set_optimizer_state_dict)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)     # for get_model_state_dict
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
warnings.filterwarnings("ignore", "torch.distributed is disabled|FSDP2-wrapped module")


def pick_device(name="auto"):
    """The torch.device of that name. "auto": CUDA or Apple's MPS if there is one, or the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if name not in ("auto", "cpu", found.type):
        raise ValueError(f"--device {name} is not on this machine; --device auto is {found.type}")
    return found if name == "auto" else torch.device(name)


def pick_precision(name, device):
    """The type of matrix products. "auto": bf16 where the hardware multiplies it fast."""
    if name == "auto":
        found = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        fast = found.get("avx512_bf16") or found.get("amx_bf16")
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bf16" if fast else "fp32"
    return PRECISIONS[name]


def autocast(device, precision):
    """A context in which matrix products are computed in `precision`."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


class World:
    """Process `rank` of `size`. "fsdp" shards a model over all, "hsdp" in a node, "ddp" never."""
    def __init__(self, device="auto", parallel="auto", parameters=0):
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.device = pick_device(device)
        self.workers = 0                         # processes that make batches (batches.Ahead)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
            cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            self.workers = min(14, max(1, cores - 1))
        self.parallel = parallel
        if parallel == "auto":
            self.parallel = "fsdp" if self.size > 1 and parameters > 10**9 else "ddp"
        if self.size == 1 and self.parallel != "ddp":
            raise ValueError(f"--parallel {parallel} needs several processes: use torchrun")
        if self.size == 1:
            return
        if not {"LOCAL_RANK", "LOCAL_WORLD_SIZE"} <= os.environ.keys():
            raise ValueError("LOCAL_RANK and LOCAL_WORLD_SIZE are not set; start with torchrun")
        shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if shared and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
            warnings.warn("to restart: TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun", stacklevel=2)
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))
        shards = int(os.environ["LOCAL_WORLD_SIZE"]) if self.parallel == "hsdp" else self.size
        self.mesh = dist.init_device_mesh(self.device.type, (self.size // shards, shards),
                                          mesh_dim_names=("copies", "shards"))

    def shard(self, model, precision):
        """Makes fp32 shards of each block, gathered in `precision`, and of the rest, in fp32."""
        if self.parallel == "ddp":
            return
        for module in (*model.joint_blocks, model):
            dtype = torch.float32 if module is model else precision     # embeds t: fp32
            policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
            fully_shard(module, mesh=self.mesh, mp_policy=policy, reshard_after_forward=True)

    def wrap(self, model):
        """The model whose backward() averages gradients over all processes."""
        if self.size > 1 and self.parallel == "ddp":
            model = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        return model

    def gather(self, value):
        """The list of all ranks' values, by rank. All ranks wait for each other here."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def same(self, value):
        """Rank 0's value, on every rank."""
        return self.gather(value)[0]

    def close(self):
        """Leaves the other processes, once all have come here."""
        self.gather(None)
        if self.size > 1:
            dist.destroy_process_group()


def assign(parameter, value):
    """parameter <- value, a whole tensor that is the same on all ranks. A shard takes its part."""
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value.to(parameter.device), parameter.device_mesh,
                                  parameter.placements, src_data_rank=None)
    parameter.copy_(value)


def whole(tensor):
    """The whole of a sharded tensor, gathered from all ranks. Any other tensor is returned."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def save_state(state, folder):
    """Writes a dict of state dicts, all ranks together. OSError if it cannot be written whole."""
    try:
        dcp.save(state, checkpoint_id=folder)
    except (Exception, dcp.CheckpointException) as problem:  # The second is a BaseException.
        raise OSError(f"could not save {folder}; older ones are untouched ({problem})") from None


def load_state(state, folder):
    """Reads `state` in place. OSError if it is cut off. It unpickles metadata: read your own."""
    try:
        dcp.load(state, checkpoint_id=folder)
    except (Exception, dcp.CheckpointException) as problem:
        raise OSError(f"{folder} cannot be read: {problem}") from None


def command(main):
    """Runs main. What a user can get wrong ends in one sentence and exit code 1; Ctrl-C, 130."""
    name = os.path.basename(sys.argv[0])
    try:
        main()
        # Python's own way out ends threads of gloo that still hold a tensor. That can abort a
        # process after good work.
        if "RANK" in os.environ:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
    except (ValueError, RuntimeError, OSError, MemoryError) as problem:
        lines = [" ".join(line.split()) for line in str(problem).split("\n  ")]
        sys.exit(f"{name}: " + ("\n  ".join(lines) or type(problem).__name__))
    except ImportError as problem:                           # matplotlib, for example
        sys.exit(f"{name}: {problem}; run pip install -r requirements-dev.txt")
    except KeyboardInterrupt as stop:                        # Its text may say how to go on.
        print("; ".join([f"{name}: stopped", *stop.args]), file=sys.stderr)
        sys.exit(130)
