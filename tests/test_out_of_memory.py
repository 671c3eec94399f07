"""Errors as libraries raise them: whose memory ran out, and which of them say nothing of the kind."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from memplan.levers.host_memory import NoRoom
from memplan.out_of_memory import HELP, SHAPES, Where, diagnose

TAIL = "GPU 0 has a total capacity of 79.15 GiB of which 1.25 GiB is free. Of the allocated memory 76 GiB is allocated"


def like(name: str, *bases: type) -> Callable[[str], Exception]:
    """An error of a package that is not here: its class by name, raised by that package's own module."""
    module, _, own = name.rpartition(".")
    return type(own, bases or (Exception,), {"__module__": module})


OutOfResources = like("triton.runtime.errors.OutOfResources")
DistBackendError = like("torch.distributed.DistBackendError", RuntimeError)
AcceleratorError = like("torch.AcceleratorError", RuntimeError)
NCCL = (
    "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:275, unhandled cuda error (run with NCCL_DEBUG=INFO "
    "for details), NCCL version 2.20.5\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
)
CUDA_TAIL = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be "
    "incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1"
)

# shape -> (error, where)
SEEN = {
    "CUDA allocator": (torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate 2.00 GiB. {TAIL}"), Where.DEVICE),
    "HIP allocator": (torch.OutOfMemoryError(f"HIP out of memory. Tried to allocate 2.00 GiB. {TAIL}"), Where.DEVICE),
    "XPU allocator": (torch.OutOfMemoryError(f"XPU out of memory. Tried to allocate 59.61 GiB. {TAIL}"), Where.DEVICE),
    "MPS allocator": (
        RuntimeError(
            "MPS backend out of memory (MPS allocated: 42.28 GiB, other allocations: 720.00 KiB, max allowed: "
            "42.43 GiB). Tried to allocate 384.00 MiB on shared pool."
        ),
        Where.DEVICE,
    ),
    "HPU allocator": (
        RuntimeError("FATAL ERROR :: MODULE:PT_DEVMEM Allocation failed for size::1073741824 (1024)MB"),
        Where.DEVICE,
    ),
    "device allocator": (torch.OutOfMemoryError("Allocation on device 0 would exceed allowed memory"), Where.DEVICE),
    "CUDA runtime": (AcceleratorError(f"CUDA error: out of memory{CUDA_TAIL}"), Where.DEVICE),
    "CUDA driver": (RuntimeError("CUDA driver error: out of memory"), Where.DEVICE),
    "cuBLAS": (
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        Where.DEVICE,
    ),
    "cuBLAS (Lt)": (
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasLtMatmul( ltHandle, ...)`"),
        Where.DEVICE,
    ),
    "cuBLAS handle": (
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        Where.DEVICE,
    ),
    "cuSOLVER": (
        RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`. If you"),
        Where.DEVICE,
    ),
    "cuFFT": (RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"), Where.DEVICE),
    "cuDNN": (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), Where.DEVICE),
    "cuDNN (9)": (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), Where.DEVICE),
    "cuDNN host": (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"), Where.HOST),
    "cuDNN support": (
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contig"),
        Where.DEVICE,
    ),
    "cuDNN algorithm": (RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"), Where.DEVICE),
    "cuDNN algorithm (8)": (
        RuntimeError("GET was unable to find an engine to execute this computation"),
        Where.DEVICE,
    ),
    "report": (
        RuntimeError('NVML_SUCCESS == r INTERNAL ASSERT FAILED at "/pytorch/c10/cuda/CUDACachingAllocator.cpp":1131'),
        Where.DEVICE,
    ),
    "NCCL": (DistBackendError(f"{NCCL}Cuda failure 2 'out of memory'"), Where.DEVICE),
    "NCCL (older)": (DistBackendError(f"{NCCL}Cuda failure 'out of memory'"), Where.DEVICE),
    "Triton launch": (RuntimeError("Triton Error [CUDA]: out of memory"), Where.DEVICE),
    "Triton kernel": (
        OutOfResources(
            "out of resource: shared memory, Required: 131072, Hardware limit: 101376. Reducing block sizes or "
            "`num_stages` may help."
        ),
        Where.KERNEL,
    ),
    "Triton compiled": (
        RuntimeError("No valid triton configs. OutOfResources: out of resource: shared memory, Required: 131072"),
        Where.KERNEL,
    ),
    "pinning": (
        RuntimeError(
            "Caught RuntimeError in pin memory thread for device 0.\nOriginal Traceback (most recent call last):\n"
            f"  File ...\nRuntimeError: CUDA error: out of memory{CUDA_TAIL}"
        ),
        Where.PINNED,
    ),
    "offload": (NoRoom("no room"), Where.PINNED),
    "shared file": (
        RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_0>: No space left on device (28)"),
        Where.SHARED,
    ),
    "worker bus error": (
        RuntimeError(
            "DataLoader worker (pid 249) is killed by signal: Bus error. It is possible that dataloader's workers are "
            "out of shared memory. Please try to raise your shared memory limit."
        ),
        Where.SHARED,
    ),
    "worker killed": (RuntimeError("DataLoader worker (pid 249) is killed by signal: Killed. "), Where.WORKER),
    "CPU allocator": (
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
            "allocate 2359296 bytes. Error code 12 (Cannot allocate memory)"
        ),
        Where.HOST,
    ),
    "CPU allocator (Windows)": (
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:72] data. DefaultCPUAllocator: not enough memory: you tried to allocate 2 "
            "bytes."
        ),
        Where.HOST,
    ),
    "C++": (RuntimeError("std::bad_alloc"), Where.HOST),
    "Python": (MemoryError(), Where.HOST),
}

