"""AdamW (arXiv 1711.05101) on fp32 parameters and gradients, by torch or by our kernels, without a host synchronisation."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastcpt import UserError
from fastcpt.config import Optim
from fastcpt.kernels import launch
from fastcpt.kernels.adamw import adamw_reference, adamw_step, gradient_square, square_by_products
from fastcpt.rates import WHOLE, Piece


class AdamW(torch.optim.AdamW):
    """AdamW in two groups: matrices, embeddings included, decay; biases and norms do not.

    kernels: `fastcpt.kernels.adamw`, one launch for all parameters; else torch's fused kernel. Both fold in scaling,
    clipping and the skip of gradients that are not finite; torch's by the two attributes that its gradient scaler uses:
    `grad_scale` divides each gradient as it is read, `found_inf` leaves parameters, moments and Adam's own step
    untouched. Checkpoints of one go on with the other.
    moments: torch.float32, or torch.bfloat16, rounded stochastically from a fixed seed (kernels, or on CPU without).
    elementwise: compute each element alike wherever it stands; torch's fused kernel on CPU rounds the last few of a tensor
    otherwise, so that it matters how a tensor is sharded.
    reduce: what is done to the sum of squares of this process's gradients before it is the norm's; a process that holds
    shards sets it to a sum over processes. whole: what is done to the gradients before they are squared; where the norm
    must not depend on how they are sharded, they are put together.
    rows: of a parameter, those whose gradient is not zero; the norm is taken of no other. Set anew before each step.
    pieces: of parameters of which not all has the schedule's rate (`rates.py`).
    veto: of the scaled gradient's norm, whether to skip the step all the same; all processes must decide alike.

    Raises UserError where the kernels that were asked for cannot run.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        config: Optim,
        kernels: bool = False,
        moments: torch.dtype = torch.float32,
        elementwise: bool = False,
        pieces: dict[nn.Parameter, list[Piece]] | None = None,
    ) -> None:
        parameters = list(parameters)
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        beta1, beta2 = config.betas
        super().__init__(groups, lr=config.lr or 0.0, betas=(beta1, beta2), eps=config.eps, fused=True)
        device = parameters[0].device
        if kernels:
            if not launch.on_triton(parameters[0]):
                raise UserError("kernels-need-gpu", "the kernels of AdamW need a GPU; use torch's fused AdamW on CPU")
        elif moments != torch.float32 and device.type != "cpu":
            raise UserError(
                "moments-need-kernels", f"{moments} moments on {device} need the kernels of AdamW; torch's are fp32"
            )
        elif pieces and device.type != "cpu":
            raise UserError(
                "rates-need-kernels",
                f"optim.embeddings_first and optim.new_rows_lr on {device} need the kernels of AdamW; use train.kernels: auto",
            )
        self.config = config
        self.parameters = parameters
        self.elementwise = elementwise
        self.pieces = pieces or {}
        self.kernels = kernels or moments != torch.float32 or elementwise or bool(pieces)
        self.reduce: Callable[[Tensor], Tensor] = lambda square: square
        self.whole: Callable[[list[Tensor]], list[Tensor]] = lambda gradients: gradients
        self.rows: dict[nn.Parameter, Tensor] = {}
        self.veto: Callable[[Tensor], Tensor] | None = None
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None
        self.count = torch.zeros((), device=device)  # of updates by the kernels; torch has one for each parameter
        for parameter in parameters:  # made here and not at the first step, so that a checkpoint can be read into it
            state = self.state[parameter]
            if not self.kernels:
                state["step"] = torch.zeros_like(self.count)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=moments)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=moments)

    @torch.no_grad()
    def clipped_step(self, lr: float, scale: float = 1.0, embeddings_only: bool = False) -> tuple[Tensor, Tensor]:
        """One update at rate `lr` by gradients times `scale`, their norm limited to `clip`; gradients are freed.

        embeddings_only: of the moments of all parameters, but of the weights of both embeddings alone.

        Returns (norm of the scaled gradient before clipping, 1.0 if the step was skipped, since it was not finite or by
        the veto, else 0.0), fp32 scalars on the device.
        """
        if self.kernels:
            norm, skipped = self._step_by_kernels(lr, scale, embeddings_only)
        else:
            norm, skipped = self._step_by_torch(lr, scale)
        self.zero_grad(set_to_none=True)
        return norm, skipped

    def _squared(self) -> list[Tensor]:
        """What the norm is taken of."""
        gradients = ((p.grad, self.rows.get(p)) for p in self.parameters if p.grad is not None)
        return self.whole([grad if rows is None else grad.index_select(0, rows) for grad, rows in gradients])

    def _step_by_torch(self, lr: float, scale: float) -> tuple[Tensor, Tensor]:
        cpu = self.parameters[0].device.type == "cpu"
        squared = self._squared()
        square = square_by_products(squared) if cpu else torch.nn.utils.get_total_norm(squared).square()
        norm = self.reduce(square).sqrt() * scale
        finite = torch.isfinite(norm)
        self.found_inf = (~finite if self.veto is None else ~finite | self.veto(norm)).float()
        self.grad_scale = torch.clamp(norm / self.config.clip, min=1.0) / scale
        for group in self.param_groups:
            group["lr"] = lr
        self.step()
        return norm, self.found_inf

    def _step_by_kernels(self, lr: float, scale: float, embeddings_only: bool) -> tuple[Tensor, Tensor]:
        square = self.reduce(gradient_square(self._squared()))
        true_norm = square.sqrt() * scale
        if self.veto is not None:
            square = torch.where(self.veto(true_norm), torch.inf, square)  # what the kernel skips
        step = adamw_reference if self.elementwise and square.device.type == "cpu" else adamw_step
        beta1, beta2 = self.config.betas
        before = self.count.clone()
        for factor, rows in self._rows(embeddings_only).items():
            self.count.copy_(before)  # of each of the calls, which are one update
            parameters, gradients, exp_avgs, exp_avg_sqs, decays = (list(column) for column in zip(*rows))
            norm, skipped = step(
                parameters, gradients, exp_avgs, exp_avg_sqs, decays, self.count,
                lr=lr * factor, betas=(beta1, beta2), eps=self.config.eps, clip=self.config.clip, scale=scale, square=square,
            )  # fmt: skip
        return (norm if self.veto is None else true_norm), skipped

    def _rows(self, embeddings_only: bool) -> dict[float, list[tuple[Any, ...]]]:
        """{rate relative to the schedule's: (parameter, gradient, both moments, weight decay) of each piece}."""
        groups: dict[float, list[tuple[Any, ...]]] = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                tensors = (p.detach(), p.grad, self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"])
                for piece in self.pieces.get(p, [WHOLE]):
                    rows = [tensor[piece.first : piece.end] if piece.parts else tensor for tensor in tensors]
                    if rows[0].numel() or not piece.parts:
                        groups.setdefault(piece.factor(embeddings_only), []).append((*rows, group["weight_decay"]))
        return groups

    @property
    def _counts(self) -> list[Tensor]:
        return [self.count] if self.kernels else [self.state[parameter]["step"] for parameter in self.parameters]

    @property
    def updates(self) -> int:
        """Updates applied, skipped steps left out. Reads from the device."""
        return int(self._counts[0].item())

    def set_updates(self, updates: int) -> None:
        for count in self._counts:
            count.fill_(updates)
