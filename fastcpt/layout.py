"""How a model is laid out over processes, on PyTorch's own engines: whole on each (DDP), or in shards (FSDP2, HSDP).

    single  one process
    ddp     every process holds the whole model; gradients are averaged
    fsdp    every process holds a share of each parameter; a block's are gathered while it is computed
    hsdp    shards within a machine, copies of them on each machine

Parameters are sharded in fp32 and gathered in the compute dtype, in which their gradients come; these are reduced in
fp32. The optimizer works on
plain local tensors in every layout (`Layout.locals`).
"""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fastcpt import UserError, compiling, memory
from fastcpt.config import Config, Train
from fastcpt.model import Architecture, GPTNeoX
from fastcpt.parallel import World
from fastcpt.trees import tree_sum

Kind = Literal["single", "ddp", "fsdp", "hsdp"]
ROOM = 0.9  # of a device's memory: what a model may need of it by the formulas of `memory.py`
# A micro-batch beyond which matrix products gain nothing: tokens on a GPU, where adding up its gradients takes under 1% of
# its time, and sequences on CPU.
ENOUGH, ENOUGH_CPU = 1 << 16, 8


def local_size(world_size: int) -> int:
    """Processes of one machine, as torchrun says it."""
    return min(world_size, int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))


def device_memory(device: torch.device, processes: int) -> int:
    """Bytes that one of so many processes of a machine has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // processes


def choose(
    train: Train, size: int, machine: int, needed: Callable[[int, bool], int], memory: int
) -> tuple[Kind, bool, str]:
    """(what `train.parallel` comes to, whether blocks are recomputed, why), of `size` processes, `machine` on each machine.

    needed(processes that share one copy, recomputed): bytes that each needs; memory: bytes that each has. Shards are
    tried before recomputation, which costs more. Raises UserError for what is asked for by name and cannot be.
    """
    setting = train.parallel if size > 1 else "single"
    if setting == "hsdp" and machine == size:
        raise UserError(
            "hsdp-one-machine", "train.parallel is hsdp, but all processes are on one machine; use fsdp or auto"
        )
    if setting == "hsdp" and size % machine:
        raise UserError(
            "hsdp-uneven-machines",
            f"train.parallel is hsdp, but {size} processes are not {machine} on every machine; use fsdp",
        )
    shards: dict[Kind, int] = {"single": 1, "ddp": 1, "hsdp": machine, "fsdp": size}
    kinds: list[Kind] = ["ddp", *(["hsdp"] if machine < size and size % machine == 0 else []), "fsdp"]  # type: ignore[list-item]
    ways = {"none": (False,), "blocks": (True,), "auto": (False, True)}[train.recompute]
    tried = [(kind, way) for way in ways for kind in (kinds if setting == "auto" else [setting])]
    fitting = [(kind, way) for kind, way in tried if needed(shards[kind], way) <= ROOM * memory]
    kind, recompute = (fitting or tried[-1:])[0]

    def gib(shards: int, way: bool) -> str:
        return f"{needed(shards, way) / 2**30:.1f} of {memory / 2**30:.1f} GiB"

    first, own = gib(1, ways[0]), gib(shards[kind], recompute)
    why = "one process" if size == 1 else "as train.parallel says"
    if setting == "auto":
        why = f"a whole copy needs {own}"
        if kind != "ddp":
            why = f"a whole copy would need {first}, one in {shards[kind]} shards needs {own}"
    if recompute:
        cause = f"keeping all would need {gib(shards[kind], False)}, this {own}"
        why += f"; blocks are recomputed: {cause if len(ways) > 1 else 'as train.recompute says'}"
    return kind, recompute, why if fitting else f"{why}; that does not fit: lower train.micro_batch"


def with_micro_batch(config: Config, arch: Architecture, world: World, machine: int, room: int) -> tuple[Config, str]:
    """The configuration with a micro-batch, and why that one; as it is, if it says one. machine, room: see `choose`.

    The layout is the first that has room for one sequence. In it a micro-batch is the largest that fits and that a
    process's sequences are a multiple of; or, where that is under half of what fits, it cuts them into as few parts as
    fit, as even as can be. All processes take equally many. It depends on nothing but the sizes.
    """
    if config.train.micro_batch:
        return config, ""
    if config.train.deterministic:
        raise UserError(
            "deterministic-micro-batch",
            "train.deterministic gives any number of processes the same bits, of the same micro-batches; say train.micro_batch",
        )
    sequences = config.train.batch_tokens // config.data.seq_len
    fewest, share = sequences // world.size, -(-sequences // world.size)
    enough = max(1, ENOUGH // config.data.seq_len) if world.device.type == "cuda" else ENOUGH_CPU
    one = memory.needed(memory.with_micro_batch(config, 1), arch, world)
    kind, recompute, _ = choose(config.train, world.size, machine, one, room)
    shards = {"single": 1, "ddp": 1, "hsdp": machine, "fsdp": world.size}[kind]
    fits = memory.largest(config, arch, world, shards, recompute, ROOM * room, min(share, enough)) or 1
    alike = [size for size in range(1, fits + 1) if -(-fewest // size) == -(-share // size)] or [fits]
    whole = [size for size in alike if share % size == 0 and 2 * size > fits]
    chosen = max(whole) if whole else min(alike, key=lambda size: (-(-share // size), size))
    bound = f"at most {fits} fit"
    if fits == min(share, enough):
        bound = "all of them fit" if fits == share else f"more than {fits} are no faster"
    return memory.with_micro_batch(config, chosen), f"micro-batches of {chosen} of its {share} sequences: {bound}"


def check(config: Config, kind: Kind, size: int) -> None:
    """Raises UserError for what `size` processes cannot do in a layout, of a configuration that says its micro-batch."""
    train, sequences = config.train, config.train.batch_tokens // config.data.seq_len
    fewest, most = (-(-share // train.micro_batch) for share in (sequences // size, -(-sequences // size)))
    if kind in ("fsdp", "hsdp") and fewest != most:  # processes that hold shards meet in every micro-batch
        raise UserError(
            "micro-batches-uneven",
            f"train.parallel is {kind}, and {sequences} sequences a step are {fewest} micro-batches of train.micro_batch "
            f"{train.micro_batch} on some of {size} processes and {most} on others; raise it, or make train.batch_tokens a "
            "multiple",
        )
    if train.deterministic and sequences % (size * train.micro_batch):
        raise UserError(
            "deterministic-micro-batch",
            f"train.deterministic takes whole micro-batches: {sequences} sequences a step are not a multiple of "
            f"{size} processes x train.micro_batch {train.micro_batch}; lower it",
        )
    if train.deterministic and config.optim.moments != "fp32":
        raise UserError(
            "deterministic-moments",
            "train.deterministic takes optim.moments: fp32; those in bf16 are rounded at random",
        )


class _TreeReduceScatter:
    """FSDP's reduce-scatter in the order of `trees.py`."""

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        parts = torch.empty_like(input_tensor)
        dist.all_to_all_single(parts, input_tensor, group=group)
        total = tree_sum(parts.chunk(group.size()))
        output_tensor.copy_(total / group.size() if op == dist.ReduceOp.AVG else total)


