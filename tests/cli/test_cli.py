import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import transformers
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from typer.testing import CliRunner, Result

import memplan
from memplan.cli import app, main
from memplan.errors import BadBatch, DoesNotFit
from memplan.plan_record import Budget, Layer, Plan, Verdict
from memplan.prediction import Prediction, Timeline
from memplan.report.settings import settings_text
from memplan.world import World

GIB = 2**30


class Pipeline(SimpleNamespace):
    """Stands in for `memplan.pipeline`: notes what it was called with, returns or raises what it was told."""

    model: nn.Module
    gpu: str
    sample: Any
    options: dict[str, Any]

    def __init__(self, answer: object) -> None:
        super().__init__(answer=answer)

    def plan(self, model: nn.Module, gpu: str, **options: Any) -> object:
        self.model, self.gpu, self.options = model, gpu, options
        return self._answer()

    def predict(self, model: nn.Module, sample: object, **options: Any) -> object:
        self.model, self.sample, self.options = model, sample, options
        return self._answer()

    def _answer(self) -> object:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[object], Pipeline]:
    def install(answer: object) -> Pipeline:
        pipeline = Pipeline(answer)
        monkeypatch.setitem(sys.modules, "memplan.pipeline", pipeline)
        return pipeline

    return install


def run(*arguments: object, **environment: str) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment)


def a_plan(**changes: Any) -> Plan:
    layers = tuple(
        Layer(path=f"model.layers.{i}", option=option, keep_bytes=GIB, held_bytes=1, extra_s=0.1)
        for i, option in enumerate(("keep", "recompute"))
    )
    values: dict[str, Any] = {
        "verdict": Verdict.FITS,
        "reason": "one block is recomputed",
        "budget": Budget(gpu="24GiB", total_bytes=24 * GIB, others_bytes=0, context_bytes=0, margin_bytes=GIB),
        "strategy": "balanced",
        "micro_batch": 2,
        "accumulation": 4,
        "effective_batch": 8,
        "decisions": {layer.path: layer.option for layer in layers},
        "layers": layers,
        "peak_bytes": 20 * GIB,
        "peak_phase": "backward",
        "breakdown": {"params": 20 * GIB},
        "unplanned_bytes": 30 * GIB,
        "step_s": 1.0,
        "samples_per_s": 8.0,
        "slowdown": 0.1,
        "gap": 0.0,
        "shadow_price": 0.0,
        "times": "estimate",
        "smallest_bytes": 10 * GIB,
        "optimizer": "adamw",
        "autocast": None,
        "how": "fake",
        "model": "LlamaForCausalLM",
        "signature": "0",
    }
    return Plan(**(values | changes))


def a_prediction() -> Prediction:
    return Prediction(
        peak_bytes=3,
        phase="backward",
        module="",
        breakdown={"params": 3},
        saved={},
        timeline=Timeline(phase=("backward",), bytes={"params": (3,)}),
        how="fake",
        micro_batch=1,
        accumulation=1,
        optimizer="adamw",
        autocast=None,
    )


