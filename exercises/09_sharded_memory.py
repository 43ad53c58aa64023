"""Exercise 9 (20 minutes): what a GPU holds during a sharded step, on paper (Sec. 4, App. B.3).

8.06 billion parameters in fp32 are 32 GB, and training keeps more than the weights: gradients,
AdamW's two moments and the average of App. B.3. With sharding (FSDP), each of S GPUs holds one S-th
of all five. A GPU gathers what it computes with block by block, in bf16. Write four functions:

    python exercises/09_sharded_memory.py        (python bench/plan.py does the same sums)

Think first: with 8 GPUs and depth 38, which is larger: a GPU's share of the optimizer's moments, or
two gathered blocks?
"""

import sys

from marking import mark


def block_parameters(depth):
    """Parameters of a joint block (not of the last one, which has less).

    Each of the two streams has qkv, a projection, an MLP of width 4 D and a modulation of 6 D from
    D, all with biases, and 64 scales of QK-norm for q and for k. D = 64 depth.
    """
    raise NotImplementedError


def state_bytes(parameters, shards):
    """What a GPU holds between steps: its share of weights, two moments and average, in fp32."""
    raise NotImplementedError


def gathered_bytes(block, outside):
    """What is whole on a GPU for a moment, in bf16: two blocks, and what lies outside of blocks.

    While one block computes, the next one comes. block, outside: numbers of parameters.
    """
    raise NotImplementedError


def sent_bytes(parameters, shards):
    """What a GPU sends in a step: all weights in bf16 twice (forward, backward), gradients in fp32.

    A gather or a scatter of X bytes over S GPUs sends X (S - 1) / S.
    """
    raise NotImplementedError


# --- Checks: each returns "" if the answer is right, and a hint if not ----------------------------

TOTAL = 8_057_000_000                                                 # depth 38 with QK-norm


def compare(ours, right, hints, unit, name):
    """Returns "", or the hint of the wrong answer that it equals. hints: wrong number -> hint."""
    if abs(ours - right) <= 1e-6 * right:
        return ""
    for wrong, hint in hints.items():
        if abs(ours - wrong) <= 1e-6 * wrong:
            return hint
    return f"{ours / unit:.3f} {name}, it should be {right / unit:.3f} {name}"


def check_block(answers):
    for depth in (1, 24, 38):
        D = 64 * depth
        matrices = (3 + 1 + 4 + 4 + 6) * D * D                        # qkv, proj, MLP, modulation
        biases = (3 + 1 + 4 + 1 + 6) * D
        right = 2 * (matrices + biases + 2 * 64)
        hints = {
            2 * (matrices + 2 * 64): "the biases are missing: a layer of m outputs has m of them",
            2 * (matrices + biases): "QK-norm's 64 scales are missing: of q and k, in both streams",
            right / 2: "that is one stream; text and image have weights of their own",
        }
        hint = compare(answers["block_parameters"](depth), right, hints, 1e6, "M")
        if hint:
            return hint
    return ""


def check_state(answers):
    all_of_it = 4 * 4 * TOTAL                                         # four numbers of four bytes
    hints = {
        all_of_it / 8 * 5 / 4: "gradients are gone between steps",
        all_of_it / 8 * 3 / 4: "AdamW has two moments, and there is the average",
        all_of_it: "that is all of it; a GPU has one of 8 shards",
    }
    hint = compare(answers["state_bytes"](TOTAL, 8), all_of_it / 8, hints, 1e9, "GB")
    return hint or compare(answers["state_bytes"](TOTAL, 32), all_of_it / 32, {}, 1e9, "GB")


def check_gathered(answers):
    block, outside = 213_000_000, 41_000_000
    right = 2 * (2 * block + outside)
    hints = {
        2 * right: "in bf16, 2 bytes each",
        2 * (block + outside): "the next block is on its way too",
    }
    return compare(answers["gathered_bytes"](block, outside), right, hints, 1e9, "GB")


def check_sent(answers):
    for shards in (8, 2):
        right = (2 * 2 + 4) * TOTAL * (shards - 1) / shards
        hints = {
            8 * TOTAL: "a GPU does not send what it keeps: (S - 1) / S",
            right * 6 / 8: "weights come twice: the backward pass needs them again",
        }
        hint = compare(answers["sent_bytes"](TOTAL, shards), right, hints, 1e9, "GB")
        if hint:
            return hint
    return ""


CHECKS = {
    "a block": check_block,
    "between steps": check_state,
    "gathered": check_gathered,
    "sent": check_sent,
}


if __name__ == "__main__":
    sys.exit(mark(CHECKS, globals()))
