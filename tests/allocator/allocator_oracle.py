"""A second allocator, written from the rules with no regard to speed: every segment is a list of rows, and every
question is answered by looking at all of them. It shares the settings with the real one and nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from memplan.allocator import Settings

MIB = 2**20


class Full(Exception):
    """No room under the cap."""


@dataclass
class Row:
    size: float
    state: str  # "used", "awaiting", "free", "hole"
    identity: int | None = None
    since: int = 0  # searches of the large pool when it became free


@dataclass
class Piece:
    stream: int
    small: bool
    expandable: bool
    rows: list[Row]


@dataclass
class Oracle:
    settings: Settings
    cap: float = math.inf
    retries: int = 0
    searches: int = 0
    pieces: list[Piece] = field(default_factory=list)
    log: list[tuple[str, int, int]] = field(default_factory=list)
    finished: set[int] = field(default_factory=set)

    @property
    def reserved(self) -> int:
        return int(sum(row.size for piece in self.pieces for row in piece.rows if row.state != "hole"))

    def in_state(self, *states: str) -> int:
        return int(sum(row.size for piece in self.pieces for row in piece.rows if row.state in states))

    # --- the five things that can be asked ---

    def allocate(self, identity: int, size: int, stream: int) -> None:
        need = self.settings.rounded(size)
        small = need <= MIB
        found = self.search(need, stream, small)
        if found is None:
            self.collect()
            found = self.ask_driver(need, stream, small)
        if found is None and self.free_oversize(need, stream, small):
            found = self.ask_driver(need, stream, small)
        if found is None:
            self.empty_cache()
            self.retries += 1
            found = self.ask_driver(need, stream, small)
        if found is None:
            raise Full
        piece, at = found
        rest = piece.rows[at].size - need
        limit = self.settings.max_split_bytes or math.inf
        splits_all = small or self.settings.expandable_segments
        if rest >= 512 if splits_all else need < limit and rest > MIB:
            piece.rows.insert(at + 1, Row(rest, "free", since=self.searches))
            piece.rows[at].size = need
        piece.rows[at].state, piece.rows[at].identity = "used", identity

    def request_free(self, identity: int) -> None:
        piece, at = self.where(identity)
        piece.rows[at].state = "awaiting"

    def free(self, identity: int) -> None:
        if identity in self.finished:
            self.finished.remove(identity)
            return
        piece, at = self.where(identity)
        piece.rows[at] = Row(piece.rows[at].size, "free", since=self.searches)
        self.tidy(piece)

    def empty_cache(self) -> None:
        waiting = [row.identity for piece in self.pieces for row in piece.rows if row.state == "awaiting"]
        for identity in waiting:
            self.free(identity)
            self.finished.add(identity)
        for small in (False, True):
            for stream in sorted({piece.stream for piece in self.pieces}):
                free = [(row.size, i, j) for i, j, row in self.free_rows(stream, small)]
                rows = [(self.pieces[i], self.pieces[i].rows[j]) for _, i, j in sorted(free)]
                for piece, row in rows:
                    if piece.expandable:
                        self.unmap(piece, row)
                    elif len(piece.rows) == 1:
                        self.give_back(piece)

    # --- how ---

    def where(self, identity: int) -> tuple[Piece, int]:
        return next(
            (piece, at) for piece in self.pieces for at, row in enumerate(piece.rows) if row.identity == identity
        )

    def free_rows(self, stream: int, small: bool) -> list[tuple[int, int, Row]]:
        return [
            (i, j, row)
            for i, piece in enumerate(self.pieces)
            for j, row in enumerate(piece.rows)
            if row.state == "free" and piece.stream == stream and piece.small == small
        ]

    def search(self, need: int, stream: int, small: bool) -> tuple[Piece, int] | None:
        self.searches += not small
        found = sorted((row.size, i, j) for i, j, row in self.free_rows(stream, small) if row.size >= need)
        if self.settings.expandable_segments:
            while len(found) > 1 and self.room(*found[1]) < self.room(*found[0]):
                found = found[1:]
        if not found:
            return None
        size, i, j = found[0]
        limit = self.settings.max_split_bytes or math.inf
        if need < limit <= size:
            return None
        if need >= limit and size >= need + self.settings.max_non_split_rounding_bytes:
            return None
        return self.pieces[i], j

    def room(self, size: float, i: int, j: int) -> float:
        rows = self.pieces[i].rows
        return size + (rows[j + 1].size if j + 1 < len(rows) and rows[j + 1].state == "hole" else 0)

    def ask_driver(self, need: int, stream: int, small: bool) -> tuple[Piece, int] | None:
        size = 2 * MIB
        if not small:
            size = self.settings.large_segment_bytes if need < 10 * MIB else math.ceil(need / (2 * MIB)) * 2 * MIB
        if self.reserved + size > self.cap:
            return None
        if self.settings.expandable_segments:
            return self.expand(need, stream, small)
        self.pieces.append(Piece(stream, small, False, [Row(size, "free")]))
        self.log.append(("segment_alloc", size, stream))
        return self.pieces[-1], 0

    def expand(self, need: int, stream: int, small: bool) -> tuple[Piece, int] | None:
        mine = [p for p in self.pieces if p.stream == stream and p.small == small]
        if not mine:
            self.pieces.append(Piece(stream, small, True, [Row(math.inf, "hole")]))
            mine = self.pieces[-1:]
        (piece,) = mine
        page = 2 * MIB if small else self.settings.large_segment_bytes
        at = next(j for j in range(len(piece.rows)) if self.reaches(piece.rows, j, need))
        mapped, have, rows = [], 0, piece.rows[at:]
        for row in rows:
            if have >= need:
                break
            if row.state == "hole":
                size = math.ceil(min(row.size, need - have) / page) * page
                mapped.append((row, size))
                have += size
            else:
                have += row.size
        if self.reserved + sum(size for _, size in mapped) > self.cap:
            return None
        for row, size in mapped:
            spot = next(k for k, other in enumerate(piece.rows) if other is row)
            piece.rows[spot : spot + 1] = [
                Row(size, "free"),
                *([Row(row.size - size, "hole")] if row.size > size else []),
            ]
            self.log.append(("segment_map", size, stream))
        self.tidy(piece)
        return piece, at

    @staticmethod
    def reaches(rows: list[Row], j: int, need: int) -> bool:
        """Whether the run of free rows and holes from row j has the room, and has a hole first or second."""
        states = [row.state for row in rows[j : j + 2]]
        if states[0] != "hole" and states != ["free", "hole"]:
            return False
        have = 0.0
        for row in rows[j:]:
            if have >= need or row.state in {"used", "awaiting"}:
                break
            have += row.size
        return have >= need

    def unmap(self, piece: Piece, row: Row) -> None:
        page = 2 * MIB if piece.small else self.settings.large_segment_bytes
        at = next(k for k, other in enumerate(piece.rows) if other is row)
        start = sum(other.size for other in piece.rows[:at])
        first, last = math.ceil(start / page) * page, (start + row.size) // page * page
        if last > first:
            parts = [(first - start, "free"), (last - first, "hole"), (start + row.size - last, "free")]
            piece.rows[at : at + 1] = [Row(size, state, since=self.searches) for size, state in parts if size]
            self.log.append(("segment_unmap", int(last - first), piece.stream))
            self.tidy(piece)

    def give_back(self, piece: Piece) -> int:
        self.pieces = [other for other in self.pieces if other is not piece]
        self.log.append(("segment_free", int(piece.rows[0].size), piece.stream))
        return int(piece.rows[0].size)

    def free_oversize(self, need: int, stream: int, small: bool) -> bool:
        limit = self.settings.max_split_bytes
        if limit is None or self.settings.expandable_segments:
            return False
        wanted = max(need, limit)
        free = sorted((row.size, i) for i, _, row in self.free_rows(stream, small) if row.size >= limit)
        one = [i for size, i in free if size >= wanted][:1]
        given = [self.pieces[i] for i in one] or [self.pieces[i] for _, i in reversed(free)]
        total = 0
        for piece in given:
            if total < wanted:
                total += self.give_back(piece)
        return total >= wanted

    def collect(self) -> None:
        share = self.settings.garbage_collection_threshold
        if not share or self.cap == math.inf:
            return
        excess, freed = self.reserved - int(share * self.cap), 0
        while freed < excess:
            idle = [
                (piece.stream, piece.rows[0].size, i, self.searches - piece.rows[0].since)
                for i, piece in enumerate(self.pieces)
                if not piece.small and not piece.expandable and [row.state for row in piece.rows] == ["free"]
            ]
            if not idle:
                return
            mean = sum(row[3] for row in idle) / len(idle)
            old = [self.pieces[i] for _, _, i, age in sorted(idle) if age >= mean]
            freed += sum(self.give_back(piece) for piece in old)

    def tidy(self, piece: Piece) -> None:
        """Free neighbours become one, and so do holes."""
        rows: list[Row] = []
        for row in piece.rows:
            if rows and row.state == rows[-1].state and row.state in {"free", "hole"}:
                rows[-1] = Row(rows[-1].size + row.size, row.state, since=self.searches)
            else:
                rows.append(row)
        piece.rows = rows

    def segments(self) -> list[tuple[int, bool, tuple[tuple[int, str], ...]]]:
        found = []
        for piece in self.pieces:
            run: list[tuple[int, str]] = []
            for row in [*piece.rows, Row(0, "hole")]:
                if row.state != "hole":
                    run.append(
                        (int(row.size), {"used": "allocated", "awaiting": "awaiting_free"}.get(row.state, "free"))
                    )
                elif run:
                    found.append((piece.stream, piece.small, tuple(run)))
                    run = []
        return sorted(found)
