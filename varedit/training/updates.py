"""From gradients to new weights: parameter groups, learning rates, clipping, the average."""

import contextlib
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from varedit.training.config import OptimizerConfig
from varedit.training.optimizer import Muon
from varedit.training.processes import Processes, local

NOT_DECAYED = ("modulation_table", "level_embed", "null_text", "query")
"""Tables of more than one dimension that are not matrices; vectors are never decayed."""

STATE = {"Muon": ("momentum",), "AdamW": ("step", "exp_avg", "exp_avg_sq")}
"""What an optimizer remembers of each parameter, by class."""

_LEAST_SIDE = 16


def trainable(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Name -> parameter of all that is trained, the module's name in front."""
    return {
        f"{prefix}.{name}": parameter
        for prefix, module in modules.items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def build_optimizers(modules: Mapping[str, nn.Module], config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """Optimizers over all trainable parameters, their state allocated (zeros), so that it can be loaded in place."""
    matrices, decayed, others = [], [], []
    for name, parameter in trainable(modules).items():
        is_matrix = parameter.ndim >= 2 and not name.endswith(NOT_DECAYED)
        # The transformer's matrices outside the blocks (embedding, head, text) go to AdamW, as the Muon recipe has it.
        inside = ".blocks." in name or not name.startswith("transformer.")
        if config.name == "muon" and is_matrix and inside and min(parameter.shape[:2]) > _LEAST_SIDE:
            matrices.append(parameter)
        else:
            (decayed if is_matrix else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay))
    if groups:
        optimizers.append(torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
            for parameter in group["params"]:
                optimizer.state[parameter] = {
                    key: torch.zeros(()) if key == "step" else torch.zeros_like(parameter)
                    for key in STATE[type(optimizer).__name__]
                }
    return optimizers


def learning_rate_factor(step: int, done: float, config: OptimizerConfig) -> float:
    """Share of the peak learning rate: linear warm-up, then constant, then the decay.

    Args:
        step: from 0. done: part of the run that lies behind, 0 to 1.
    """
    if step < config.warm_up:
        return (step + 1) / config.warm_up
    if config.decay == "constant" or config.decay_fraction == 0:
        return 1.0
    left = min(1.0, (1 - done) / config.decay_fraction)
    shape = left if config.decay == "linear" else (1 - math.cos(math.pi * left)) / 2
    return config.final_factor + (1 - config.final_factor) * shape


def set_learning_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


@torch.no_grad()
def clip_gradients(module: nn.Module, max_norm: float, processes: Processes) -> Tensor:
    """Scale a module's gradients so that their norm over all processes is at most `max_norm`.

    Returns:
        The norm before, float32 scalar; infinite or NaN where a gradient is.
    """
    gradients = [p.grad for p in module.parameters() if p.requires_grad and p.grad is not None]
    parts = [local(grad) for grad in gradients]
    norms = torch.stack(torch._foreach_norm(parts)) if parts else torch.zeros(1, device=processes.device)
    square = norms.double().square().sum()
    if any(isinstance(grad, DTensor) for grad in gradients):
        square = processes.sum(square)
    norm = square.sqrt().float()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    if parts:
        torch._foreach_mul_(parts, factor.to(parts[0].dtype))
    return norm


class Average:
    """Exponential moving average of the trained weights, float32, sharded as they are.

    Early on the decay is lower, (1 + step) / (10 + step), so that the average forgets the start.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = dict(parameters), decay
        self.values = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        mine = [local(value) for value in self.values.values()]
        theirs = [local(parameter.detach()) for parameter in self.parameters.values()]
        torch._foreach_lerp_(mine, theirs, 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights inside the block, and its own again after it."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self.parameters.items():
            mine, theirs = local(self.values[name]), local(parameter.detach())
            kept = theirs.clone()
            theirs.copy_(mine)
            mine.copy_(kept)
