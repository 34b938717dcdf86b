"""One implementation of training, in a process of its own that takes its steps when asked. `bench_train` runs them, by path.

    python train_rivals.py NAME FOLDER DEVICE

FOLDER holds model/ in Hugging Face's format, batches.npy (K, B, T+1) int64 token ids, job.json, and for ours shards/.
Requests are lines of JSON on stdin, answers lines on stdout: {"steps": n} -> {"ms", "losses"} of n steps, which go
through the batches in turn; {"profile": n} -> {"share", "table"}: of the time of n steps, what products and attention
take, and the operators that take most; {"peak": true} -> {"mb"}. The first line that it writes says {"versions"}, or the
module that is {"missing"}. Only ours imports fastcpt, so that any interpreter that has the rivals can run it.

Every implementation trains fp32 weights with AdamW and clips to a norm of 1; matrices decay.
"""

# mypy: disable-error-code="import-not-found, import-untyped"

import ctypes
import importlib.metadata
import json
import resource
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Step = Callable[[int], float]  # the number of a batch -> the mean loss of its step
OPTIM: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "clip": 1.0}
# Of a profile: operators whose own time counts, and those that count with all that they call.
PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}
ATTENTION = ("scaled_dot_product", "cpu_attention")
GPU_KERNELS = ("gemm", "nvjet", "cutlass", "xmma", "cublas", "flash", "fmha", "attention", "cudnn")


def ours(folder: Path, job: dict[str, Any], device: torch.device) -> Step:
    """fastcpt's own setup and step."""
    from fastcpt import config, train

    batches = np.load(folder / "batches.npy").astype(np.uint16)
    _, batch, length = batches.shape
    state = train.setup(
        config.Config(
            model=config.Model(),
            init=config.Init(from_=str(folder / "model")),
            data=config.Data(
                train=[config.Source(name="new", path=str(folder / "shards"), weight=1.0)], seq_len=length - 1
            ),
            train=config.Train(
                tokens=config.Count(100_000 * batch * (length - 1)), batch_tokens=config.Count(batch * (length - 1)),
                micro_batch=job["micro_batch"], compile=job["compile"],
            ),
            optim=config.Optim(**OPTIM),
            schedule=config.Schedule(kind="constant", warmup=0),
            run=config.Run(output=str(folder / "run"), tensorboard=False),
        )
    )  # fmt: skip
    return lambda number: train.train_step(state, batches[number])["loss"].item()


def _training(
    model: torch.nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor], bf16: bool, folder: Path, micro: int
) -> Step:
    """The usual loop around a model: autocast for bf16, torch's fused AdamW, torch's clipping."""
    device = next(model.parameters()).device
    batches = torch.from_numpy(np.load(folder / "batches.npy"))
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": OPTIM["weight_decay"]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, **{name: OPTIM[name] for name in ("lr", "betas", "eps")}, fused=True)

    def step(number: int) -> float:
        parts = batches[number].to(device).split(micro)
        total = torch.zeros((), device=device)
        for part in parts:
            with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
                loss = loss_of(part[:, :-1].contiguous(), part[:, 1:].contiguous()) / len(parts)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters, OPTIM["clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total.item()

    return step


def transformers(
    folder: Path, job: dict[str, Any], device: torch.device, attention: str, bf16: bool, compiled: bool,
    liger: bool = False,
) -> Step:  # fmt: skip
    from transformers import GPTNeoXForCausalLM

    model: Any = GPTNeoXForCausalLM.from_pretrained(
        folder / "model", attn_implementation=attention, dtype=torch.float32
    )
    model.config.use_cache = False
    model.to(device).train()
    if liger:
        return _liger(model, bf16, folder, job)
    call = torch.compile(model) if compiled else model
    return _training(
        model,
        lambda tokens, targets: call(input_ids=tokens, labels=targets, shift_labels=targets).loss,
        bf16, folder, job["micro_batch"],
    )  # fmt: skip


def _liger(model: Any, bf16: bool, folder: Path, job: dict[str, Any]) -> Step:
    """Liger has no patch for GPT-NeoX: its norm and its cross-entropy are put in by hand, and cuDNN attends."""
    from liger_kernel.transformers import LigerCrossEntropyLoss, LigerLayerNorm
    from torch.nn.attention import SDPBackend, sdpa_kernel

    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.LayerNorm):
                norm = LigerLayerNorm(child.normalized_shape[0], eps=child.eps).to(child.weight.device)
                norm.load_state_dict(child.state_dict())
                setattr(module, name, norm)
    criterion, call = LigerCrossEntropyLoss(), torch.compile(model)

    def loss_of(tokens: Tensor, targets: Tensor) -> Tensor:
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
            return criterion(call(input_ids=tokens).logits.flatten(0, 1), targets.flatten())

    return _training(model, loss_of, bf16, folder, job["micro_batch"])


