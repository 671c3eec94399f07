"""What was found on a machine, as records and as text. `memplan.doctor` looks."""

from enum import StrEnum

from pydantic import Field
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from memplan.records import Record


class State(StrEnum):
    """How a finding is; the value is what the user reads."""

    FINE = "ok"
    CARE = "care"
    BROKEN = "broken"


_STYLES = {State.FINE: "green", State.CARE: "bold yellow", State.BROKEN: "bold red"}


class Finding(Record):
    """One thing that was looked at."""

    what: str
    says: str = Field(description="how it is; with care, what would go wrong")
    state: State = State.FINE
    mend: str = Field(default="", description="what to do about it")


class Diagnosis(Record):
    """All of them, in the order of looking."""

    schema_version: int = 1
    findings: tuple[Finding, ...]

    @property
    def is_usable(self) -> bool:
        """Whether memplan can work here at all."""
        return all(finding.state is not State.BROKEN for finding in self.findings)


def diagnosis_sheet(found: Diagnosis) -> RenderableType:
    """A line for each finding, what to do under it, and the sum."""
    parts: list[RenderableType] = []
    for finding in found.findings:
        parts.append(Text.assemble((f"{finding.state:<6}", _STYLES[finding.state]), f" {finding.what}: {finding.says}"))
        if finding.mend:
            parts.append(Padding(Text(finding.mend), (0, 0, 0, 7)))
    care = sum(finding.state is State.CARE for finding in found.findings)
    words = (
        "memplan cannot work here." if not found.is_usable else f"{care} to take care of." if care else "All is well."
    )
    return Group(*parts, Text(words, style="bold"))
