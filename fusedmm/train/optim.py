"""The optimiser and what keeps it out of trouble: schedule, skipped steps, averaged weights. Nothing here waits for the
device.
"""

import math
from fnmatch import fnmatchcase
from itertools import chain

import torch
from torch import Tensor, nn

from fusedmm.train.config import TrainConfig

MIN_WINDOW = 16
"""Accepted steps before the spike detector speaks up: the first losses of a run fall too fast to be judged."""
RELATIVE_FLOOR = 0.01
"""A window that hardly varies has this share of its mean as its deviation, so that rounding is no spike."""


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW over what is not frozen; vectors (biases, norms) have no weight decay. Each group has its
    ``lr_scale``, the factor of its learning rate.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for is_vector in (False, True):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and (parameter.ndim < 2) == is_vector:
                scales = [scale for pattern, scale in config.lr_scale.items() if fnmatchcase(name, pattern)]
                kind = (0.0 if is_vector else config.weight_decay, [1.0, *scales][-1])
                groups.setdefault(kind, []).append(parameter)
    described = [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale}
        for (decay, scale), parameters in groups.items()
    ]
    return torch.optim.AdamW(described, lr=config.lr, betas=(0.9, 0.98), fused=True)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine to a twentieth of the peak at the last step."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


class SpikeGuard:
    """Decides on the device which steps the optimiser leaves out.

    A step is left out where loss or gradient norm is not finite, or more than ``sigma`` standard deviations above the
    mean of the last ``window`` accepted steps. The decision is a float32 scalar that fused AdamW reads as
    ``found_inf``: no host waits for it.
    Source: the skip-step optimiser of OLMo-core.
    """

    def __init__(self, sigma: float, window: int, device: torch.device) -> None:
        self._sigma = sigma
        self.state: dict[str, Tensor] = {
            "window": torch.zeros(2, window, device=device),
            "accepted": torch.zeros((), dtype=torch.int64, device=device),
            "streak": torch.zeros((), dtype=torch.int64, device=device),
        }

    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Loss and gradient norm, equal on all ranks -> 1.0 where the step is to be skipped, else 0.0."""
        window, accepted, streak = self.state["window"], self.state["accepted"], self.state["streak"]
        size = window.shape[1]
        values = torch.stack([loss, norm])  # [2]
        filled = torch.arange(size, device=window.device) < accepted
        count = filled.sum().clamp(min=1)
        mean = (window * filled).sum(dim=1) / count
        deviation = (
            ((window - mean[:, None]) * filled).square().sum(dim=1) / count
        ).sqrt() + RELATIVE_FLOOR * mean.abs()
        spike = (values > mean + self._sigma * deviation).any() & (accepted >= min(MIN_WINDOW, size))
        skip = spike | ~values.isfinite().all()
        slot = torch.arange(size, device=window.device) == accepted % size
        window.copy_(torch.where(slot & ~skip, values[:, None], window))
        accepted.add_((~skip).long())
        streak.copy_((streak + 1) * skip.long())
        return skip.float()


class WeightAverage:
    """Exponential moving average of the (sharded) weights: a list of DTensors beside the model's own.

    Args:
        decay: of one step; the first steps use (1 + step) / (10 + step) where that is smaller.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self.state = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def update(self, model: nn.Module, step: int) -> None:
        """Move towards the model's weights after ``step`` steps."""
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.state.values()), [p.detach() for p in model.parameters()], 1.0 - decay)


def copy_weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of this rank's shards, and of the buffers (which modalities are switched off), by name."""
    return {name: tensor.detach().clone() for name, tensor in chain(model.named_parameters(), model.named_buffers())}


def put_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Overwrite what ``weights`` names."""
    with torch.no_grad():
        for name, tensor in chain(model.named_parameters(), model.named_buffers()):
            if name in weights:
                tensor.copy_(weights[name])
