"""What a prediction or a plan takes for granted, in lines of plain text."""

from torch import nn

from memplan import packed
from memplan.blocks import is_batch_coupled, statement
from memplan.device import CudaDevice, Device
from memplan.gpus import Gpu
from memplan.recipe import AFTER_STEP, Recipe
from memplan.roofline import is_nominal
from memplan.samples import Sample
from memplan.trace import Trace


def assumptions_of(
    model: nn.Module, sample: Sample, recipe: Recipe, gpu: Gpu, device: Device | None, trace: Trace
) -> tuple[str, ...]:
    """Of the model, of the loop, of the card, and of how the step was traced."""
    when = "after each step" if recipe.drops == AFTER_STEP else "between forward and backward"
    steady = f"steady state: optimizer state exists and gradients are dropped (set_to_none) {when}"
    lines = [statement(model, sample.tokens, recipe.kept), steady]
    if recipe.keeps_output:
        lines.append("the model's output is kept until the next forward has returned")
    else:
        lines.append("only the loss is kept of the model's output; logits held through the backward come on top")
    lines += trace.assumptions
    if not model.training:
        lines.append("the model is in eval mode; the step is taken in training mode, as Trainer does")
    if gpu.kind != "cpu":
        lines.append("a CUDA step is predicted without the card; not yet verified on one")
        if gpu.is_amd:
            lines.append("an AMD card is planned for with CUDA's kernels and allocator: its own may need other memory")
        if is_nominal(gpu):
            lines.append("the card's speed is unknown: times are for 100 TFLOP/s and 1 TB/s, only ratios count")
    if isinstance(device, CudaDevice):
        lines += device.warnings()
    if trace.how == "recorded":
        lines.append("the step reads values, so it was run for real rather than traced")
    lines += packed.statements(model)
    if is_batch_coupled(model):
        lines.append("batch norm couples the samples of a batch, so the batch is never split")
    return tuple(lines)
