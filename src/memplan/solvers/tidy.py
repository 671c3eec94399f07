"""The same plan in a tidier order: of interchangeable blocks, those that hold least come first."""

from collections import defaultdict

from memplan.problem import Choice, Problem
from memplan.solvers.solution import Solution, peak_bytes


def tidied(problem: Problem, solution: Solution) -> Solution:
    """The solution with its options handed out anew among blocks of equal holds and times, if the budget allows it.

    Where nothing is copied to the host, time and the bytes held at the loss stay what they are, and every earlier
    moment holds less or as much. What is won is a plan that reads as "recompute the first 20 of 32" and not as a
    pattern. An order in which copies wait longer for the link is not taken.
    """
    if solution.choice is None or solution.step_s is None or solution.bound_s is None:
        return solution
    groups: dict[object, list[int]] = defaultdict(list)
    for i, block in enumerate(problem.blocks):
        groups[
            tuple((option.name, option.hold_bytes, option.step_s, option.link_bytes) for option in block.options)
        ].append(i)
    tidy = list(solution.choice)
    for group in groups.values():
        options = problem.blocks[group[0]].options
        by_hold = sorted((solution.choice[i] for i in group), key=lambda k: (options[k].hold_bytes, k))
        for i, k in zip(group, by_hold, strict=True):
            tidy[i] = k
    choice: Choice = tuple(tidy)
    if peak_bytes(problem, choice) > problem.budget_bytes:
        return solution
    ordered = Solution.of(problem, choice, solution.bound_s)
    slower = any(option.link_bytes for option in problem.chosen(choice)) and problem.step_s(choice) > solution.step_s
    return solution if slower else ordered
