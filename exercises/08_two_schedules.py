"""Exercise 8 (20 minutes): one shift or two? The sampling schedules of public SD3 code (Eq. 23).

A sampler of N steps visits falling times t_0 = 1 > ... > t_N = 0. The paper's shift moves evenly spaced times once. The code
that came with the released models does it differently: it has a table of 1000 training times, i / 1000, *shifted*; it spreads N
points evenly from the table's largest entry to its smallest; it shifts these *again*; and it puts a 0 behind them. Both are
in use and give different latents, so whoever compares with a reference has to know which. Write four functions, then

    python exercises/08_two_schedules.py

Think first: which of the two spends more of its steps at t > 1/2? Which has the shorter last step, and what for?
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from marking import mark

import flow


def shift(t, alpha):
    """Eq. 23 with alpha = sqrt(m / n), elementwise."""
    raise NotImplementedError


def shifted_once(num_steps, alpha):
    """(num_steps + 1,): evenly spaced times from 1 to 0, shifted."""
    raise NotImplementedError


def released(num_steps, alpha):
    """(num_steps + 1,): the schedule of the released code."""
    raise NotImplementedError


def effective_shift(num_steps, alpha):
    """The alpha for which evenly spaced times from 1 to 1/1000 (num_steps of them), shifted once, give about `released`: a
    number. The smallest entry of the table, 1/1000 shifted, is so near to 0 that it may be taken for 1/1000."""
    raise NotImplementedError


# ------------------------------------------------------------------------------------------------------------
# Checks: each returns "" if the answer is right, else a hint
# ------------------------------------------------------------------------------------------------------------

def compare(ours, right, hints):
    """"" if equal to 1e-6, else the hint of the wrong answer that it equals."""
    ours = torch.as_tensor(ours, dtype=torch.float64)
    if ours.shape != right.shape:
        return f"{len(ours)} times; N steps have N + 1 ends, so it should be {len(right)}"
    same = lambda other: ours.shape == other.shape and torch.allclose(ours, other.double(), atol=1e-6)
    if same(right):
        return ""
    return next((hint for other, hint in hints if same(other)), f"it should begin {[round(x, 4) for x in right[:3].tolist()]}")


def check_shift(answers):
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    return compare(answers["shift"](t, 3.0), flow.shift_time(t, 3.0),
                   [(flow.shift_time(t, 1 / 3), "that lowers t; more pixels need more noise")])


def check_once(answers):
    right = flow.shifted_schedule(28, 3.0).double()
    return compare(answers["shifted_once"](28, 3.0), right, [(right.flip(0), "sampling goes from noise, t = 1, to data, t = 0"),
                                                            (flow.shifted_schedule(28), "that is not shifted yet")])


def check_released(answers):
    def times(largest, smallest, count, shifts):
        t = torch.linspace(largest, smallest, count, dtype=torch.float64)
        for _ in range(shifts):
            t = flow.shift_time(t, 3.0)
        return torch.cat([t, t.new_zeros(1)])
    low = flow.shift_time(1 / 1000, 3.0)
    return compare(answers["released"](28, 3.0), flow.released_schedule(28, 3.0).double(),
                   [(times(1.0, low, 28, 0), "the spread points are shifted again"),
                    (times(1.0, 1 / 1000, 28, 1), "the table's smallest entry is already shifted once: 3/1002, not 1/1000"),
                    (times(1.0, 1 / 1000, 28, 2), "the smallest entry of the table is shifted too: 3/1002, not 1/1000")])


def check_effective(answers):
    ours = float(answers["effective_shift"](28, 3.0))
    t = torch.linspace(1, 1 / 1000, 28, dtype=torch.float64)
    distance = lambda alpha: (flow.shift_time(t, alpha) - flow.released_schedule(28, 3.0)[:-1].double()).abs().max().item()
    if distance(ours) < 0.01:
        return ""
    if abs(ours - 9) < 1e-6:
        return f"two shifts by alpha would be one by alpha^2, but then t differs by {distance(9.0):.2f}: only the table's ends " \
               f"were shifted first, the points between them are spread evenly"
    return f"with {ours:g} the times differ by up to {distance(ours):.2f}; what does the first shift do to the points in between?"


CHECKS = {"the shift (23)": check_shift, "shifted once": check_once, "the released code": check_released,
          "what it amounts to": check_effective}


if __name__ == "__main__":
    sys.exit(mark(CHECKS, globals()))
