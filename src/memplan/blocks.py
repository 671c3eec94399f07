"""Which modules of a model are its blocks: the links of the chain that is planned.

Blocks are modules that repeat: the layers of a decoder or encoder, the blocks of a vision transformer, the bottlenecks
of a ResNet. They are told by structure; transformers' own `GradientCheckpointingLayer`s are taken as they are.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from types import MappingProxyType

import torch
from torch import nn

from memplan import packed
from memplan._compat import is_checkpointing_layer
from memplan.errors import AlreadyApplied, UsageError
from memplan.mixed_precision import MixedPrecision
from memplan.sharding import Unit, padded_bytes
from memplan.trace import CHECKPOINT, Trace
from memplan.units import format_count


def find_blocks(model: nn.Module) -> tuple[str, ...]:
    """Paths of the model's blocks, in the order of `named_modules`; none lies inside another.

    Outermost first: a module is a block if it is one of transformers' checkpointing layers, or if it sits in a
    ModuleList or Sequential together with a twin (same class, same parameter shapes, parameters at all). Stages that
    hold such twins but differ among themselves are looked into.
    """
    repeated = _repeated_classes(model)
    found: list[str] = []
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules(remove_duplicate=True):
        if inside and path.startswith(inside):
            continue
        if path and _is_block(module, repeated):
            found.append(path)
            inside = (*inside, f"{path}.")
    return tuple(found)


def _is_block(module: nn.Module, repeated: frozenset[type]) -> bool:
    if is_checkpointing_layer(module):
        return True
    return type(module) in repeated and type(module) not in _twins(module)  # of nested Sequentials the inner ones


def _repeated_classes(model: nn.Module) -> frozenset[type]:
    """The outermost classes of which some container holds twins."""
    layers = any(is_checkpointing_layer(module) for module in model.modules())
    if layers:
        return frozenset()
    level: list[nn.Module] = [model]
    while level:
        classes = {kind for module in level for kind in _twins(module)}
        if classes:
            return frozenset(classes)
        level = [child for module in level for child in module.children()]
    return frozenset()


def _twins(container: nn.Module) -> Iterator[type]:
    """Classes of which a container holds two children with the same parameters, doing more than one operation each."""
    if not isinstance(container, nn.ModuleList | nn.Sequential):
        return
    kinds = Counter((type(child), _shapes(child)) for child in container if _is_composite(child))
    yield from (kind for (kind, _), count in kinds.items() if count > 1)


def _is_composite(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and any(True for _ in module.parameters())


def _shapes(module: nn.Module) -> tuple[object, ...]:
    return tuple((name, tuple(p.shape), p.dtype) for name, p in module.named_parameters())


def alike(model: nn.Module, blocks: Sequence[str]) -> list[tuple[str, ...]]:
    """Runs of consecutive blocks of one container that cannot be told apart but by their position.

    Two blocks are alike if their whole module trees agree in class, mode, parameters (shape, dtype, requires_grad),
    buffers and plain attributes; an attribute that just counts the blocks (`layer_idx`) is passed over.
    """
    described = [(path.rpartition(".")[0], describe(model.get_submodule(path), path)) for path in blocks]
    runs = []
    for _, group in groupby(zip(blocks, described, strict=True), key=lambda pair: pair[1]):
        runs.append(tuple(path for path, _ in group))
    return runs


def one_of_each(model: nn.Module, blocks: Sequence[str]) -> tuple[str, ...]:
    """The last of all blocks that cannot be told apart but by their position, wherever they stand."""
    return tuple({describe(model.get_submodule(path), path): path for path in blocks}.values())


def describe(block: nn.Module, path: str) -> tuple[object, ...]:
    """Everything about a block that may decide what it does, in comparable form."""
    last = path.rpartition(".")[2]
    position = int(last) if last.isdecimal() else None
    rows: list[object] = []
    for name, module in block.named_modules():
        rows.append((name, type(module), module.training))
        rows += [(n, tuple(p.shape), p.stride(), p.dtype, p.requires_grad) for n, p in _tensors(module)]
        for n, v in sorted(vars(module).items()):
            if n[0] == "_":
                rows += [(n, len(v))] if n.endswith("_hooks") and v else []
            elif _tells(n, v, position):
                rows.append((n, _plain(v, f".{last}.")))
    return tuple(rows)


def _tensors(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    own = {**module._parameters, **module._buffers}
    return [(name, tensor) for name, tensor in own.items() if tensor is not None]  # type: ignore[misc]  # buffers are no Parameters; both have what is read


def _tells(name: str, value: object, position: int | None) -> bool:
    """Whether an attribute says something beyond the block's position."""
    is_number = isinstance(value, int) and not isinstance(value, bool)
    counts = is_number and value == position and ("idx" in name or "layer" in name)
    return not counts and name != "training"


