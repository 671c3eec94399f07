"""What a CUDA card does where the CPU does something else, for a step that runs on fake CPU tensors.

`CudaKernels` replaces operators: attention by torch's own order and checks, dropout that keeps a boolean mask, RMS norm
in one kernel, and autocast by CUDA's lists. `CudaBackend` adds what operators allocate behind their results.
A rule names its file in ATen (torch 2.11 to 2.13, wheels for CUDA 13, whose cuDNN is newer than 9.15).

Not covered:
- float32 statistics of a half-precision layer norm (4 bytes a row more than counted), and softmax from float16 into
  float32 in one kernel (a float32 copy of the scores less);
- cuDNN's and MIOpen's RNN kernels, and the reserve that cuDNN's batch norm keeps;
- autocast's weight cache for einsum, bilinear and RNN cells; `binary_cross_entropy`, which CUDA's autocast refuses.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from memplan.kernels import cuda_workspaces
from memplan.kernels.cuda_attention import Attention, Capability, attend

_aten = torch.ops.aten

# -- operators -----------------------------------------------------------------------------------------------------


def _dropout(input: Tensor, p: float, train: bool) -> Tensor:  # noqa: A002  # torch's name, which may be a keyword
    """One kernel that keeps a boolean mask (native/Dropout.cpp); on the CPU it keeps the factors themselves."""
    if train and 0 < p < 1 and input.numel():
        return _aten.native_dropout(input, p, True)[0]
    return torch.dropout(input, p, train)