class Replayed(nn.Module):
    """Training forward passes of a model that replays CUDA graphs, each of which writes to the same memory.

    Autograd would keep a replay's gradients where they lie, and the next one overwrite them (pytorch#146569, #169545); to
    gradients that are there it adds. Losses are wanted after other replays.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any, **options: Any) -> tuple[Tensor, Tensor]:
        for parameter in self.model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        loss, losses_BT = self.model(*inputs, **options)
        return loss, losses_BT.clone()


@dataclass(frozen=True)
class Layout:
    """mesh: the processes of fsdp, (shard,), or of hsdp, (replicate, shard). tree: sums in a fixed order. recompute: see
    `Execution`."""

    kind: Kind
    why: str
    world: World
    mesh: DeviceMesh | None = None
    tree: bool = False
    recompute: bool = False

    @classmethod
    def make(cls, kind: Kind, why: str, world: World, tree: bool, recompute: bool = False) -> "Layout":
        """Raises UserError where sums in a fixed order are not to be had."""
        mesh, machine = None, local_size(world.size)
        if kind == "fsdp":
            mesh = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
        if kind == "hsdp":
            shape = (world.size // machine, machine)
            mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))
        if tree and (world.size & (world.size - 1) or (kind == "hsdp" and world.size > 2 * machine)):
            raise UserError(
                "deterministic-processes",
                f"train.deterministic takes a power of two of processes, and of hsdp two machines; there are {world.size}",
            )
        return cls(kind, why, world, mesh, tree, recompute)

    @classmethod
    def of(cls, config: Config, arch: Architecture, world: World) -> "tuple[Layout, Config]":
        """How a run is spread over processes, and its configuration with a micro-batch. Raises UserError for what cannot
        be."""
        machine = local_size(world.size)
        room = min(world.gather(device_memory(world.device, machine)))  # all choose alike
        config, note = with_micro_batch(config, arch, world, machine, room)
        train = config.train
        kind, recompute, why = choose(train, world.size, machine, memory.needed(config, arch, world), room)
        check(config, kind, world.size)
        why = f"{why}; {note}" if note else why
        return cls.make(kind, why, world, train.deterministic, recompute), config

    @property
    def sharded(self) -> bool:
        return self.mesh is not None

    @property
    def share(self) -> int:
        """Which share of a batch is this process's: its rank, but so that sums over shards are a tree's first levels."""
        if not self.tree or self.kind != "hsdp":
            return self.world.rank
        assert self.mesh is not None
        replica, shard = self.mesh.get_coordinate() or (0, 0)
        return shard * self.mesh.size(0) + replica

    @property
    def averages(self) -> bool:
        """Whether gradients come as an average over processes, and not as a sum."""
        return self.sharded or (self.kind == "ddp" and not self.tree)

    def prepare(self, model: GPTNeoX, dtype: torch.dtype, compile_: bool | str) -> None:
        """Compiles and shards a model that has no storage yet; `finish` goes on when it has its values.

        One process compiles all of it, several block by block, so that communication overlaps the backward pass. In a
        fixed order any number of processes compiles block by block, and shards are gathered in fp32: norms, which are not
        cast, would else be computed with rounded weights. compile_: `train.compile`; raises UserError where graphs cannot be.
        """
        alone = self.kind == "single" and not self.tree
        if compile_ == "graphs" and not (alone and self.world.device.type == "cuda"):
            raise UserError(
                "graphs-not-possible",
                f"train.compile is graphs, which takes one process on a GPU and not train.deterministic; this is {self.kind} "
                f"on {self.world.device}; use true",
            )
        model.execution = replace(model.execution, recompute=self.recompute)
        if compile_:
            compiling.prepare(self.world.device)
            if alone and compile_ != "blocks":
                options = {"triton.cudagraphs": True} if compile_ == "graphs" else None
                model.compile(dynamic=False, fullgraph=True, options=options)
            else:
                for layer in model.layers:
                    layer.compile(dynamic=False, fullgraph=True)
        if self.mesh is not None:
            gathered = None if self.tree or dtype == torch.float32 else dtype
            policy = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False)
            for module in (*model.layers, model):
                fully_shard(module, mesh=self.mesh, mp_policy=policy)
                if self.tree:
                    module.set_custom_reduce_scatter(_TreeReduceScatter())

    def finish(self, model: GPTNeoX, compile_: bool | str) -> nn.Module:
        """What is called in training, of a model whose parameters have their values. compile_: `train.compile`."""
        if compile_ == "graphs":
            return Replayed(model)
        if self.kind == "ddp" and not self.tree:
            return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
        return model

    def locals(self, model: GPTNeoX) -> dict[str, nn.Parameter]:
        """This process's part of each parameter, a plain tensor on the same memory."""
        return {
            name: nn.Parameter(parameter.to_local().detach()) if isinstance(parameter, DTensor) else parameter
            for name, parameter in model.named_parameters()
        }

    def accumulate(self, forward: nn.Module, last: bool) -> Any:
        """For one micro-batch: communicates no more than it must before the last one. Returns a context.

        Shards are reduced with every micro-batch, because whole gradients are what there is no room for; copies of
        them on other machines once.
        """
        if isinstance(forward, DistributedDataParallel) and not last:
            return forward.no_sync()
        if self.kind == "hsdp" and isinstance(forward, FSDPModule):
            forward.set_requires_all_reduce(last or self.tree)
        return contextlib.nullcontext()

    def gradients(self, model: GPTNeoX) -> list[Tensor]:
        """Takes this process's part of each gradient out of the model."""
        taken = []
        for parameter in model.parameters():
            gradient = parameter.grad
            assert gradient is not None
            taken.append(gradient.to_local() if isinstance(gradient, DTensor) else gradient)
            parameter.grad = None
        return taken

    def reshard(self, model: GPTNeoX) -> None:
        """After an evaluation the outermost parameters are whole still: FSDP leaves them so for a backward pass to come."""
        if isinstance(model, FSDPModule):
            model.reshard()

    def tree_reduced(self, tensors: list[Tensor]) -> list[Tensor]:
        """Sums over processes in the order of their shares, of tensors that are whole on each."""
        if self.world.size == 1 or not tensors:
            return tensors
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        parts = [torch.empty_like(flat) for _ in range(self.world.size)]
        dist.all_gather(parts, flat)
        if self.kind == "hsdp":
            assert self.mesh is not None
            parts = [parts[rank] for rank in self.mesh.mesh.T.flatten().tolist()]  # by share
        pieces = tree_sum(parts).split([tensor.numel() for tensor in tensors])
        return [piece.view_as(tensor) for piece, tensor in zip(pieces, tensors)]

    def sum_over_shards(self, square: Tensor) -> Tensor:
        """Sums this process's number over those that hold the other shards, in place."""
        if self.mesh is not None:
            dist.all_reduce(square, group=self.mesh.get_group("shard"))
        return square

    def copies(self) -> tuple[list[int], dist.ProcessGroup | None] | None:
        """The processes that hold the same bits as this one, and their group (None: all); None when there are none."""
        if self.kind == "ddp":
            return list(range(self.world.size)), None
        if self.kind == "hsdp":
            assert self.mesh is not None
            group = self.mesh.get_group("replicate")
            return dist.get_process_group_ranks(group), group
        return None

    def like(self, parameter: Tensor, local: Tensor) -> Tensor:
        """A local tensor as the part that it is of one of a parameter's shape."""
        if not isinstance(parameter, DTensor):
            return local
        return DTensor.from_local(
            local, parameter.device_mesh, parameter.placements, run_check=False,
            shape=parameter.shape, stride=parameter.stride(),
        )  # fmt: skip

    def whole(self, model: GPTNeoX, locals_: list[Tensor]) -> list[Tensor]:
        """The tensors that have these parts; every process calls it."""
        tensors = [self.like(parameter, local) for parameter, local in zip(model.parameters(), locals_, strict=True)]
        return [tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
