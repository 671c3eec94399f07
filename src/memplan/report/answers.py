"""What a reader of a plan wants to know first: what fits, what it costs, what takes most, what more memory would do."""

from collections import Counter
from dataclasses import dataclass

from memplan.plan_record import Plan, Verdict, pace_text
from memplan.prediction import activations_in, by_category
from memplan.report.paths import module_shares
from memplan.units import format_budget, format_bytes, format_percent, format_rate, format_seconds


@dataclass(frozen=True, slots=True)
class Answer:
    """One of the questions that a reader comes with."""

    question: str
    short: str
    sentences: tuple[str, ...]


def answers(plan: Plan) -> tuple[Answer, ...]:
    """What fits, what it costs, what takes most, and what more memory would change."""
    return _what_fits(plan), _what_it_costs(plan), _what_takes_most(plan), _what_more_would_change(plan)


def _what_fits(plan: Plan) -> Answer:
    spare = plan.budget_bytes - plan.needs_bytes
    batch = f"{plan.micro_batch}"
    samples = "All samples of a step at once."
    if plan.accumulation > 1:
        batch += f" x {plan.accumulation}"
        samples = f"{plan.micro_batch} at a time, {plan.accumulation} times: {plan.effective_batch} in a step."
    if plan.verdict is Verdict.DOES_NOT_FIT:
        short = f"{format_bytes(plan.smallest_bytes - plan.budget_bytes)} too much"
        least = f"The least that a plan of the strategy {plan.strategy!r} needs is {format_bytes(plan.smallest_bytes)}."
        return Answer("What fits?", short, (least, f"The budget is {format_budget(plan.budget_bytes)}."))
    needs = f"It needs {plan.beside_budget(plan.needs_bytes)}; the budget is {format_budget(plan.budget_bytes)}."
    room = f"{format_budget(spare)} are spare." if spare >= 0 else f"{plan.budget.beyond(-spare)}."
    return Answer("What fits?", f"{batch} samples", (samples, needs, room))


def _what_it_costs(plan: Plan) -> Answer:
    pace = pace_text(plan.slowdown)
    fits = plan.verdict is not Verdict.DOES_NOT_FIT
    takes = "A step takes" if fits else "With that least, a step would take"
    rate = format_rate(plan.samples_per_s, "samples")
    about = "about " if plan.is_for_card else ""
    sentences = [
        f"{takes} {format_seconds(plan.step_s)} ({plan.basis}): {rate}.",
        f"Keeping everything would take {format_seconds(plan.step_s / (1 + plan.slowdown))} and need {about}"
        f"{format_bytes(plan.unplanned_needs_bytes)}.",
    ]
    if fits:
        speed_counts = plan.verdict is Verdict.FITS and plan.faster_within_budget is None
        within = "budget" if speed_counts else "so little memory"
        if plan.share_bytes is not None:
            within = f"{format_budget(plan.share_bytes)} of the budget"
        if plan.is_for_card:  # what an allocator takes beside them is no part of the proof
            within = "so few bytes of tensors"
        by = f"by {', '.join(plan.levers)}" if plan.levers else "of the strategy's levers"
        sentences.append(
            f"By these times no plan {by} for this batch and {within} is {_at_all(plan.gap)} faster; that is proven."
        )
        if plan.is_for_card:
            sentences.append(
                "What the allocator takes beside tensors is another with each plan, so that some is spare."
            )
    if plan.host_bytes:
        sentences.append(f"{format_bytes(plan.host_bytes)} of pinned host memory.")
    return Answer("What does it cost?", "no time" if pace.startswith("0.0%") else pace, tuple(sentences))


def _at_all(gap: float) -> str:
    return "any" if gap < 5e-5 else f"more than {gap:.2%}"


def _what_takes_most(plan: Plan) -> Answer:
    sums = Counter(by_category(plan.breakdown))
    (largest, n_bytes), *others = sums.most_common() or [("nothing", 0)]
    total = sum(sums.values()) or 1
    where = f" of {plan.peak_module}" if plan.peak_module else ""
    share = format_percent(n_bytes / total)
    sentences = [f"{format_bytes(n_bytes)}, {share} of the peak, which is in {plan.peak_phase}{where}."]
    if others and others[0][1]:
        sentences.append(f"Next: {others[0][0]}, {format_bytes(others[0][1])}.")
    modules = module_shares({}, activations_in(plan.breakdown))
    if shares := sorted(modules, key=lambda share: -share.peak_bytes):
        name, held = shares[0].name or "the model itself", format_bytes(shares[0].peak_bytes)
        sentences.append(f"Of the activations, {name} has most: {held}.")
    return Answer("What takes most?", largest, tuple(sentences))


def _what_more_would_change(plan: Plan) -> Answer:
    question = "And with more memory?"
    if plan.verdict is Verdict.DOES_NOT_FIT:
        missing = format_bytes(plan.smallest_bytes - plan.budget_bytes)
        return Answer(question, f"{missing} more, and it fits", ())
    if (other := plan.faster_within_budget) is not None:
        saved = format_percent(1 - other.step_s / plan.step_s)
        return Answer(
            question,
            "nothing",
            (
                f"The strategy {plan.strategy!r} takes as little as it can. In the same budget there is a plan that "
                f"takes {saved} less time and needs {format_bytes(other.peak_bytes)}: plan with 'balanced'.",
            ),
        )
    faster = [point for point in plan.frontier if point.step_s < plan.step_s]
    if plan.shadow_price <= 0 and not faster:
        said = f"No plan for micro-batches of {plan.micro_batch} is faster, however much memory there is."
        return Answer(question, "nothing", (said,))
    short, sentences = "", []
    if plan.share_bytes is not None:
        sentences.append(
            f"The plan was made for {format_budget(plan.share_bytes)} of the budget, and tune chose it by measurement: "
            "that others are faster is a prediction."
        )
    if faster:
        saved, needs = format_percent(1 - faster[-1].step_s / plan.step_s), format_bytes(faster[-1].peak_bytes)
        short = f"up to {saved} less time"
        if len(faster) > 1:
            next_saved = format_percent(1 - faster[0].step_s / plan.step_s)
            sentences.append(
                f"The next of the plans below needs {format_bytes(faster[0].peak_bytes)}, saves {next_saved}."
            )
        sentences.append(f"The fastest for micro-batches of {plan.micro_batch} needs {needs} and saves {saved}.")
    if plan.shadow_price > 0:
        saved = format_percent(plan.shadow_price / plan.step_s)
        about, beside = ("about ", ", by its tensors alone") if plan.is_for_card else ("", "")
        short = f"{about}{format_seconds(plan.shadow_price)} per GiB"
        sentences.insert(0, f"One GiB more would save {about}{saved} of a step{beside}.")
    return Answer(question, short, tuple(sentences))
