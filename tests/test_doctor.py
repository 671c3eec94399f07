"""What the doctor makes of machines of every kind. The machine is given here; only versions are this one's."""

import sys
import types
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from rich.console import Console

import memplan.device
import memplan.driver
from memplan.device import DeviceMemory
from memplan.doctor import examine
from memplan.driver import DriverCard, cards
from memplan.errors import NoDevice
from memplan.report.diagnosis import Diagnosis, Finding, State, diagnosis_sheet

GIB = 2**30

Cards = Callable[..., None]


def of(found: Diagnosis, what: str) -> list[Finding]:
    return [finding for finding in found.findings if finding.what == what]


@pytest.fixture(autouse=True)
def _a_machine_without_a_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memplan.driver, "cards", lambda: ())
    monkeypatch.setattr(memplan.driver, "driver_version", lambda: "")
    monkeypatch.setenv("MEMPLAN_CACHE", "on")
    monkeypatch.setenv("MEMPLAN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(memplan.device, "resolve_gpu", _resolver())


def _resolver(*live: object) -> Callable[[str], tuple[None, object]]:
    def resolve(name: str) -> tuple[None, object]:
        index = int(name.removeprefix("cuda:"))
        if index >= len(live):
            raise NoDevice(
                f"{name!r} was asked for, but torch finds no usable CUDA device; to plan without it, pass 'cpu'"
            )
        return None, live[index]

    return resolve


def a_card(name: str = "NVIDIA GeForce RTX 4090", **changes: object) -> types.SimpleNamespace:
    values: dict[str, object] = {
        "memory": lambda: DeviceMemory(24 * GIB, 23 * GIB, others_bytes=GIB // 2, context_bytes=GIB // 2),
        "cap_bytes": 24 * GIB,
        "warnings": list,
    }
    return types.SimpleNamespace(name=name, **(values | changes))


def test_a_machine_without_a_card_is_fine(tmp_path: Path) -> None:
    found = examine({}, tmp_path)
    assert found.is_usable
    assert {finding.state for finding in found.findings} == {State.FINE}
    (torch,) = of(found, "torch")
    assert torch.says == metadata.version("torch")
    (none,) = of(found, "cards for torch")
    assert none.says == "none: torch finds no usable CUDA device. Plans for the CPU and for cards elsewhere can be made"
    assert not (tmp_path / "cache").exists()


class TestVersions:
    def needs(self, monkeypatch: pytest.MonkeyPatch, *lines: str) -> Diagnosis:
        monkeypatch.setattr(metadata, "requires", lambda _: list(lines))
        return examine({})

    def test_what_is_too_old_makes_memplan_unusable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = self.needs(monkeypatch, "torch>=99")
        (torch,) = [finding for finding in of(found, "torch") if finding.state is State.BROKEN]
        assert torch.says == f"is {metadata.version('torch')}"
        assert torch.mend == "pip install 'torch>=99'"
        assert not found.is_usable

    def test_what_is_missing_makes_memplan_unusable_unless_it_is_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert not self.needs(monkeypatch, "no-such-package").is_usable
        assert self.needs(monkeypatch, 'no-such-package; extra == "peft"').is_usable

    def test_a_torch_that_cannot_be_imported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torch", None)
        monkeypatch.setitem(sys.modules, "memplan.device", None)
        found = examine({})
        assert not found.is_usable
        assert any("cannot be imported" in finding.says for finding in of(found, "torch"))


class TestCards:
    def test_each_has_its_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memplan.device, "resolve_gpu", _resolver(a_card(), a_card("Some Card Of Tomorrow")))
        found = examine({})
        (first,) = of(found, "cuda:0")
        assert first.state is State.FINE
        assert first.says.startswith("NVIDIA GeForce RTX 4090, 24.00 GiB, of which 23.00 GiB are free and 512.00 MiB")
        assert "not in the catalogue" in of(found, "cuda:1")[1].says
        assert of(found, "cards for torch") == []

    def test_what_others_hold_a_cap_and_the_device_s_own_warnings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        crowded = DeviceMemory(24 * GIB, 4 * GIB, others_bytes=19 * GIB, context_bytes=GIB)
        card = a_card(memory=lambda: crowded, cap_bytes=12 * GIB, warnings=lambda: ["it is a slice"])
        monkeypatch.setattr(memplan.device, "resolve_gpu", _resolver(card))
        held, cap, warning = of(examine({}), "cuda:0")
        assert (held.state, "nvidia-smi" in held.mend) == (State.CARE, True)
        assert cap.says == "this process may reserve 12.00 GiB of it"
        assert (warning.state, warning.says) == (State.CARE, "it is a slice")

    def test_a_card_that_torch_was_not_built_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memplan.driver, "cards", lambda: (DriverCard("RTX 4090", 24 * GIB, has_mig=False),))
        (none,) = of(examine({}), "cards for torch")
        assert none.state is State.CARE
        assert "build of torch for CUDA" in none.mend

    def test_a_driver_that_is_too_old(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fails(name: str) -> None:
            raise RuntimeError(f"{name}: the driver on your system is too old\nand more")

        monkeypatch.setattr(memplan.device, "resolve_gpu", fails)
        (broken,) = of(examine({}), "cuda:0")
        assert broken.says == "does not answer: cuda:0: the driver on your system is too old"
        assert broken.state is State.CARE

    def test_shared_memory_slices_and_two_orders(self, monkeypatch: pytest.MonkeyPatch) -> None:
        two = (DriverCard("GB10", None, has_mig=False), DriverCard("H100", 80 * GIB, has_mig=True))
        monkeypatch.setattr(memplan.driver, "cards", lambda: two)
        monkeypatch.setattr(memplan.driver, "driver_version", lambda: "570.86.15")
        found = examine({})
        assert of(found, "NVIDIA's driver")[0].says == "570.86.15, 2 cards"
        assert "shared with the processor" in of(found, "GB10")[0].says
        assert "MIG" in of(found, "H100")[0].says
        assert of(found, "CUDA_DEVICE_ORDER")[0].mend == "export CUDA_DEVICE_ORDER=PCI_BUS_ID"
        assert of(examine({"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}), "CUDA_DEVICE_ORDER") == []

    @pytest.mark.parametrize(("visible", "state"), [("1,0", State.FINE), ("", State.CARE), ("-1", State.CARE)])
    def test_visible_cards(self, visible: str, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memplan.driver, "cards", lambda: (DriverCard("RTX 4090", 24 * GIB, has_mig=False),))
        (finding,) = of(examine({"CUDA_VISIBLE_DEVICES": visible}), "CUDA_VISIBLE_DEVICES")
        assert finding.state is state
        assert repr(visible) in finding.says


class TestAllocator:
    @pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
    def test_what_is_understood(self, name: str) -> None:
        (finding,) = of(examine({name: "expandable_segments:True"}), name)
        assert (finding.state, finding.says) == (State.FINE, "expandable_segments:True")

    @pytest.mark.parametrize("text", ["made_up:1", "backend:cudaMallocAsync", "max_split_size_mb:1", ":::"])
    def test_what_is_not(self, text: str) -> None:
        (finding,) = of(examine({"PYTORCH_ALLOC_CONF": text}), "PYTORCH_ALLOC_CONF")
        assert finding.state is State.CARE
        assert finding.mend


class TestHost:
    @pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
    def test_the_limit_of_a_container(self, name: str, tmp_path: Path) -> None:
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("1073741824\n")
        (finding,) = of(examine({}, tmp_path), "main memory")
        assert finding.state is State.CARE
        assert "1.00 GiB" in finding.says
        assert "cpu:1073741824B" in finding.mend

    def test_no_limit(self, tmp_path: Path) -> None:
        (tmp_path / "memory.max").write_text("max\n")
        assert of(examine({}, tmp_path), "main memory")[0].state is State.FINE

    def test_a_cache_that_cannot_be_written(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("os.access", lambda *_: False)
        (finding,) = of(examine({}), "cache")
        assert (finding.state, "MEMPLAN_CACHE_DIR" in finding.mend) == (State.CARE, True)

    def test_a_full_disk(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda _: types.SimpleNamespace(free=1000))
        assert "1000 B left" in of(examine({}), "cache")[0].says

    def test_a_cache_that_cannot_be_looked_at(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        def refused(path: Path) -> bool:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(Path, "exists", refused)
        (finding,) = of(examine({}), "cache")
        assert (finding.state, "MEMPLAN_CACHE_DIR" in finding.mend) == (State.CARE, True)
        assert "cannot be looked at (Permission denied): no plan learns" in finding.says

    def test_a_cache_in_a_home_that_nobody_knows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MEMPLAN_CACHE_DIR", "~no-such-user/cache")
        (finding,) = of(examine(), "cache")
        assert (finding.state, "MEMPLAN_CACHE_DIR" in finding.mend) == (State.CARE, True)
        assert "the home folder is not known: no plan learns" in finding.says

    def test_a_cache_that_is_switched_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MEMPLAN_CACHE", "off")
        (finding,) = of(examine({}), "cache")
        assert (finding.state, finding.says) == (State.FINE, "switched off: no plan learns from measured runs")


class TestSettings:
    def test_what_is_set_is_named(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.chdir(tmp_path)
        assert of(examine({}), "settings")[0].says == "memplan's own"
        (tmp_path / "memplan.toml").write_text('gpu = "24GiB"\nstrategy = "balanced"\n')
        (finding,) = of(examine({"MEMPLAN_BANNER": "off"}), "settings")
        assert (finding.state, finding.says) == (State.FINE, "gpu = '24GiB', banner = False")

    @pytest.mark.parametrize(
        ("name", "value", "says"),
        [
            ("MEMPLAN_CACHE", "perhaps", "cache = 'perhaps', which has to be true or false"),
            ("MEMPLAN_MICRO_BATCH", "many", "micro_batch = 'many', which has to be a whole number"),
            ("MEMPLAN_STRATEGY", "x", "no strategy is called 'x'"),
            ("MEMPLAN_GPU", "rtx-1", "rtx-1"),
            ("MEMPLAN_CARD", "x", "set 'card', which is no setting of memplan"),
        ],
    )
    def test_a_variable_that_cannot_be_used(
        self, name: str, value: str, says: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(name, value)
        found = examine()
        (finding,) = of(found, "settings")
        assert (finding.state, says in finding.says, "take it out" in finding.mend) == (State.BROKEN, True, True)
        assert not found.is_usable
        assert len(of(found, "cache")) == (name != "MEMPLAN_CACHE")

    @pytest.mark.parametrize(
        ("file", "text"),
        [("memplan.toml", "gpu = "), ("memplan.toml", "cache = 3"), ("pyproject.toml", "tool.memplan = 3")],
    )
    def test_a_file_that_cannot_be_used_is_told_once(
        self, file: str, text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / file).write_text(text)
        found = examine({})
        (finding,) = of(found, "settings")
        assert (finding.state, file in finding.says) == (State.BROKEN, True)
        assert of(found, "cache") == []


class NvmlOfThree(types.ModuleType):
    """A card, one that shares the host's memory, and one in slices."""

    class NVMLError(Exception):
        """As pynvml's."""

    class NVMLError_NotSupported(NVMLError):  # noqa: N801  # pynvml's name
        """As pynvml's."""

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def nvmlShutdown(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 3

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetName(self, handle: int) -> str:  # noqa: N802
        return ("A", "B", "C")[handle]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> types.SimpleNamespace:  # noqa: N802
        if handle == 1:
            raise self.NVMLError_NotSupported
        return types.SimpleNamespace(total=GIB)

    def nvmlDeviceGetMigMode(self, handle: int) -> list[int]:  # noqa: N802
        if handle == 0:
            raise self.NVMLError_NotSupported
        return [1, 1] if handle == 2 else [0, 0]


def test_cards_as_the_driver_knows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", NvmlOfThree("pynvml"))
    assert cards() == (DriverCard("A", GIB, False), DriverCard("B", None, False), DriverCard("C", GIB, True))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert cards() == ()


@pytest.mark.parametrize(
    ("states", "sum_"),
    [("f", "All is well."), ("fcc", "2 to take care of."), ("fcb", "memplan cannot work here.")],
)
def test_the_sheet_ends_with_the_sum(states: str, sum_: str) -> None:
    kinds = {"f": State.FINE, "c": State.CARE, "b": State.BROKEN}
    findings = tuple(Finding(what="thing", says="so " * 20, state=kinds[s], mend="mend it") for s in states)
    console = Console(width=40, color_system=None)
    with console.capture() as capture:
        console.print(diagnosis_sheet(Diagnosis(findings=findings)))
    lines = capture.get().splitlines()
    assert lines[-1] == sum_
    assert max(map(len, lines)) <= 40
    assert sum("mend it" in line for line in lines) == len(states)
