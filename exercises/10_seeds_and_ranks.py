"""Exercise 10 (15 minutes): why a seed for each rank breaks a run that goes on with other ranks.

Many training scripts call torch.manual_seed(seed + rank) and draw noise and times from that stream. It works, until the run is
resumed on another number of GPUs: then the same step of the same run sees other noise, and two runs that should be equal are
not. Here every draw belongs to a sample: (seed, step, index in the global batch), whoever computes it. Write three functions,
then

    python exercises/10_seeds_and_ranks.py

Think first: with the stream of each rank, which two things besides the number of ranks change the noise?
"""

import sys

import numpy as np
from marking import mark


def my_indices(rank, world_size, batch_size):
    """Which samples of the global batch (0 ... batch_size - 1) this rank computes: a list, neighbours together, all ranks
    equally many."""
    raise NotImplementedError


def draw(seed, step, index):
    """The noise of one sample: 4 normal numbers (float64) from numpy's default_rng, the same whoever asks."""
    raise NotImplementedError


def global_batch(seed, step, world_size, batch_size):
    """The noise of a whole step as `world_size` ranks draw it, in the order of the global batch: (batch_size, 4)."""
    raise NotImplementedError


# ------------------------------------------------------------------------------------------------------------
# Checks: each returns "" if the answer is right, else a hint
# ------------------------------------------------------------------------------------------------------------

def check_indices(answers):
    for size in (1, 2, 4):
        parts = [list(answers["my_indices"](rank, size, 8)) for rank in range(size)]
        if sorted(sum(parts, [])) != list(range(8)):
            return f"with {size} ranks the parts {parts} are not every sample once"
        if parts != [list(range(8))[rank * 8 // size : (rank + 1) * 8 // size] for rank in range(size)]:
            return f"with {size} ranks: {parts}; neighbours stay together, so that joining the ranks gives the batch in order"
    return ""


def check_draw(answers):
    draw = answers["draw"]
    first = draw(0, 5, 3)
    if not np.array_equal(first, draw(0, 5, 3)):
        return "asked twice, it differs: make the generator inside, from the three numbers"
    for other, what in (((1, 5, 3), "seed"), ((0, 6, 3), "step"), ((0, 5, 4), "index")):
        if np.array_equal(first, draw(*other)):
            return f"the {what} does not matter, but it must"
    if any(np.array_equal(draw(0, 5, 3), draw(*other)) for other in ((0, 3, 5), (0, 4, 4), (0, 6, 2), (3, 5, 0), (5, 3, 0))):
        return "two samples share their noise: a sum of seed, step and index is the same for many; give default_rng all three"
    return ""


def check_batch(answers):
    batches = [answers["global_batch"](0, 5, size, 8) for size in (1, 2, 4)]
    if any(np.shape(batch) != (8, 4) for batch in batches):
        return f"shapes {[np.shape(batch) for batch in batches]}, it should be (8, 4) each"
    if len({row.tobytes() for row in batches[0]}) < 8:
        return "samples share their noise"
    if not all(np.array_equal(batch, batches[0]) for batch in batches):
        return "one, two and four ranks draw different noise: that run could not go on with another number of them"
    return ""


CHECKS = {"who computes what": check_indices, "the noise of a sample": check_draw, "resuming on other ranks": check_batch}


if __name__ == "__main__":
    sys.exit(mark(CHECKS, globals()))
