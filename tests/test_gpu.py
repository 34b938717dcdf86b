"""A training step on a GPU: the host waits for nothing, and our kernels are in the compiled graph.

Without a GPU tensors are on torch's device "meta": they have no data, so that whatever would read one from the host
raises, and every operator is seen, with the copies that would wait.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from fastcpt import UserError, attention, parallel, train
from fastcpt.attention import Backend
from fastcpt.config import Config, Count, Source
from fastcpt.execution import Execution
from fastcpt.kernels import launch
from fastcpt.layout import Layout, Replayed
from fastcpt.model import Architecture, GPTNeoX
from fastcpt.parallel import World
from fastcpt.state import State

STEPS, BATCH, SEQ_LEN = 4, 6, 16
META = torch.device("meta")


@pytest.fixture
def config(
    tmp_path: Path, write_shards: Callable, random_documents: Callable, tiny_config: Callable[..., Config]
) -> Callable[..., Config]:
    """config(**train): two sources and two micro-batches a step, the second of them smaller."""
    for name, seed in (("new", 1), ("old", 2)):
        write_shards(tmp_path / name, random_documents(seed, 35))

    def make(**settings: Any) -> Config:
        sources = [Source(name=name, path=str(tmp_path / name), weight=1.0) for name in ("new", "old")]
        steps = {"tokens": Count(STEPS * BATCH * SEQ_LEN), "batch_tokens": Count(BATCH * SEQ_LEN), "micro_batch": 4}
        data = {"train": sources, "seq_len": SEQ_LEN}
        return tiny_config(tmp_path / "run", data=data, train=steps | {"attention": "sdpa"} | settings)

    return make


def steps(state: State, windows: Callable[[Any], Any], begun: Callable[[], None] = lambda: None) -> None:
    """begun: called after the first step."""
    for step in range(STEPS):
        train.train_step(state, windows(state.mixture.windows(BATCH * step, BATCH)))
        if step == 0:
            begun()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("spikes", [0.0, 6.0])
def test_the_host_waits_for_nothing_in_a_step(config: Callable[..., Config], compiled: bool, spikes: float) -> None:
    """From the second step on; the first one compiles. CUDA itself raises where it would wait."""
    state = train.setup(config(compile=compiled, skip_spikes=spikes, precision="bf16", attention="auto"))
    try:
        steps(state, train.pinned, lambda: torch.cuda.set_sync_debug_mode("error"))
        with pytest.raises(RuntimeError, match="synchronizing"):
            state.interval.sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert state.optimizer.updates == STEPS


class Copies(TorchDispatchMode):
    """Names of operators, and those that copy from host memory and wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.waiting: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.calls[function._opname] += 1
        result = function(*args, **kwargs)
        if function._opname in ("_to_copy", "copy_"):
            source, target = (args[0], result) if function._opname == "_to_copy" else (args[1], args[0])
            blocking = not (kwargs.get("non_blocking") or (function._opname == "copy_" and args[2:3] == (True,)))
            if source.device != target.device and blocking:
                self.waiting.append(f"{function._opname} of {tuple(source.shape)}")
        return result


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose device is "meta"."""
    monkeypatch.setattr(parallel, "start", lambda *arguments: World(0, 1, META))
    monkeypatch.setattr(parallel, "has_bf16", lambda device: True)
    monkeypatch.setattr(torch, "Generator", lambda device: torch.default_generator)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(GPTNeoX, "initialise_", lambda model, generator: None)


@pytest.mark.parametrize("spikes", [0.0, 6.0])
@pytest.mark.parametrize("loss", ["full", "blocks"])
@pytest.mark.parametrize("recompute", ["none", "blocks"])
def test_a_step_reads_nothing_and_copies_without_waiting(
    meta: None, config: Callable[..., Config], spikes: float, loss: str, recompute: str
) -> None:
    state = train.setup(config(skip_spikes=spikes, loss=loss, recompute=recompute, precision="bf16"))
    with Copies() as copies:
        steps(state, torch.from_numpy)
    assert copies.calls["adamw_step"] == STEPS
    assert copies.waiting == []


def test_what_would_wait_is_seen(meta: None, config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    state = train.setup(config())
    monkeypatch.setattr(parallel, "to_device", lambda rows_BT, device: rows_BT.to(device).long())
    with Copies() as copies:
        train.train_step(state, torch.from_numpy(state.mixture.windows(0, BATCH)))
    assert copies.waiting == [f"_to_copy of {(rows, SEQ_LEN + 1)}" for rows in (4, 2)]
    for read in (torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.nonzero, bool):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read(state.interval.sum())


def operators(graph: torch.fx.GraphModule) -> Counter[str]:
    """Our operators and attention's in a graph; those that overwrite are arguments of another."""
    found: Counter[str] = Counter()
    for node in graph.graph.nodes:
        name = str(node.args[0] if "auto_functionalized" in str(node.target) else node.target)
        if node.op == "call_function" and ("fastcpt" in name or "attention" in name):
            found[name.split(".")[1]] += 1
    return found


