"""ModalityLayout: offsets, packing, times and work lists."""

import math

import pytest
import torch

from fusedmm import ModalityLayout, ShapeError, gated_multimodal_attention

Q_LENGTHS, K_LENGTHS = torch.tensor([3, 0, 200]), torch.tensor([[2, 0], [5, 1], [0, 300]])


def test_offsets_and_owners() -> None:
    layout = ModalityLayout.from_lengths(Q_LENGTHS, K_LENGTHS)
    assert layout.cu_seqlens_q.tolist() == [0, 3, 3, 203]
    assert layout.cu_seqlens_k.tolist() == [0, 2, 2, 7, 8, 8, 308]
    assert (layout.max_seqlen_q, layout.max_seqlen_k) == (200, 300)
    assert (layout.total_q, layout.total_k, layout.batch_size) == (203, 308, 3)
    assert layout.query_samples().bincount(minlength=3).tolist() == [3, 0, 200]
    assert layout.key_segments().bincount(minlength=6).tolist() == [2, 0, 5, 1, 0, 300]


def test_per_query_repeats_and_differentiates() -> None:
    layout = ModalityLayout.from_lengths(Q_LENGTHS, K_LENGTHS)
    x = torch.randn(3, 2, requires_grad=True)
    repeated = layout.per_query(x)
    assert torch.equal(repeated, x.repeat_interleave(Q_LENGTHS, 0))
    repeated.sum().backward()
    assert x.grad[:, 0].tolist() == [3, 0, 200]


def test_work_lists_cover_every_row_once_with_the_longest_first() -> None:
    layout = ModalityLayout.from_lengths(Q_LENGTHS, K_LENGTHS)
    for tiles, bounds, partners in (
        (layout.query_tiles, layout.cu_seqlens_q, K_LENGTHS.sum(1).tolist()),
        (layout.key_tiles, layout.cu_seqlens_k, Q_LENGTHS.repeat_interleave(2).tolist()),
    ):
        covered, costs = [], []
        for run, start in tiles.tolist():
            if run < 0:
                assert start == 0
                costs.append(-1)
                continue
            stop = min(start + 128, int(bounds[run + 1]))
            covered += range(start, stop)
            costs.append((stop - start) * partners[run])
        assert sorted(covered) == list(range(int(bounds[-1])))
        assert costs == sorted(costs, reverse=True)


def test_lengths_on_the_host_make_a_layout_anywhere() -> None:
    """Meta tensors have no values: whatever read one on the device would fail, as it would wait for a GPU."""
    built = ModalityLayout.from_lengths(Q_LENGTHS, K_LENGTHS)
    found = ModalityLayout.from_lengths(Q_LENGTHS, K_LENGTHS, device="meta")
    tables = ("cu_seqlens_q", "cu_seqlens_k", "query_tiles", "key_tiles")
    for table, expected in ((getattr(found, name), getattr(built, name)) for name in tables):
        assert table.is_meta
        assert (table.shape, table.dtype) == (expected.shape, torch.int32)
    sizes = ("total_q", "total_k", "max_seqlen_q", "max_seqlen_k", "max_segments_k", "num_modalities")
    assert all(getattr(found, name) == getattr(built, name) for name in sizes)


def test_masks_with_holes_pack_and_unpack() -> None:
    q_mask = torch.tensor([[True, False, True], [False, False, False]])
    masks = {"text": torch.tensor([[False, True], [True, True]]), "audio": torch.zeros(2, 0, dtype=torch.bool)}
    layout = ModalityLayout.from_masks(q_mask, masks)
    assert layout.names == ("text", "audio")
    query = torch.arange(6.0).view(2, 3, 1).masked_fill(~q_mask[..., None], math.nan).requires_grad_()
    packed = layout.pack(query)
    assert packed.flatten().tolist() == [0, 2]
    assert torch.equal(layout.unpack(packed), torch.where(q_mask[..., None], query, 0.0))
    packed.sum().backward()
    assert torch.equal(query.grad, q_mask[..., None].float())
    tokens = {"text": torch.arange(4.0).view(2, 2, 1), "audio": torch.zeros(2, 0, 1)}
    keys = layout.pack(tokens)
    assert keys.flatten().tolist() == [1, 2, 3]
    back = layout.unpack_keys(keys)
    assert back["text"].flatten().tolist() == [0, 1, 2, 3]
    assert back["audio"].shape == (2, 0, 1)


def test_lengths_pack_leading_tokens() -> None:
    layout = ModalityLayout.from_lengths(torch.tensor([2, 1]), torch.tensor([[1, 2], [0, 1]]), names=["a", "b"])
    padded = torch.arange(6.0).view(2, 3)
    assert layout.pack(padded).tolist() == [0, 1, 3]
    assert layout.unpack(layout.pack(padded)).tolist() == [[0, 1], [3, 0]]
    tokens = {"a": torch.tensor([[1.0], [9.0]]), "b": torch.tensor([[2.0, 3.0], [4.0, 9.0]])}
    assert layout.pack(tokens).tolist() == [1, 2, 3, 4]
    assert {name: x.tolist() for name, x in layout.unpack_keys(layout.pack(tokens)).items()} == {
        "a": [[1], [0]],
        "b": [[2, 3], [4, 0]],
    }


