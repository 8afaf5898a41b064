"""What a benchmark case is: one task, everyone who can do all of it, and what it costs at least.

A case asks every variant for the same outputs and gradients; who computes less has a case of its own. The same
definition serves `python -m benchmarks`, `pytest benchmarks` and the correctness gate.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

MODES = ("forward", "backward", "both")


class Unavailable(Exception):
    """A variant cannot run here; the message says why."""


@dataclass(frozen=True)
class Prepared:
    """A variant bound to its inputs.

    Attributes:
        forward: computes the outputs, by name; differentiable in ``inputs``.
        inputs: leaves, by name.
        upstream: gradient of each output that has one, by name.
        order: of an input whose rows this variant keeps in an order of its own, by name: the task's row of each.
    """

    forward: Callable[[], dict[str, Tensor]]
    inputs: Mapping[str, Tensor]
    upstream: Mapping[str, Tensor]
    order: Mapping[str, Tensor] = field(default_factory=dict)

    def gradients(self, outputs: Mapping[str, Tensor], *, keep: bool = False) -> tuple[Tensor, ...]:
        """Gradients of all inputs; ``keep`` the graph to take them again."""
        wanted = [name for name in self.upstream if outputs[name].requires_grad]
        return torch.autograd.grad(
            [outputs[name] for name in wanted],
            list(self.inputs.values()),
            [self.upstream[name].to(outputs[name].dtype) for name in wanted],
            retain_graph=keep,
            allow_unused=True,
        )

    def results(self, *, gradients: bool) -> dict[str, Tensor]:
        """Outputs, and gradients as ``grad_<input>``."""
        outputs = self.forward()
        found = {name: output.detach() for name, output in outputs.items()}
        if gradients and self.upstream:
            for (name, leaf), gradient in zip(self.inputs.items(), self.gradients(outputs), strict=True):
                gradient = torch.zeros_like(leaf) if gradient is None else gradient
                if name in self.order:
                    gradient = torch.empty_like(gradient).index_copy(0, self.order[name], gradient)
                found[f"grad_{name}"] = gradient
        return found


@dataclass(frozen=True)
class Variant:
    """One way to do a case's task.

    Attributes:
        name: such as ``sdpa-loop``.
        prepare: binds it to a problem; raises `Unavailable` where it cannot run.
        modes: those it has; a merge of attention calls whose LSE has no gradient has only "forward".
        ours: whether it is this project's: held to the strict budget, and what ratios are of.
        compiles: through torch.compile, FlexAttention's and a merge's too, or CuTe: many seconds before its first call.
    """

    name: str
    prepare: Callable[[Any], Prepared]
    modes: tuple[str, ...] = MODES
    ours: bool = False
    compiles: bool = False


@dataclass(frozen=True)
class Case:
    """One task at one size.

    Attributes:
        name: such as ``attention/dense-gated-d128-4k``.
        sizes: what plots and tables show.
        problem: makes the inputs on a device.
        small: makes a twin with everything of the task in it, small enough for the float64 reference.
        reference: binds the reference to a problem, computing in the dtype that is given.
        variants: ours first.
        flops: at least needed in each mode; only what is visible counts.
        bytes: at least moved in each mode: inputs read once, outputs written once.
        dtype: of the matrix products, for the ceiling.
        quick: part of ``--quick``; the points of curves are not.
        launch_bound: so short that the host decides: on a GPU also timed as a CUDA graph that is replayed.
        kernels: mode and variant to the name in the static table of the kernel that does most of it.
        terms: sizes of what cancels in a result, from the truth, for the gate (see `fusedmm.testing.over_budget`).
    """

    name: str
    sizes: Mapping[str, int | float | str]
    problem: Callable[[torch.device], Any]
    small: Callable[[torch.device], Any]
    reference: Callable[[Any, torch.dtype], Prepared]
    variants: tuple[Variant, ...]
    flops: Mapping[str, float]
    bytes: Mapping[str, float]
    dtype: torch.dtype
    quick: bool = True
    launch_bound: bool = False
    kernels: Mapping[tuple[str, str], str] = field(default_factory=dict)
    terms: Callable[[Any, Mapping[str, Tensor]], dict[str, Tensor]] | None = None

    @property
    def modes(self) -> tuple[str, ...]:
        """Modes that the case has."""
        return tuple(mode for mode in MODES if mode in self.flops)

    def may_take(self, variant: Variant, compiling: Collection[tuple[str, str]] | None) -> bool:
        """Whether a variant runs where only ``compiling``, by case and variant, may compile for long; None: all may."""
        return not variant.compiles or compiling is None or (self.name, variant.name) in compiling
