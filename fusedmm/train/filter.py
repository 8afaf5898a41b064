"""The filter of a run: modalities whose absence dev does not notice are switched off for good, and no longer read.

At every look at dev in the second half of a run each modality that is still on is hidden once. The rise of the loss,
as a share of what all rise together, is what `ModalityGate.update` takes in; it switches off the least important
modality that has stayed under the variant's ``filter`` for `PATIENCE` looks, and starts counting anew. One at a time:
of two modalities that stand for each other neither is missed alone, and the one that is left is. The run's best weights
are the best since the last one went.

Cost: one more pass over dev for each modality and look.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fusedmm.nn import ModalityGate

START = 0.5
"""Share of the steps before the first look counts: an untrained model misses nothing."""
PATIENCE = 3
"""Looks under the threshold before a modality goes."""
MOMENTUM = 0.5
"""Of the running mean over looks."""
FLOOR = 1e-12


def modality_gates(model: nn.Module) -> list[ModalityGate]:
    """The gates that can switch: one a block of a gated fusion with a threshold, none elsewhere."""
    return [module for module in model.modules() if isinstance(module, ModalityGate) and module.threshold is not None]


def active_modalities(model: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    """Those still on; waits for the device."""
    gates = modality_gates(model)
    if not gates:
        return names
    on = gates[0].active(1)
    assert on is not None
    return tuple(name for name, keep in zip(names, on[0].tolist(), strict=True) if keep)


def modality_importance(loss: Tensor, hidden: Mapping[str, Tensor], names: tuple[str, ...]) -> Tensor:
    """How far the mean loss [n] rises without each modality, as a share of all that rise: [M], 0 for those not in
    ``hidden``.
    """
    rises = torch.stack([(hidden.get(name, loss) - loss).mean() for name in names])
    return rises / rises.clamp_min(0.0).sum().clamp_min(FLOOR)


def update_gates(model: nn.Module, importance: Tensor, names: tuple[str, ...]) -> bool:
    """Give every gate the same importances [M], on all ranks alike; whether a modality went."""
    before = active_modalities(model, names)
    for gate in modality_gates(model):
        gate.update(importance[None].to(gate.importance.device))
    return active_modalities(model, names) != before
