"""What a fusion module reads: the tokens of every modality packed once, for all layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor

from fusedmm.layout import ModalityLayout, occupied, uncompiled
from fusedmm.shapes import FLOATS, ShapeError, check_device, check_dtype, check_tensor, check_type
from fusedmm.tree import TensorTree

OP = "MultimodalBatch"


class BatchOptions(TypedDict, total=False):
    """What may be said of a batch beside its query and tokens; see `MultimodalBatch.build`."""

    masks: Mapping[str, Tensor] | None
    query_mask: Tensor | None
    times: Mapping[str, Tensor] | None
    query_time: Tensor | None
    lookback: int | Mapping[str, int] | None
    active: Tensor | None


@dataclass(frozen=True, eq=False)
class MultimodalBatch(TensorTree):
    """Tokens of all modalities without padding, and how they lie.

    Attributes:
        layout: of queries and keys, with times if there are any.
        tokens: for each modality of the layout, in its order, its tokens packed over the samples [n_m, Em].
        key_source: [total_k] int64, where key j of the layout lies in the concatenation of all tokens.
        active: [B, M] or [B, Hq, M] bool, or None.
        query_slots: [total_q] int64, rows of the padded query [B * Lq]; None where the query was packed already.
        query_shape: (B, Lq) of the padded query.
    """

    layout: ModalityLayout
    tokens: Mapping[str, Tensor]
    key_source: Tensor
    active: Tensor | None
    query_slots: Tensor | None
    query_shape: tuple[int, int]

    @classmethod
    def of(
        cls,
        query: Tensor,
        tokens: "Mapping[str, Tensor] | MultimodalBatch",
        modalities: Mapping[str, int],
        **options: Unpack[BatchOptions],
    ) -> "MultimodalBatch":
        """The batch itself where ``tokens`` is one, else `build`'s with the options.

        Raises:
            ValueError: for a batch beside masks, times or anything else that it holds already, or one that was built
                for other modalities, or for these in another order.
        """
        if not isinstance(tokens, MultimodalBatch):
            return cls.build(query, tokens, modalities, **options)
        widths = [(name, x.shape[-1]) for name, x in tokens.tokens.items()]
        if widths != list(modalities.items()):
            raise ValueError(
                f"{OP}: a batch must have the module's modalities in its order, {modalities}, got {dict(widths)}. "
                "Build it with the module's `modalities`."
            )
        given = [name for name, value in options.items() if value is not None]
        if given:
            raise ValueError(
                f"{OP}: a batch holds its own {given[0]}, got both. Give {given[0]} to MultimodalBatch.build."
            )
        return tokens

    @classmethod
    def build(
        cls,
        query: Tensor,
        tokens: Mapping[str, Tensor],
        modalities: Mapping[str, int],
        *,
        masks: Mapping[str, Tensor] | None = None,
        query_mask: Tensor | None = None,
        times: Mapping[str, Tensor] | None = None,
        query_time: Tensor | None = None,
        lookback: int | Mapping[str, int] | None = None,
        active: Tensor | None = None,
    ) -> "MultimodalBatch":
        """Pack a batch. Waits for the GPU once where there are masks or nested tensors, and once more for times.

        For the layers of one step, which then pack nothing themselves::

            batch = MultimodalBatch.build(query, tokens, attention.modalities, masks=masks)
            output, mass = attention(query, batch)

        Args:
            query: [B, Lq, E] padded, or a jagged nested tensor.
            tokens: for each modality its name and [B, Lm, Em], or a jagged nested tensor; a modality that is left out
                is missing from every sample.
            modalities: names and token widths the module knows, in its order.
            masks: for padded modalities [B, Lm] bool, True where there is a token; a modality without a mask is full.
            query_mask: [B, Lq] bool.
            times: for every modality given [B, Lm] int64 (or nested): when each token was knowable.
            query_time: [B, Lq] int64 (or nested): what is knowable then may be seen.
            lookback: half-open window in the unit of the times; one for all, or by name (those left out are unbounded).
            active: [B, M] or [B, Hq, M] bool, False switches a modality off.

        Raises:
            ValueError: for an unknown modality, or times for some modalities only.
            ShapeError, TypeError: for shapes and dtypes that do not fit.
        """
        masks, times = {} if masks is None else masks, {} if times is None else times
        _check_given(query, tokens, modalities, masks, times, query_time, lookback)
        _check_active(active, query.shape[0], len(modalities))
        batch, device = query.shape[0], query.device
        queries = _Ragged.of("query", query, "query_mask", query_mask, batch, None)
        given = {
            name: _Ragged.of(
                f"tokens[{name!r}]", tokens[name], f"masks[{name!r}]", masks.get(name), batch, modalities[name]
            )
            for name in modalities
            if name in tokens
        }
        nothing = torch.zeros(batch, dtype=torch.int64, device="cpu")
        q_lengths, *k_lengths = _on_host(
            [queries.lengths, *(given[name].lengths if name in given else nothing for name in modalities)]
        )
        lengths = torch.stack(k_lengths, 1)
        layout = ModalityLayout.from_lengths(q_lengths, lengths, list(modalities), device)
        totals = dict(zip(modalities, lengths.sum(0).tolist(), strict=True))
        slots = {name: ragged.slots(totals[name]) for name, ragged in given.items()}
        packed = {
            name: _take(given[name].values, slots[name]) if name in given else queries.values.new_zeros((0, width))
            for name, width in modalities.items()
        }
        key_source = uncompiled(_key_source)(layout, lengths)
        query_slots = queries.slots(layout.total_q)
        if query_time is not None and tokens:
            key_time = torch.cat(
                [_take(_flat_time(f"times[{name!r}]", times[name], tokens[name]), slots[name]) for name in given]
            )
            layout = layout.at_times(
                _take(_flat_time("query_time", query_time, query), query_slots),
                key_time[key_source],
                _lookback(lookback, modalities),
            )
        shape = (batch, 0 if query.is_nested else query.shape[1])
        return cls(layout, packed, key_source, active, query_slots, shape)

    def pack_query(self, query: Tensor, width: int | None = None) -> Tensor:
        """[B, Lq, E] or nested to [total_q, E]; packed queries pass.

        Raises:
            ShapeError: where B and Lq are not those that the batch was built with, or E is not ``width``, if given.
            ValueError: where query and batch are on two devices.
        """
        check_tensor(OP, "query", query)
        if query.device != self.key_source.device:
            check_device(OP, {"the batch": self.key_source, "query": query})
        if query.ndim == 3 and not query.is_nested and tuple(query.shape[:2]) != self.query_shape:
            raise ShapeError(
                f"{OP}: query must have the shape that the batch was built with, {list(self.query_shape)}, got "
                f"{list(query.shape[:2])}. Build a batch for this query."
            )
        rows = _nested_rows("query", query) if query.is_nested else query.flatten(0, -2)
        if width not in (None, rows.shape[-1]):
            raise ShapeError(f"{OP}: query must have width {width}, the module's embed_dim, got {rows.shape[-1]}.")
        return _take(rows, None if query.ndim == 2 else self.query_slots)

    def restore_query(self, packed: Tensor, like: Tensor) -> Tensor:
        """[total_q, ...] to the form that ``like``, the query, came in; zeros in the padding."""
        if like.is_nested:
            return torch.nested.nested_tensor_from_jagged(packed, _offsets(like))
        if like.ndim == 2:
            return packed
        rows = packed
        if self.query_slots is not None:
            flat = packed.new_zeros((self.query_shape[0] * self.query_shape[1], *packed.shape[1:]))
            rows = flat.index_copy(0, self.query_slots, packed)
        # no view to autograd, as of a matmul: FSDP2 wants none from what it shards
        restored: Tensor = torch.ops.aten._unsafe_view.default(rows, (*self.query_shape, *packed.shape[1:]))
        return restored


def _check_given(
    query: Tensor,
    tokens: Mapping[str, Tensor],
    modalities: Mapping[str, int],
    masks: Mapping[str, Tensor],
    times: Mapping[str, Tensor],
    query_time: Tensor | None,
    lookback: int | Mapping[str, int] | None,
) -> None:
    """What `MultimodalBatch.build` wants of its arguments together: kinds, names, devices, all times or none."""
    if not isinstance(modalities, Mapping):
        raise TypeError(
            f"{OP}: modalities must map names to token widths, got {type(modalities).__name__}. "
            "Pass the module's `modalities`."
        )
    if not isinstance(tokens, Mapping) or not isinstance(query, Tensor):
        raise TypeError(
            f"{OP}: query must be a tensor and tokens must map names to tensors, got {type(query).__name__} and "
            f"{type(tokens).__name__}."
        )
    for argument, mapping in (("masks", masks), ("times", times)):
        check_type(OP, argument, mapping, Mapping, "Give {name: tensor}.")
    absent = [name for name, x in tokens.items() if x is None]
    if absent:
        raise TypeError(f"{OP}: tokens[{absent[0]!r}] must be a tensor, got None. Leave a missing modality out.")
    for argument, mapping in (("tokens", tokens), ("masks", masks), ("times", times)):
        unknown = [name for name in mapping if name not in modalities]
        if unknown:
            raise ValueError(
                f"{OP}: {argument} names an unknown modality, got {unknown[0]!r}. The module knows {list(modalities)}."
            )
    tensors = {
        "query": query,
        **{f"tokens[{name!r}]": x for name, x in tokens.items()},
        **{f"masks[{name!r}]": x for name, x in masks.items()},
        **{f"times[{name!r}]": x for name, x in times.items()},
        **({} if query_time is None else {"query_time": query_time}),
    }
    for argument, tensor in tensors.items():
        check_tensor(OP, argument, tensor)
    check_device(OP, tensors)
    if tokens and (bool(times) != (query_time is not None) or (times and set(times) != set(tokens))):
        lacking = [*(name for name in tokens if name not in times), *(["query_time"] if query_time is None else [])]
        raise ValueError(
            f"{OP}: times must be given for every modality and for the query (query_time), got none for "
            f"{', '.join(lacking) or 'tokens of ' + ', '.join(sorted(set(times) - set(tokens)))}."
        )
    if tokens and lookback is not None and query_time is None:
        raise ValueError(f"{OP}: lookback needs times and query_time, got lookback alone.")


def _check_active(active: Tensor | None, batch: int, modalities: int) -> None:
    """[B, M] or [B, Hq, M] bool, with any Hq: the module knows it."""
    if active is None:
        return
    check_dtype(OP, "active", active, (torch.bool,), ". False switches a segment off; use active.bool().")
    shape = tuple(active.shape)
    if len(shape) not in (2, 3) or (shape[0], shape[-1]) != (batch, modalities):
        raise ShapeError(
            f"{OP}: active must be [batch, modality] or [batch, head, modality] with batch={batch} and "
            f"modality={modalities}, got shape {list(shape)}."
        )


@dataclass(frozen=True)
class _Ragged:
    """Rows of one padded or nested tensor: flat values [rows, width], lengths [B], which are on the CPU where every
    sample is full, and the mask that picks the rows that count.
    """

    values: Tensor
    lengths: Tensor
    mask: Tensor | None

    @classmethod
    def of(
        cls, argument: str, x: Tensor, mask_argument: str, mask: Tensor | None, batch: int, width: int | None
    ) -> "_Ragged":
        check_dtype(OP, argument, x, FLOATS, ". Use .float(); ids go through torch.nn.Embedding first.")
        if x.is_nested:
            if mask is not None:
                raise ValueError(
                    f"{OP}: {argument} is nested and has its own lengths, got {mask_argument} too. Drop the mask."
                )
            rows = _nested_rows(argument, x)
            ragged = cls(rows, _offsets(x).diff(), None)
        else:
            if x.ndim != 3:
                raise ShapeError(
                    f"{OP}: {argument} must be [batch, tokens, width] or a jagged nested tensor, got shape "
                    f"{list(x.shape)}."
                )
            if mask is not None:
                check_dtype(OP, mask_argument, mask, (torch.bool,), ". True where there is a token; use .bool().")
                if mask.shape != x.shape[:2]:
                    raise ShapeError(
                        f"{OP}: {mask_argument} must have shape {list(x.shape[:2])}, got {list(mask.shape)}."
                    )
            lengths = torch.full((x.shape[0],), x.shape[1], device="cpu") if mask is None else mask.sum(1)
            ragged = cls(x.flatten(0, 1), lengths, mask)
        if ragged.lengths.shape[0] != batch:
            raise ShapeError(f"{OP}: {argument} has batch={ragged.lengths.shape[0]}, but query has batch={batch}.")
        if width is not None and ragged.values.shape[-1] != width:
            raise ShapeError(f"{OP}: {argument} must have width {width}, got {ragged.values.shape[-1]}.")
        return ragged

    def slots(self, total: int) -> Tensor | None:
        """Rows that count, in order; None: all of them."""
        return None if self.mask is None else occupied(self.mask, total)


def _on_host(lengths: list[Tensor]) -> list[Tensor]:
    """The same on the CPU: all that lie on a GPU come in one copy."""
    away = [x for x in lengths if not x.is_cpu]
    came = iter(torch.stack(away).cpu()) if away else iter(())
    return [x if x.is_cpu else next(came) for x in lengths]


def _nested_rows(argument: str, nested: Tensor) -> Tensor:
    """Values [rows, width] of a jagged nested tensor; one with holes, as ``torch.nested.narrow`` gives, is refused."""
    if nested.layout != torch.jagged:
        raise TypeError(
            f"{OP}: {argument} must be a jagged nested tensor, got the strided layout. Use "
            "torch.nested.as_nested_tensor(..., layout=torch.jagged)."
        )
    if not nested.is_contiguous():
        raise ValueError(f"{OP}: {argument} must be contiguous, got a nested tensor with holes. Use .contiguous().")
    rows: Tensor = nested.values()
    return rows


def _offsets(nested: Tensor) -> Tensor:
    offsets: Tensor = nested.offsets()  # type: ignore[attr-defined]
    return offsets


def _take(rows: Tensor, slots: Tensor | None) -> Tensor:
    return rows if slots is None else rows.index_select(0, slots)


def _flat_time(argument: str, time: Tensor, like: Tensor) -> Tensor:
    if not time.is_nested and tuple(time.shape) != tuple(like.shape[:2]):
        advice = " Use query_time[:, None].expand(-1, Lq)." if argument == "query_time" and time.ndim == 1 else ""
        raise ShapeError(f"{OP}: {argument} must have shape {list(like.shape[:2])}, got {list(time.shape)}.{advice}")
    flat = time.values() if time.is_nested else time.flatten()
    advice = " (it cannot hold epoch times exactly)" if flat.is_floating_point() else ""
    check_dtype(OP, argument, flat, (torch.int64,), f"{advice}. Use .to(torch.int64).")
    return flat


def _lookback(lookback: int | Mapping[str, int] | None, modalities: Mapping[str, int]) -> int | Tensor | None:
    if not isinstance(lookback, Mapping):
        return lookback
    unknown = [name for name in lookback if name not in modalities]
    if unknown:
        raise ValueError(
            f"{OP}: lookback names an unknown modality, got {unknown[0]!r}. The module knows {list(modalities)}."
        )
    for name, window in lookback.items():
        check_type(OP, f"lookback[{name!r}]", window, Integral, "Leave an unbounded modality out.")
        if isinstance(window, bool) or window < 0:
            raise ValueError(f"{OP}: lookback[{name!r}] must be a whole number of time units, 0 or more, got {window}.")
    return torch.tensor([int(lookback.get(name, 2**63 - 1)) for name in modalities])


def _key_source(layout: ModalityLayout, lengths: Tensor) -> Tensor:
    """Row of each packed key in the concatenation of all modalities' tokens, modality after modality."""
    device, counts = layout.cu_seqlens_k.device, lengths.numpy()
    by_modality = counts.T.ravel()
    first = (by_modality.cumsum() - by_modality).reshape(counts.T.shape).T  # [B, M] where a segment starts there
    counts = counts.ravel()
    shift = first.ravel() - counts.cumsum() + counts  # the same for all keys of a segment
    shifts, repeats = torch.from_numpy(np.stack((shift, counts))).to(device, non_blocking=True).unbind()
    shifts = shifts.repeat_interleave(repeats, output_size=layout.total_k)
    return shifts + torch.arange(layout.total_k, device=device)
