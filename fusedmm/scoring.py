"""How much each modality matters to the answer, from one attention pass: the importance that filters learn from."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fusedmm.heads import LinearHead
from fusedmm.ops.distillation import distillation_scores
from fusedmm.ops.partials import ModalityPartials, leave_one_out, merge_modalities
from fusedmm.shapes import ShapeError

MEASURES = ("kl", "squared_error")


@torch.no_grad()
def modality_scores(
    partials: ModalityPartials,
    head: nn.Linear | Callable[[Tensor], Tensor],
    *,
    log_prior: Tensor | None = None,
    gate: Tensor | None = None,
    measure: str = "kl",
    temperature: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """Change of the answer when one modality is left out, for every modality at once.

    ::

        full, without = head(output), head(output without modality m)
        score[m] = KL(softmax(full / T) || softmax(without / T))      # measure="kl", in nats
        score[m] = ((full - without) ** 2).sum(-1)                    # measure="squared_error", for regression

    Without modality m the others take over its share of the attention, as if it had been missing: no key is read again.

    Args:
        partials: of `fusedmm.modality_partials`, N = total_q rows.
        head: what follows the attention. An `nn.Linear` from Hq * D to V classes is scored without ever holding the
            logits; any other callable maps [N, Hq * D] to [N, V], and its answers are held for one modality at a time.
        log_prior: broadcasts from the right to [N, Hq, M].
        gate: broadcasts to [N, Hq, M].
        measure: "kl" or "squared_error".
        temperature: divides the logits under "kl".
        impl: of the fused scores, as in `fusedmm.distillation_scores`.

    Returns:
        [N, M] float32, at least 0; 0 where the modality had no mass. Without gradient: scores are targets.

    Raises:
        ValueError: for an unknown measure, or an `nn.Linear` under "squared_error" of another width than Hq * D.

    Cost: M + 1 evaluations of the head, ``2 * N * Hq * M**2 * D`` FLOPs for the outputs without each modality.
    """
    if measure not in MEASURES:
        raise ValueError(f"modality_scores: measure must be one of {', '.join(map(repr, MEASURES))}, got {measure!r}.")
    rows, heads, modalities, dim = partials.output.shape
    if isinstance(head, nn.Linear) and head.in_features != heads * dim:
        raise ShapeError(
            f"modality_scores: head must take head * dim = {heads * dim} features, got {head.in_features}. "
            "Pass a callable that applies the output projection first."
        )
    full = merge_modalities(partials, log_prior, gate).output.flatten(1)
    without = leave_one_out(partials, log_prior, gate)
    scores = torch.empty((rows, modalities), dtype=torch.float32, device=full.device)
    answer = None if isinstance(head, nn.Linear) and measure == "kl" else head(full).float()
    for modality in range(modalities):
        left_out = without[:, :, modality].flatten(1)
        if answer is None:
            assert isinstance(head, nn.Linear)
            student, teacher = (LinearHead(x.to(head.weight.dtype), head.weight, head.bias) for x in (left_out, full))
            scores[:, modality] = distillation_scores(student, teacher, temperature=temperature, impl=impl).forward_kl
        elif measure == "kl":
            log_full, log_without = (
                torch.log_softmax(logits / temperature, -1) for logits in (answer, head(left_out).float())
            )
            scores[:, modality] = (log_full.exp() * (log_full - log_without)).sum(-1)
        else:
            scores[:, modality] = (answer - head(left_out).float()).square().sum(-1)
    return scores.clamp_(min=0.0)
