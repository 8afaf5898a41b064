"""Tile sizes of the attention kernels, from head size, dtype and architecture: pure functions over one table.

Chosen by what the compiler makes of them, not by timings yet. No entry spills registers or asks for more shared
memory than its architecture has: `python -m benchmarks static` compiles them all and says so. A head of 80 or 96 runs
in tiles of 128, whose padding is multiplied but not read: 64 + 32 would save a quarter of the products, and take
two loads, products and accumulators for each one of every kernel.
"""

import torch

from fusedmm.kernels.launch import LaunchConfig

MAX_REGISTERS = 255  # of a thread; where nothing is said the compiler may make room for another program, and spill
# (pass, bytes of an element): {arch: {BLOCK_D: (BLOCK_Q, BLOCK_K, num_warps, num_stages)}}, with the most registers of
# a thread behind them where the compiler is not to choose; a smaller head uses the 64. sm_86, which speaks for 8.6, 8.9
# and 12.x, lists what it takes in place of sm_80's: that would ask for more than 99 KiB, or spill on 12.x.
_TABLE: dict[tuple[str, int], dict[str, dict[int, tuple[int, ...]]]] = {
    ("forward", 2): {
        "sm_80": {64: (128, 32, 4, 3), 128: (64, 64, 4, 2), 256: (64, 64, 8, 2)},
        "sm_86": {64: (128, 32, 8, 3), 256: (64, 32, 8, 2)},
        "sm_90": {64: (128, 64, 8, 3), 128: (128, 64, 8, 2), 256: (64, 64, 8, 2)},
        "sm_100": {64: (128, 64, 8, 3), 128: (128, 64, 8, 2), 256: (128, 32, 8, 2)},
        "gfx942": {64: (128, 64, 4, 1), 128: (128, 32, 4, 1), 256: (64, 32, 4, 1)},
    },
    ("key_value", 2): {
        "sm_80": {64: (64, 64, 4, 2), 128: (64, 64, 4, 2), 256: (32, 32, 4, 1)},
        "sm_86": {128: (64, 64, 8, 2)},
        "sm_90": {64: (64, 64, 4, 3), 128: (32, 128, 8, 2), 256: (32, 32, 8, 2)},
        "sm_100": {64: (64, 128, 8, 2), 128: (64, 128, 8, 2), 256: (32, 64, 8, 1)},
        "gfx942": {64: (32, 64, 4, 1), 128: (32, 64, 4, 1), 256: (16, 64, 8, 1)},
    },
    ("query", 2): {
        "sm_80": {64: (64, 64, 4, 2), 128: (64, 32, 4, 2), 256: (32, 32, 4, 2)},
        "sm_86": {64: (64, 32, 4, 2, MAX_REGISTERS)},
        "sm_90": {64: (64, 64, 4, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
        "sm_100": {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2, MAX_REGISTERS)},
        "gfx942": {64: (128, 32, 4, 1), 128: (64, 32, 4, 1), 256: (32, 16, 4, 1)},
    },
    # For few queries: 64 rows, a warp group's. With fewer, products read key tiles through shared memory once a warp,
    # which costs sm_90 what the rows save.
    ("forward few", 2): {
        "sm_80": {64: (64, 64, 4, 3), 128: (32, 128, 4, 2), 256: (64, 64, 8, 2)},
        "sm_86": {64: (64, 32, 4, 3, MAX_REGISTERS), 256: (64, 32, 8, 2)},
        "sm_90": {64: (64, 64, 4, 3), 128: (64, 64, 4, 2), 256: (64, 64, 8, 2)},
        "sm_100": {64: (64, 64, 4, 3, MAX_REGISTERS), 128: (64, 64, 4, 2), 256: (64, 64, 8, 2)},
        "gfx942": {64: (64, 32, 4, 1), 128: (64, 32, 4, 1), 256: (64, 16, 4, 1)},
    },
    ("query few", 2): {
        "sm_80": {64: (64, 64, 4, 3), 128: (32, 64, 4, 2), 256: (32, 32, 4, 2)},
        "sm_90": {64: (64, 64, 4, 2), 128: (64, 32, 4, 2), 256: (64, 32, 8, 1)},
        "sm_100": {64: (64, 64, 4, 2), 128: (64, 32, 4, 2, MAX_REGISTERS), 256: (64, 32, 8, 2)},
        "gfx942": {64: (64, 32, 4, 1), 128: (64, 32, 4, 1), 256: (32, 16, 4, 1)},
    },
    # Full float32 products run on the vector units from registers: small tiles.
    ("forward", 4): {
        "sm_80": {64: (64, 32, 8, 2), 128: (32, 32, 8, 2), 256: (16, 32, 8, 2)},
        "sm_90": {64: (32, 32, 8, 2), 128: (16, 16, 8, 1), 256: (16, 32, 8, 2)},
        "sm_100": {64: (32, 32, 8, 2), 128: (64, 16, 8, 2), 256: (16, 32, 8, 2)},
        "gfx942": {64: (32, 32, 4, 1), 128: (32, 32, 4, 1), 256: (16, 16, 4, 1)},
    },
    ("key_value", 4): {
        "sm_80": {64: (32, 32, 8, 2), 128: (32, 32, 8, 2), 256: (16, 16, 8, 2)},
        "sm_90": {64: (32, 32, 8, 2), 128: (32, 32, 8, 2), 256: (16, 16, 8, 2)},
        "sm_100": {64: (32, 32, 8, 2), 128: (32, 32, 8, 2), 256: (16, 16, 8, 2)},
        "gfx942": {64: (16, 32, 4, 1), 128: (16, 32, 4, 1), 256: (16, 16, 4, 1)},
    },
    ("query", 4): {
        "sm_80": {64: (32, 32, 8, 2), 128: (32, 16, 8, 1), 256: (32, 16, 8, 1)},
        "sm_90": {64: (32, 32, 4, 2), 128: (16, 16, 4, 2), 256: (16, 16, 4, 1)},
        "sm_100": {64: (32, 32, 8, 2), 128: (32, 16, 8, 2), 256: (16, 16, 8, 2)},
        "gfx942": {64: (32, 16, 4, 1), 128: (32, 16, 4, 1), 256: (32, 16, 4, 1)},
    },
    # Of key tiles that span segments. Rows of a warp group: samples of short segments have few tiles, and more programs
    # on a multiprocessor hide more of what each of their small products waits for. The pass over keys, whose pairs have
    # terms of their own, takes fewer queries.
    ("forward spans", 2): {
        "sm_80": {64: (64, 32, 4, 2), 128: (64, 32, 4, 2), 256: (64, 32, 8, 2)},
        "sm_86": {64: (32, 32, 4, 2, MAX_REGISTERS), 128: (32, 32, 4, 2), 256: (32, 32, 4, 2)},
        "sm_90": {64: (64, 64, 4, 2), 128: (64, 32, 4, 2), 256: (64, 32, 8, 2)},
        "sm_100": {64: (64, 32, 8, 2), 128: (64, 32, 8, 2), 256: (64, 64, 8, 2)},
        "gfx942": {64: (64, 32, 4, 1), 128: (64, 32, 4, 1), 256: (64, 16, 4, 1)},
    },
    ("key_value spans", 2): {
        "sm_80": {64: (32, 64, 4, 2), 128: (32, 32, 4, 2), 256: (32, 32, 8, 2)},
        "sm_90": {64: (64, 64, 4, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 2)},
        "sm_100": {64: (32, 64, 8, 2), 128: (32, 64, 8, 2), 256: (16, 32, 8, 1)},
        "gfx942": {64: (32, 64, 4, 1), 128: (32, 64, 4, 1), 256: (16, 32, 8, 1)},
    },
    ("query spans", 2): {
        "sm_80": {64: (64, 32, 8, 2), 128: (64, 32, 4, 2), 256: (64, 16, 8, 2)},
        "sm_86": {64: (32, 32, 4, 2), 128: (32, 32, 4, 2), 256: (32, 32, 4, 2)},
        "sm_90": {64: (64, 32, 4, 2), 128: (64, 32, 4, 2), 256: (64, 32, 8, 2)},
        "sm_100": {64: (64, 32, 4, 2), 128: (64, 32, 4, 2), 256: (64, 32, 8, 2)},
        "gfx942": {64: (64, 32, 4, 1), 128: (64, 32, 4, 1), 256: (32, 16, 4, 1)},
    },
    ("forward spans", 4): {
        "sm_80": {64: (32, 32, 8, 2), 128: (32, 32, 8, 2), 256: (16, 32, 8, 2)},
        "sm_90": {64: (32, 32, 8, 2), 128: (32, 16, 8, 2), 256: (16, 32, 8, 2)},
        "sm_100": {64: (32, 32, 8, 2), 128: (32, 16, 8, 2), 256: (16, 32, 8, 2)},
        "gfx942": {64: (32, 32, 4, 1), 128: (32, 32, 4, 1), 256: (16, 16, 4, 1)},
    },
    ("key_value spans", 4): {
        "sm_80": {64: (32, 32, 8, 2), 128: (32, 32, 8, 2), 256: (16, 16, 8, 2)},
        "sm_90": {64: (32, 32, 8, 2), 128: (32, 32, 8, 2), 256: (16, 16, 8, 2)},
        "sm_100": {64: (32, 32, 8, 2), 128: (32, 32, 8, 2), 256: (16, 16, 8, 2)},
        "gfx942": {64: (16, 32, 4, 1), 128: (16, 32, 4, 1), 256: (16, 16, 4, 1)},
    },
    ("query spans", 4): {
        "sm_80": {64: (32, 32, 8, 2), 128: (16, 32, 8, 2), 256: (16, 16, 4, 2)},
        "sm_90": {64: (32, 32, 8, 2), 128: (32, 16, 8, 2), 256: (16, 16, 4, 2)},
        "sm_100": {64: (32, 32, 8, 2), 128: (32, 16, 8, 2), 256: (16, 16, 8, 2)},
        "gfx942": {64: (32, 16, 4, 1), 128: (32, 16, 4, 1), 256: (16, 16, 4, 1)},
    },
}
# Tiles of a variant that would spill in those above, of 16-bit inputs: counters of dropout, masks of visible ranges or
# of columns (heads of 80, 96) and the tile of an output gate take registers; few keys are fewer rows than four warps
# hold. (variant, pass, arch, BLOCK_D): as above.
_VARIANTS: dict[tuple[str, str, str, int], tuple[int, ...]] = {
    ("dropout", "forward", "sm_80", 128): (32, 128, 4, 2),
    ("dropout", "key_value", "sm_80", 64): (32, 64, 4, 2),
    ("dropout", "key_value", "sm_80", 128): (64, 32, 4, 2),
    ("dropout", "key_value", "sm_90", 64): (32, 64, 4, 3),
    ("dropout", "key_value", "sm_100", 64): (32, 128, 8, 2),
    ("dropout", "key_value spans", "sm_90", 64): (16, 64, 4, 2),
    ("dropout", "query", "sm_80", 64): (64, 32, 4, 2),
    ("dropout", "query", "sm_80", 128): (32, 64, 4, 2),
    ("dropout", "query", "sm_90", 64): (64, 64, 4, 1),
    ("dropout", "query few", "sm_80", 64): (64, 32, 4, 2),
    ("dropout", "query few", "sm_90", 64): (64, 64, 4, 1),
    ("visible", "forward spans", "sm_80", 128): (64, 32, 4, 2),
    ("visible", "key_value", "sm_80", 128): (32, 64, 4, 2),
    ("visible", "key_value", "sm_90", 64): (32, 64, 4, 2),  # under Triton 3.6
    ("visible", "key_value spans", "sm_80", 64): (16, 64, 4, 2),
    ("visible", "key_value spans", "sm_90", 64): (16, 64, 4, 2),
    ("output gate", "forward", "sm_80", 64): (128, 32, 4, 2),
    ("output gate", "forward", "sm_80", 128): (32, 128, 4, 2),
    ("short", "key_value", "sm_80", 64): (64, 32, 2, 2),
    ("short", "key_value", "sm_80", 128): (32, 32, 2, 2),
    ("masked columns", "forward spans", "sm_80", 128): (32, 32, 4, 2),
}
# (arch, BLOCK_D) of the order of the forward's products that needs them to be asynchronous. From 128 on the second set
# of scores would spill, and ptxas waits for the products before most of the exp2 that they could hide.
_CARRY_SCORES = {("sm_90", 64)}
# The option beside which, at BLOCK_D 256, more than 32 keys a tile spill; tails of more than 16 spill there as well.
_NARROWING = {"sm_90": "dropout", "sm_100": "visible"}
BLOCK_TAIL = 32  # keys of the tile that finishes a segment: a segment of 5 keys costs 32 columns, not BLOCK_K
BLOCK_ROWS = 32  # queries of a program of the backward's first pass, which only streams
FEW_QUERIES = 64  # queries of the average sample up to which tiles have so many rows
MAX_SPLITS = 64  # parts of the keys at most: all of a row's are one tile of the kernel that combines them
SPLIT_KEYS = 256  # keys of a split at least
SHORT_SEGMENT = 32  # keys on average up to which key tiles span segments, or dK's and dV's are of this size
MAX_COLUMNS = 2**24  # keys of a batch up to which passes over queries span segments: they count them in float32


def head_block(head_dim: int) -> int:
    """BLOCK_D: the power of two, at least 16, that holds a head."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _tiles(
    which: str, block_d: int, dtype: torch.dtype, arch: str, variants: dict[str, bool] | None = None
) -> tuple[int, ...]:
    """(BLOCK_Q, BLOCK_K, num_warps, num_stages) of a pass, and the most registers where they are given: of the first
    variant in use that has its own, if any."""
    size = max(64, block_d)
    table = _TABLE[which, dtype.itemsize]
    if arch == "sm_86":
        if own := table.get(arch, {}).get(size):
            return own
        arch = "sm_80"
    if dtype.itemsize == 2:
        for variant in (name for name, is_used in (variants or {}).items() if is_used):
            if own := _VARIANTS.get((variant, which, arch, size)):
                return own
    return table[arch][size]


def _attention_forward_config(
    head_dim: int,
    dtype: torch.dtype,
    arch: str,
    mean_queries: int,
    *,
    dropout: bool = False,
    visible: bool = False,
    wide_end: bool = False,
    output_gate: bool = False,
) -> LaunchConfig:
    """Tiles of the forward, where a sample has ``mean_queries`` queries on average.

    With ``wide_end``, under another softmax than the joint one or with an output gate, a second tile of the output's
    size meets the accumulator behind the loop: at 256 both of 64 rows fit the registers, of 128 they do not.
    """
    block_d = head_block(head_dim)
    narrowing = _NARROWING.get(arch) if block_d == 256 and dtype.itemsize == 2 else None
    # float32's tiles have no more rows in any case
    is_few = dtype.itemsize == 2 and (mean_queries <= FEW_QUERIES or (wide_end and narrowing is not None))
    which = "forward few" if is_few else "forward"
    variants = {"dropout": dropout, "output gate": output_gate}
    block_q, block_k, num_warps, num_stages, *max_registers = _tiles(which, block_d, dtype, arch, variants)
    if (narrowing == "dropout" and dropout) or (narrowing == "visible" and visible):
        block_k = min(block_k, 32)
    blocks = {
        "BLOCK_Q": block_q,
        "BLOCK_K": block_k,
        "BLOCK_TAIL": min(BLOCK_TAIL if narrowing is None else 16, block_k),
        "BLOCK_D": block_d,
        "CARRY_SCORES": dtype.itemsize == 2 and not is_few and (arch, max(64, block_d)) in _CARRY_SCORES,
    }
    return LaunchConfig(blocks, num_warps, num_stages, *max_registers)


def spans_segments(softmax: str, num_modalities: int, mean_segment: int) -> bool:
    """Whether key tiles span the segments of a sample: in the backward, and in the forward of the joint softmax."""
    return softmax != "partials" and num_modalities > 1 and mean_segment <= SHORT_SEGMENT


def _attention_backward_key_value_config(
    head_dim: int, dtype: torch.dtype, arch: str, mean_keys: int, *, spans: bool, visible: bool, dropout: bool
) -> LaunchConfig:
    """Tiles of the backward for keys and values, where a segment, or with ``spans`` a sample, has ``mean_keys`` keys
    on average."""
    block_d = head_block(head_dim)
    short = mean_keys <= SHORT_SEGMENT
    which = "key_value spans" if spans else "key_value"
    variants = {"dropout": dropout, "visible": visible, "short": short}
    block_q, block_k, num_warps, num_stages, *max_registers = _tiles(which, block_d, dtype, arch, variants)
    if short:
        block_k = min(block_k, SHORT_SEGMENT)
        num_warps = min(num_warps, 4) if dtype.itemsize == 2 and block_d <= 128 else num_warps
    blocks = {"BLOCK_Q": block_q, "BLOCK_K": block_k, "BLOCK_D": block_d}
    return LaunchConfig(blocks, num_warps, num_stages, *max_registers)


def _attention_backward_query_config(
    head_dim: int, dtype: torch.dtype, arch: str, mean_queries: int, *, dropout: bool = False
) -> LaunchConfig:
    """Tiles of the backward for queries, gates and priors, where a sample has ``mean_queries`` on average."""
    block_d = head_block(head_dim)
    is_few = mean_queries <= FEW_QUERIES and dtype.itemsize == 2
    which = "query few" if is_few else "query"
    block_q, block_k, num_warps, num_stages, *max_registers = _tiles(which, block_d, dtype, arch, {"dropout": dropout})
    block_tail = min(BLOCK_TAIL, block_k)
    if arch == "sm_90" and dtype.itemsize == 2 and 64 < head_dim < block_d <= 128 and not dropout:
        block_tail = block_k  # the column masks of 80 and 96 would spill
    blocks = {"BLOCK_Q": block_q, "BLOCK_K": block_k, "BLOCK_TAIL": block_tail, "BLOCK_D": block_d}
    return LaunchConfig(blocks, num_warps, num_stages, *max_registers)


def _attention_spans_config(
    which: str, head_dim: int, dtype: torch.dtype, arch: str, num_modalities: int, *, visible: bool
) -> LaunchConfig:
    """Tiles of the forward ("forward") or the backward for queries ("query") that span segments."""
    block_d = head_block(head_dim)
    variants = {"visible": visible, "masked columns": head_dim < block_d}
    block_q, block_k, num_warps, num_stages, *max_registers = _tiles(f"{which} spans", block_d, dtype, arch, variants)
    if visible and arch == "sm_100":  # the bounds of each pair are products as well, and want tensor memory
        block_k = min(block_k, 32)
    block_m = 16 if num_modalities <= 16 else 32
    if block_m == 32:  # wider terms: they would spill, or want more tensor memory than sm_100 has
        block_k = min(block_k, 16 if arch == "sm_100" and block_d == 256 else 32)
        num_warps = 8 if (which, block_d) == ("query", 128) and arch != "gfx942" else num_warps
        max_registers = [MAX_REGISTERS] if arch == "sm_100" else max_registers  # one fills tensor memory
    blocks = {"BLOCK_Q": block_q, "BLOCK_K": block_k, "BLOCK_M": block_m, "BLOCK_D": block_d}
    return LaunchConfig(blocks, num_warps, num_stages, *max_registers)


def key_splits(
    total_q: int, total_k: int, batch: int, num_heads: int, block_q: int, processors: int, *, results: int = 1
) -> int:
    """Parts into which a pass over query tiles shares out the keys; 1 unless few queries meet many keys.

    From shapes alone, so nothing waits for the GPU. Programs are split where they would fill less than half the chip,
    into two a multiprocessor at most. What a split leaves, ``8 D`` bytes a query, head and result written and read, is
    at most a quarter of the keys and values of 16 bit it reads, ``4 D`` bytes a key: the buffer of all splits, which
    lives as long as the launch, has at most ``total_k num_heads D / 2`` bytes and ``2 processors block_q results D``
    float32.

    Args:
        total_q: queries of the batch.
        total_k: keys of the batch.
        batch: samples.
        num_heads: query heads.
        block_q: queries of a program.
        processors: multiprocessors of the GPU.
        results: rows of D that a split leaves of a query and head: modalities, where each has its own.
    """
    programs = max(batch, -(-total_q // block_q)) * num_heads
    if total_q == 0 or 2 * programs > processors:
        return 1
    least_keys = max(SPLIT_KEYS, 8 * -(-total_q // batch) * results)
    return max(1, min(2 * processors // programs, total_k // batch // least_keys, MAX_SPLITS))


def _attention_combine_config(head_dim: int) -> LaunchConfig:
    """Tiles of the kernel that combines splits, the same everywhere: it is bound by memory."""
    blocks = {"BLOCK_S": MAX_SPLITS, "BLOCK_M": 32, "BLOCK_D": head_block(head_dim)}
    return LaunchConfig(blocks=blocks, num_warps=8 if head_dim > 128 else 4, num_stages=1)


def _attention_backward_rows_config(head_dim: int) -> LaunchConfig:
    """Tiles of the backward's first pass, the same everywhere: it is bound by memory. In 4 warps some float32 spill."""
    return LaunchConfig(blocks={"BLOCK_Q": BLOCK_ROWS, "BLOCK_D": head_block(head_dim)}, num_warps=8, num_stages=1)
