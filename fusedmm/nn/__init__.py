"""Modules: parameters, initialisation, and one call to the operators each."""

from fusedmm.nn.attention import FusionOutput, GatedMultimodalAttention
from fusedmm.nn.batch import MultimodalBatch
from fusedmm.nn.block import FusionBlock
from fusedmm.nn.distillation import DistillationLoss, FeatureDistillation, MassMatching
from fusedmm.nn.gate import GateOutput, ModalityGate

__all__ = [
    "DistillationLoss",
    "FeatureDistillation",
    "FusionBlock",
    "FusionOutput",
    "GateOutput",
    "GatedMultimodalAttention",
    "MassMatching",
    "ModalityGate",
    "MultimodalBatch",
]
