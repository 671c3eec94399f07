"""Which errors say that memory ran out, and whose: `diagnose(error)`, from a table of the shapes they come in.

Half of them do not say "out of memory", and some that do are about the host's. An error that hides another (a cause, a
group, a worker's report) is looked through. Read by the names of classes and by text, so that no package is imported.

A library that ends the process is no error to catch: CUDA kernels of bitsandbytes print "Error out of memory at line
... in file ..." and exit (``CUDA_CHECK_RETURN`` in csrc/ops.cuh).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Where(StrEnum):
    """Whose memory ran out; the value is what the user reads."""

    DEVICE = "the device's memory"
    HOST = "the host's memory"
    WORKER = "the host's memory, in a loader's worker"
    PINNED = "pinned memory of the host"
    SHARED = "shared memory between processes (/dev/shm)"
    KERNEL = "a kernel's shared memory, which lies in the processor"


HELP: Final = {
    Where.DEVICE: "take a plan for a smaller budget or a smaller micro-batch, or end other processes on the device",
    Where.WORKER: "start fewer loader workers, or keep less of the data in memory",
    Where.HOST: "start fewer loader workers, keep less of the data in memory, or offload less",
    Where.PINNED: "lower the strategy's host_memory, turn off pin_memory, or raise the limit (ulimit -l)",
    Where.SHARED: "start fewer loader workers, or give /dev/shm more room (docker run --shm-size)",
    Where.KERNEL: "no memory would help: take another kernel, or one with smaller blocks and fewer stages",
}


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """An error that says that memory ran out.

    Attributes:
        where: whose memory.
        name: of the shape, as in `SHAPES`.
        sure: whether nothing else raises such an error; where not, it has to be tried.
        error: the one that said it, which may be inside the one that was asked about.
    """

    where: Where
    name: str
    sure: bool
    error: BaseException

    @property
    def helps(self) -> str:
        """What would help, in a sentence without its full stop."""
        return HELP[self.where]


@dataclass(frozen=True, slots=True)
class Shape:
    """One way in which an error says it: the name of its class or of a base of it, and a pattern in its text."""

    name: str
    where: Where
    kind: str
    pattern: str
    sure: bool = True

    def fits(self, error: BaseException) -> bool:
        names = {f"{base.__module__}.{base.__qualname__}".removeprefix("builtins.") for base in type(error).__mro__}
        return self.kind in names and re.search(self.pattern, str(error)) is not None


_ANY: Final = "RuntimeError"  # of which torch derives OutOfMemoryError, AcceleratorError and DistBackendError

# The first that fits counts, so what is special comes before what is general. Above each is where its text comes from;
# a path without a repository is one in pytorch/pytorch.
SHAPES: Final = (
    # The pinning thread reports what it met as text; for pinned memory CUDA's words are those for its own.
    # torch/utils/data/_utils/pin_memory.py
    Shape("pinning", Where.PINNED, _ANY, r"in pin memory thread(.|\n)*out of memory"),
    # memplan's own, of the pool that blocks are offloaded to
    Shape("offload", Where.PINNED, "memplan.levers.host_memory.NoRoom", ""),
    # torch/csrc/distributed/c10d/NCCLUtils.cpp; ncclGetLastError, NVIDIA/nccl include/checks.h
    Shape("NCCL", Where.DEVICE, _ANY, r"NCCL (E|e)rror(.|\n)*(Cuda|CUDA|HIP) failure.*'?out of memory"),
    # c10/cuda/CUDACachingAllocator.cpp
    Shape("CUDA allocator", Where.DEVICE, _ANY, r"^CUDA out of memory\. "),
    # c10/cuda/CUDACachingAllocator.cpp, as hipify writes it
    Shape("HIP allocator", Where.DEVICE, _ANY, r"^HIP out of memory\. "),
    # c10/xpu/XPUCachingAllocator.cpp
    Shape("XPU allocator", Where.DEVICE, _ANY, r"^XPU out of memory\. "),
    # aten/src/ATen/mps/MPSAllocator.mm
    Shape("MPS allocator", Where.DEVICE, _ANY, r"^MPS backend out of memory"),
    # huggingface/accelerate, src/accelerate/utils/memory.py
    Shape("HPU allocator", Where.DEVICE, _ANY, r"MODULE:PT_DEVMEM Allocation failed"),
    # torch/csrc/Exceptions.cpp: every device's allocator raises it
    Shape("device allocator", Where.DEVICE, "torch.OutOfMemoryError", ""),
    # c10/cuda/CUDAException.cpp
    Shape("CUDA runtime", Where.DEVICE, _ANY, r"(CUDA|HIP) error: out of memory"),
    # aten/src/ATen/cuda/Exceptions.h, AT_CUDA_DRIVER_CHECK
    Shape("CUDA driver", Where.DEVICE, _ANY, r"CUDA driver error: out of memory"),
    # aten/src/ATen/cuda/Exceptions.h, TORCH_CUDABLAS_CHECK; cuBLASLt too
    Shape("cuBLAS", Where.DEVICE, _ANY, r"(CUBLAS|HIPBLAS)_STATUS_ALLOC_FAILED"),
    # the same; a handle that finds no room for its own
    Shape(
        "cuBLAS handle",
        Where.DEVICE,
        _ANY,
        r"CUBLAS_STATUS_NOT_INITIALIZED when calling `cublas(Lt)?Create",
        sure=False,
    ),
    # aten/src/ATen/cuda/Exceptions.h, TORCH_CUSOLVER_CHECK
    Shape("cuSOLVER", Where.DEVICE, _ANY, r"CUSOLVER_STATUS_ALLOC_FAILED"),
    # aten/src/ATen/native/cuda/CuFFTUtils.h
    Shape("cuFFT", Where.DEVICE, _ANY, r"CUFFT_ALLOC_FAILED"),
    # aten/src/ATen/cuda/Exceptions.h, AT_CUDNN_CHECK
    Shape("cuDNN", Where.DEVICE, _ANY, r"CUDNN_STATUS_(ALLOC_FAILED|INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED)"),
    # cudnn_graph.h of cuDNN 9
    Shape("cuDNN host", Where.HOST, _ANY, r"CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
    # the same as cuDNN; raised for inputs too that are not contiguous
    Shape("cuDNN support", Where.DEVICE, _ANY, r"cuDNN error: CUDNN_STATUS_NOT_SUPPORTED", sure=False),
    # aten/src/ATen/native/cudnn/Conv_v7.cpp, Conv_v8.cpp: errors of each try are swallowed
    Shape(
        "cuDNN algorithm",
        Where.DEVICE,
        _ANY,
        r"^Unable to find a valid cuDNN algorithm|was unable to find an engine to execute this computation",
        sure=False,
    ),
    # c10/cuda/CUDACachingAllocator.cpp: the report of an out-of-memory error fails
    Shape("report", Where.DEVICE, _ANY, r"NVML_SUCCESS == r INTERNAL ASSERT FAILED", sure=False),
    # triton-lang/triton, third_party/nvidia/backend/driver.c
    Shape("Triton launch", Where.DEVICE, _ANY, r"Triton Error \[(CUDA|HIP)\]: out of memory"),
    # triton-lang/triton, python/triton/runtime/errors.py
    Shape("Triton kernel", Where.KERNEL, "triton.runtime.errors.OutOfResources", ""),
    # torch/_inductor/runtime/triton_heuristics.py wraps the one above
    Shape("Triton compiled", Where.KERNEL, _ANY, r"out of resource: "),
    # aten/src/ATen/MapAllocator.cpp
    Shape(
        "shared file",
        Where.SHARED,
        _ANY,
        r"unable to (allocate|mmap|write|resize).*(No space left on device|Cannot allocate memory|/dev/shm)",
    ),
    # torch/csrc/DataLoader.cpp
    Shape("worker bus error", Where.SHARED, _ANY, r"DataLoader worker \(pid \d+\) is killed by signal: Bus error"),
    # torch/csrc/DataLoader.cpp; the kernel's killer is the usual sender
    Shape(
        "worker killed", Where.WORKER, _ANY, r"DataLoader worker \(pid \d+\) is killed by signal: Killed", sure=False
    ),
    # c10/core/impl/alloc_cpu.cpp
    Shape("CPU allocator", Where.HOST, _ANY, r"DefaultCPUAllocator: (can't allocate memory|not enough memory)"),
    # torch/csrc/Exceptions.h hands every std::exception on by what it calls itself
    Shape("C++", Where.HOST, _ANY, r"std::bad_alloc"),
    # Python; NumPy's _ArrayMemoryError is one
    Shape("Python", Where.HOST, "MemoryError", ""),
)


def diagnose(error: BaseException) -> Diagnosis | None:
    """What ran out, if memory did: said by the error itself, by one of a group, or by what it was raised from.

    What was being handled when it was raised counts too, unless it was raised `from None`.
    """
    for one in inside(error):
        for shape in SHAPES:
            if shape.fits(one):
                return Diagnosis(shape.where, shape.name, shape.sure, one)
    return None


def inside(error: BaseException) -> Iterator[BaseException]:
    """The error and those inside and behind it, nearest first, each once."""
    waiting, seen = [error], set()
    while waiting:
        one = waiting.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        if isinstance(one, BaseExceptionGroup):
            waiting += one.exceptions
        behind = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
        waiting += [] if behind is None else [behind]
