"""Modules and batches under the tools of PyTorch that look into their arguments: export, FSDP2, loaders, pickling."""

import copy
import io
import pickle
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.data import DataLoader

from fusedmm import ModalityLayout
from fusedmm.nn import FusionBlock, MultimodalBatch

WIDTHS = {"price": 5, "text": 12, "chart": 7}


class Stack(nn.Module):
    """Two layers that share one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(FusionBlock(32, 2, WIDTHS, output_gate=True) for _ in range(2))

    def forward(self, query: Tensor, batch: MultimodalBatch) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            query, mass = block(query, batch)
        return query, mass


def example(samples: int, queries: int, tokens: int, *, timed: bool = False) -> tuple[Tensor, MultimodalBatch]:
    """A query and its batch; no size is that of an example with other arguments."""
    query = torch.randn(samples, queries, 32)
    given = {name: torch.randn(samples, tokens + n, width) for n, (name, width) in enumerate(WIDTHS.items())}
    lengths = torch.arange(samples) % 3 + tokens - 1
    options: dict = {"masks": {"text": torch.arange(tokens + 1) < lengths[:, None]}}
    if timed:
        options["times"] = {name: torch.arange(x.shape[1]).expand(x.shape[:2]) for name, x in given.items()}
        options["query_time"] = torch.full((samples, queries), tokens)
    return query, MultimodalBatch.build(query, given, WIDTHS, **options)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # of PyTorch 2.11's torch.export.load
@pytest.mark.parametrize("timed", [False, True])
def test_exported_once_it_takes_other_sizes(timed: bool) -> None:
    torch.manual_seed(0)
    stack, examples = Stack().eval(), torch.export.AdditionalInputs()
    first = example(4, 3, 5, timed=timed)
    for arguments in (first, example(3, 5, 8, timed=timed)):  # what differs here may differ later
        examples.add(arguments)
    program, file = torch.export.export(stack, first, dynamic_shapes=examples), io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    exported = torch.export.load(file).module()
    for sizes in ((4, 3, 5), (2, 7, 9), (6, 2, 20)):
        arguments = example(*sizes, timed=timed)
        for found, expected in zip(exported(*arguments), stack(*arguments), strict=True):
            torch.testing.assert_close(found, expected)


def test_an_export_of_one_example_refuses_another_size() -> None:
    stack = Stack().eval()
    exported = torch.export.export(stack, example(4, 3, 5)).module()
    arguments = example(4, 3, 5)
    torch.testing.assert_close(exported(*arguments), stack(*arguments))
    with pytest.raises((AssertionError, RuntimeError), match="query"):
        exported(*example(3, 5, 8))


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("timed", [False, True])
def test_fsdp2_casts_what_the_batch_holds(timed: bool) -> None:
    """Its mixed precision puts every argument together anew; a view among the results would warn, which is an error."""
    torch.manual_seed(0)
    stack = Stack()
    query, batch = example(4, 3, 5, timed=timed)
    expected = stack(query, batch)[0]
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    for module in (*stack.blocks, stack):
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
    output, mass = stack(query, batch)
    torch.testing.assert_close(output, expected, rtol=0.05, atol=0.05)
    (output.square().sum() + mass[..., 0].sum()).backward()
    assert all(p.grad is None or bool(p.grad.to_local().isfinite().all()) for p in stack.parameters())


def test_nothing_returned_is_a_view() -> None:
    query, batch = example(4, 3, 5)
    assert not any(x._is_view() for x in Stack()(query, batch))


def copies(batch: MultimodalBatch) -> Iterator[MultimodalBatch]:
    yield copy.copy(batch)
    yield copy.deepcopy(batch)
    yield pickle.loads(pickle.dumps(batch))
    file = io.BytesIO()
    torch.save(batch, file)
    file.seek(0)
    yield torch.load(file)  # weights_only: no code of the file's runs
    yield batch.to("cpu", non_blocking=True)


def test_copies_are_the_batch() -> None:
    stack = Stack()
    query, batch = example(4, 3, 5, timed=True)
    expected = stack(query, batch)
    for other in copies(batch):
        assert type(other) is MultimodalBatch
        assert (other.layout.names, other.layout.total_k) == (batch.layout.names, batch.layout.total_k)
        torch.testing.assert_close(stack(query, other), expected, rtol=0, atol=0)
    moved = batch.to("meta")
    visibility = moved.layout.visibility
    tensors = [*moved.tokens.values(), moved.key_source, moved.layout.key_tiles, visibility.ranges, visibility.key_time]
    assert all(x.is_meta for x in tensors)


def test_full_tokens_are_packed_without_a_look_at_the_device() -> None:
    """Meta tensors have no values: whatever read one would fail, as it would wait for a GPU."""
    query, tokens = torch.zeros(3, 4, 64, device="meta"), {"a": torch.zeros(3, 5, 8, device="meta")}
    batch = MultimodalBatch.build(query, tokens, {"a": 8, "b": 3})
    assert (batch.layout.total_q, batch.layout.total_k, batch.layout.max_segments_k) == (12, 15, (5, 0))
    assert all(x.is_meta for x in (batch.key_source, batch.layout.cu_seqlens_k, batch.layout.key_tiles))


def test_a_module_compiled_with_its_packing_is_not_compiled_for_every_batch() -> None:
    """What NumPy makes of lengths stays out of the graphs, which would hold them as constants."""
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    module = FusionBlock(64, 4, {"a": 8, "b": 5})
    compiled = torch.compile(module, backend=count)
    counts = []
    for _ in range(5):
        query, tokens = torch.randn(3, 4, 64), {"a": torch.randn(3, 9, 8), "b": torch.randn(3, 7, 5)}
        masks = {"a": torch.rand(3, 9) < 0.5, "b": torch.rand(3, 7) < 0.5}
        torch.testing.assert_close(compiled(query, tokens, masks=masks), module(query, tokens, masks=masks))
        counts.append(len(graphs))
    assert counts[0] > 0
    assert counts[2:] == [counts[2]] * 3


def collate(lengths: list[list[int]]) -> ModalityLayout:
    k_lengths = torch.tensor(lengths)
    return ModalityLayout.from_lengths(torch.ones(len(lengths), dtype=torch.int64), k_lengths, names=["a", "b"])


def test_layouts_come_from_the_workers_of_a_loader() -> None:
    lengths = [[1, 2], [0, 3], [4, 0], [2, 2]]
    loader = DataLoader(lengths, batch_size=2, num_workers=2, collate_fn=collate)
    for found, rows in zip(loader, (lengths[:2], lengths[2:]), strict=True):
        expected = collate(rows)
        assert (found.names, found.total_k) == (("a", "b"), sum(map(sum, rows)))
        assert found.max_segments_k == tuple(map(max, zip(*rows, strict=True)))
        assert torch.equal(found.cu_seqlens_k, expected.cu_seqlens_k)
        assert torch.equal(found.key_tiles, expected.key_tiles)
