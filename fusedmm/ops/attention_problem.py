"""What the registered operators of attention are asked beside query, key and value."""

from typing import TYPE_CHECKING, Any, NamedTuple, cast

from torch import Tensor

from fusedmm.eager.attention_inputs import Inputs

if TYPE_CHECKING:
    from fusedmm.kernels.attention.arguments import AttentionProblem


class Problem(NamedTuple):
    """All but query, key and value, in the order of the schemas."""

    log_prior: Tensor | None  # [total_q, Hq, M]
    gate: Tensor | None  # [total_q, Hq, M]
    output_gate: Tensor | None  # [total_q, Hq, D]
    cu_seqlens_q: Tensor  # [B+1]
    cu_seqlens_k: Tensor  # [B*M+1]
    query_tiles: Tensor  # [tiles, 2]
    key_tiles: Tensor  # [tiles, 2]
    active: Tensor | None  # [B, Hq, M]
    visible: Tensor | None  # [total_q, M, 2]
    seed: Tensor | None  # [1]
    num_modalities: int
    dropout_p: float
    scale: float
    softmax: str
    impl: str

    def for_kernels(self) -> "AttentionProblem":
        """The same for the Triton launchers."""
        from fusedmm.kernels.attention.arguments import AttentionProblem

        return AttentionProblem(
            cu_seqlens_q=self.cu_seqlens_q,
            cu_seqlens_k=self.cu_seqlens_k,
            query_tiles=self.query_tiles,
            key_tiles=self.key_tiles,
            num_modalities=self.num_modalities,
            softmax=cast(Any, self.softmax),
            scale=self.scale,
            log_prior=self.log_prior,
            gate=self.gate,
            output_gate=self.output_gate,
            active=self.active,
            visible=self.visible,
            seed=self.seed,
            dropout_p=self.dropout_p,
        )

    def eager_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> Inputs:
        """The same for the eager composition, which leaves the output gate to its caller."""
        return Inputs(
            query,
            key,
            value,
            self.cu_seqlens_q,
            self.cu_seqlens_k,
            self.num_modalities,
            self.log_prior,
            self.gate,
            self.active,
            self.visible,
            self.seed,
            self.dropout_p,
            self.scale,
        )


TENSORS = 3 + Problem._fields.index("num_modalities")  # of an operator's arguments: they lead, settings follow
