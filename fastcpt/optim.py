"""AdamW (arXiv 1711.05101) on fp32 parameters, gradients and moments, without a host synchronisation."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastcpt.config import Optim


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW in two groups: matrices, embeddings included, decay; biases and norms do not.

    `clipped_step` folds clipping and the skip of non-finite gradients into the fused kernel, by the two attributes
    that torch's gradient scaler uses: `grad_scale` divides each gradient as it is read, `found_inf` leaves parameters,
    moments and Adam's own step untouched.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], config: Optim) -> None:
        parameters = list(parameters)
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        beta1, beta2 = config.betas
        super().__init__(groups, lr=config.lr or 0.0, betas=(beta1, beta2), eps=config.eps, fused=True)
        self.clip = config.clip
        self.parameters = parameters
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None
        for parameter in parameters:  # made here and not at the first step, so that a checkpoint can be read into it
            self.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    @torch.no_grad()
    def clipped_step(self, lr: float) -> tuple[Tensor, Tensor]:
        """One update at rate `lr` with the gradient's norm limited to `clip`; gradients are freed.

        Returns (norm before clipping, 1.0 if it was not finite and the step was skipped else 0.0), fp32 scalars on the
        device.
        """
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        self.found_inf = (~torch.isfinite(norm)).float()
        self.grad_scale = torch.clamp(norm / self.clip, min=1.0)
        for group in self.param_groups:
            group["lr"] = lr
        self.step()
        self.zero_grad(set_to_none=True)
        return norm, self.found_inf

    @property
    def updates(self) -> int:
        """Updates applied, skipped steps left out. Reads from the device."""
        return int(self.state[self.parameters[0]]["step"].item())

    def set_updates(self, updates: int) -> None:
        for parameter in self.parameters:
            self.state[parameter]["step"].fill_(updates)
