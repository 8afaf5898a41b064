"""GatedMultimodalAttention: the fused attention as a module with parameters."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Unpack

import torch
from torch import Tensor, nn

from fusedmm.impl import IMPLEMENTATIONS
from fusedmm.layout import MAX_MODALITIES
from fusedmm.nn.batch import BatchOptions, MultimodalBatch
from fusedmm.nn.gate import ModalityGate
from fusedmm.ops.attention import MAX_HEAD_DIM, MIN_HEAD_DIM, SOFTMAXES, gated_multimodal_attention
from fusedmm.ops.partials import modality_partials
from fusedmm.scoring import modality_scores
from fusedmm.shapes import as_number, check_dtype, check_type

Modalities = Sequence[str] | Mapping[str, int]


class FusionOutput(NamedTuple):
    """What a fusion module gives, in the form the query came in (padded, nested or packed).

    Attributes:
        output: [B, Lq, embed_dim], the query's dtype; zeros in the padding.
        mass: [B, Lq, num_heads, M] float32, attention mass of each modality; differentiable.
    """

    output: Tensor
    mass: Tensor


class GatedMultimodalAttention(nn.Module):
    """Cross-attention from a query to the tokens of several modalities, with learned priors and gates.

    Every modality has its own key and value projection, so token widths may differ. Drop-in for a cross-attention::

        attention = GatedMultimodalAttention(256, 8, {"price": 16, "text": 384})
        fused = attention(query, {"price": bars, "text": sentences}, masks={"text": sentence_mask})
        fused.output, fused.mass

    Args:
        embed_dim: width of query and output.
        num_heads: query heads; ``embed_dim / num_heads`` is the head dim, 16 to 256.
        modalities: names, each of token width embed_dim, or names with their token widths.
        num_kv_heads: key and value heads, a divisor of num_heads; None: num_heads.
        softmax: "joint" over all modalities, or "per_modality".
        prior: learn a log prior of each modality from the query (joint only).
        gate: learn a gate of each modality from the query.
        output_gate: learn a sigmoid gate of every output channel from the query.
        threshold, patience, momentum: when a modality is switched off, see `ModalityGate`; threshold None: never.
        dropout: attention dropout in training.
        bias: biases of the projections.
        impl: as in `fusedmm.gated_multimodal_attention`.
        device, dtype: of the parameters.

    Raises:
        ValueError: dimensions that do not divide, no or duplicate or unusable modality names, values out of range.
        TypeError: sizes that are no whole numbers.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        modalities: Modalities,
        *,
        num_kv_heads: int | None = None,
        softmax: str = "joint",
        prior: bool = True,
        gate: bool = True,
        output_gate: bool = False,
        threshold: float | None = None,
        patience: int = 100,
        momentum: float = 0.99,
        dropout: float = 0.0,
        bias: bool = True,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for argument, size in (("embed_dim", embed_dim), ("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
            if size is not None:
                check_type("GatedMultimodalAttention", argument, size, int, "Sizes are whole numbers.")
        self.modalities = _modality_widths(modalities, embed_dim)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if min(num_heads, num_kv_heads) < 1 or embed_dim % num_heads or num_heads % num_kv_heads:
            raise ValueError(
                "GatedMultimodalAttention: num_heads must divide embed_dim and num_kv_heads must divide "
                f"num_heads, got {embed_dim}, {num_heads} and {num_kv_heads}."
            )
        if softmax not in SOFTMAXES or impl not in IMPLEMENTATIONS:
            raise ValueError(
                f"GatedMultimodalAttention: softmax must be one of {SOFTMAXES} and impl one of {IMPLEMENTATIONS}, "
                f"got {softmax!r} and {impl!r}."
            )
        head_dim = embed_dim // num_heads
        if not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
            raise ValueError(
                f"GatedMultimodalAttention: embed_dim / num_heads must be {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, got "
                f"{head_dim}. Change num_heads."
            )
        if not 0.0 <= as_number("GatedMultimodalAttention", "dropout", dropout) < 1.0:
            raise ValueError(f"GatedMultimodalAttention: dropout must be in [0, 1), got {dropout}.")
        self.embed_dim, self.num_heads, self.num_kv_heads, self.head_dim = embed_dim, num_heads, num_kv_heads, head_dim
        self.softmax, self.dropout, self.impl = softmax, dropout, impl
        kv_width = num_kv_heads * head_dim
        self.query_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.key_proj, self.value_proj = (
            nn.ModuleDict(
                {
                    name: nn.Linear(width, kv_width, bias=bias, device=device, dtype=dtype)
                    for name, width in self.modalities.items()
                }
            )
            for _ in range(2)
        )
        self.output_gate_proj = nn.Linear(embed_dim, embed_dim, device=device, dtype=dtype) if output_gate else None
        self.modality_gate = ModalityGate(
            embed_dim,
            num_heads,
            len(self.modalities),
            prior=prior and softmax == "joint",
            gate=gate,
            threshold=threshold,
            patience=patience,
            momentum=momentum,
            device=device,
            dtype=dtype,
        )
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform projections with zero biases, an output gate half open, a neutral modality gate."""
        for layer in (self.query_proj, self.out_proj, *self.key_proj.values(), *self.value_proj.values()):
            assert isinstance(layer, nn.Linear)
            _reset_projection(layer)
        if self.output_gate_proj is not None:
            nn.init.zeros_(self.output_gate_proj.weight)
            nn.init.zeros_(self.output_gate_proj.bias)
        self.modality_gate.reset_parameters()

    def add_modality(self, name: str, width: int) -> None:
        """Take in a modality that a trained module has not seen, as the last one; the others keep what they learnt.

        Its projections are new and its prior and gate neutral. An optimiser made before, or a sharded module, does not
        know the new parameters: add first.

        Args:
            name: of the modality.
            width: of its tokens.

        Raises:
            ValueError: for a name that is there already or cannot be one, or a width below 1.
            TypeError: for a width that is no whole number, or projections that are no `nn.Linear` any more.
        """
        op = "GatedMultimodalAttention.add_modality"
        if name in self.modalities:
            raise ValueError(f"{op}: name must be new, got {name!r}. The module knows {list(self.modalities)}.")
        modalities = _modality_widths({**self.modalities, name: width}, self.embed_dim)
        gate = self.modality_gate
        for argument, layer in (("query_proj", self.query_proj), ("prior", gate.prior), ("gate", gate.gate)):
            if layer is not None:
                check_type(op, argument, layer, nn.Linear, "Add before layers are replaced or sharded.")
        weight, bias = self.query_proj.weight, self.query_proj.bias is not None
        for proj in (self.key_proj, self.value_proj):
            new = nn.Linear(width, self.num_kv_heads * self.head_dim, bias, weight.device, weight.dtype)
            _reset_projection(new)
            proj[name] = new
        gate.add_modality()
        self.modalities = modalities

    def forward(
        self,
        query: Tensor,
        tokens: Mapping[str, Tensor] | MultimodalBatch,
        **options: Unpack[BatchOptions],
    ) -> FusionOutput:
        """Fuse the modalities' tokens into the query.

        Args:
            query: [B, Lq, embed_dim] padded, or jagged nested; [total_q, embed_dim] beside a MultimodalBatch.
            tokens: {name: [B, Lm, width]} padded or nested, missing modalities left out; or a `MultimodalBatch` built
                once for many layers (then nothing else may be given).
            options: masks, query_mask, times, query_time, lookback, active: see `MultimodalBatch.build`.

        Returns:
            FusionOutput(output, mass).

        Raises:
            ValueError, ShapeError, TypeError: as `MultimodalBatch.build`; ValueError too for anything beside a batch.
        """
        batch = MultimodalBatch.of(query, tokens, self.modalities, **options)
        packed = batch.pack_query(query, self.embed_dim)
        self._check_dtypes(packed, batch)
        log_prior, gate = self.modality_gate(packed)
        output_gate = None if self.output_gate_proj is None else self._heads(self.output_gate_proj(packed))
        result = gated_multimodal_attention(
            self._heads(self.query_proj(packed)),
            *self._keys_values(batch),
            batch.layout,
            log_prior=log_prior,
            gate=gate,
            output_gate=output_gate,
            active=self._active(batch),
            softmax=self.softmax,
            dropout_p=self.dropout if self.training else 0.0,
            impl=self.impl,
        )
        output = self._project(result.output.flatten(-2))
        return FusionOutput(batch.restore_query(output, query), batch.restore_query(result.mass, query))

    @torch.no_grad()
    def modality_scores(
        self,
        query: Tensor,
        tokens: Mapping[str, Tensor] | MultimodalBatch,
        head: nn.Linear | Callable[[Tensor], Tensor],
        *,
        measure: str = "kl",
        temperature: float = 1.0,
        **options: Unpack[BatchOptions],
    ) -> Tensor:
        """How much the head's answer changes without each modality, from one attention pass; see
        `fusedmm.modality_scores`.

        What `ModalityGate` learns from, on the rows that count::

            scores = attention.modality_scores(query, tokens, head, query_mask=query_mask)
            attention.modality_gate.update(scores[query_mask])

        Args:
            query, tokens, options: as in `forward`.
            head: what follows this module, from [N, embed_dim] to [N, V]; an `nn.Linear` is never asked for its logits.
            measure, temperature: as in `fusedmm.modality_scores`.

        Returns:
            [B, Lq, M] float32 (nested or packed as the query), 0 in the padding; of the undropped attention, without
            gradient.

        Raises:
            ValueError, ShapeError, TypeError: as `forward` and `fusedmm.modality_scores`.
        """
        batch = MultimodalBatch.of(query, tokens, self.modalities, **options)
        packed = batch.pack_query(query, self.embed_dim)
        self._check_dtypes(packed, batch)
        log_prior, gate = self.modality_gate(packed)
        open_share = None if self.output_gate_proj is None else self.output_gate_proj(packed).sigmoid()
        scores = modality_scores(
            modality_partials(
                self._heads(self.query_proj(packed)),
                *self._keys_values(batch),
                batch.layout,
                active=self._active(batch),
                impl=self.impl,
            ),
            head,
            log_prior=log_prior,
            gate=gate,
            softmax=self.softmax,
            projection=lambda x: self._project(x if open_share is None else x * open_share),
            measure=measure,
            temperature=temperature,
            impl=self.impl,
        )
        return batch.restore_query(scores, query)

    def _heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (-1, self.head_dim))
        return heads

    def _project(self, x: Tensor) -> Tensor:
        projected: Tensor = self.out_proj(x)
        return projected

    def _check_dtypes(self, query: Tensor, batch: MultimodalBatch) -> None:
        """Say what to do where a plain layer cannot multiply what it is given: what replaces one, an adapter or a
        quantised layer, knows itself what it takes.
        """
        layer = self.query_proj
        if type(layer) is not nn.Linear:
            return
        wanted = layer.weight.dtype
        if all(x.dtype == wanted for x in (query, *batch.tokens.values())):
            return
        given: dict[str, tuple[Tensor, nn.Module]] = {"query": (query, layer)}
        given |= {f"tokens[{name!r}]": (x, self.key_proj[name]) for name, x in batch.tokens.items()}
        for argument, (x, own) in given.items():
            if type(own) is nn.Linear and not torch.is_autocast_enabled(x.device.type):
                advice = ". Cast it to the dtype of the weights, cast the module, or use torch.autocast."
                check_dtype("GatedMultimodalAttention", argument, x, (own.weight.dtype,), advice)

    def _keys_values(self, batch: MultimodalBatch) -> tuple[Tensor, Tensor]:
        """Project every modality's tokens and put them in the layout's order: [total_k, Hkv, D] each."""
        key, value = (
            self._heads(
                torch.cat([proj[name](tokens) for name, tokens in batch.tokens.items()]).index_select(
                    0, batch.key_source
                )
            )
            for proj in (self.key_proj, self.value_proj)
        )
        return key, value

    def _active(self, batch: MultimodalBatch) -> Tensor | None:
        switched = self.modality_gate.active(batch.layout.batch_size)
        if batch.active is None or switched is None:
            return switched if batch.active is None else batch.active
        return batch.active & (switched if batch.active.ndim == 2 else switched[:, None])

    def extra_repr(self) -> str:
        """Sizes, for print(module)."""
        sizes = f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}"
        return f"{sizes}, softmax={self.softmax!r}, impl={self.impl!r}"


def _reset_projection(layer: nn.Linear) -> None:
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _modality_widths(modalities: Modalities, embed_dim: int) -> dict[str, int]:
    if isinstance(modalities, str) or not isinstance(modalities, Sequence | Mapping) or not modalities:
        raise ValueError(
            "GatedMultimodalAttention: modalities must be a non-empty sequence of names or a mapping to widths, "
            f"got {modalities!r}."
        )
    widths = dict(modalities) if isinstance(modalities, Mapping) else dict.fromkeys(modalities, embed_dim)
    for name, width in widths.items():
        if not isinstance(name, str) or not isinstance(width, int) or isinstance(width, bool):
            raise TypeError(
                f"GatedMultimodalAttention: modalities must be names with whole token widths, got {name!r}: {width!r}."
            )
        if width < 1:
            raise ValueError(f"GatedMultimodalAttention: a token width must be at least 1, got {width} for {name!r}.")
    if len(widths) > MAX_MODALITIES:
        raise ValueError(
            f"GatedMultimodalAttention: modalities must be at most {MAX_MODALITIES}, got {len(widths)}. Merge some."
        )
    if len(widths) != len(modalities):
        raise ValueError(f"GatedMultimodalAttention: modalities must have different names, got {list(modalities)}.")
    unusable = [name for name in widths if not name or "." in name or hasattr(nn.ModuleDict(), name)]
    if unusable:
        raise ValueError(
            'GatedMultimodalAttention: a modality name must be non-empty, without "." and no attribute of ModuleDict, '
            f"got {unusable[0]!r}."
        )
    return widths
