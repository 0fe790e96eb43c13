"""Element types: their names in safetensors, in PyTorch, and as plain integers that NumPy can slice."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def name_of(dtype: torch.dtype) -> str:
    """The safetensors name of a dtype. Raises ValueError for one that has none."""
    if dtype not in NAMES:
        raise ValueError(f"arrays of {dtype} can't be stored; the known types are {', '.join(map(str, NAMES))}")
    return NAMES[dtype]


INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers, which NumPy knows for every size and which compare bit for bit."""
    return tensor.view(INTEGERS[tensor.element_size()])


def in_panels(tensor: torch.Tensor, panels: int) -> torch.Tensor:
    """A view shaped (panels, *shape of one): the columns (last dim) in so many equal shares, one after the other."""
    return tensor.unsqueeze(0) if panels == 1 else tensor.unflatten(-1, (panels, -1)).movedim(-2, 0)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """A CPU tensor's values in row-major order as bytes; copied only if it is not contiguous."""
    return memoryview(same_bits(tensor.detach().contiguous()).reshape(-1).view(torch.uint8).numpy().data)


def as_tensor(raw: np.ndarray[Any, Any], dtype: str) -> torch.Tensor:
    """The tensor whose bits are these integers, sharing their memory."""
    return torch.from_numpy(raw.reshape(-1)).view(TORCH_DTYPES[dtype]).reshape(raw.shape)
