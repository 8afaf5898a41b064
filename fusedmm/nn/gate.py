"""ModalityGate: the learned filter that decides how far each query trusts and uses each modality."""

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from fusedmm.shapes import ShapeError, as_number, check_shapes, check_tensor

MIN_SCORE = 1e-12  # nats; a score below counts as this in shares of importance


class GateOutput(NamedTuple):
    """Attributes: log_prior [..., H, M] or None, gate [..., H, M] or None, both float32."""

    log_prior: Tensor | None
    gate: Tensor | None


class ModalityGate(nn.Module):
    """Priors and gates from the query, and a switch from distilled importance.

    ::

        log_prior = query @ prior.weight.T + prior.bias        # added to the scores
        gate      = 2 * sigmoid(query @ gate.weight.T + gate.bias)

    Both start neutral (weights 0: prior 0, gate 1), so that a new module is plain attention over all tokens. They read
    the query alone: nothing a query may not see can reach it through them. `update` keeps a running mean of how much
    the answer changes without each modality (`fusedmm.modality_scores`); a modality whose mean has stayed under
    ``threshold`` for ``patience`` updates is switched off for good, and its keys are no longer read. One goes at a
    time, the least important, and then the counts start anew: of two that stand for each other neither is missed alone,
    and the one that is left is. `importance_loss` teaches the prior the same importances.

    Args:
        embed_dim: width of the query.
        num_heads: H.
        num_modalities: M.
        prior: learn priors.
        gate: learn gates.
        threshold: score under which a modality counts as useless, in nats; None: never switch off.
        patience: updates in a row under the threshold before it is switched off.
        momentum: of the running mean.
    """

    importance: Tensor
    updates_below: Tensor
    updates: Tensor

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_modalities: int,
        *,
        prior: bool = True,
        gate: bool = True,
        threshold: float | None = None,
        patience: int = 100,
        momentum: float = 0.99,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if threshold is not None and as_number("ModalityGate", "threshold", threshold) < 0:
            raise ValueError(f"ModalityGate: threshold must not be negative, got {threshold}.")
        if patience < 1:
            raise ValueError(f"ModalityGate: patience must be at least 1, got {patience}.")
        if not 0.0 <= as_number("ModalityGate", "momentum", momentum) < 1.0:
            raise ValueError(f"ModalityGate: momentum must be in [0, 1), got {momentum}.")
        self.num_heads, self.num_modalities = num_heads, num_modalities
        self.threshold, self.patience, self.momentum = threshold, patience, momentum
        width = num_heads * num_modalities
        self.prior = nn.Linear(embed_dim, width, device=device, dtype=dtype) if prior else None
        self.gate = nn.Linear(embed_dim, width, device=device, dtype=dtype) if gate else None
        self.register_buffer("importance", torch.zeros(num_modalities, device=device, dtype=torch.float32))
        self.register_buffer("updates_below", torch.zeros(num_modalities, device=device, dtype=torch.int64))
        self.register_buffer("updates", torch.zeros((), device=device, dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Neutral: priors 0, gates 1, nothing known of importance."""
        for layer in (self.prior, self.gate):
            if layer is not None:
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
        for buffer in (self.importance, self.updates_below, self.updates):
            buffer.zero_()

    @torch.no_grad()
    def add_modality(self) -> None:
        """Make room for one more, the last: neutral, on, and with running means that start anew."""
        for layer in (self.prior, self.gate):
            if layer is not None:
                grown = (_with_zeros(x.unflatten(0, (self.num_heads, -1))) for x in (layer.weight, layer.bias))
                layer.weight, layer.bias = (nn.Parameter(x, layer.weight.requires_grad) for x in grown)
                layer.out_features = layer.bias.numel()
        self.importance, self.updates_below = (_with_zeros(x[None]) for x in (self.importance, self.updates_below))
        self.updates.zero_()
        self.num_modalities += 1

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Casts of the module spare the running mean: in half precision its small steps would round away."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.importance = self.importance.float()
        return self

    def forward(self, query: Tensor) -> GateOutput:
        """[..., embed_dim] to log_prior and gate [..., H, M], float32."""
        shape = (*query.shape[:-1], self.num_heads, self.num_modalities)
        log_prior = None if self.prior is None else self.prior(query).float().view(shape)
        gate = None if self.gate is None else 2.0 * torch.sigmoid(self.gate(query).float()).view(shape)
        return GateOutput(log_prior, gate)

    @torch.no_grad()
    def update(self, scores: Tensor) -> None:
        """Take in scores [N, M] of `fusedmm.modality_scores`; under data parallelism give all ranks the same
        (all-reduced) scores.
        """
        check_tensor("ModalityGate.update", "scores", scores)
        if scores.ndim > 2:
            raise ShapeError(
                f"ModalityGate.update: scores must be [row, {self.num_modalities}], got shape {list(scores.shape)}. "
                "Use scores[query_mask], or scores.flatten(0, 1) where every row counts."
            )
        check_shapes("ModalityGate.update", {"scores": (scores, ("row", self.num_modalities))})
        if scores.shape[0] == 0:
            return
        mean = scores.float().mean(0)
        self.updates += 1
        weight = torch.clamp(1.0 / self.updates, min=1.0 - self.momentum)  # a plain mean at first
        self.importance.lerp_(mean, weight)
        if self.threshold is not None:
            self.updates_below.copy_(self._count_below(self.threshold))

    def _count_below(self, threshold: float) -> Tensor:
        """[M] updates in a row under the threshold, after this one; ``patience`` for those that are off."""
        off = self.updates_below >= self.patience
        count = torch.where(self.importance < threshold, self.updates_below + 1, 0)
        due = ~off & (count >= self.patience)
        least = self.importance.masked_fill(~due, torch.inf).argmin()
        gone = off | (due & (torch.arange(self.num_modalities, device=due.device) == least))
        count = torch.where(due.any(), 0, count)
        return torch.where(gone, self.patience, count)

    def active(self, batch_size: int) -> Tensor | None:
        """[B, M] bool, False where a modality is switched off; None where this gate never switches."""
        if self.threshold is None:
            return None
        return (self.updates_below < self.patience).expand(batch_size, -1)

    def importance_loss(self, log_prior: Tensor, scores: Tensor, temperature: float = 1.0) -> Tensor:
        """Cross-entropy of the prior's shares against the distilled importances; a scalar.

        Args:
            log_prior: [N, H, M] of `forward`.
            scores: [N, M], how much the answer changed without each modality, in nats; a target, without gradient.
            temperature: the target is ``scores / scores.sum()`` sharpened by ``1 / temperature``.
        """
        if not temperature > 0:
            raise ValueError(f"ModalityGate: temperature must be positive, got {temperature}.")
        check_shapes(
            "ModalityGate.importance_loss",
            {
                "log_prior": (log_prior, ("row", "head", self.num_modalities)),
                "scores": (scores, ("row", self.num_modalities)),
            },
        )
        target = torch.softmax(scores.detach().float().clamp_min(MIN_SCORE).log() / temperature, -1)
        return -(target[:, None] * torch.log_softmax(log_prior, -1)).sum(-1).mean()


def _with_zeros(x: Tensor) -> Tensor:
    """[H, M, ...] to [H * (M + 1), ...], zeros for the new modality."""
    return torch.cat((x, torch.zeros_like(x[:, :1])), 1).flatten(0, 1)
