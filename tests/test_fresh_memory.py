"""What holding costs in time: nothing where nothing is given back, and taken off what holds less."""

import pytest
import tiny

from memplan.device import CpuDevice, DeviceMemory, FakeDevice
from memplan.fresh_memory import relieved, seconds_per_byte
from memplan.gpus import find_gpu
from memplan.kernels import backend_for
from memplan.profile import ChainSizes
from memplan.recipe import Recipe
from memplan.recorder import Recorder
from memplan.roofline import StepTimes
from memplan.samples import Sample
from memplan.study import Study
from memplan.timing import LEAST_SLOWDOWN

SIZES = (2, 4)


@pytest.fixture(scope="module")
def study() -> Study:
    model, batch = tiny.llama(layers=2)
    recorder = Recorder(model, Recipe(), backend_for(find_gpu("cpu")))
    return Study(model, Sample.of(batch), Recipe(), recorder, find_gpu("cpu"), None, SIZES, 1)


def times_of(study: Study, recomputed_s: float) -> StepTimes:
    options = {path: study.menu.options[path] for path in study.blocks}
    seconds = {(p, o): 1.0 if o == "keep" else recomputed_s for p, names in options.items() for o in names}
    return StepTimes({key: dict.fromkeys(SIZES, s) for key, s in seconds.items()}, {"keep": {}}, optimizer_s=1.0)


def test_a_card_gives_nothing_back() -> None:
    assert seconds_per_byte(FakeDevice(DeviceMemory(1, 1, 0, 0))) == 0.0


def test_a_processor_has_a_price() -> None:
    """Between nothing and a hundred times what zeroing takes."""
    assert 0.0 <= seconds_per_byte(CpuDevice()) < 1e-8


def test_each_option_is_spared_what_it_does_not_hold(study: Study) -> None:
    levels = {size: study.levels(size) for size in SIZES}
    before = times_of(study, recomputed_s=2.0)
    options = ChainSizes.of(levels[4]["keep"], -1, study.blocks).options
    rate = 0.5 / max(row[0] for rows in options for row in rows.values())
    after = relieved(before, levels, study.blocks, rate)
    for size, by_variant in levels.items():
        sizes = ChainSizes.of(by_variant["keep"], -1, study.blocks)
        for path, rows in zip(sizes.paths, sizes.options, strict=True):
            assert len(rows) > 2
            assert after.blocks[path, "keep"][size] == 1.0
            for option in rows.keys() - {"keep"}:
                spared = before.blocks[path, option][size] - after.blocks[path, option][size]
                assert spared == pytest.approx(rate * (rows["keep"][0] - rows[option][0]))
                assert spared >= 0
            assert after.blocks[path, "recompute"][size] < 2.0


@pytest.mark.parametrize(("own_s", "wanted_s"), [(1.2, LEAST_SLOWDOWN), (1.005, 1.005)])
def test_no_price_falls_below_what_noise_is(study: Study, own_s: float, wanted_s: float) -> None:
    levels = {size: study.levels(size) for size in SIZES}
    after = relieved(times_of(study, own_s), levels, study.blocks, held_s_per_byte=1.0)
    for (path, option), points in after.blocks.items():
        assert path in study.blocks
        assert points == dict.fromkeys(SIZES, 1.0 if option == "keep" else wanted_s)


def test_without_a_price_nothing_changes(study: Study) -> None:
    levels = {size: study.levels(size) for size in SIZES}
    before = times_of(study, recomputed_s=2.0)
    assert relieved(before, levels, study.blocks, 0.0).blocks == before.blocks
