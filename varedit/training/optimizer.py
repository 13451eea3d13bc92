"""Optimizers: Muon for matrices and convolutions beside AdamW for the rest, or AdamW alone (Infinity's)."""

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from varedit.runtime import computes_bfloat16

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


_TOGETHER = 1 << 22  # elements orthogonalized at once: more would cost memory and save no time


def orthogonalize(matrix: Tensor, num_steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrix by quintic Newton-Schulz iteration (Jordan et al., Muon, 2024).

    Computed in bfloat16, which is enough for it, where the device has that, else in float32.

    Args:
        matrix: (..., rows, columns), each its own.
    """
    a, b, c = _NEWTON_SCHULZ
    x = matrix.to(torch.bfloat16 if computes_bfloat16(matrix.device) else torch.float32)
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(num_steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized, for parameters of two or more dimensions (a convolution is flattened to a matrix).

    torch.optim.Muon takes two-dimensional parameters only, and the image tokenizer is all convolutions.

    Weights may be sharded by FSDP2. A matrix must be orthogonalized whole: each process gathers the update,
    orthogonalizes it and keeps its own part. The work is repeated on every process; it does not depend on the batch and
    is small beside a step of a large one.
    """

    def __init__(self, parameters: Iterable, lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            waiting: dict[tuple, list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                nesterov = parameter.grad.lerp(momentum, group["momentum"])
                matrix = (nesterov.full_tensor() if isinstance(nesterov, DTensor) else nesterov).flatten(1)
                alike = waiting[matrix.shape, matrix.dtype, matrix.device]
                alike.append((parameter, matrix))
                if len(alike) * matrix.numel() >= _TOGETHER:
                    self._update(alike, group)
                    alike.clear()
            for alike in waiting.values():
                if alike:
                    self._update(alike, group)

    @staticmethod
    def _update(alike: list[tuple[nn.Parameter, Tensor]], group: dict) -> None:
        """One step of parameters whose matrices have one shape: together, since a GPU is slow to ask."""
        rows, columns = alike[0][1].shape
        updates = orthogonalize(torch.stack([matrix for _, matrix in alike]))
        for (parameter, _), matrix in zip(alike, updates):
            update = matrix.view(parameter.shape)
            if isinstance(parameter, DTensor):
                mesh = parameter.device_mesh
                update = DTensor.from_local(update, mesh, [Replicate()] * mesh.ndim, run_check=False)
                update = update.redistribute(placements=parameter.placements)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def muon_and_adamw(
    model: nn.Module,
    muon_lr: float,
    adamw_lr: float,
    weight_decay: float = 0.01,
    prefix: str = "",
    factors: Mapping[str, float] | None = None,
) -> list[torch.optim.Optimizer]:
    """Muon on matrices and convolutions with more than 16 channels on each side whose name starts with `prefix`,
    AdamW on everything else.

    Args:
        factors: beginning of a parameter's name -> what its learning rate is multiplied by. Parts that begin at zero
            in a trained model need a rate at which the others would unlearn.
    """
    matrices, others = defaultdict(list), defaultdict(list)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = name.startswith(prefix) and parameter.ndim >= 2 and min(parameter.shape[:2]) > 16
        factor = next((value for start, value in (factors or {}).items() if name.startswith(start)), 1.0)
        (matrices if is_matrix else others)[factor].append((name, parameter))
    groups = [
        [{"params": named, "lr": lr * factor} for factor, named in of_factor.items()]
        for of_factor, lr in ((matrices, muon_lr), (others, adamw_lr))
    ]
    return [
        Muon(groups[0], lr=muon_lr, weight_decay=weight_decay),
        torch.optim.AdamW(groups[1], lr=adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
