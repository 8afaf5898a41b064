"""How much each modality matters to the answer, from one attention pass: the importance that filters learn from."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fusedmm.heads import LinearHead
from fusedmm.ops.distillation import distillation_scores
from fusedmm.ops.partials import ModalityPartials, leave_one_out, merge_modalities
from fusedmm.shapes import ShapeError, as_number, check_shapes

OP = "modality_scores"
MEASURES = ("kl", "squared_error")


@torch.no_grad()
def modality_scores(
    partials: ModalityPartials,
    head: nn.Linear | Callable[[Tensor], Tensor],
    *,
    log_prior: Tensor | None = None,
    gate: Tensor | None = None,
    softmax: str = "joint",
    projection: Callable[[Tensor], Tensor] | None = None,
    measure: str = "kl",
    temperature: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """Change of the answer when one modality is left out, for every modality at once.

    ::

        full, without = head(projection(output)), head(projection(output without modality m))
        score[m] = KL(softmax(full / T) || softmax(without / T))      # measure="kl", in nats
        score[m] = ((full - without) ** 2).sum(-1)                    # measure="squared_error", for regression

    Without modality m the others take over its share of a joint softmax, as if it had been missing: no key is read
    again. `fusedmm.nn.GatedMultimodalAttention.modality_scores` calls this with the module's own projections.

    Args:
        partials: of `fusedmm.modality_partials`, N = total_q rows.
        head: gives the answer. An `nn.Linear` to V classes is scored without ever holding the logits; any other
            callable maps [N, width] to [N, V], and its answers are held for one modality at a time.
        log_prior: broadcasts from the right to [N, Hq, M]; joint only.
        gate: broadcasts to [N, Hq, M].
        softmax: "joint" or "per_modality", as the answer was made.
        projection: between attention and head, [N, Hq * D] to [N, width]: the output projection. None: width is Hq * D.
        measure: "kl" or "squared_error".
        temperature: divides the logits under "kl".
        impl: of the fused scores, as in `fusedmm.distillation_scores`.

    Returns:
        [N, M] float32, at least 0; 0 where the modality had no mass. Without gradient: scores are targets.

    Raises:
        ValueError: for an unknown measure or softmax, a temperature that is not positive, or a log_prior under
            per_modality.
        ShapeError: for an `nn.Linear` of another width, or a head of one output under "kl".
        TypeError: for partials, head or temperature of another type.

    Cost: M + 1 evaluations of projection and head, ``2 * N * Hq * M**2 * D`` FLOPs for the outputs without each of M.
    """
    if measure not in MEASURES:
        raise ValueError(f"{OP}: measure must be one of {', '.join(map(repr, MEASURES))}, got {measure!r}.")
    if not callable(head):
        raise TypeError(
            f"{OP}: head must be an nn.Linear or another callable, got {type(head).__name__}. Pass what "
            "maps the attention's output to the answer."
        )
    temperature = as_number(OP, "temperature", temperature)
    if not temperature > 0:
        raise ValueError(f"{OP}: temperature must be positive, got {temperature}.")
    merged = merge_modalities(partials, log_prior, gate, softmax)
    full = merged.output.flatten(1)
    without = [x.flatten(1) for x in leave_one_out(partials, log_prior, gate, softmax).unbind(2)]
    if projection is not None:
        full, without = projection(full), [projection(x) for x in without]
    if isinstance(head, nn.Linear) and head.in_features != full.shape[1]:
        raise ShapeError(
            f"{OP}: head must take the {full.shape[1]} features of "
            f"{'the heads together' if projection is None else 'the projection'}, got {head.in_features}. "
            "Pass the output projection as projection."
        )
    if isinstance(head, nn.Linear) and measure == "kl":
        _check_classes(head.out_features)
        teacher = LinearHead(full.to(head.weight.dtype), head.weight, head.bias)
        students = (LinearHead(x.to(head.weight.dtype), head.weight, head.bias) for x in without)
        rows = [distillation_scores(x, teacher, temperature=temperature, impl=impl).forward_kl for x in students]
    elif measure == "kl":
        logits = _answer(head, full)
        _check_classes(logits.shape[1])
        answer = torch.log_softmax(logits / temperature, -1)
        others = (torch.log_softmax(_answer(head, x) / temperature, -1) for x in without)
        rows = [(answer.exp() * (answer - x)).sum(-1) for x in others]
    else:
        answer = _answer(head, full)
        rows = [(answer - _answer(head, x)).square().sum(-1) for x in without]
    is_absent = (merged.mass == 0).all(1)  # [N, M]: the same answer, but not bit for bit
    return torch.stack(rows, 1).clamp_(min=0.0).masked_fill_(is_absent, 0.0)


def _answer(head: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """[N, width] to the head's [N, V], float32."""
    answer = head(x)
    check_shapes(OP, {"the head's answer": (answer, ("row", "class"))}, {"row": x.shape[0]})
    return answer.float()


def _check_classes(classes: int) -> None:
    if classes < 2:
        raise ShapeError(
            f'{OP}: head must give 2 classes or more for measure="kl", got {classes}, whose softmax never '
            'changes. Use measure="squared_error" for a regression.'
        )
