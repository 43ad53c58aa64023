"""Exercise 8 (20 minutes): two sampling schedules that share a name (Sec. 5.3.2, Eq. 23).

A sampler visits times from 1 to 0. Eq. 23, t_m = alpha t_n / (1 + (alpha - 1) t_n), moves even ones towards noise:

    shifted     N + 1 even times from 1 to 0, moved once
    released    what public SD3 code does: its 1000 training times 1/1000 ... 1000/1000 are moved; N even ones between the
                largest and the smallest of those are moved again; then comes 0

Both are called "shift 3". Write the functions below, then

    python exercises/08_two_schedules.py

Think first: which of the two takes the longer last step, and what does Euler's method do to fine detail there? What does moving
twice by alpha amount to?
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import flow


def shifted(num_steps, alpha):
    """The times (N + 1,) of the first schedule, from 1 to 0."""
    raise NotImplementedError


def released(num_steps, alpha):
    """The times (N + 1,) of the second, from 1 to 0."""
    raise NotImplementedError


def twice(alpha):
    """The one alpha that moves a time as far as moving it twice by `alpha` does."""
    raise NotImplementedError


def last_times(num_steps, alpha):
    """(shifted, released): the last time before 0 of each, in closed form, without making a schedule."""
    raise NotImplementedError


def euler(velocity, z, times):
    """Euler's method from times[0] to times[-1]: z (B, C, H, W), velocity(z, t (B,)) -> as z. Returns the last z."""
    raise NotImplementedError


# ------------------------------------------------------------------------------------------------------------
# Checks: each returns "" if the answer is right, else a hint
# ------------------------------------------------------------------------------------------------------------

def same(ours, right):
    return torch.allclose(torch.as_tensor(ours).double(), right.double(), atol=1e-6)


def check_shifted(answers):
    ours, right = answers["shifted"](28, 3.0), flow.shifted_schedule(28, 3.0)
    if len(ours) != len(right):
        return f"{len(ours)} times; 28 steps have 29 ends"
    if same(ours, right):
        return ""
    if same(ours, flow.shifted_schedule(28, 1 / 3)):
        return "that moves them towards the data; at alpha = 3, t = 1/2 becomes 3/4"
    return "that runs from 0 to 1" if ours[0] < ours[-1] else "even times from 1 to 0, each through Eq. 23"


def check_released(answers):
    ours, right = answers["released"](28, 3.0), flow.released_schedule(28, 3.0)
    if len(ours) != len(right):
        return f"{len(ours)} times; 28 steps have 29 ends, the last of them 0"
    if same(ours, right):
        return ""
    once = torch.linspace(1, flow.shift_time(1 / 1000, 3.0), 28)
    if same(ours[:-1], once):
        return "those are even between the ends of the moved training times; now they are moved again"
    if same(ours[:-1], flow.shift_time(torch.linspace(1, 1 / 1000, 28), 3.0)):
        return "the smallest training time is moved before the even ones are laid out: it is 3 / 1002, not 1 / 1000"
    return f"the second time is {float(right[1]):.5f}, the last before 0 is {float(right[-2]):.7f}"


def check_twice(answers):
    ours = answers["twice"](3.0)
    t = torch.linspace(0, 1, 11)
    if same(flow.shift_time(t, ours), flow.shift_time(flow.shift_time(t, 3.0), 3.0)):
        return ""
    return "in log-SNR, moving adds -2 log(alpha) (Eq. 25): twice that is ...?"


def check_last(answers):
    for steps, alpha in ((28, 3.0), (10, 2.0)):
        for name, ours, right in zip(("shifted", "released"), answers["last_times"](steps, alpha), (
                flow.shifted_schedule(steps, alpha)[-2], flow.released_schedule(steps, alpha)[-2])):
            if not same(ours, right):
                return f"{name}, {steps} steps, alpha {alpha}: {float(right):.7f}; Eq. 23 of 1/N, and of 1/1000 twice"
    return ""


def check_euler(answers):
    """Data N(2, 0.5^2): the velocity is known."""
    noise = torch.linspace(-2, 2, 9).view(9, 1, 1, 1)
    velocity = lambda z, t: flow.gaussian_velocity(z, t, 2.0, 0.5)
    ours, right = (f(velocity, noise, flow.released_schedule(28)) for f in (answers["euler"], flow.euler))
    if same(ours, right):
        return ""
    if torch.as_tensor(ours).mean() < 0:
        return "the sign: t falls, so the step t_next - t is negative, and the velocity points from data to noise"
    return "z + (t_next - t) velocity(z, t), for every pair of neighbours"


CHECKS = {"shifted": check_shifted, "released": check_released, "twice by alpha": check_twice,
          "the last time before 0": check_last, "Euler's method": check_euler}


def main(answers) -> int:
    """Say which checks pass. answers: the functions by name. Returns the number of those that do not."""
    wrong = 0
    for name, check in CHECKS.items():
        try:
            hint = check(answers)
        except NotImplementedError:
            hint = "not written yet"
        except Exception as problem:                     # a shape that does not fit, say: the student sees why
            hint = f"{type(problem).__name__}: {problem}"
        wrong += bool(hint)
        print(f"{'not yet' if hint else 'passed '}  {name}{': ' + hint if hint else ''}")
    return wrong


if __name__ == "__main__":
    sys.exit(min(1, main(globals())))
