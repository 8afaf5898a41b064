"""fusedmm: fused gated multimodal attention and distillation scoring, as PyTorch operators and modules.

Importing it touches no GPU and imports no Triton.
"""

from fusedmm import nn
from fusedmm.heads import LinearHead, Logits, TopKLogProbs
from fusedmm.layout import ModalityLayout
from fusedmm.ops.attention import AttentionOutput, gated_multimodal_attention
from fusedmm.ops.distillation import DistillationScores, distillation_loss, distillation_scores
from fusedmm.ops.partials import ModalityPartials, leave_one_out, merge_modalities, modality_partials
from fusedmm.scoring import modality_scores
from fusedmm.selection import select_rows
from fusedmm.shapes import ShapeError

__version__ = "0.1.0"

__all__ = [
    "AttentionOutput",
    "DistillationScores",
    "LinearHead",
    "Logits",
    "ModalityLayout",
    "ModalityPartials",
    "ShapeError",
    "TopKLogProbs",
    "__version__",
    "distillation_loss",
    "distillation_scores",
    "gated_multimodal_attention",
    "leave_one_out",
    "merge_modalities",
    "modality_partials",
    "modality_scores",
    "nn",
    "select_rows",
]
