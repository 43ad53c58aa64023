"""Exercise 9 (20 minutes): what a GPU holds during a sharded step, on paper (Sec. 4, App. B.3; experiments/plan.py).

8.06 billion parameters in fp32 are 32 GB, and training keeps more than the weights: gradients, AdamW's two moments, and the
average of App. B.3. Sharding (FSDP) gives each of S GPUs one S-th of all five. What it computes with is gathered block by
block, in bf16. Write the four functions below, then

    python exercises/09_sharded_memory.py

Think first: with 8 GPUs, which is larger for depth 38: a GPU's shard of the optimizer, or one gathered block?
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
sys.path.insert(0, str(Path(__file__).parents[1]))
import plan
from marking import mark


def block_parameters(depth):
    """Parameters of a joint block but the last: two streams, each with qkv, projection, an MLP of width 4 D and a modulation
    of 6 D out of D, all with biases, and the 64 scales of QK-norm for q and for k. D = 64 depth."""
    raise NotImplementedError


def state_bytes(parameters, shards):
    """What one GPU holds between steps: its share of weights, two moments and average, in fp32. No gradients then."""
    raise NotImplementedError


def gathered_bytes(block, outside):
    """What is whole on one GPU for a moment: two blocks (one computes, the next one comes) and what lies outside of blocks, in
    bf16. block, outside: parameters."""
    raise NotImplementedError


def sent_bytes(parameters, shards):
    """What one GPU sends in a step: it gathers all weights in bf16 twice (forward and backward) and scatters the gradients in
    fp32. A gather or scatter of X bytes over S GPUs sends X (S - 1) / S."""
    raise NotImplementedError


# ------------------------------------------------------------------------------------------------------------
# Checks: each returns "" if the answer is right, else a hint
# ------------------------------------------------------------------------------------------------------------

def planned(depth=38, world=8):
    return plan.Plan(depth=depth, world=world, batch_size=8 * world, strategy="fsdp")


def compare(ours, right, hints, unit=1e9, name="GB"):
    if abs(ours - right) <= 1e-6 * right:
        return ""
    return next((hint for wrong, hint in hints if abs(ours - wrong) <= 1e-6 * wrong),
                f"{ours / unit:.3f} {name}, it should be {right / unit:.3f} {name}")


def check_block(answers):
    D, right = 64 * 38, plan.parameter_counts(planned().sizes)["block"]
    return compare(answers["block_parameters"](38), right,
                   [(right - 2 * 16 * D, "the biases are missing: a linear layer of m outputs has m of them"),
                    (right - 4 * 64, "QK-norm's 64 scales are missing: for q and k, in both streams"),
                    (right / 2, "that is one stream; text and image have weights of their own")], 1e6, "M")


def check_state(answers):
    total = plan.parameter_counts(planned().sizes)["total"]
    m, table = plan.memory(planned()), 2 * 4 * planned().sizes.pos_embed_max_size**2 * planned().sizes.hidden_size
    right = m["weights"] + m["optimizer"] + m["ema"] - table                      # the tables of positions are whole everywhere
    return compare(answers["state_bytes"](total, 8), right, [
        (right * 5 / 4, "gradients are gone between steps"), (right * 3 / 4, "AdamW has two moments, and there is the average"),
        (right * 8, "that is all of it; a GPU has one of 8 shards")])


def check_gathered(answers):
    counts = plan.parameter_counts(planned().sizes)
    right = 2 * (2 * counts["block"] + counts["outside"])
    return compare(answers["gathered_bytes"](counts["block"], counts["outside"]), right, [
        (2 * right, "in bf16, 2 bytes each"), (2 * (counts["block"] + counts["outside"]), "the next block is on its way too")])


def check_sent(answers):
    total, right = plan.parameter_counts(planned().sizes)["total"], plan.communication(planned())["within_a_copy"]
    return compare(answers["sent_bytes"](total, 8), right, [
        (right * 8 / 7, "what a GPU has itself it need not be sent: (S - 1) / S"), (right * 6 / 8, "weights come twice: the "
         "backward pass needs them again, and they were let go")])


CHECKS = {"a block": check_block, "between steps": check_state, "gathered": check_gathered, "sent": check_sent}


if __name__ == "__main__":
    sys.exit(mark(CHECKS, globals()))
