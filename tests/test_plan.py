"""plan.py: parameters by hand, FLOPs and saved activations as torch counts them, refusals."""

import functools
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import mmdit
from devices import World
from mmdit import MMDiT

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import plan as planner
from plan import Plan, forward_flops, memory, parameter_counts

# No product of these is a width, so that saved tensors cannot be taken for weights.
SMALL = Plan(depth=2, resolution=240, text_tokens=60, batch_size=2, world=1, strategy="ddp",
             device="cpu")


def small_model(plan):
    """A model of these sizes with random weights, and its four inputs."""
    rng = torch.Generator().manual_seed(0)
    model = MMDiT(plan.sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02, generator=rng)
    B, side, sizes = plan.local_batch, plan.resolution // 8, plan.sizes
    latent = torch.randn(B, sizes.latent_channels, side, side, generator=rng)
    context = torch.randn(B, plan.text_tokens, sizes.context_dim, generator=rng)
    pooled = torch.randn(B, sizes.pooled_dim, generator=rng)
    return model, (latent, torch.rand(B, generator=rng), context, pooled)


def compute(plan):
    """Autocast as train.py sets it on a CPU."""
    return torch.autocast("cpu", torch.bfloat16, enabled=plan.precision == "bf16")


def saved_bytes(plan):
    """Bytes that autograd keeps after the forward pass, each storage once. Weights and their bf16
    copies are not activations."""
    model, inputs = small_model(plan)
    weights, shapes, storages, alive = set(), set(), {}, []
    for parameter in model.parameters():
        weights.add(parameter.untyped_storage().data_ptr())
        shapes |= {tuple(parameter.shape), tuple(parameter.shape)[::-1]}

    def pack(tensor):
        storage = tensor.untyped_storage()
        copied_weight = tensor.dtype == torch.bfloat16 and tuple(tensor.shape) in shapes
        if storage.data_ptr() not in weights and not copied_weight:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)                                  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), compute(plan):
        alive.append(model(*inputs))
    return sum(storages.values())


@pytest.mark.parametrize("name, value", [
    ("mfu", float("nan")), ("peak_tflops", float("inf")), ("world", 0), ("mfu", 1.1)])
def test_numbers_that_plan_nothing_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}; it"):
        Plan(**{name: value})


@pytest.mark.parametrize("depth, billions", [(24, 2), (38, 8)])
def test_parameters_are_those_of_the_papers_models(depth, billions):
    assert round(parameter_counts(Plan(depth=depth).sizes)["total"] / 1e9) == billions


def test_parameters_by_hand():
    """A column of a block has 18 D^2 weights, 15 D biases and 2 x 64 of QK-norm. Text features are
    4096 and 2048 wide, a patch has 2 x 2 x 16 numbers and the embedding of time has 256."""
    D, depth = 64 * 3, 3
    column, unused = 18 * D**2 + 15 * D + 2 * 64, 13 * D**2 + 10 * D
    embedders = (256 * D + D) + (2048 * D + D) + 2 * (D**2 + D)
    outside = embedders + (64 * D + D) + (4096 * D + D) + (2 * D**2 + 2 * D) + (64 * D + 64)
    assert parameter_counts(Plan(depth=depth).sizes) == {
        "block": 2 * column, "outside": outside, "embedders": embedders,
        "total": 2 * depth * column - unused + outside}


@pytest.mark.parametrize("dual_attention_layers", [0, 1])
@pytest.mark.parametrize("depth, side, text_tokens", [(1, 8, 5), (3, 16, 90)])
def test_forward_flops_are_those_that_torch_counts(depth, side, text_tokens, dual_attention_layers):
    """Exactly."""
    plan = replace(SMALL, depth=depth, resolution=8 * side, text_tokens=text_tokens, batch_size=1)
    sizes = replace(plan.sizes, dual_attention_layers=dual_attention_layers)
    _, inputs = small_model(plan)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        MMDiT(sizes)(*inputs)
    assert counter.get_total_flops() == forward_flops(sizes, text_tokens, plan.image_tokens)


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("depth", [2, 4])
def test_activation_formula_is_what_autograd_keeps(depth, precision, qk_norm):
    """Within 0.7 %. With a single head, merging the heads would not copy."""
    plan = replace(SMALL, depth=depth, precision=precision, qk_norm=qk_norm)
    assert planner.activation_bytes(plan) == pytest.approx(saved_bytes(plan), rel=0.007)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fused_attention_keeps_no_scores(precision, monkeypatch):
    """The GPU's formula, but for QK-norm, whose fused kernel a CPU has not."""
    monkeypatch.setattr(mmdit, "attend", F.scaled_dot_product_attention)
    plan = replace(SMALL, precision=precision, qk_norm=False, device="cuda")
    assert planner.activation_bytes(plan) == pytest.approx(saved_bytes(plan), rel=0.005)


class Peak(TorchDispatchMode):
    """Bytes of the tensors that are alive, by storage; `highest` is what the plan calls peak."""

    def __init__(self, tensors):
        super().__init__()
        self.alive, self.now, self.highest = set(), 0, 0
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.alive and storage.nbytes():
            self.alive.add(storage.data_ptr())
            self.now += storage.nbytes()
            self.highest = max(self.highest, self.now)
            weakref.finalize(storage, self.remove, storage.data_ptr(), storage.nbytes())

    def remove(self, address, size):
        self.alive.discard(address)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return result


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_peak_of_a_step_is_the_plans(accumulate, recompute, precision):
    """The second step of AdamW with EMA on one process, within 10 %. The scratch space of kernels
    does not show here."""
    plan = replace(SMALL, depth=3, batch_size=4 * accumulate, accumulate=accumulate,
                   recompute=recompute, precision=precision)
    model, inputs = small_model(plan)
    average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if recompute:
        for block in model.joint_blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    moments = [t for state in optimizer.state.values() for t in state.values()]
    with Peak([*model.state_dict().values(), *average.values(), *moments]) as peak:
        for _ in range(accumulate):
            with compute(plan):
                loss = model(*inputs).float().square().mean()
            loss.backward()
            del loss
        optimizer.step()
    assert peak.highest == pytest.approx(memory(plan)["peak"], rel=0.1)


def test_depth_38_under_fsdp_is_sharded_as_planned():
    """64 pretended processes and no memory: the same names, every block a unit of its own, every
    weight in shards, and as much on a GPU as the plan says."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule
    from torch.testing._internal.distributed.fake_pg import FakeStore

    plan, world = Plan(depth=38, world=64, strategy="fsdp"), object.__new__(World)
    world.rank, world.size, world.device, world.parallel = 0, 64, torch.device("cpu"), "fsdp"
    with torch.device("meta"):
        model = MMDiT(plan.sizes)
    names = list(model.state_dict())
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=64)
    try:
        world.mesh = init_device_mesh("cpu", (1, 64), mesh_dim_names=("copies", "shards"))
        world.shard(model, torch.bfloat16)
        assert list(model.state_dict()) == names
        assert all(isinstance(module, FSDPModule) for module in [model, *model.joint_blocks])
        assert all(isinstance(p, DTensor) and p.device.type == "meta" for p in model.parameters())
        local = sum(4 * p.to_local().numel() for p in model.parameters())
    finally:
        torch.distributed.destroy_process_group()
    table = 4 * plan.sizes.pos_embed_max_size**2 * plan.sizes.hidden_size
    assert local == pytest.approx(memory(plan)["weights"] - table, rel=0.002)     # rows rounded up
