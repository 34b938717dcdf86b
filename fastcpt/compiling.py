"""torch.compile: what a process compiled serves the next, and what can be done early is."""

import hashlib
import threading
from pathlib import Path

import torch

from fastcpt import attention, cpu_attention, fp8
from fastcpt.kernels import launch


def prepare(device: torch.device) -> None:
    """Called once before anything is compiled."""
    torch._dynamo.config.recompile_limit = 64  # beyond it a graph that must be whole is an error
    keep_compiled()
    if device.type == "cpu":
        find_vector_instructions()


def keep_compiled() -> None:
    """Lets a later process take over all that this one compiles, the tracing of the backward pass included.

    torch keys what it keeps by the graph. What an operator of ours, or an autograd.Function, does in the backward pass is
    not in it, so by default torch keeps no graph with the latter; with the source of both in the key it is safe.
    """
    ours = (Path(str(module.__file__)) for module in (attention, cpu_attention, fp8))
    files = [*Path(launch.__file__).parent.glob("*.py"), *ours]
    source = b"".join(path.read_bytes() for path in sorted(files))
    torch.compiler.config.cache_key_tag = f"fastcpt {hashlib.sha256(source).hexdigest()}"
    name = "autograd_cache_allow_custom_autograd_functions"
    if hasattr(torch._functorch.config, name):  # not in every version of torch
        setattr(torch._functorch.config, name, True)


def find_vector_instructions() -> threading.Thread:
    """Which of them this CPU and compiler have, on a thread: torch asks other processes, for about two seconds at every
    start, and keeps the answer for itself. Meanwhile weights are read and the model is traced."""
    # Imported here: two threads that import the same modules may find them half made.
    import torch._inductor.codecache  # noqa: F401
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    thread = threading.Thread(target=pick_vec_isa, name="vector-instructions", daemon=True)
    thread.start()
    return thread