@pytest.mark.parametrize("lookback", [None, 0, 7, torch.tensor([3, 10**15])])
@pytest.mark.parametrize("sorted_keys", [True, False])
def test_visible_ranges_are_what_the_definition_says(lookback, sorted_keys) -> None:
    layout = ModalityLayout.from_lengths(torch.tensor([6, 0, 9]), torch.tensor([[5, 12], [3, 0], [0, 40]]))
    query_time = torch.randint(0, 30, (15,)) + 10**15
    key_time = torch.randint(0, 30, (60,)) + 10**15
    if sorted_keys:
        key_time = key_time[torch.argsort(layout.key_segments() * 2**50 + key_time)]
    visibility = layout.at_times(query_time, key_time, lookback).visibility
    assert (visibility.key_order is None) == sorted_keys
    order = torch.arange(60) if sorted_keys else visibility.key_order
    assert torch.equal(layout.key_segments()[order], layout.key_segments())
    age = query_time[:, None] - key_time
    segment = layout.key_segments()
    limit = torch.as_tensor(2**60 if lookback is None else lookback).expand(2)[segment % 2]
    expected = (age >= 0) & (age < limit) & (layout.query_samples()[:, None] == segment // 2)
    seen = torch.zeros_like(expected)
    for i in range(15):
        for m in range(2):
            low, high = visibility.ranges[i, m].tolist()
            seen[i, order[low:high]] = True
    assert torch.equal(seen, expected)


EXTREME_TIMES = torch.tensor([-(2**63), -(2**63) + 1, -(2**62), -1, 0, 2**62, 2**63 - 1])


@pytest.mark.parametrize("implementation", ["ranges", "kernel", "reference"])
@pytest.mark.parametrize("lookback", [None, 0, 1, 2**62, 2**63 - 1])
def test_differences_of_times_may_exceed_int64(implementation: str, lookback: int | None, device) -> None:
    """A query and a key 2**63 apart or more are far apart, not the other way round."""
    count = len(EXTREME_TIMES)
    layout = ModalityLayout.from_lengths(torch.tensor([count], device=device), torch.tensor([[count]], device=device))
    times = EXTREME_TIMES.to(device)
    timed = layout.at_times(times, times, lookback)
    expected = [
        [key <= query and (lookback is None or query - key < lookback) for key in EXTREME_TIMES.tolist()]
        for query in EXTREME_TIMES.tolist()
    ]
    if implementation == "reference":
        zeros, scores = torch.zeros(count, 1, 16, device=device), torch.eye(count, 16, device=device)[:, None]
        options = {"query_time": times, "key_time": times, "lookback": lookback, "impl": "reference"}
        seen = gated_multimodal_attention(zeros, zeros, scores, layout, **options).output[:, 0, :count] > 0
        assert seen.tolist() == expected
        return
    ranges = timed.visibility.ranges
    if implementation == "kernel":
        from fusedmm.kernels.visibility import visible_ranges

        ranges = torch.full_like(ranges, -1)
        window = timed.visibility.lookback if lookback is None else timed.visibility.lookback.contiguous()
        tables = (layout.cu_seqlens_q, layout.cu_seqlens_k, layout.query_tiles)
        visible_ranges(times, times, window, *tables, ranges, layout.max_seqlen_k)
    assert [[low <= key < high for key in range(count)] for low, high in ranges[:, 0].tolist()] == expected


@pytest.mark.parametrize("lookback", [None, torch.tensor([7, 0])])
def test_the_kernel_finds_the_same_ranges(lookback, device) -> None:
    from fusedmm.kernels.visibility import visible_ranges

    lengths = torch.tensor([6, 0, 150]), torch.tensor([[5, 12], [3, 0], [0, 400]])
    layout = ModalityLayout.from_lengths(*(x.to(device) for x in lengths))
    query_time = torch.randint(0, 90, (layout.total_q,)).to(device) + 10**15
    key_time = torch.randint(0, 90, (layout.total_k,)).to(device) + 10**15
    key_time = key_time[torch.argsort(layout.key_segments() * 2**50 + key_time)]
    expected = (
        ModalityLayout.from_lengths(*lengths).at_times(query_time.cpu(), key_time.cpu(), lookback).visibility.ranges
    )
    ranges = torch.full_like(expected, -1, device=device)
    lookback = None if lookback is None else lookback.to(device)
    tables = (layout.cu_seqlens_q, layout.cu_seqlens_k, layout.query_tiles)
    visible_ranges(query_time, key_time, lookback, *tables, ranges, layout.max_seqlen_k)
    assert torch.equal(ranges.cpu(), expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.tensor([1, -1]), torch.tensor([[1], [1]])), ValueError, "q_lengths must not be negative, got -1"),
        ((torch.tensor([1]), torch.tensor([[1], [1]])), ShapeError, "k_lengths has batch=2, but q_lengths has batch=1"),
        ((torch.tensor([1.0]), torch.tensor([[1]])), TypeError, "q_lengths must be int32 or int64, got float32"),
        (([1], torch.tensor([[1]])), TypeError, "q_lengths must be a tensor, got list. Use torch.as_tensor"),
        ((torch.tensor([2**31 - 1, 1]), torch.tensor([[1], [1]])), ValueError, "q_lengths must sum to less than"),
        ((torch.tensor([1]), torch.tensor([[2**62] * 4])), ValueError, "k_lengths must sum to less than"),
        ((torch.tensor([1]), torch.ones(1, 33).long()), ValueError, "num_modalities must be 1 to 32, got 33"),
        ((torch.tensor([1]), torch.ones(1, 0).long()), ValueError, "num_modalities must be 1 to 32, got 0"),
        ((torch.tensor([1]), torch.tensor([[1, 1]]), ["a", "a"]), ValueError, "names must be 2 different names"),
    ],
)
def test_bad_lengths(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        ModalityLayout.from_lengths(*arguments)


def test_bad_masks_and_tensors() -> None:
    with pytest.raises(TypeError, match=r"k_masks\['a'\] must be bool, got int64"):
        ModalityLayout.from_masks(torch.ones(1, 2).bool(), {"a": torch.ones(1, 2).long()})
    layout = ModalityLayout.from_lengths(torch.tensor([2]), torch.tensor([[3]]))
    with pytest.raises(ShapeError, match=r"unpack: packed must have shape \[query=2"):
        layout.unpack(torch.zeros(3, 1))
    with pytest.raises(ShapeError, match=r"pack: query must have shape \[batch=1, at least 2 tokens"):
        layout.pack(torch.zeros(1, 1, 4))
    named = ModalityLayout.from_lengths(torch.tensor([1, 1]), torch.tensor([[5, 1], [2, 1]]), names=["a", "b"])
    with pytest.raises(ShapeError, match=r"pack: a must have shape \[batch=2, at least 5 tokens"):
        named.pack({"a": torch.zeros(2, 3, 1), "b": torch.zeros(2, 2, 1)})
    with pytest.raises(ValueError, match=r"pack: the layout must have names of its modalities"):
        layout.pack({"a": torch.zeros(1, 3, 4)})
    with pytest.raises(TypeError, match=r"key_time must be int64, got float32"):
        layout.at_times(torch.arange(2), torch.arange(3.0))
    with pytest.raises(TypeError, match=r"lookback must be int64, got str"):
        layout.at_times(torch.arange(2), torch.arange(3), "3 days")
    with pytest.raises(TypeError, match=r"k_masks must be a Mapping, got list"):
        ModalityLayout.from_masks(torch.ones(1, 2).bool(), [torch.ones(1, 2).bool()])
    with pytest.raises(TypeError, match=r"names must be a sequence of strings, got 'a'"):
        ModalityLayout.from_lengths(torch.tensor([2]), torch.tensor([[3]]), names="a")
    for method in (layout.unpack, layout.unpack_keys, layout.per_query):
        with pytest.raises(TypeError, match=rf"{method.__name__}: \w+ must be a tensor, got list"):
            method([1.0, 2.0])
    with pytest.raises(TypeError, match=r"pack: padded must be a Mapping, got list"):
        named.pack([1.0, 2.0])


def test_an_empty_batch_of_queries_and_keys() -> None:
    layout = ModalityLayout.from_lengths(torch.tensor([0, 0]), torch.tensor([[0], [0]]))
    assert (layout.total_q, layout.total_k) == (0, 0)
    assert layout.at_times(torch.zeros(0).long(), torch.zeros(0).long()).visibility.ranges.shape == (0, 1, 2)
    nobody = ModalityLayout.from_lengths(torch.zeros(0).long(), torch.zeros(0, 2).long(), names=["a", "b"])
    assert (nobody.batch_size, nobody.max_segments_k) == (0, (0, 0))
    assert nobody.pack({"a": torch.zeros(0, 4, 3), "b": torch.zeros(0, 0, 3)}).shape == (0, 3)


def test_a_layout_of_offsets_alone_is_the_one_of_lengths() -> None:
    """What is derived is found where it is not given, once: a layout with times or slots keeps it."""
    built = ModalityLayout.from_lengths(torch.tensor([3, 0, 130]), torch.tensor([[4, 0], [1, 2], [0, 7]]))
    found = ModalityLayout(built.cu_seqlens_q, built.cu_seqlens_k, 2, built.max_seqlen_q, built.max_seqlen_k)
    assert (found.total_q, found.total_k, found.max_segments_k) == (133, 14, (4, 7))
    assert (built.total_q, built.total_k, built.max_segments_k) == (133, 14, (4, 7))
    for name in ("query_tiles", "key_tiles"):
        assert torch.equal(getattr(found, name), getattr(built, name))
    timed = built.at_times(torch.zeros(133, dtype=torch.int64), torch.zeros(14, dtype=torch.int64))
    assert timed.query_tiles is built.query_tiles