@pytest.mark.parametrize(
    ("backend", "recompute", "forward", "backward"),
    [
        ("cudnn", False, "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward"),
        ("flash4", False, "flash4_forward", "flash4_backward"),
        ("flash4", True, "flash4_forward", "flash4_backward"),
    ],
)
def test_the_compiled_graph_is_one_and_has_our_kernels(
    monkeypatch: pytest.MonkeyPatch, backend: str, recompute: bool, forward: str, backward: str
) -> None:
    """What torch.compile would hand to its compiler, of three blocks: a graph each way, shapes in numbers."""
    monkeypatch.setattr(launch, "INTERPRETED", False)
    attend = Backend(backend, "", attention.build(backend, False))
    with META:
        model = GPTNeoX(
            Architecture(3, 64, 1, vocab_size=128),
            Execution(torch.bfloat16, kernels=True, recompute=recompute, attention=attend),
        )
    graphs: list[torch.fx.GraphModule] = []

    def capture(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        assert not any(isinstance(size, torch.SymInt) for tensor in inputs for size in tensor.shape)
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    model.compile(dynamic=False, fullgraph=True, backend=aot_autograd(fw_compiler=capture, bw_compiler=capture))
    tokens_BT = torch.zeros(2, 128, dtype=torch.int64, device=META)
    model(tokens_BT, tokens_BT, None, total=True)[0].backward()
    block = Counter({"layer_norm": 3, "qkv_rotary_": 3, "bias_gelu": 3, forward: 3})
    there, back = map(operators, graphs)
    assert there == block + Counter({"rotary_table": 1, "layer_norm": 1, "cross_entropy_": 1})
    again = Counter({"layer_norm_backward": 4, "qkv_rotary_backward": 3, "bias_gelu_backward": 3, backward: 3})
    again["scale_rows_"] = 1
    assert back == again + (block if recompute else Counter())


class Replay(torch.nn.Module):
    """What a model with CUDA graphs does, as far as its caller sees: results and gradients lie where those of the call
    before lay, in other tensors."""

    def __init__(self, model: GPTNeoX) -> None:
        super().__init__()
        self.model = model
        self.memory: dict[str, torch.Tensor] = {}

    def placed(self, name: str, value: torch.Tensor) -> torch.Tensor:
        memory = self.memory.setdefault(name, torch.empty(2 * value.numel(), dtype=value.dtype))
        return memory[: value.numel()].view_as(value).copy_(value).detach()

    def forward(self, *inputs: Any, **options: Any) -> Any:
        outer, names = self, [name for name, _ in self.model.named_parameters()]

        class Graph(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *parameters: torch.Tensor) -> Any:
                with torch.enable_grad():
                    ctx.own = [parameter.detach().requires_grad_() for parameter in parameters]
                    ctx.loss, losses_BT = torch.func.functional_call(
                        outer.model, dict(zip(names, ctx.own)), inputs, options
                    )
                losses_BT = outer.placed("losses", losses_BT)
                ctx.mark_non_differentiable(losses_BT)
                return outer.placed("loss", ctx.loss), losses_BT

            @staticmethod
            def backward(ctx: Any, gradient: torch.Tensor, _: Any) -> Any:
                gradients = torch.autograd.grad(ctx.loss, ctx.own)
                return tuple(outer.placed(name, value) for name, value in zip(names, gradients))

        return Graph.apply(*self.model.parameters())


@pytest.mark.parametrize("guarded", [True, False])
def test_what_a_graph_overwrites_is_not_needed(config: Callable[..., Config], guarded: bool) -> None:
    """Of two micro-batches a step; without the guard gradients are wrong, so that this test sees what it is about."""
    results, losses = [], []
    for graphs in (False, True):
        state = train.setup(config(parallel="single"))
        if graphs:
            replay = Replay(state.model)
            state.forward = Replayed(replay) if guarded else replay
        seen: list[Any] = []
        state.guard.record = lambda *values, seen=seen: seen.append(values[-1])  # type: ignore[method-assign]
        steps(state, torch.from_numpy)
        losses.append([torch.cat(parts) for parts in seen])
        results.append([parameter.detach() for parameter in state.model.parameters()])
    same = [torch.equal(a, b) for pair in (results, losses) for a, b in zip(*pair, strict=True)]
    assert all(same) == guarded


def test_graphs_take_one_process_on_a_gpu(config: Callable[..., Config], meta: None) -> None:
    for device in (torch.device("cpu"), META):
        alone = Layout("single", "", World(0, 1, device))
        with pytest.raises(UserError, match=f"this is single on {device}; use true"):
            alone.prepare(GPTNeoX(Architecture(1, 8, 1, vocab_size=8)), torch.float32, "graphs")
    gpu = Layout("single", "", World(0, 1, torch.device("cuda")))
    for layout in (replace(gpu, kind="ddp"), replace(gpu, tree=True)):
        with pytest.raises(UserError, match=r"takes one process on a GPU and not train\.deterministic"):
            layout.prepare(GPTNeoX(Architecture(1, 8, 1, vocab_size=8)), torch.float32, "graphs")
    model = GPTNeoX(Architecture(1, 8, 1, vocab_size=8))
    asked: list[dict[str, Any]] = []
    model.compile = lambda **options: asked.append(options)  # type: ignore[method-assign]
    gpu.prepare(model, torch.float32, "graphs")
    assert asked == [{"dynamic": False, "fullgraph": True, "options": {"triton.cudagraphs": True}}]
    assert isinstance(gpu.finish(model, "graphs"), Replayed) and gpu.finish(model, True) is model


def test_blocks_are_compiled_alone(config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same code for each of them: two graphs, since the first block has no addends, and a second layer adds none."""
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compile_(self, backend="eager", **options))
    torch._dynamo.reset()
    results, graphs = [], []
    for setting in (False, "blocks"):
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        state = train.setup(config(compile=setting, micro_batch=BATCH))
        steps(state, torch.from_numpy)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)
        results.append(torch.cat([parameter.detach().flatten() for parameter in state.model.parameters()]))
    assert graphs == [0, 2] and torch.equal(*results)
