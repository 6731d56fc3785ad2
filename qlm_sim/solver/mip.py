"""Integer programs in PuLP, solved by HiGHS or CBC up to a number of nodes, never up to a time.

Tells a proved optimum from a solution that is merely the best so far: ``LpStatus`` calls both "Optimal".
"""

from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pulp


class Backend(StrEnum):
    HIGHS = "highs"
    CBC = "cbc"


class Outcome(StrEnum):
    OPTIMAL = "optimal"
    """Proved, to the gap that was asked for."""
    FEASIBLE = "feasible"
    """The nodes ran out: the best solution so far."""
    NONE = "none"
    """No solution was found."""


def run(problem: "pulp.LpProblem", backend: Backend, *, nodes: int, gap: float) -> Outcome:
    """Solve on one thread; the values are in the problem's variables afterwards.

    ``gap``: difference between solution and bound, relative or absolute, that counts as optimal.
    """
    import pulp  # here, because it takes long to import and most runs do without

    if backend is Backend.HIGHS:
        solver = pulp.HiGHS(msg=False, threads=1, gapRel=gap, gapAbs=gap, mip_max_nodes=nodes)
        try:
            problem.solve(solver)
        except KeyError:
            # PuLP 3.3 reads HiGHS's solution, and then does not know what it calls running out of nodes.
            info = problem.solverModel.getInfo()
            return Outcome.FEASIBLE if info.primal_solution_status == _HIGHS_FEASIBLE else Outcome.NONE
    else:
        path = pulp.PULP_CBC_CMD.pulp_cbc_path  # the CBC that comes with PuLP
        problem.solve(pulp.COIN_CMD(path=path, msg=False, threads=1, gapRel=gap, gapAbs=gap, maxNodes=nodes))
    if problem.sol_status == pulp.LpSolutionOptimal:
        return Outcome.OPTIMAL
    return Outcome.FEASIBLE if problem.sol_status == pulp.LpSolutionIntegerFeasible else Outcome.NONE


_HIGHS_FEASIBLE = 2
