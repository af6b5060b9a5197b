"""Checks answers to the exercises of a chapter."""

import math


def check(answer: float | None, solution: float | None, within: float) -> None:
    """Prints whether a numeric answer (None: no answer so far) is right, without printing the solution.

    solution: the right number; None or NaN if it cannot be computed, for example without run records. within: largest
    absolute difference that counts as right.

    >>> check(3.1, solution=3.14159, within=0.05)
    Correct.
    >>> check(4, solution=3.14159, within=0.05)
    Too large. Try again.
    >>> check(None, solution=3.14159, within=0.05)
    Replace None with your answer and run this cell.
    """
    if solution is None or math.isnan(solution):
        print("This exercise has no solution with the present data.")
    elif answer is None:
        print("Replace None with your answer and run this cell.")
    elif abs(answer - solution) <= within:
        print("Correct.")
    elif answer > solution:
        print("Too large. Try again.")
    elif answer < solution:
        print("Too small. Try again.")
    else:
        print("The answer must be a number.")
