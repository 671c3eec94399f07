"""The solvers: each is one function from a `Problem` to a `Solution`, in one file, with one line in this table.

To add one, write its file, add its line, and run the contract tests: every solver here has to agree with brute force on
small chains, stay within the budget by the simulator, never get slower with more budget, and answer the same twice.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from memplan.problem import Problem
from memplan.solvers import dp, exact
from memplan.solvers.dp import smallest_budget
from memplan.solvers.solution import Solution, Status

Solver = Callable[[Problem], Solution]

SOLVERS: Mapping[str, Solver] = MappingProxyType(
    {
        "dp": dp.solve,  # the default: numpy only, milliseconds
        "exact": exact.solve,  # a mixed-integer programme in HiGHS, the oracle; needs memplan[exact]
    }
)

__all__ = ["SOLVERS", "Solution", "Solver", "Status", "smallest_budget"]