class TestPlan:
    def test_a_plan_that_fits_is_shown_on_stderr(self, config: Path, stand_in: Callable[[object], Pipeline]) -> None:
        stand_in(a_plan())
        result = run("plan", config, "--gpu", "24GiB")
        assert result.exit_code == 0
        assert result.stdout == ""
        for part in ("fits: one block", "= budget", "2 x 4", "model.layers.0", "Predicted at the peak", "slowdown"):
            assert part in result.stderr
        assert "layer.gradient_checkpointing = i in {1}" in result.stderr
        assert "\x1b" not in result.stderr

    def test_json_is_all_that_stdout_has(self, config: Path, stand_in: Callable[[object], Pipeline]) -> None:
        plan = a_plan()
        stand_in(plan)
        result = run("plan", config, "--gpu", "24GiB", "--json")
        assert Plan.model_validate_json(result.stdout) == plan
        assert json.loads(result.stdout)["schema_version"] == plan.schema_version
        assert "fits: one block" in result.stderr

    def test_the_options_reach_the_planner(self, config: Path, stand_in: Callable[[object], Pipeline]) -> None:
        pipeline = stand_in(a_plan())
        options = ("--seq-len", 16, "--micro-batch", 2, "--effective-batch", 8, "--strategy", "throughput")
        options += ("--clip-grad-norm", "--replicas", 2, "--shards", 4)
        options += ("--param-dtype", "bf16", "--reduce-dtype", "fp32")
        result = run(
            "plan", "--config", config, "--gpu", "rtx-4090", "--optimizer", "sgd", "--autocast", "bf16", *options
        )
        assert result.exit_code == 0
        assert pipeline.gpu == "rtx-4090"
        assert pipeline.options == {
            "sample": None,
            "optimizer": "sgd",
            "autocast": torch.bfloat16,
            "clip_grad_norm": True,
            "effective_batch": 8,
            "micro_batch": 2,
            "strategy": "throughput",
            "seq_len": 16,
            "risk": None,
            "world": World(2, 4, MixedPrecisionPolicy(torch.bfloat16, torch.float32)),
        }

    def test_mixed_precision_needs_shards(self, config: Path) -> None:
        result = run("plan", config, "--gpu", "rtx-4090", "--param-dtype", "bf16")
        assert result.exit_code == 2
        assert "give --shards too" in result.stderr

    def test_what_no_option_says_is_in_the_settings(
        self, config: Path, stand_in: Callable[[object], Pipeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pipeline = stand_in(a_plan())
        monkeypatch.chdir(tmp_path)
        (tmp_path / "memplan.toml").write_text('gpu = "rtx-4090"\nstrategy = "throughput"\nrisk = 0.001\n')
        monkeypatch.setenv("MEMPLAN_MICRO_BATCH", "4")
        monkeypatch.setenv("MEMPLAN_GPU", "24GiB")
        assert run("plan", config, "--risk", 0.05).exit_code == 0
        assert pipeline.gpu == "24GiB"
        found = {name: pipeline.options[name] for name in ("strategy", "micro_batch", "risk")}
        assert found == {"strategy": "throughput", "micro_batch": 4, "risk": 0.05}

    def test_a_bad_setting_is_bad_usage(self, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MEMPLAN_MICRO_BATCH", "many")
        result = run("plan", config, "--gpu", "24GiB")
        assert result.exit_code == 2
        assert "the environment set micro_batch = 'many'" in result.stderr

    def test_a_plan_is_saved(self, config: Path, tmp_path: Path, stand_in: Callable[[object], Pipeline]) -> None:
        plan = a_plan()
        stand_in(plan)
        assert run("plan", config, "--gpu", "24GiB", "--save", tmp_path / "plan.json").exit_code == 0
        assert Plan.load(tmp_path / "plan.json") == plan
        result = run("plan", config, "--gpu", "24GiB", "--save", tmp_path / "no" / "plan.json")
        assert result.exit_code == 2
        assert f"memplan: cannot write {tmp_path / 'no' / 'plan.json'}: No such file or directory" in result.stderr

    def test_what_does_not_fit_exits_with_3(self, config: Path, stand_in: Callable[[object], Pipeline]) -> None:
        stand_in(a_plan(verdict=Verdict.DOES_NOT_FIT, reason="too large", ways_out=("train with LoRA",)))
        result = run("plan", config, "--gpu", "1GiB", "--json")
        assert result.exit_code == 3
        assert "- train with LoRA" in result.stderr
        assert "Settings to paste" not in result.stderr
        assert json.loads(result.stdout)["verdict"] == "does not fit"

    def test_an_uncertain_plan_is_a_plan(self, config: Path, stand_in: Callable[[object], Pipeline]) -> None:
        stand_in(a_plan(verdict=Verdict.UNCERTAIN))
        assert run("plan", config, "--gpu", "1GiB").exit_code == 0

    @pytest.mark.parametrize(
        ("error", "code", "said"),
        [(DoesNotFit("no\n  way", 7), 3, "no\n  way"), (BadBatch("no\nway"), 2, "no way")],
    )
    def test_an_error_is_one_line_and_a_plan_that_does_not_fit_has_its_own(
        self, error: Exception, code: int, said: str, config: Path, stand_in: Callable[[object], Pipeline]
    ) -> None:
        stand_in(error)
        result = run("plan", config, "--gpu", "1GiB", "--json")
        assert (result.exit_code, result.stdout, result.stderr) == (code, "", f"memplan: {said}\n")

    def test_a_full_disk_behind_stdout_is_one_line(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def full(**_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setitem(main.__globals__, "app", full)
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == 2
        assert capsys.readouterr().err == "memplan: No space left on device where stdout goes. Send it elsewhere.\n"

    def test_a_bug_keeps_its_traceback(self, config: Path, stand_in: Callable[[object], Pipeline]) -> None:
        stand_in(ZeroDivisionError("oops"))
        assert isinstance(run("plan", config, "--gpu", "1GiB").exception, ZeroDivisionError)

    def test_layers_of_other_kinds_get_the_plan_applied(
        self, tmp_path: Path, stand_in: Callable[[object], Pipeline]
    ) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "resnet", "architectures": ["ResNetModel"]}))
        path = "encoder.stages.0"
        stand_in(a_plan(decisions={path: "recompute"}))
        result = run("plan", tmp_path, "--gpu", "1GiB", "--save", tmp_path / "p.json")
        assert f'memplan.apply(model, memplan.Plan.load("{tmp_path / "p.json"}"))' in result.stderr


class TestPredict:
    def test_a_prediction_is_shown_and_written(self, config: Path, stand_in: Callable[[object], Pipeline]) -> None:
        pipeline = stand_in(a_prediction())
        result = run(
            "predict", config, "--json", "--batch", 3, "--seq-len", 8, "--accumulation", 2, "--gpu", "cpu:1GiB"
        )
        assert result.exit_code == 0
        assert Prediction.model_validate_json(result.stdout) == a_prediction()
        assert result.stderr.startswith("peak 3 B in backward\n")
        assert {name: tuple(value.shape) for name, value in pipeline.sample.items()} == {
            "input_ids": (3, 8),
            "labels": (3, 8),
        }
        assert pipeline.options == {
            "optimizer": "adamw",
            "autocast": None,
            "accumulation": 2,
            "clip_grad_norm": False,
            "gpu": "cpu:1GiB",
        }

    def test_without_options_it_is_one_sample_on_the_cpu(
        self, config: Path, stand_in: Callable[[object], Pipeline]
    ) -> None:
        pipeline = stand_in(a_prediction())
        assert run("predict", config).stdout == ""
        assert pipeline.sample["input_ids"].shape == (1, 32)
        assert (pipeline.options["accumulation"], pipeline.options["gpu"]) == (1, "cpu")


class TestGpus:
    def test_the_catalogue_is_shown(self) -> None:
        result = run("gpus")
        assert (result.exit_code, result.stdout) == (0, "")
        assert "rtx-4090" in result.stderr

    def test_the_catalogue_is_json(self) -> None:
        record = json.loads(run("gpus", "--json").stdout)
        assert record["schema_version"] == 1
        (card,) = [gpu for gpu in record["gpus"] if gpu["name"] == "rtx-4090"]
        assert card["total_bytes"] == memplan.find_gpu("rtx-4090").total_bytes
        assert card["flops"]["bfloat16"] > 1e14


class TestForReal:
    """With the pipeline itself, on a model of two tiny layers."""

    def test_a_plan_that_fits_can_be_loaded(self, config: Path, tmp_path: Path) -> None:
        path = tmp_path / "plan.json"
        result = run("plan", config, "--gpu", "rtx-4090", "--seq-len", 8, "--micro-batch", 2, "--save", path)
        assert result.exit_code == 0, result.stderr
        plan = Plan.load(path)
        assert (plan.verdict, plan.micro_batch, len(plan.decisions)) == (Verdict.FITS, 2, 2)
        assert plan.peak_bytes == sum(plan.breakdown.values())

    def test_a_prediction_adds_up(self, config: Path) -> None:
        result = run("predict", config, "--seq-len", 8, "--json")
        assert result.exit_code == 0, result.stderr
        prediction = Prediction.model_validate_json(result.stdout)
        assert prediction.peak_bytes == sum(prediction.breakdown.values())

    def test_the_pasted_flags_recompute_the_planned_layers(self) -> None:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny.LLAMA_CONFIG)).train()
        lines = settings_text(a_plan()).partition("\n)\n")[2]
        exec(lines, {"model": model})
        assert [layer.gradient_checkpointing for layer in model.model.layers] == [False, True]
        ids = torch.zeros(1, 4, dtype=torch.long)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    def test_an_unknown_card_names_the_nearest(self, config: Path) -> None:
        result = run("plan", config, "--gpu", "rtx-4091")
        assert result.exit_code == 2
        assert result.stderr.startswith("memplan: no card is called 'rtx-4091'")
        assert result.stderr.count("\n") == 1

    def test_a_budget_below_the_weights_exits_with_3(self, config: Path) -> None:
        result = run("plan", config, "--gpu", "cpu:1KiB", "--seq-len", 8, "--micro-batch", 2)
        assert result.exit_code == 3, result.stderr


