"""Tile sizes of the attention kernels, from head size, dtype and architecture: pure functions over one table.

Chosen by what the compiler makes of them, not by timings yet. No entry spills registers in a main loop or asks for more
shared memory than its architecture has: `python -m benchmarks static` compiles them all and says so. A head of 80 or 96
runs in tiles of 128, whose padding is multiplied but not read: 64 + 32 would save a quarter of the products, and take
two loads, products and accumulators for each one of every kernel.
"""

import torch

from fusedmm.kernels.launch import LaunchConfig

MAX_REGISTERS = 255  # of a thread; where nothing is said the compiler may make room for another program, and spill
# (pass, bytes of an element): {arch: {BLOCK_D: (BLOCK_Q, BLOCK_K, num_warps, num_stages)}}, with the most registers of
# a thread behind them where the compiler is not to choose; a smaller head uses the 64.
_TABLE: dict[tuple[str, int], dict[str, dict[int, tuple[int, ...]]]] = {
    ("forward", 2): {
        "sm_80": {64: (128, 32, 4, 3), 128: (128, 64, 8, 3), 256: (64, 64, 8, 2)},
        "sm_90": {64: (128, 64, 8, 3), 128: (128, 64, 8, 2), 256: (64, 64, 8, 2)},
        "sm_100": {64: (128, 64, 8, 3), 128: (128, 64, 8, 2), 256: (128, 32, 8, 2)},
        "gfx942": {64: (128, 64, 4, 1), 128: (128, 32, 4, 1), 256: (64, 32, 4, 1)},
    },
    ("key_value", 2): {
        "sm_80": {64: (64, 64, 4, 2), 128: (64, 64, 8, 2), 256: (32, 64, 8, 1)},
        "sm_90": {64: (64, 64, 4, 3), 128: (32, 128, 8, 2), 256: (32, 32, 8, 2)},
        "sm_100": {64: (64, 128, 8, 2), 128: (64, 128, 8, 2), 256: (32, 64, 8, 1)},
        "gfx942": {64: (32, 64, 4, 1), 128: (32, 64, 4, 1), 256: (16, 64, 8, 1)},
    },
    ("query", 2): {
        "sm_80": {64: (64, 64, 4, 2), 128: (64, 64, 8, 2), 256: (64, 16, 8, 2)},
        "sm_90": {64: (64, 64, 4, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
        "sm_100": {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2, MAX_REGISTERS)},
        "gfx942": {64: (128, 32, 4, 1), 128: (64, 32, 4, 1), 256: (32, 16, 4, 1)},
    },
    # For few queries: 64 rows, a warp group's. With fewer, products read key tiles through shared memory once a warp,
    # which costs sm_90 what the rows save.
    ("forward few", 2): {
        "sm_80": {64: (64, 64, 4, 3), 128: (64, 64, 4, 2), 256: (64, 64, 8, 2)},
        "sm_90": {64: (64, 64, 4, 3), 128: (64, 64, 4, 2), 256: (64, 64, 8, 2)},
        "sm_100": {64: (64, 64, 4, 3, MAX_REGISTERS), 128: (64, 64, 4, 2), 256: (64, 64, 8, 2)},
        "gfx942": {64: (64, 32, 4, 1), 128: (64, 32, 4, 1), 256: (64, 16, 4, 1)},
    },
    ("query few", 2): {
        "sm_80": {64: (64, 64, 4, 2), 128: (64, 64, 8, 2), 256: (64, 16, 8, 2)},
        "sm_90": {64: (64, 64, 4, 2), 128: (64, 32, 4, 2), 256: (64, 32, 8, 1)},
        "sm_100": {64: (64, 64, 4, 2), 128: (64, 32, 4, 2, MAX_REGISTERS), 256: (64, 32, 8, 2)},
        "gfx942": {64: (64, 32, 4, 1), 128: (64, 32, 4, 1), 256: (32, 16, 4, 1)},
    },
    # Full float32 products run on the vector units from registers: small tiles.
    ("forward", 4): {
        "sm_80": {64: (64, 32, 8, 2), 128: (32, 32, 8, 2), 256: (16, 32, 8, 2)},
        "sm_90": {64: (32, 32, 8, 2), 128: (16, 16, 8, 1), 256: (16, 32, 8, 2)},
        "sm_100": {64: (32, 32, 8, 2), 128: (32, 32, 8, 2), 256: (16, 32, 8, 2)},
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
        "gfx942": {64: (32, 16, 4, 1), 128: (32, 16, 4, 1), 256: (16, 16, 4, 2)},
    },
}
# The same for passes over queries whose key tiles span segments. Rows of a warp group: samples of short segments have
# few tiles, and more programs on a multiprocessor hide more of what each of their small products waits for.
_SPANS: dict[tuple[str, int], dict[str, dict[int, tuple[int, ...]]]] = {
    ("forward", 2): {
        "sm_80": {64: (64, 32, 4, 2), 128: (64, 32, 4, 2), 256: (64, 32, 8, 2)},
        "sm_90": {64: (64, 64, 4, 2), 128: (64, 32, 4, 2), 256: (64, 32, 8, 2)},
        "sm_100": {64: (64, 32, 8, 2), 128: (64, 32, 8, 2), 256: (64, 64, 8, 2)},
        "gfx942": {64: (64, 32, 4, 1), 128: (64, 32, 4, 1), 256: (64, 16, 4, 1)},
    },
    ("query", 2): {
        "sm_80": {64: (64, 32, 8, 2), 128: (64, 32, 8, 2), 256: (64, 16, 8, 2)},
        "sm_90": {64: (64, 32, 4, 2), 128: (64, 32, 4, 2), 256: (64, 32, 8, 2)},
        "sm_100": {64: (64, 32, 4, 2), 128: (64, 32, 4, 2), 256: (64, 32, 8, 2)},
        "gfx942": {64: (64, 32, 4, 1), 128: (64, 32, 4, 1), 256: (32, 16, 4, 1)},
    },
    ("forward", 4): {
        "sm_80": {64: (32, 32, 8, 2), 128: (32, 32, 8, 2), 256: (16, 32, 8, 2)},
        "sm_90": {64: (32, 32, 8, 2), 128: (32, 16, 8, 2), 256: (16, 32, 8, 2)},
        "sm_100": {64: (32, 32, 8, 2), 128: (32, 16, 8, 2), 256: (16, 32, 8, 2)},
        "gfx942": {64: (32, 32, 4, 1), 128: (32, 32, 4, 1), 256: (16, 16, 4, 1)},
    },
    ("query", 4): {
        "sm_80": {64: (32, 32, 8, 2), 128: (32, 16, 8, 1), 256: (32, 16, 8, 1)},
        "sm_90": {64: (32, 32, 8, 2), 128: (32, 16, 8, 2), 256: (16, 16, 4, 2)},
        "sm_100": {64: (32, 32, 8, 2), 128: (32, 16, 8, 2), 256: (16, 16, 8, 2)},
        "gfx942": {64: (32, 16, 4, 1), 128: (32, 16, 4, 1), 256: (16, 16, 4, 1)},
    },
}
# (arch, BLOCK_D) of the order of the forward's products that needs them to be asynchronous. From 128 on the second set
# of scores would spill, and ptxas waits for the products before most of the exp2 that they could hide.
_CARRY_SCORES = {("sm_90", 64)}
# The option beside which, at BLOCK_D 256, more than 32 keys a tile spill; tails of more than 16 spill there as well.
_NARROWING = {"sm_90": "dropout", "sm_100": "visible"}
# Queries, where not 32, of a tile that spans segments: its pairs have terms of their own, for which larger tiles spill
# or lack sm_80's shared memory.
_SPAN_QUERIES = {("sm_90", 64): 64, ("sm_100", 256): 16}
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


def _attention_forward_config(
    head_dim: int,
    dtype: torch.dtype,
    arch: str,
    mean_queries: int,
    *,
    dropout: bool = False,
    visible: bool = False,
    wide_end: bool = False,
) -> LaunchConfig:
    """Tiles of the forward, where a sample has ``mean_queries`` queries on average.

    With ``wide_end``, under another softmax than the joint one or with an output gate, a second tile of the output's
    size meets the accumulator behind the loop: at 256 both of 64 rows fit the registers, of 128 they do not.
    """
    block_d = head_block(head_dim)
    narrowing = _NARROWING.get(arch) if block_d == 256 and dtype.itemsize == 2 else None
    # float32's tiles have no more rows in any case
    is_few = dtype.itemsize == 2 and (mean_queries <= FEW_QUERIES or (wide_end and narrowing is not None))
    table = _TABLE["forward few" if is_few else "forward", dtype.itemsize]
    block_q, block_k, num_warps, num_stages, *max_registers = table[arch][max(64, block_d)]
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
    on average. Dropout, whose counters need registers and take most of the time, gets fewer queries a tile."""
    block_d = head_block(head_dim)
    block_q, block_k, num_warps, num_stages = _TABLE["key_value", dtype.itemsize][arch][max(64, block_d)]
    if spans:
        block_q = min(block_q, _SPAN_QUERIES.get((arch, max(64, block_d)), 32))
        block_k = min(block_k, 64 if block_d <= 128 else 32)
        num_stages = min(num_stages, 2)
    if (dropout and block_d <= 64) or (spans and visible):
        block_q = min(block_q, 16 if spans and block_d <= 64 and arch == "sm_90" else 32)
    elif visible and block_d <= 64 and arch == "sm_90":  # more would spill under Triton 3.6
        block_q, num_stages = min(block_q, 32), min(num_stages, 2)
    if mean_keys <= SHORT_SEGMENT:
        block_k = min(block_k, SHORT_SEGMENT)
        num_warps = 4 if dtype.itemsize == 2 and block_d <= 128 else num_warps
    blocks = {"BLOCK_Q": block_q, "BLOCK_K": block_k, "BLOCK_D": block_d}
    return LaunchConfig(blocks=blocks, num_warps=num_warps, num_stages=num_stages)


def _attention_backward_query_config(
    head_dim: int, dtype: torch.dtype, arch: str, mean_queries: int, *, dropout: bool = False
) -> LaunchConfig:
    """Tiles of the backward for queries, gates and priors, where a sample has ``mean_queries`` on average."""
    block_d = head_block(head_dim)
    is_few = mean_queries <= FEW_QUERIES and dtype.itemsize == 2
    table = _TABLE["query few" if is_few else "query", dtype.itemsize]
    block_q, block_k, num_warps, num_stages, *max_registers = table[arch][max(64, block_d)]
    block_tail = min(BLOCK_TAIL, block_k)
    if arch == "sm_90" and dtype.itemsize == 2:  # dropout, and the column masks of 80 and 96, would spill
        num_stages = 1 if dropout and block_d <= 64 else num_stages
        block_tail = block_k if 64 < head_dim < block_d <= 128 and not dropout else block_tail
    blocks = {"BLOCK_Q": block_q, "BLOCK_K": block_k, "BLOCK_TAIL": block_tail, "BLOCK_D": block_d}
    return LaunchConfig(blocks, num_warps, num_stages, *max_registers)


def _attention_spans_config(
    which: str, head_dim: int, dtype: torch.dtype, arch: str, num_modalities: int, *, visible: bool
) -> LaunchConfig:
    """Tiles of the forward ("forward") or the backward for queries ("query") that span segments."""
    block_d = head_block(head_dim)
    block_q, block_k, num_warps, num_stages, *max_registers = _SPANS[which, dtype.itemsize][arch][max(64, block_d)]
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
