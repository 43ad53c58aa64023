"""Exercise 10 (15 minutes): why a seed for each rank breaks a run that goes on with other ranks.

Many training scripts call torch.manual_seed(seed + rank) and draw noise and times from that stream.
It works until the run goes on with another number of GPUs. Then the same step of the same run sees
other noise, and two runs that should be equal are not. Here every draw belongs to a sample: its key
is (seed, step, index in the global batch), whoever computes it. Write three functions, then run

    python exercises/10_seeds_and_ranks.py

Think first: with one stream per rank, what else than the number of ranks changes the noise?
"""

import sys

import numpy as np
from marking import mark


def my_indices(rank, world_size, batch_size):
    """The samples of the global batch (0 ... batch_size - 1) that this rank computes, as a list.

    Neighbours stay together, and all ranks have equally many.
    """
    raise NotImplementedError


def draw(seed, step, index):
    """The noise of one sample, 4 normal float64 numbers from numpy's default_rng."""
    raise NotImplementedError


def global_batch(seed, step, world_size, batch_size):
    """The noise of a step as world_size ranks draw it, in the batch's order: (batch_size, 4)."""
    raise NotImplementedError


# --- Checks: each returns "" if the answer is right, and a hint if not ----------------------------

def check_indices(answers):
    for world_size in (1, 2, 4):
        joined = []
        for rank in range(world_size):
            part = list(answers["my_indices"](rank, world_size, 8))
            if len(part) != 8 // world_size:
                return f"rank {rank} of {world_size} has {len(part)} of 8 samples"
            joined += part
        if sorted(joined) != list(range(8)):
            return f"with {world_size} ranks not every sample comes once: {joined}"
        if joined != list(range(8)):
            return f"with {world_size} ranks: {joined}; neighbours stay together"
    return ""


def check_draw(answers):
    draw = answers["draw"]
    first = draw(0, 5, 3)
    if not np.array_equal(first, draw(0, 5, 3)):
        return "asked twice, it differs: make the generator inside, from the three numbers"
    for changed, key in (("seed", (1, 5, 3)), ("step", (0, 6, 3)), ("index", (0, 5, 4))):
        if np.array_equal(first, draw(*key)):
            return f"the {changed} does not matter, but it must"
    others = [((0, 5, 3), key) for key in ((0, 3, 5), (0, 4, 4), (0, 6, 2), (3, 5, 0), (5, 3, 0))]
    for key, other in (*others, ((0, 5, 100), (0, 6, 0)), ((0, 5, 1000), (0, 6, 0))):
        if np.array_equal(draw(*key), draw(*other)):
            return ("two samples share their noise: a sum of seed, step and index is the same for "
                    "many; give default_rng all three")
    if np.shape(first) != (4,):
        return f"shape {np.shape(first)}, it should be (4,)"
    many = np.concatenate([draw(0, 0, index) for index in range(100)])
    if abs(many.mean()) > 0.2 or abs(many.std() - 1) > 0.2:
        return f"mean {many.mean():.2f}, deviation {many.std():.2f}: normal numbers have 0 and 1"
    return ""


def check_batch(answers):
    batches = []
    for world_size in (1, 2, 4):
        batch = answers["global_batch"](0, 5, world_size, 8)
        if np.shape(batch) != (8, 4):
            return f"shape {np.shape(batch)}, it should be (8, 4)"
        batches.append(batch)
    if len(np.unique(batches[0], axis=0)) < 8:
        return "samples share their noise"
    for batch in batches[1:]:
        if not np.array_equal(batch, batches[0]):
            return "more ranks draw different noise: that run could not go on with another number"
    if not check_draw(answers) and not np.array_equal(batches[0][3], answers["draw"](0, 5, 3)):
        return "row i must be the noise of sample i, as `draw` makes it"
    return ""


CHECKS = {
    "who computes what": check_indices,
    "the noise of a sample": check_draw,
    "going on with other ranks": check_batch,
}


if __name__ == "__main__":
    sys.exit(mark(CHECKS, globals()))