def litgpt(folder: Path, job: dict[str, Any], device: torch.device, compiled: bool) -> Step:
    """litgpt's GPT and its chunked loss, as its `pretrain` calls them, under autocast."""
    from litgpt import GPT, Config
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_gpt_neox
    from litgpt.utils import chunked_cross_entropy
    from safetensors.torch import load_file

    shape = json.loads((folder / "model" / "config.json").read_text())
    config = Config(
        name="pythia", block_size=shape["max_position_embeddings"], n_layer=shape["num_hidden_layers"],
        n_embd=shape["hidden_size"], n_head=shape["num_attention_heads"], vocab_size=shape["vocab_size"],
        padded_vocab_size=shape["vocab_size"], intermediate_size=shape["intermediate_size"], rotary_percentage=0.25,
        parallel_residual=True, bias=True, norm_class_name="LayerNorm", mlp_class_name="GptNeoxMLP",
    )  # fmt: skip
    model, weights = GPT(config), dict[str, Tensor]()
    copy_weights_gpt_neox(config, weights, load_file(folder / "model" / "model.safetensors"))
    model.load_state_dict(weights)
    model.to(device)
    model.max_seq_length = job["seq_len"]
    call = torch.compile(model) if compiled else model
    return _training(
        model, lambda tokens, targets: chunked_cross_entropy(call(tokens), targets), True, folder, job["micro_batch"]
    )


IMPLEMENTATIONS: dict[str, tuple[Callable[..., Step], dict[str, Any], tuple[str, ...]]] = {
    "fastcpt": (ours, {}, ("torch",)),
    "transformers fp32": (transformers, {"attention": "eager", "bf16": False, "compiled": False}, ("transformers",)),
    "transformers sdpa fp32": (
        transformers,
        {"attention": "sdpa", "bf16": False, "compiled": False},
        ("transformers",),
    ),
    "transformers sdpa bf16": (transformers, {"attention": "sdpa", "bf16": True, "compiled": False}, ("transformers",)),
    "transformers compiled": (transformers, {"attention": "sdpa", "bf16": True, "compiled": True}, ("transformers",)),
    "transformers Liger": (
        transformers,
        {"attention": "sdpa", "bf16": True, "compiled": True, "liger": True},
        ("transformers", "liger_kernel"),
    ),
    "litgpt": (litgpt, {"compiled": False}, ("litgpt",)),
    "litgpt compiled": (litgpt, {"compiled": True}, ("litgpt",)),
}
# A rival as it is, but for what fastcpt sets of the C library on a CPU (`parallel.keep_memory`).
KEPT = ", memory kept"


def keep_memory() -> None:
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        for parameter, value in ((-4, 0), (-1, -1), (-2, 1 << 26)):
            library.mallopt(parameter, value)


def profile(step: Callable[[], Any], count: int, device: torch.device) -> dict[str, Any]:
    """The share of products and attention, and the 25 operators or kernels that take most of the time, with shares."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    gpu = device.type == "cuda"
    with profiler(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as run:
        for _ in range(count):
            step()
    events = run.key_averages()

    def own(event: Any) -> float:
        return event.self_device_time_total if gpu else event.self_cpu_time_total

    total = sum(own(event) for event in events)
    if gpu:
        counted = sum(own(event) for event in events if any(name in event.key.lower() for name in GPU_KERNELS))
    else:
        attending = [event for event in events if any(name in event.key for name in ATTENTION) and "::" in event.key]
        # What an operator of ours multiplies is in its total already.
        inside = any("cpu_attention" in event.key for event in attending)
        products = PRODUCTS - ({"aten::bmm", "aten::baddbmm"} if inside else set())
        counted = sum(own(event) for event in events if event.key in products)
        counted += sum(event.cpu_time_total for event in attending)
    most = sorted(events, key=own, reverse=True)[:25]
    return {"share": counted / total, "table": [[event.key, own(event) / total, event.count] for event in most]}


def main(name: str, folder: Path, device: torch.device) -> None:
    make, options, modules = IMPLEMENTATIONS[name.removesuffix(KEPT)]
    if name.endswith(KEPT):
        keep_memory()
    job = json.loads((folder / "job.json").read_text())
    try:
        step = make(folder, job, device, **options)
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), flush=True)
        return
    versions = ", ".join(f"{module} {importlib.metadata.version(module)}" for module in modules)
    print(json.dumps({"versions": versions}), flush=True)
    number = 0

    def one() -> float:
        nonlocal number
        number += 1
        return step((number - 1) % job["batches"])

    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        if "steps" in request:
            answer = {"ms": [], "losses": []}
            for _ in range(request["steps"]):
                start = time.perf_counter()
                answer["losses"].append(one())  # which waits for the device
                answer["ms"].append((time.perf_counter() - start) * 1000)
        elif "profile" in request:
            answer = profile(one, request["profile"], device)
        elif "peak" in request:
            gpu = device.type == "cuda"
            peak = (
                torch.cuda.max_memory_allocated() if gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            )
            answer = {"mb": peak / 1e6}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    sys.path = [entry for entry in sys.path if not entry.rstrip("/").endswith("benchmarks")]
    main(sys.argv[1], Path(sys.argv[2]), torch.device(sys.argv[3]))
