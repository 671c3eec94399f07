"""The house guard: what CONTRIBUTING.md says about floors, imports and sizes, checked on the source itself."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import memplan

ROOT = Path(memplan.__file__).parent

# A room (a module or a package) imports from its own floor and those below. Torch begins on floor 8.
TORCH_FLOOR = 8
FLOORS = {
    "errors": 0,
    "units": 0,
    "gpus": 1,
    "link": 1,
    "main_memory": 1,
    "plan_record": 1,
    "prediction": 1,
    "records": 0,
    "progress": 1,
    "settings": 1,
    "strategy": 1,
    "storages": 1,
    "trace": 1,
    "queued": 2,
    "trials": 3,
    "workers": 0,
    "world": 10,
    "allocator": 2,
    "training_run": 3,
    "graph": 2,
    "menu": 4,
    "selection": 3,
    "data": 1,
    "risk": 2,
    "sharding": 2,
    "batches": 2,
    "problem": 2,
    "profile": 3,
    "rescale": 4,
    "roofline": 3,
    "corrections": 4,
    "cache": 5,
    "simulator": 4,
    "sizes": 4,
    "solvers": 5,
    "task": 6,
    "tradeoff": 6,
    "planner": 6,
    "offer": 2,
    "survey": 13,
    "report": 7,
    "_compat": 8,
    "device": 8,
    "driver": 1,
    "fake_memory": 8,
    "kernels": 8,
    "laps": 8,
    "losses": 9,
    "meter": 8,
    "packed": 8,
    "abstract": 9,
    "accumulation": 9,
    "assembly": 9,
    "blocks": 9,
    "mixed_precision": 8,
    "buckets": 9,
    "inplace": 9,
    "division": 9,
    "assumptions": 9,
    "means": 9,
    "micro_steps": 9,
    "notes": 9,
    "optimizer_step": 9,
    "optimizers": 9,
    "recipe": 9,
    "recorder": 9,
    "repeat": 9,
    "runs": 9,
    "sample_rules": 9,
    "samples": 9,
    "tape": 9,
    "zero": 9,
    "zero3": 9,
    "around": 9,
    "gathering": 9,
    "levers": 10,
    "fitting": 11,
    "pipeline": 12,
    "checking": 12,
    "doctor": 12,
    "resolving": 12,
    "session": 12,
    "proof": 11,
    "room": 11,
    "rewind": 11,
    "bench": 12,
    "guard": 13,
    "tuning": 13,
    "rungs": 13,
    "out_of_memory": 1,
    "ranks": 11,
    "study": 12,
    "timing": 11,
    "fresh_memory": 12,
    "skipping": 11,
    "advice": 7,
    "summary": 7,
    "integrations": 14,
    "cli": 15,
    "__main__": 15,
}
TORCH_AND_ITS_LIKE = {"accelerate", "peft", "pynvml", "torch", "transformers", "trl"}

FILES = [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]
for_every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node of a file, but for what only the type checker reads."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            continue
        yield node
        yield from nodes(node)


def imports(path: Path) -> set[str]:
    """The dotted names that a file imports, at its top or inside a function."""
    found = set()
    for node in nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def rooms_imported(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("memplan.")} - {room(path), "__version__"}


@for_every_file
def test_every_file_has_a_floor(path: Path) -> None:
    assert room(path) in FLOORS, f"give {room(path)!r} a floor in the table above"


@for_every_file
def test_imports_never_point_up(path: Path) -> None:
    above = {name for name in rooms_imported(path) if FLOORS.get(name, 99) > FLOORS[room(path)]}
    assert not above, (
        f"{room(path)} is on floor {FLOORS[room(path)]} and imports {sorted(above)} from above (or the root)"
    )


@for_every_file
def test_the_root_is_not_imported_from_inside(path: Path) -> None:
    assert "memplan" not in imports(path)


def test_rooms_do_not_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for path in FILES:
        graph.setdefault(room(path), set()).update(rooms_imported(path))
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@for_every_file
def test_torch_stays_below_its_line(path: Path) -> None:
    packages = {name.split(".")[0] for name in imports(path)}
    if FLOORS[room(path)] < TORCH_FLOOR:
        assert not packages & TORCH_AND_ITS_LIKE


@for_every_file
def test_only_the_device_room_speaks_to_the_driver(path: Path) -> None:
    if room(path) in ("device", "driver"):
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    spoken = {ast.unparse(node) for node in nodes(tree) if isinstance(node, ast.Attribute)} | imports(path)
    assert not {name for name in spoken if name.startswith(("torch.cuda", "pynvml"))}


@for_every_file
def test_no_file_is_longer_than_400_lines(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= 400


def test_no_module_has_the_name_of_a_root_export() -> None:
    # `import memplan.plan as m` would otherwise give the function, and `memplan.plan` sometimes the module.
    assert not {room(path) for path in FILES} & set(memplan.__all__)


def test_the_type_checker_and_the_lazy_root_know_the_same_exports() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    seen = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == memplan._HOMES
    assert {*seen, "__version__"} == set(memplan.__all__)