OTHERS = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle, ...)`"),
    RuntimeError("the caption cache is out of memory slots"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
    DistBackendError(f"{NCCL}Cuda failure 1 'invalid argument'"),
    RuntimeError("Triton Error [CUDA]: invalid argument"),
    RuntimeError("unable to resize file </tmp/x> to the right size: File too large (27)"),
    RuntimeError("DataLoader worker (pid 249) is killed by signal: Segmentation fault. "),
    ValueError("CUDA out of memory. Tried to allocate 2.00 GiB"),  # a text that somebody has copied
    KeyError("std::bad_alloc"),
]


@pytest.mark.parametrize("name", SEEN)
def test_a_shape_is_known(name: str) -> None:
    error, where = SEEN[name]
    found = diagnose(error)
    assert found is not None
    assert (found.name, found.where, found.error) == (name.partition(" (")[0], where, error)
    assert found.helps == HELP[where]


def test_every_shape_of_the_table_is_tested() -> None:
    assert {name.partition(" (")[0] for name in SEEN} == {shape.name for shape in SHAPES}
    assert len(SHAPES) == len({shape.name for shape in SHAPES}) >= 15


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_another_error_is_left_alone(error: Exception) -> None:
    assert diagnose(error) is None


def test_what_else_raises_is_not_sure() -> None:
    unsure = {shape.name for shape in SHAPES if not shape.sure}
    assert unsure == {"cuBLAS handle", "cuDNN support", "cuDNN algorithm", "report", "worker killed"}


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        (lambda: torch.empty(2**60), "CPU allocator"),
        (lambda: np.empty(2**58), "Python"),
        (lambda: bytearray(2**62), "Python"),
        (lambda: torch.UntypedStorage._new_shared(2**60), "shared file"),
    ],
)
def test_what_really_cannot_be_had_here(asked: Callable[[], object], name: str) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as raised:
        asked()
    found = diagnose(raised.value)
    assert found is not None
    assert found.name == name


# --- errors inside errors ---------------------------------------------------------------------------------------------


def ran_out(*_: object) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def raised_by(body: Callable[[], object]) -> BaseException:
    with pytest.raises(BaseException) as raised:  # noqa: PT011  # whatever it is
        body()
    return raised.value


def test_a_cause_and_what_was_being_handled_count() -> None:
    def caused() -> None:
        try:
            ran_out()
        except RuntimeError as error:
            raise ValueError("the step failed") from error

    def handling() -> None:
        try:
            ran_out()
        except RuntimeError:
            {}["missing"]

    def cut_off() -> None:
        try:
            ran_out()
        except RuntimeError:
            raise ValueError("on purpose") from None

    for body in (caused, handling):
        found = diagnose(raised_by(body))
        assert found is not None
        assert isinstance(found.error, torch.OutOfMemoryError)
    assert diagnose(raised_by(cut_off)) is None


def test_one_of_a_group_counts_however_deep() -> None:
    inner = ExceptionGroup("ranks", [KeyError("a"), torch.OutOfMemoryError("CUDA out of memory. x")])
    assert diagnose(ExceptionGroup("all", [ValueError("b"), inner])) is not None
    assert diagnose(ExceptionGroup("all", [ValueError("b")])) is None


def test_an_error_that_is_its_own_context_ends() -> None:
    one, other = ValueError("a"), ValueError("b")
    one.__context__, other.__context__ = other, one
    assert diagnose(one) is None


def test_inside_a_recomputation_and_a_function_of_ones_own() -> None:
    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
            return ran_out()

    calls = 0

    def block(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return ran_out() if calls == 2 else x.exp().exp()

    x = torch.ones(3, requires_grad=True)
    for body in (Own.apply(x).sum().backward, checkpoint(block, x, use_reentrant=False).sum().backward):
        found = diagnose(raised_by(body))
        assert found is not None
        assert found.where is Where.DEVICE
    assert calls == 2
