"""No number without a right answer: every variant computes a small twin of its case before it is timed.

This project's variants are held to the budget of the tests, twice the error of plain PyTorch in the same dtype plus one
rounding. Others must only compute the same thing, within `OTHERS` of the truth in norm; what they miss it by is shown.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.case import Case, Variant
from fusedmm.testing import over_budget

OTHERS = 0.1


@dataclass(frozen=True)
class Verdict:
    """What the gate found: complaints in words (none: green), and the largest relative error of any result."""

    complaints: list[str]
    worst_error: float


@dataclass(frozen=True)
class Gate:
    """The truth about one case on one device, and what plain PyTorch makes of it in the case's own dtype."""

    case: Case
    device: torch.device

    def __post_init__(self) -> None:
        problem = self.case.small(self.device)
        gradients = self.case.modes != ("forward",)
        truth = self.case.reference(problem, torch.float64).results(gradients=gradients)
        plain = self.case.reference(problem, self.case.dtype).results(gradients=gradients)
        terms = self.case.terms(problem, truth) if self.case.terms else None
        object.__setattr__(self, "_facts", (problem, truth, plain, terms))

    def check(self, variant: Variant) -> Verdict:
        """Hold a variant to its budget; what it raises is the caller's."""
        problem, truth, plain, terms = self._facts  # type: ignore[attr-defined]
        gradients = self.case.modes != ("forward",) and variant.modes != ("forward",)
        actual = variant.prepare(problem).results(gradients=gradients)
        shared = {name: truth[name] for name in truth if name in actual}
        missing = [f"{name}: not computed" for name in truth if name not in actual and not name.startswith("grad_")]
        errors = relative_errors(actual, shared)
        if variant.ours:
            complaints = over_budget(actual, shared, [plain], terms)
        else:
            complaints = [
                f"{name}: relative error {error:.1e}" for name, error in errors.items() if not error <= OTHERS
            ]
        return Verdict(missing + complaints, max(errors.values(), default=0.0))


def relative_errors(actual: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, float]:
    """Norm of the error over the norm of the truth, by name; results that are 0 but for rounding are left out."""
    found = {}
    for name, expected in truth.items():
        finite = torch.isfinite(expected)
        size = expected[finite].norm().item()
        if size > 1e-6 * max(1, int(finite.sum())) ** 0.5:
            found[name] = (actual[name].double() - expected)[finite].norm().item() / size
    return found