def _plain(value: object, place: str) -> object:
    """A comparable stand-in: simple values and their containers as they are, functions by name, what packed weights are
    decoded by through what it says, others by identity.

    `place` is the block's number as it stands in dotted paths; names of modules may carry it.
    """
    if isinstance(value, str):
        return value.replace(place, ".*.")
    if isinstance(value, int | float | bool | type(None) | torch.dtype | torch.device):
        return value
    if isinstance(value, dict):
        return tuple((key, _plain(entry, place)) for key, entry in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return tuple(_plain(entry, place) for entry in value)
    if isinstance(value, partial):
        return (_plain(value.func, place), _plain(value.args, place), _plain(value.keywords, place))
    if callable(value) and hasattr(value, "__qualname__"):
        return value.__qualname__
    return packed.told(value) or id(value)


Kept = Mapping[int, torch.dtype]
"""Of parameters, by their ``id``, the type that they have but for a while; others have theirs."""


def signature(model: nn.Module, kept: Kept = MappingProxyType({})) -> str:
    """A hash over the names, shapes, types and requires_grad of all parameters; of those to be packed, as packed."""
    forms = ((n, p, *packed.form_of(p)) for n, p in model.named_parameters())
    typed = ((n, p, shape, kept.get(id(p), dtype) if dtype == p.dtype else dtype) for n, p, shape, dtype in forms)
    rows = (f"{name} {shape} {dtype} {p.requires_grad}\n" for name, p, shape, dtype in typed)
    return hashlib.sha256("".join(rows).encode()).hexdigest()[:16]


def statement(model: nn.Module, tokens: int | None, kept: Kept = MappingProxyType({})) -> str:
    """What is trained on what, in words: the weights by their type, the rank of adapters, the tokens of a sample."""
    counts: Counter[tuple[str, bool]] = Counter()
    for parameter in model.parameters():
        if packed.bits_of(parameter) is None:  # of those `packed.statements` tells
            dtype = kept.get(id(parameter), parameter.dtype)
            counts[str(dtype).removeprefix("torch."), parameter.requires_grad] += parameter.numel()
    kinds = (f"{format_count(n)} of {dtype} {'trained' if t else 'frozen'}" for (dtype, t), n in counts.items())
    adapters = getattr(model, "peft_config", None)
    ranks = {getattr(each, "r", None) for each in adapters.values()} if isinstance(adapters, dict) else set()
    rank = "".join(f", adapters of rank {rank}" for rank in sorted(r for r in ranks if isinstance(r, int)))
    return f"weights: {', '.join(kinds)}{rank}{f'; samples of {tokens:,} tokens' if tokens else ''}"


def is_batch_coupled(model: nn.Module) -> bool:
    """Whether layers mix the samples of a batch, so that splitting it would change the mathematics: batch norms.

    A step is taken in training mode, so those of a model in eval mode count; those that alone are in eval mode do not.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return any(norm.training or not model.training for norm in norms)


def check_plannable(model: nn.Module) -> None:
    """Before a plan is made.

    Raises:
        UsageError: adapters hand a cache of keys and values to every block (PEFT's prefix tuning), or one process
            copies the model to several cards (`nn.DataParallel`).
        AlreadyApplied: torch's wrappers recompute blocks already. A plan would recompute them twice.
    """
    adapters = getattr(model, "peft_config", None)
    kinds = [str(getattr(c, "peft_type", "")) for c in adapters.values()] if isinstance(adapters, dict) else []
    if any(kind.endswith(("PREFIX_TUNING", "CARTRIDGE")) for kind in kinds):
        raise UsageError(
            "the adapter hands a cache of keys and values to every block (prefix tuning), and a block that is run "
            "again would append to it, or go without. PEFT refuses that too. Use another adapter, such as LoRA."
        )
    if any(isinstance(module, nn.DataParallel) for module in model.modules()):
        raise UsageError(
            "the model is inside nn.DataParallel, which copies it to each card in every step, and the copies of a "
            "planned block would run with the weights of the first card. Plan for the module inside, with one process "
            "for each card (torchrun) and DistributedDataParallel: memplan.autofit(model, world=memplan.World(2)) for "
            "two cards."
        )
    wrapped = [path for path, module in model.named_modules() if type(module).__name__ == "CheckpointWrapper"]
    if wrapped:
        raise AlreadyApplied(
            f"{wrapped[0] or 'the model'} is inside torch's CheckpointWrapper already. Leave it out and let the plan "
            "decide what is recomputed."
        )


def check_uncheckpointed(model: nn.Module, blocks: Sequence[str], trace: Trace, record: Callable[[], object]) -> None:
    """That no block is recomputed without a plan: a plan would do so again.

    Args:
        blocks: to be planned.
        trace: of the model without a plan.
        record: records it anew; asked only if the trace has a checkpoint somewhere.

    Raises:
        AlreadyApplied: the model has torch's checkpoint run a block.
    """
    if not blocks or CHECKPOINT not in trace.op_names:
        return
    again: list[str] = []

    def note(path: str, *_: object) -> None:
        if torch._C._current_autograd_node() is not None:
            again.append(path)

    hooks = [model.get_submodule(path).register_forward_pre_hook(partial(note, path)) for path in blocks]
    try:
        record()
    finally:
        for hook in hooks:
            hook.remove()
    if again:
        raise AlreadyApplied(
            f"the model has torch.utils.checkpoint run {again[0]} in a forward of its own, so a plan would recompute "
            "it twice. Switch that off and let the plan decide what is recomputed."
        )


def units(model: nn.Module, blocks: Sequence[str], shards: int, mixed: MixedPrecision | None = None) -> list[Unit]:
    """What FSDP2 gathers together: the parameters of each block, then those of the rest of the model."""
    mixed = mixed or MixedPrecision.of(model)
    of_blocks = {path: list(model.get_submodule(path).parameters()) for path in blocks}
    taken = {id(parameter) for parameters in of_blocks.values() for parameter in parameters}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in taken]
    return [_unit(path, parameters, shards, mixed) for path, parameters in (*of_blocks.items(), ("", rest))]


def _unit(path: str, parameters: Sequence[nn.Parameter], shards: int, mixed: MixedPrecision) -> Unit:
    def part(parameter: nn.Parameter, dtype: torch.dtype) -> int:
        return padded_bytes(parameter.shape, dtype.itemsize, shards) // shards

    trained = [p for p in parameters if p.requires_grad]
    reduced = sum(part(p, mixed.reduced(p)) for p in trained)
    return Unit(
        path,
        whole_bytes=tuple(shards * part(p, mixed.gathered(p)) for p in parameters),
        part_bytes=tuple(part(p, mixed.kept[id(p)]) for p in parameters),
        cast_bytes=sum(part(p, mixed.gathered(p)) for p in parameters if mixed.gathered(p) != mixed.kept[id(p)]),
        grad_bytes=shards * reduced,
        kept_grad_bytes=sum(part(p, mixed.kept[id(p)]) for p in trained),
        reduced_bytes=reduced if any(mixed.reduced(p) != mixed.kept[id(p)] for p in trained) else 0,
    )
