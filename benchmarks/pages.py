"""The parts of the pages in docs/ that benchmarks write, between marks that a reader does not see."""

from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"


def written(part: str, text: str, page: Path) -> None:
    """Put a text between the marks of a part of a page. SystemExit if the page has no such marks."""
    begin, end = f"<!-- {part}: begin -->", f"<!-- {part}: end -->"
    whole = page.read_text(encoding="utf-8") if page.exists() else ""
    if begin not in whole or end not in whole:
        raise SystemExit(f"{page} has no marks {begin!r} and {end!r}")
    before, _, rest = whole.partition(begin)
    page.write_text(f"{before}{begin}\n\n{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")