class TestUsage:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("plan", "--gpu", "24GiB"), "memplan: name one model, as MODEL or by --config"),
            (("plan", "x", "--config", "y", "--gpu", "24GiB"), "memplan: name one model"),
            (("plan", "--config", "missing.json", "--gpu", "24GiB"), "missing.json: there is no such file"),
            (("predict", "./missing"), "memplan: ./missing: there is no such file or folder"),
            (("predict", "x", "--batch", "0"), "--batch"),
            (("predict", "x", "--autocast", "int8"), "--autocast"),
            (("predict", "x", "--method", "rlhf"), "--method"),
            (("refit",), "refit"),
        ],
    )
    def test_bad_usage_exits_with_2(self, arguments: tuple[str, ...], message: str) -> None:
        result = run(*arguments)
        assert result.exit_code == 2
        assert result.stdout == ""
        assert message in result.stderr

    def test_the_version_is_on_stdout(self) -> None:
        result = run("--version")
        assert (result.exit_code, result.stdout) == (0, f"memplan {memplan.__version__}\n")

    @pytest.mark.parametrize("command", [(), ("plan",), ("predict",), ("gpus",)])
    def test_every_command_has_help(self, command: tuple[str, ...]) -> None:
        result = run(*command, "--help")
        assert result.exit_code == 0
        assert "Usage: " in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "--gpu", "a100-40gb"), "no card is called 'a100-40gb'"),
        (("predict", "--gpu", "a100-40gb"), "no card is called 'a100-40gb'"),
        (("plan", "--gpu", "24GiB", "--strategy", "balancd"), "no strategy is called 'balancd'"),
    ],
)
def test_names_are_looked_up_before_a_model_is_built(
    config: Path, arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memplan.cli.planning.build", lambda *_: pytest.fail("the model was built"))
    result = run(arguments[0], config, *arguments[1:])
    assert result.exit_code == 2
    assert message in result.stderr


class TestProcess:
    """What only a process of its own shows."""

    @staticmethod
    def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
        )

    def test_help_takes_at_most_half_a_second_and_no_torch(self) -> None:
        code = (
            "import sys, time; start = time.process_time()\n"  # not the clock's time: others may run beside it
            "from memplan.cli import main\n"
            "sys.argv = ['memplan', '--help']\n"
            "try: main()\n"
            "except SystemExit as exit: print(exit.code, 'torch' in sys.modules, 'pydantic' in sys.modules)\n"
            "print(time.process_time() - start)"
        )
        runs = [self.python(code).stdout.splitlines() for _ in range(3)]
        assert {lines[-2] for lines in runs} == {"0 False False"}
        assert min(float(lines[-1]) for lines in runs) <= 0.5

    def test_the_catalogue_needs_no_torch(self) -> None:
        code = (
            "import sys\n"
            "from memplan.cli import app\n"
            "app(['gpus'], standalone_mode=False)\n"
            "print('torch' in sys.modules)"
        )
        done = self.python(code)
        assert done.stdout == "False\n"
        assert "rtx-4090" in done.stderr

    def test_a_terminal_has_colour_unless_no_color_is_set(self) -> None:
        code = (
            "from memplan.cli.terminal import stderr_console\n"
            "from rich.text import Text\n"
            "stderr_console().print(Text('word', style='bold red'))"
        )
        terminal = {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
        assert "\x1b[" in self.python(code, **terminal, NO_COLOR="").stderr
        assert self.python(code, **terminal, NO_COLOR="1").stderr == "word\n"
        assert self.python(code, FORCE_COLOR="", TERM="xterm-256color").stderr == "word\n"
