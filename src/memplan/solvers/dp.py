"""The default solver: an exact dynamic programme over the prefix sum of held bytes, with a proven bound.

Let S be the bytes that the blocks before block i hold, and load_i(o) = base_i + max(forward_i(o), backward_i(o)). Then

    V_i(S) = min over o with S + load_i(o) <= B of  t_i(o) + V_{i+1}(S + hold_i(o)),    V_N(S) = 0

with S + gap_i <= B at every i is the whole problem (`memplan.problem` says why one number is the state). The programme
runs forward over *labels*: the pairs (S, time) that no other choice for the same blocks beats in both. S is never
rounded, so a label's bytes are the bytes. Three things keep the labels few without losing the optimum:

* **Need.** need_i, the least budget at which blocks i.. run when nothing is held before them, has a closed recursion
  (`smallest_budget`). A label is kept only if S + need_{i+1} <= B, so every label has a feasible completion.
* **Relaxation.** Let a block take fractions of its options, and forget load_i: V_i becomes convex and piecewise linear
  in S, and the recursion an infimal convolution, which merges slopes in order. This is the linear relaxation of the
  multiple-choice knapsack (Sinha and Zoltners, Operations Research 27, 1979) with a capacity at every position instead
  of one. A label whose time plus relaxed completion exceeds a plan already known cannot lead to a better one.
* **Width.** The search is repeated with more and more labels per block (`labels.WIDTHS`): a narrow one is quick and
  finds the plan that lets a wide one drop almost everything.

A label that is dropped for want of width takes the bound down to the least time that it could have led to. The answer
is the optimum, with gap 0, as soon as no search dropped a label that could have been faster; benchmarks/solver.py shows
where that is not so (time that falls in exact proportion to the bytes held makes every label equally promising).

A solution with gap 0 is the optimum, so a larger budget never makes it slower; others are within their gap of that.
Of equally fast choices the one that holds fewer bytes at the loss is taken, then options in a fixed order: the answer
is deterministic. Sizes are bytes, times are seconds.
"""

import numpy as np

from memplan.problem import Problem
from memplan.solvers.labels import Link, chained, fastest, some_choice
from memplan.solvers.offload import improved, least_peak
from memplan.solvers.solution import Solution, gap_peaks, peak_bytes


def solve(problem: Problem) -> Solution:
    """The fastest choice within the budget, with a lower bound on the step of any choice."""
    return improved(problem, _without_link(problem))


def _without_link(problem: Problem) -> Solution:
    """The fastest choice that copies nothing to the host, and a bound on those."""
    links = tuple(map(Link.plain, problem.blocks))
    quickest = tuple(int(link.index[np.lexsort((link.hold, link.time))[0]]) for link in links)
    if peak_bytes(problem, quickest) <= problem.budget_bytes:
        return Solution.of(problem, quickest, bound_s=problem.step_s(quickest))
    chain = chained(links, gap_peaks(problem), problem.budget_bytes)
    if chain is None or problem.optimizer_bytes > problem.budget_bytes:
        return Solution.infeasible()
    found = fastest(chain, problem.blocks_s(problem.at_most_s), problem.enough)
    choice = found.choice or some_choice(chain)  # nothing fast enough is there: one that fits, with the bound
    if found.choice is not None and found.bound_s >= found.time_s:
        return Solution.of(problem, choice, bound_s=problem.step_s(choice))
    return Solution.of(problem, choice, bound_s=problem.whole_s(found.bound_s))


def smallest_budget(problem: Problem) -> int:
    """The least budget in bytes at which some choice fits.

    Every moment needs the prefix S plus a constant, so blocks i.. fit after S if and only if S + need_i <= budget with

        need_N = gap_N,    need_i = max(gap_i, min over o of max(load_i(o), hold_i(o) + need_{i+1}))

    Proof by induction from the end: option o of block i fits if and only if S + load_i(o) <= budget and, for all that
    follows, S + hold_i(o) + need_{i+1} <= budget; some option fits if and only if the one with the least maximum does.
    Before the first block S is 0, hence max(need_0, optimizer). With copies to the host the same holds for each size of
    the staging area; the least over those is the answer (`memplan.solvers.offload.least_peak`).
    """
    return max(least_peak(problem), problem.optimizer_bytes)
