"""Replicas hold the same bits, or the run stops: silent corruption of one of them would spread through its gradients.

The hash of a tensor is sum((2 i + 1) K b_i) mod 2^64 over its elements, b_i the bits of element i as an integer, K odd.
One flipped bit changes the sum by an odd number times a power of two below 2^32, which is never 0 mod 2^64; any other
change escapes with a chance of about 2^-64. It is computed where the tensors are and reads them once.
"""

from collections import Counter
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK = {"cpu": 1 << 16, "cuda": 1 << 22}  # elements at once, which become integers of 8 bytes: in a CPU's cache
FACTOR = 0x9E3779B97F4A7C15 - (1 << 64)  # odd, its bits well mixed (Knuth, volume 3, 6.4), as a signed integer
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Drifted(Exception):
    """Replicas differ. Exit code 4."""


@torch.no_grad()
def hashes(tensors: Sequence[Tensor]) -> Tensor:
    """(T,) int64 on their device, a hash of the bits of each tensor. The host does not wait."""
    device = tensors[0].device
    chunk = CHUNK[device.type]
    factors = (2 * torch.arange(min(chunk, max(t.numel() for t in tensors)), device=device) + 1) * FACTOR
    sums = []
    for tensor in tensors:
        bits = tensor.detach().contiguous().view(BITS[tensor.element_size()]).flatten()
        total = factors.new_zeros(())
        for start in range(0, len(bits), chunk):
            part = bits[start : start + chunk]
            more = (2 * start * FACTOR + (1 << 63)) % (1 << 64) - (1 << 63)  # by how much these factors are larger
            total += (part * factors[: len(part)]).sum() + more * part.sum()
        sums.append(total)
    return torch.stack(sums)


def odd_ones_out(hashes_RT: Sequence[Sequence[int]]) -> list[int]:
    """The replicas whose hashes are not those of most; all of them if no majority is of one mind."""
    counts = Counter(map(tuple, hashes_RT)).most_common()
    most = counts[0][0] if counts[0][1] * 2 > len(hashes_RT) else None
    return [rank for rank, each in enumerate(hashes_RT) if tuple(each) != most]


def check(
    tensors: dict[str, Tensor], step: int, since: int, names: Sequence[str], group: dist.ProcessGroup | None = None
) -> None:
    """Compares replicas, one in each process of the group; every process calls it. Waits for the device.

    names: of the processes, by rank. since: the step of the last check. Raises Drifted, on all, that names who differs.
    """
    own = hashes(list(tensors.values()))
    gathered = [torch.empty_like(own) for _ in names]
    dist.all_gather(gathered, own, group)
    hashes_RT = [each.tolist() for each in gathered]
    wrong = odd_ones_out(hashes_RT)
    if len(set(map(tuple, hashes_RT))) == 1:
        return
    (name, *more) = [name for name, column in zip(tensors, zip(*hashes_RT)) if len(set(column)) > 1]
    who = " and ".join(names[rank] for rank in wrong)
    what = f"{name} and {len(more)} more tensors" if more else name
    verb = "differ from each other" if len(wrong) == len(names) else "differ from those of the others"
    raise Drifted(
        f"step {step}: weights or moments of {who} {verb} since a step from {since + 1} to {step} ({what}); nothing was "
        "saved: the same command goes on from the last checkpoint; should it come again, look at that machine's memory"
    )
