"""The same plan in a tidier order: interchangeable blocks with the same option lie side by side."""

from collections import defaultdict
from collections.abc import Callable

from memplan.problem import Choice, Option, Problem
from memplan.solvers.solution import Solution, peak_bytes


def tidied(problem: Problem, solution: Solution) -> Solution:
    """The solution with its options handed out anew among blocks of equal holds and times, if the budget allows it.

    Those that hold least come first. Where nothing is copied to the host, time and the bytes held at the loss stay what
    they are, and every earlier moment holds less or as much; only blocks whose backward takes most may then run when
    too much is held. Where that is over the budget, these come first, when the least is held. What is won is a plan
    that reads as "recompute the first 20 of 32" and not as a pattern, and a trace with few kinds of neighbours. An
    order in which copies wait longer for the link is not taken.
    """
    if solution.choice is None or solution.step_s is None or solution.bound_s is None:
        return solution
    for order in (_by_hold, _by_backward):
        choice = _handed_out(problem, solution.choice, order)
        if peak_bytes(problem, choice) > problem.budget_bytes:
            continue
        if any(option.link_bytes for option in problem.chosen(choice)) and problem.step_s(choice) > solution.step_s:
            continue
        return Solution.of(problem, choice, solution.bound_s)
    return solution


def _handed_out(problem: Problem, choice: Choice, order: Callable[[Option], float]) -> Choice:
    groups: dict[object, list[int]] = defaultdict(list)
    for i, block in enumerate(problem.blocks):
        groups[tuple(map(_looks, block.options))].append(i)
    tidy = list(choice)
    for group in groups.values():
        options = problem.blocks[group[0]].options
        in_order = sorted((choice[i] for i in group), key=lambda k: (order(options[k]), k))
        for i, k in zip(group, in_order, strict=True):
            tidy[i] = k
    return tuple(tidy)


def _by_hold(option: Option) -> float:
    return option.hold_bytes


def _by_backward(option: Option) -> float:
    return -option.backward_bytes


def _looks(option: Option) -> tuple[object, ...]:
    """What makes options interchangeable. Times of like blocks are sums: equal but for rounding."""
    return option.name, option.hold_bytes, f"{option.step_s:.9g}", option.link_bytes
