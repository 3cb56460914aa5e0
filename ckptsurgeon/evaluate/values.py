"""Between bytes and torch's tensors; torch is imported inside."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from ckptsurgeon.errors import InputError
from ckptsurgeon.limits import BLOCK

if TYPE_CHECKING:
    import torch

    from ckptsurgeon.tensor import TensorRef, TensorSpec


def from_buffer(data: memoryview | bytearray, dtype: str) -> torch.Tensor:
    """Contiguous little-endian bytes as a flat tensor."""
    import torch

    buffer = bytearray(data) if isinstance(data, memoryview) and data.readonly else data
    if dtype == "float4_e2m1":
        dtype = "float4_e2m1fn_x2"
    element = getattr(torch, dtype, None)
    if element is None:
        raise InputError(f"torch {torch.__version__} has no dtype {dtype}")
    return torch.frombuffer(buffer, dtype=torch.uint8).view(element)


def to_torch(data: bytearray | memoryview, spec: TensorSpec) -> torch.Tensor:
    """Contiguous little-endian bytes as a tensor; the 4-bit type comes as torch packs it, two in one."""
    import torch

    if not data:
        return torch.empty(spec.shape, dtype=getattr(torch, spec.dtype.name))
    flat = from_buffer(data, spec.dtype.name)
    if spec.dtype.name == "float4_e2m1":
        return flat.reshape(*spec.shape[:-1], spec.shape[-1] // 2)
    return flat.reshape(spec.shape)


def quantized(ref: TensorRef) -> torch.Tensor:
    """The values of a quantised tensor, as torch's own kind of it."""
    import torch

    found: Any = ref.quantizer
    dtype = getattr(torch, ref.dtype.name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch means to replace this kind, and files have it
        if found.axis is None:
            made = torch._empty_affine_quantized(ref.shape, scale=found.scale, zero_point=found.zero_point, dtype=dtype)
        else:
            made = torch._empty_per_channel_affine_quantized(
                ref.shape, scales=found.scale.read(), zero_points=found.zero_point.read(), axis=found.axis, dtype=dtype
            )
        data = bytearray().join(ref.blocks(BLOCK))
        if data:
            made.untyped_storage().copy_(torch.frombuffer(data, dtype=torch.uint8).untyped_storage())
    return made


def raw(tensor: torch.Tensor) -> memoryview:
    """The contiguous bytes of a tensor."""
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    dense = tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
    return memory_of(dense)


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, which they are shared with.

    Not by way of `.numpy()`, after which torch never again changes the size of the storage, as FSDP must.
    """
    import numpy as np

    shared: Any = np.asarray(_Memory(tensor))
    return memoryview(shared)


class _Memory:
    """Memory of a tensor, which lives as long as what NumPy makes of it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        place = tensor.data_ptr() if tensor.nbytes else 0
        self.__array_interface__ = {"data": (place, False), "shape": (tensor.nbytes,), "typestr": "|u1", "version": 3}


def bytes_of(array: Any) -> memoryview:
    """The bytes of a contiguous NumPy array, which they are shared with."""
    return memoryview(array.reshape(-1).view("u1"))


def to_bytes(tensor: torch.Tensor, spec: TensorSpec) -> memoryview:
    """The bytes that a kernel made, which must be those that the plan foresaw."""
    data = raw(tensor)
    if data.nbytes != spec.nbytes:
        raise AssertionError(f"a kernel made {data.nbytes} bytes where the plan has {spec.nbytes} ({spec})")
    return data
