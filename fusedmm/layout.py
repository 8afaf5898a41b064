"""Where everything lies: the packed layout of one batch, built once and used by every layer.

Queries of all samples stand one after another, and so do keys: sample-major, modality-minor, without padding. Segment
``(b, m)`` is the contiguous run of modality ``m`` in sample ``b``; a segment of length 0 is a missing modality.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fusedmm.shapes import ShapeError, check_device, check_dtype, check_shapes, check_tensor, check_type
from fusedmm.tree import TensorTree
from fusedmm.visibility import Visibility, find_visible

MAX_MODALITIES = 32
TILE = 128  # rows of a tile of the work lists; kernels with smaller blocks share one
UNKNOWN = -1  # a total that is still to be read from the offsets
INTEGERS = (torch.int32, torch.int64)

Counts = npt.NDArray[np.int64]
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, eq=False)
class ModalityLayout(TensorTree, static=("num_modalities", "names")):
    """Offsets of samples and segments in packed queries and keys.

    Build it with `from_lengths` or `from_masks`, once a batch; either waits once for the GPU, to learn the lengths: all
    tables are then made on the host, where they are a few microseconds, and copied. Of lengths on the CPU, or built
    there, in a worker of a DataLoader for example, and moved by ``to(device, non_blocking=True)``, it never waits.

    Attributes:
        cu_seqlens_q: [B+1] int32, queries of sample b are ``cu_seqlens_q[b] : cu_seqlens_q[b+1]``.
        cu_seqlens_k: [B*M+1] int32, keys of segment (b, m) are ``cu_seqlens_k[b*M+m] : cu_seqlens_k[b*M+m+1]``.
        num_modalities: M, 1 to 32.
        max_seqlen_q: most queries of one sample.
        max_seqlen_k: most keys of one sample, over all its modalities.
        names: the modalities' names, if they have any.
        visibility: which keys a query may see by time, from `at_times`; None: all.
        total_q, total_k: queries and keys in all; these and what follows are found where they are not given.
        max_segments_k: most keys of one segment, for each modality.
        query_tiles, key_tiles: work lists of the kernels.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    num_modalities: int
    max_seqlen_q: int
    max_seqlen_k: int
    names: tuple[str, ...] | None = None
    visibility: Visibility | None = None
    total_q: int = field(default=UNKNOWN, repr=False)
    total_k: int = field(default=UNKNOWN, repr=False)
    max_segments_k: tuple[int, ...] = field(default=(), repr=False)
    query_tiles: Tensor = field(default=cast(Tensor, None), repr=False)
    key_tiles: Tensor = field(default=cast(Tensor, None), repr=False)
    # Of `from_masks`: flat places of the tokens among the padded ones, and the padded lengths.
    _query_slots: Tensor | None = field(default=None, repr=False)
    _key_slots: Tensor | None = field(default=None, repr=False)
    _padded_q: int | None = field(default=None, repr=False)
    _padded_k: tuple[int, ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        modalities = self.num_modalities
        if not 1 <= modalities <= MAX_MODALITIES:
            raise ValueError(
                f"ModalityLayout: num_modalities must be 1 to {MAX_MODALITIES}, got {modalities}. Of more, "
                "merge some, or split the attention."
            )
        if self.names is not None and (len(self.names) != modalities or len(set(self.names)) != modalities):
            raise ValueError(
                f"ModalityLayout: names must be {modalities} different names, one a modality, got {list(self.names)}."
            )
        for argument in ("cu_seqlens_q", "cu_seqlens_k"):
            check_dtype("ModalityLayout", argument, getattr(self, argument), (torch.int32,), ". Use .to(torch.int32).")
        check_device("ModalityLayout", {"cu_seqlens_q": self.cu_seqlens_q, "cu_seqlens_k": self.cu_seqlens_k})
        batch = self.cu_seqlens_q.numel() - 1
        if (
            self.cu_seqlens_q.ndim != 1
            or self.cu_seqlens_k.ndim != 1
            or self.cu_seqlens_k.numel() != batch * modalities + 1
        ):
            raise ShapeError(
                f"ModalityLayout: cu_seqlens_k must be [batch * num_modalities + 1] = [{batch * modalities + 1}], "
                f"got {list(self.cu_seqlens_k.shape)} "
                f"beside cu_seqlens_q {list(self.cu_seqlens_q.shape)}."
            )
        if cast(Tensor | None, self.query_tiles) is None:  # of offsets alone, which a GPU has to give first
            lengths = self.cu_seqlens_q.diff(), self.cu_seqlens_k.diff().view(-1, modalities)
            tables = uncompiled(_tables)("ModalityLayout", *lengths, self.cu_seqlens_q.device)
            for name in ("total_q", "total_k", "max_segments_k", "query_tiles", "key_tiles"):
                object.__setattr__(self, name, tables[name])

    @classmethod
    def from_lengths(
        cls,
        q_lengths: Tensor,
        k_lengths: Tensor,
        names: Sequence[str] | None = None,
        device: torch.device | str | None = None,
    ) -> "ModalityLayout":
        """Build the layout from counts.

        Args:
            q_lengths: [B] int32 or int64, queries of each sample; 0 is allowed.
            k_lengths: [B, M] int32 or int64, keys of each segment; 0 is a missing modality.
            names: names of the M modalities.
            device: of the layout; None: of the lengths.

        Raises:
            ShapeError: where the two disagree.
            TypeError: where a length is no integer.
            ValueError: where a length is negative, or a total does not fit in int32.
        """
        op = "ModalityLayout.from_lengths"
        sizes = check_shapes(
            op, {"q_lengths": (q_lengths, ("batch",)), "k_lengths": (k_lengths, ("batch", "modality"))}
        )
        check_device(op, {"q_lengths": q_lengths, "k_lengths": k_lengths})
        for argument, lengths in (("q_lengths", q_lengths), ("k_lengths", k_lengths)):
            check_dtype(op, argument, lengths, INTEGERS, ". Lengths are whole numbers; use .to(torch.int64).")
        place = q_lengths.device if device is None else torch.device(device)
        return cls(
            num_modalities=sizes["modality"],
            names=None if names is None else _as_names(names),
            **uncompiled(_tables)(op, q_lengths, k_lengths, place),
        )

    @classmethod
    def from_masks(cls, q_mask: Tensor, k_masks: Mapping[str, Tensor]) -> "ModalityLayout":
        """Build the layout from padding masks, True where there is a token; the names are the keys of the mapping.

        Args:
            q_mask: [B, Lq] bool.
            k_masks: for each modality its name and [B, Lm] bool; Lm may be 0, and masks may have holes.

        Raises:
            ShapeError: where a mask has another batch size or number of dimensions.
            TypeError: where a mask is not bool.
        """
        op = "ModalityLayout.from_masks"
        check_type(op, "k_masks", k_masks, Mapping, "Give {name: mask}.")
        if not k_masks:
            raise ValueError(f"{op}: k_masks must name at least one modality, got none.")
        masks = {"q_mask": q_mask, **{f"k_masks[{name!r}]": mask for name, mask in k_masks.items()}}
        for argument, mask in masks.items():
            check_dtype(op, argument, mask, (torch.bool,), ". True where there is a token; use .bool().")
        check_shapes(op, {argument: (mask, ("batch", f"tokens of {argument}")) for argument, mask in masks.items()})
        check_device(op, masks)
        layout = cls.from_lengths(
            q_mask.sum(1), torch.stack([mask.sum(1) for mask in k_masks.values()], 1), names=list(k_masks)
        )
        return replace(
            layout,
            _query_slots=occupied(q_mask, layout.total_q),
            _key_slots=occupied(torch.cat(list(k_masks.values()), 1), layout.total_k),
            _padded_q=q_mask.shape[1],
            _padded_k=tuple(mask.shape[1] for mask in k_masks.values()),
        )

    @property
    def batch_size(self) -> int:
        """B, the number of samples."""
        return self.cu_seqlens_q.numel() - 1

    def query_samples(self) -> Tensor:
        """[total_q] int64, the sample of each query."""
        return _owners(self.cu_seqlens_q, self.total_q)

    def key_segments(self) -> Tensor:
        """[total_k] int64, the segment ``b*M+m`` of each key."""
        return _owners(self.cu_seqlens_k, self.total_k)

    def per_query(self, x: Tensor) -> Tensor:
        """Repeat a per-sample value for each of its queries: [B, ...] to [total_q, ...]; differentiable."""
        check_tensor("ModalityLayout.per_query", "x", x)
        if x.ndim == 0 or x.shape[0] != self.batch_size:
            raise ShapeError(
                f"ModalityLayout.per_query: x must have shape [batch={self.batch_size}, ...], got {list(x.shape)}."
            )
        return x.index_select(0, self.query_samples())

    def pack(self, padded: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Drop the padding: queries [B, Lq, ...] to [total_q, ...], or keys {name: [B, Lm, ...]} to [total_k, ...];
        differentiable.

        A layout from `from_masks` takes the tokens its masks name; one from `from_lengths` takes the first tokens of
        every row. What lies in the padding, NaN too, is never read.
        """
        if isinstance(padded, Tensor):
            self._check_padded("query", padded, self._padded_q, self.max_seqlen_q)
            return padded.flatten(0, 1).index_select(0, self._slots_of_queries(padded.shape[1]))
        check_type("ModalityLayout.pack", "padded", padded, Mapping, "Give a tensor of queries, or {name: keys}.")
        names = self._names("pack")
        if set(padded) != set(names):
            raise ValueError(
                f"ModalityLayout.pack: keys must be given for the modalities {list(names)}, got {list(padded)}."
            )
        for index, name in enumerate(names):
            self._check_padded(
                name, padded[name], self._padded_k[index] if self._padded_k else None, self.max_segments_k[index]
            )
        slots = self._slots_of_keys([padded[name].shape[1] for name in names])
        return torch.cat([padded[name] for name in names], 1).flatten(0, 1).index_select(0, slots)

    def unpack(self, packed: Tensor) -> Tensor:
        """Put packed queries back: [total_q, ...] to [B, Lq, ...], zeros in the padding; differentiable."""
        check_tensor("ModalityLayout.unpack", "packed", packed)
        if packed.ndim == 0 or packed.shape[0] != self.total_q:
            raise ShapeError(
                f"ModalityLayout.unpack: packed must have shape [query={self.total_q}, ...], got {list(packed.shape)}."
            )
        length = self.max_seqlen_q if self._padded_q is None else self._padded_q
        flat = packed.new_zeros((self.batch_size * length, *packed.shape[1:]))
        flat = flat.index_copy(0, self._slots_of_queries(length), packed)
        return flat.view(self.batch_size, length, *packed.shape[1:])

    def unpack_keys(self, packed: Tensor) -> dict[str, Tensor]:
        """Put packed keys back: [total_k, ...] to {name: [B, Lm, ...]}, zeros in the padding; differentiable."""
        check_tensor("ModalityLayout.unpack_keys", "packed", packed)
        names = self._names("unpack_keys")
        if packed.ndim == 0 or packed.shape[0] != self.total_k:
            raise ShapeError(
                f"ModalityLayout.unpack_keys: packed must have shape [key={self.total_k}, ...], got "
                f"{list(packed.shape)}."
            )
        lengths = list(self.max_segments_k if self._padded_k is None else self._padded_k)
        width = sum(lengths)
        flat = packed.new_zeros((self.batch_size * width, *packed.shape[1:]))
        flat = flat.index_copy(0, self._slots_of_keys(lengths), packed)
        return dict(zip(names, flat.view(self.batch_size, width, *packed.shape[1:]).split(lengths, 1), strict=True))

    def at_times(self, query_time: Tensor, key_time: Tensor, lookback: int | Tensor | None = None) -> "ModalityLayout":
        """The same layout with timestamp causality worked out once for all layers.

        Key j is visible to query i only if ``0 <= query_time[i] - key_time[j]`` and, with a look-back, ``< lookback``.

        Args:
            query_time: [total_q] int64, in any order.
            key_time: [total_k] int64. Sorted within each segment it costs nothing more; otherwise keys and values are
                gathered into that order by each attention call.
            lookback: half-open window in the unit of the times, an int or [M] int64; None: unbounded.

        Cost: a binary search per query and modality, and one wait for the GPU to learn whether keys are sorted.
        """
        return replace(
            self, visibility=find_visible("ModalityLayout.at_times", self, query_time, key_time, lookback, wait=True)
        )

    def with_visibility(self, visibility: Visibility | None) -> "ModalityLayout":
        """The same layout with other times."""
        return self if visibility is self.visibility else replace(self, visibility=visibility)

    def _names(self, method: str) -> tuple[str, ...]:
        if self.names is None:
            raise ValueError(
                f"ModalityLayout.{method}: the layout must have names of its modalities, got none. Build it with "
                "names=..."
            )
        return self.names

    def _check_padded(self, argument: str, padded: Tensor, exact: int | None, at_least: int) -> None:
        check_tensor("ModalityLayout.pack", argument, padded)
        rule = f"at least {at_least}" if exact is None else f"{exact}"
        wrong_length = padded.ndim >= 2 and (padded.shape[1] < at_least if exact is None else padded.shape[1] != exact)
        if padded.ndim < 2 or padded.shape[0] != self.batch_size or wrong_length:
            raise ShapeError(
                f"ModalityLayout.pack: {argument} must have shape [batch={self.batch_size}, {rule} tokens, ...], "
                f"got {list(padded.shape)}."
            )

    def _slots_of_queries(self, length: int) -> Tensor:
        """[total_q] flat places of the queries among padded ones: those of the masks, or the first of every row."""
        if self._query_slots is not None:
            return self._query_slots
        sample = self.query_samples()
        return sample * length + torch.arange(self.total_q, device=sample.device) - self.cu_seqlens_q[sample]

    def _slots_of_keys(self, lengths: Sequence[int]) -> Tensor:
        """[total_k] the same of keys, whose modalities are padded to ``lengths``."""
        if self._key_slots is not None:
            return self._key_slots
        segment = self.key_segments()
        starts = starts_of(lengths, segment.device)
        position = torch.arange(self.total_k, device=segment.device) - self.cu_seqlens_k[segment]
        return (
            torch.div(segment, self.num_modalities, rounding_mode="floor") * sum(lengths)
            + starts[segment % self.num_modalities]
            + position
        )


def _as_names(names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"ModalityLayout: names must be a sequence of strings, got {names!r}.")
    return tuple(names)


def _tables(op: str, q_lengths: Tensor, k_lengths: Tensor, device: torch.device) -> dict[str, Any]:
    """All that a layout holds of lengths [B] and [B, M], made on the host."""
    both: Counts = torch.cat((q_lengths.long(), k_lengths.long().flatten())).cpu().numpy()
    queries, keys = both[: len(q_lengths)], both[len(q_lengths) :]
    bounds_q, bounds_k = (np.concatenate(([0], counts.cumsum())) for counts in (queries, keys))
    for argument, counts in (("q_lengths", queries), ("k_lengths", keys)):
        if (smallest := counts.min(initial=0)) < 0:
            raise ValueError(f"{op}: {argument} must not be negative, got {smallest}.")
        if (total := counts.sum(dtype=np.float64)) >= 2**31:  # an int64 sum may come round to one that fits
            raise ValueError(f"{op}: {argument} must sum to less than 2**31, got {total:.0f}. Split the batch.")
    segments = keys.reshape(k_lengths.shape)
    sample_keys = segments.sum(1)
    tables = {
        "cu_seqlens_q": bounds_q,
        "cu_seqlens_k": bounds_k,
        "query_tiles": _work_list(bounds_q, sample_keys),
        "key_tiles": _work_list(bounds_k, queries.repeat(segments.shape[1])),
    }
    return {
        "total_q": int(bounds_q[-1]),
        "total_k": int(bounds_k[-1]),
        "max_seqlen_q": int(queries.max(initial=0)),
        "max_seqlen_k": int(sample_keys.max(initial=0)),
        "max_segments_k": tuple(segments.max(0, initial=0).tolist()),
    } | {name: torch.from_numpy(table.astype(np.int32)).to(device, non_blocking=True) for name, table in tables.items()}


def uncompiled(function: F) -> F:
    """The function, which a compiler runs as it is: of NumPy's calls it would make graphs."""
    return torch.compiler.disable(function) if torch.compiler.is_compiling() else function


def occupied(mask: Tensor, total: int) -> Tensor:
    """Flat positions of the True entries, in order, of whose ``total`` the host knows: so nothing waits."""
    return torch.nonzero_static(mask.flatten(), size=total)[:, 0]


def starts_of(lengths: Sequence[int], device: torch.device) -> Tensor:
    """[M] int64, where each of M runs starts that lie one after another; copied to the device without a wait."""
    return torch.tensor([0, *accumulate(lengths[:-1])], device="cpu").to(device, non_blocking=True)


def _owners(cu_seqlens: Tensor, total: int) -> Tensor:
    """Which run of ``cu_seqlens`` each of ``total`` rows belongs to."""
    return torch.repeat_interleave(cu_seqlens.diff().long(), output_size=total)


def _work_list(bounds: Counts, partners: Counts) -> Counts:
    """Tiles of up to 128 rows of one run, the most expensive first.

    Run r owns the tile ids from ``bounds[r] // 128 + r`` on; that leaves a few ids unused, but kernels can find a row's
    tile from it.

    Args:
        bounds: [R+1], of the runs.
        partners: [R], rows of the other side that each row meets.

    Returns:
        [total // 128 + R, 2]: (run, first row), unused ones (-1, 0) at the end.
    """
    runs = len(bounds) - 1
    first_tile = bounds[:-1] // TILE + np.arange(runs)
    tile = np.arange(bounds[-1] // TILE + runs)
    run = first_tile.searchsorted(tile, side="right") - 1
    start = bounds[run] + (tile - first_tile[run]) * TILE
    rows = np.minimum(bounds[run + 1] - start, TILE)
    cost = np.where(rows > 0, rows * partners[run], -1)
    tiles = np.where(rows > 0, (run, start), ((-1,), (0,))).T
    return tiles[(-cost).argsort(kind="stable")]
