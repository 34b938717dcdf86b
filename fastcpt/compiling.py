"""torch.compile: what a process compiled serves the next, and what can be done early is."""

import contextlib
import hashlib
import threading
from pathlib import Path

import torch

from fastcpt import attention, cpu_attention, embedding, fp8
from fastcpt.kernels import launch


def prepare(device: torch.device) -> None:
    """Called once before anything is compiled."""
    torch._dynamo.config.recompile_limit = 64  # beyond it a graph that must be whole is an error
    keep_compiled()
    if device.type == "cpu":
        warm_up_compiler()


def keep_compiled() -> None:
    """Lets a later process take over all that this one compiles, the tracing of the backward pass included.

    torch keys what it keeps by the graph. What an operator of ours, or an autograd.Function, does in the backward pass is
    not in it, so by default torch keeps no graph with the latter; with the source of both in the key it is safe.
    """
    ours = (Path(str(module.__file__)) for module in (attention, cpu_attention, embedding, fp8))
    files = [*Path(launch.__file__).parent.glob("*.py"), *ours]
    source = b"".join(path.read_bytes() for path in sorted(files))
    torch.compiler.config.cache_key_tag = f"fastcpt {hashlib.sha256(source).hexdigest()}"
    name = "autograd_cache_allow_custom_autograd_functions"
    if hasattr(torch._functorch.config, name):  # not in every version of torch
        setattr(torch._functorch.config, name, True)


# What torch compiles a CPU's kernels around.
EMPTY_KERNEL = '#include <torch/csrc/inductor/cpp_prefix.h>\nextern "C" void kernel(float* x) {}\n'


def warm_up_compiler() -> threading.Thread:
    """What the C++ compiler does before the first kernel, on a thread: torch asks which vector instructions there are, at
    every start, and has the header of its kernels compiled, once a machine, for about five seconds. Meanwhile weights are
    read and the model is traced."""
    # Imported here: two threads that import the same modules may find them half made.
    from torch._inductor.codecache import CppPythonBindingsCodeCache
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    def work() -> None:
        pick_vec_isa()
        with contextlib.suppress(Exception):  # the first kernel of the model meets it again
            CppPythonBindingsCodeCache.load_pybinding(["float*"], EMPTY_KERNEL)

    thread = threading.Thread(target=work, name="compiler", daemon=True)
    thread.start()
    return thread
