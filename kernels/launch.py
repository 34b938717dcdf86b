"""Where the operators of this package run: Triton or torch."""

import torch
import triton
from torch import Tensor

# Under TRITON_INTERPRET=1, set before triton is imported, kernels run on numpy: operators then use them on CPU as well.
INTERPRETED: bool = triton.knobs.runtime.interpret


def on_triton(x: Tensor) -> bool:
    """Whether operators on the device of x launch Triton kernels; otherwise they run the fastest torch path."""
    return INTERPRETED or x.device.type != "cpu"


def next_power_of_2(size: int) -> int:
    return 1 << (size - 1).bit_length()


def warps(block: int) -> int:
    """Warps for one program on `block` elements at once: eight elements, 16 bytes of bf16, a thread; 4 to 16 warps."""
    return min(16, max(4, block // 256))


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU, 132 (an H100) for a tensor without data, and 4 where kernels are interpreted."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132 if device.type == "meta" else 4
