"""The scalar that a training step differentiates."""

from collections.abc import Callable

from torch import Tensor, nn

from memplan.errors import BadLoss
from memplan.samples import Sample

Loss = Callable[[nn.Module, object], Tensor]


def loss_of(model: nn.Module, batch: Sample, loss: Loss | None) -> Tensor:
    """The scalar to differentiate: `loss(model, batch)`, else what the model's output calls its loss.

    That is its `.loss` or key "loss", the output itself where it is a tensor, and of a tuple the one differentiable
    scalar in it, else its first. Nothing else of the output is kept alive. Raises BadLoss, which says what to pass.
    """
    return forward(model, batch, loss)[1]


def forward(model: nn.Module, batch: Sample, loss: Loss | None) -> tuple[object, Tensor]:
    """The output and the loss in it. Of a `loss` of the user's own only the loss is seen."""
    if loss is not None:
        found = _checked(loss(model, batch.content), "loss(model, batch)")
        return found, found
    output = batch.call(model)
    return output, _checked(loss_in(output), f"the output of {type(model).__name__}")


def loss_in(output: object) -> object:
    """What a model's output calls its loss, whatever it is."""
    if isinstance(output, dict):  # also transformers' ModelOutput
        return output.get("loss")
    if isinstance(output, tuple) and output and not hasattr(output, "loss"):
        scalars = [part for part in output if isinstance(part, Tensor) and part.dim() == 0 and part.requires_grad]
        return scalars[0] if len(scalars) == 1 else output[0]  # (logits, loss), or the loss first
    return output if isinstance(output, Tensor) else getattr(output, "loss", None)


def _checked(loss: object, source: str) -> Tensor:
    way_out = "Pass loss=lambda model, batch: ... that returns one differentiable scalar, or labels in the sample."
    if not isinstance(loss, Tensor):
        raise BadLoss(f"{source} holds no loss (found {type(loss).__name__}). {way_out}")
    if loss.numel() != 1:
        raise BadLoss(f"{source} is no scalar but of shape {tuple(loss.shape)}. {way_out}")
    if not loss.requires_grad:
        raise BadLoss(f"{source} does not depend on a trainable parameter, so there is nothing to learn. {way_out}")
    return loss
