"""What the planner weighs: the options that a strategy leaves, the fastest of them, the micro-batches to try."""

from collections.abc import Iterator
from dataclasses import replace

from memplan.problem import Block, Choice, Problem, levers_of
from memplan.strategy import Strategy


def allowed(problem: Problem, strategy: Strategy) -> Problem:
    """The problem with the options that the strategy allows; a block without such an option keeps all it has."""
    levers = frozenset(strategy.levers)

    def only(block: Block) -> Block:
        if strategy.every_block is not None:
            options = tuple(option for option in block.options if option.name == strategy.every_block)
        else:
            options = tuple(option for option in block.options if levers_of(option.name) <= levers)
        return replace(block, options=options or block.options)

    return replace(problem, blocks=tuple(map(only, problem.blocks)))


def fastest(problem: Problem) -> Choice:
    """Every block's fastest option that copies nothing, of equally fast ones the one that holds less."""
    return tuple(
        min((o.step_s, o.hold_bytes, k) for k, o in enumerate(block.options) if o.link_bytes == 0)[2]
        for block in problem.blocks
    )


def least_s(problem: Problem) -> float:
    """Seconds of a step in which every block takes its fastest option and never waits for the link."""
    return problem.whole_s(sum(min(o.step_s for o in block.options if problem.allows(o)) for block in problem.blocks))


def ladder(largest: int) -> Iterator[int]:
    """2, 3, 4, 6, 8, 12, 16, ... and last `largest`."""
    power = 2
    while power < largest:
        yield power
        if power * 3 // 2 < largest:
            yield power * 3 // 2
        power *= 2
    if largest > 1:
        yield largest
