"""What is updated when, and at which rate: embeddings first, and the rows of new tokens at a rate of their own.

A new vocabulary begins with the embeddings alone (Chinese-LLaMA, arXiv 2304.08177), whose new rows may take larger steps
than weights that are good already. Both are rates relative to the schedule's, of pieces of parameters: the rows of new
tokens, the other rows of both embeddings, and all else. Where a rate is 0, weights stay bit for bit, weight decay included,
and Adam's moments go on, so that the first step after is like any other.
"""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from fastcpt import UserError
from fastcpt.config import Config
from fastcpt.model import Architecture, GPTNeoX
from fastcpt.schedules import Plan
from fastcpt.units import steps_of

EMBEDDINGS = ("embed_in.weight", "embed_out.weight")


@dataclass(frozen=True)
class Piece:
    """Rows [first, end) of this process's part of a parameter, or all of it unless `parts`. rate: relative to the
    schedule's. embedding: it is of an embedding."""

    rate: float = 1.0
    embedding: bool = False
    first: int = 0
    end: int | None = None
    parts: bool = False

    def factor(self, embeddings_only: bool) -> float:
        return self.rate if self.embedding or not embeddings_only else 0.0


WHOLE = Piece()


def first_steps(config: Config, plan: Plan) -> int:
    """Steps of the run in which the embeddings alone are updated."""
    length = config.optim.embeddings_first
    return 0 if length is None else steps_of(length, plan.steps, config.train.batch_tokens)


def check(config: Config, arch: Architecture, plan: Plan) -> None:
    """Raises UserError for a stage that the run ends in, and for a rate of rows that there are not."""
    if (steps := first_steps(config, plan)) > 0 and steps >= plan.steps:
        raise UserError(
            "embeddings-first-too-long",
            f"optim.embeddings_first is {steps} steps, but the run has {plan.steps}; shorten it",
        )
    if config.optim.new_rows_lr is not None and not arch.old_rows:
        raise UserError(
            "new-rows-missing",
            f"optim.new_rows_lr is {config.optim.new_rows_lr}, but the model has no new rows; `fastcpt extend` makes them, or "
            "remove the setting",
        )


def pieces(config: Config, model: GPTNeoX, parts: dict[str, nn.Parameter]) -> dict[nn.Parameter, list[Piece]]:
    """Of the optimizer's parameters, this process's parts of the model's; none where all has the schedule's rate."""
    optim, found = config.optim, {}
    if optim.new_rows_lr is None and optim.embeddings_first is None:
        return {}
    for name, parameter in model.named_parameters():
        if name not in EMBEDDINGS:
            continue
        whole = Piece(embedding=True)
        found[parts[name]] = [whole]
        if optim.new_rows_lr is not None:
            edge = min(max(0, model.arch.old_rows - _first_row(parameter)), len(parts[name]))
            old = Piece(embedding=True, end=edge, parts=True)
            found[parts[name]] = [old, Piece(optim.new_rows_lr, True, edge, None, True)]
    return found


def _first_row(parameter: Tensor) -> int:
    """Of this process's part."""
    if not isinstance(parameter, DTensor):
        return 0
    _, offsets = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return offsets[0]


def describe(config: Config, plan: Plan) -> str:
    """For people; empty where all has the schedule's rate throughout."""
    last, new = plan.first + first_steps(config, plan), config.optim.new_rows_lr
    texts = [f"to step {last:,} of both embeddings alone"] if last > plan.first else []
    texts += [f"of new rows {new:g} times as high"] if new is not None else []
    return ", ".join(texts)
