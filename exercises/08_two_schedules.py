"""Exercise 8 (20 minutes): one shift or two? The sampling schedules of public SD3 code (Eq. 23).

A sampler of N steps visits falling times t_0 = 1 > ... > t_N = 0. The paper shifts them once. The
code that came with the released models has a table of 1000 training times, i / 1000, that are
*shifted*. It spreads N points evenly from the table's largest entry to its smallest, shifts these
points *again*, and puts a 0 behind them. Both are in use and give different latents, so whoever
compares with a reference must know which one it is. Write the four functions, then run

    python exercises/08_two_schedules.py

Think first: which one has more of its steps at t > 1/2? Which has the shorter last step, and why?
"""

import sys

import torch
from marking import mark


def shift(t, alpha):
    """Eq. 23 with alpha = sqrt(m / n), elementwise."""
    raise NotImplementedError


def shifted_once(num_steps, alpha):
    """(num_steps + 1,): even times from 1 to 0, shifted."""
    raise NotImplementedError


def released(num_steps, alpha):
    """(num_steps + 1,): the schedule of the released code."""
    raise NotImplementedError


def effective_shift(num_steps, alpha):
    """The alpha with which num_steps even times, 1 to 1/1000, shifted once, are about `released`.

    The smallest entry of the table is so near to 0 that it may be taken for 1/1000.
    """
    raise NotImplementedError


# --- Checks: each returns "" if the answer is right, and a hint if not ----------------------------

def right_shift(t, alpha):
    return t / (t + (1 - t) / alpha)                                  # Eq. 23, divided by alpha


def spread(largest, smallest, count):
    return torch.linspace(largest, smallest, count, dtype=torch.float64)


def same(ours, other):
    ours = torch.as_tensor(ours, dtype=torch.float64)
    return ours.shape == other.shape and torch.allclose(ours, other, atol=1e-6)


def with_zero(times):
    return torch.cat([times, times.new_zeros(1)])


def right_released(num_steps, alpha):
    points = spread(1, right_shift(0.001, alpha), num_steps)
    return with_zero(right_shift(points, alpha))


def check_shift(answers):
    for alpha in (3.0, 0.5, 6.0):
        t = torch.rand(11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        ours = answers["shift"](t, alpha)
        if same(ours, right_shift(t, 1 / alpha)):
            return "that lowers t; more pixels need more noise"
        if not same(ours, right_shift(t, alpha)):
            return "t_m = alpha t / (1 + (alpha - 1) t)"
    return ""


def check_once(answers):
    for num_steps, alpha in ((28, 3.0), (5, 1.5)):
        ours = answers["shifted_once"](num_steps, alpha)
        even = spread(1, 0, num_steps + 1)
        if len(ours) != num_steps + 1:
            return f"{len(ours)} times; N steps have N + 1 ends, so it should be {num_steps + 1}"
        if same(ours, right_shift(even, alpha).flip(0)):
            return "sampling goes from noise, t = 1, to data, t = 0"
        if same(ours, even):
            return "that is not shifted yet"
        if not same(ours, right_shift(even, alpha)):
            return f"the first step of {num_steps} ends at {right_shift(even, alpha)[1]:.4f}"
    return ""


def check_released(answers):
    for num_steps, alpha in ((28, 3.0), (5, 1.5)):
        ours = answers["released"](num_steps, alpha)
        if len(ours) != num_steps + 1:
            return f"{len(ours)} times; N steps have N + 1 ends, so it should be {num_steps + 1}"
        if same(ours, with_zero(spread(1, right_shift(0.001, alpha), num_steps))):
            return "the spread points are shifted again"
        if same(ours, with_zero(right_shift(spread(1, 0.001, num_steps), alpha))):
            return "the table's smallest entry is already shifted: 3/1002 for alpha 3, not 1/1000"
        if not same(ours, right_released(num_steps, alpha)):
            right = right_released(num_steps, alpha)[:3].tolist()
            return f"for {num_steps} steps it begins {right[0]:.4f}, {right[1]:.4f}, {right[2]:.4f}"
    return ""


def check_effective(answers):
    ours = float(answers["effective_shift"](28, 3.0))
    right = right_released(28, 3.0)[:-1]
    distance = (right_shift(spread(1, 0.001, 28), ours) - right).abs().max().item()
    if distance < 0.01:
        return ""
    if abs(ours - 9) < 1e-6:
        return (f"two shifts by alpha would be one by alpha^2, but that is off by {distance:.2f}: "
                f"only the ends of the table were shifted before the points were spread evenly")
    return f"{ours:g} is off by up to {distance:.2f}; what does the first shift do to the points?"


CHECKS = {
    "the shift (23)": check_shift,
    "shifted once": check_once,
    "the released code": check_released,
    "what it amounts to": check_effective,
}


def show(answers):
    """Both schedules of 10 steps, side by side."""
    once, twice = answers["shifted_once"](10, 3.0), answers["released"](10, 3.0)
    for i in range(11):
        print(f"step {i:2}  shifted once {float(once[i]):.4f}  released {float(twice[i]):.4f}")


if __name__ == "__main__":
    sys.exit(mark(CHECKS, globals(), show))
