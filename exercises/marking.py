"""marking.py: runs the checks of an exercise and prints one line for each."""


def mark(checks, answers, show=None):
    """Prints which checks pass, and a hint for each that does not. Returns 0 if all pass, else 1.

    checks: name -> function of `answers` that returns "" or a hint. answers: the functions that the
    student wrote, by name. show(answers) prints what there is to see once all checks pass.
    """
    failed = 0
    for name, check in checks.items():
        try:
            hint = check(answers)
        except NotImplementedError:
            hint = "not written yet"
        except Exception as problem:                  # For example, shapes that do not fit.
            hint = f"{type(problem).__name__}: {problem}"
        if hint:
            failed += 1
            print(f"not yet  {name}: {hint}")
        else:
            print(f"passed   {name}")
    if failed == 0 and show is not None:
        show(answers)
    return int(failed > 0)
