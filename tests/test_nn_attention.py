"""GatedMultimodalAttention and FusionBlock: what they compute of padded, nested and packed batches, and changed."""

import math

import pytest
import torch

from fusedmm.nn import FusionBlock, GatedMultimodalAttention, MultimodalBatch
from tests.nn_batch import WIDTHS, padded_batch


@pytest.fixture
def batch():
    return padded_batch()


@pytest.mark.parametrize("module", [GatedMultimodalAttention, FusionBlock])
def test_padding_is_never_read_and_gradients_are_finite(module, batch) -> None:
    torch.manual_seed(1)
    layer = module(64, 4, WIDTHS, num_kv_heads=2, output_gate=True)
    clean = layer(batch["query"], **{k: v for k, v in batch.items() if k != "query"})
    dirty = {**batch, "tokens": {**batch["tokens"], "text": batch["tokens"]["text"].clone()}}
    dirty["tokens"]["text"][~batch["masks"]["text"]] = math.nan
    dirty["query"] = batch["query"].masked_fill(~batch["query_mask"][..., None], math.nan)
    out = layer(dirty["query"], **{k: v for k, v in dirty.items() if k != "query"})
    assert torch.equal(out.output[batch["query_mask"]], clean.output[batch["query_mask"]])
    assert (out.output[~batch["query_mask"]] == 0).all()
    assert out.mass.shape == (3, 4, 4, 3)
    assert (out.mass[..., 2] == 0).all()  # the missing modality
    assert (out.mass[1, :2, :, 1] == 0).all()  # missing in that sample
    out.output.square().sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in layer.parameters())


def test_equals_multihead_attention_for_one_modality() -> None:
    """A new module is plain attention: priors and gates start neutral."""
    ours = GatedMultimodalAttention(32, 2, ["tokens"])
    theirs = torch.nn.MultiheadAttention(32, 2, batch_first=True)
    with torch.no_grad():
        parts = (ours.query_proj, ours.key_proj["tokens"], ours.value_proj["tokens"])
        for part, weight, bias in zip(parts, theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3), strict=True):
            part.weight.copy_(weight)
            part.bias.copy_(bias)
        ours.out_proj.load_state_dict(theirs.out_proj.state_dict())
    query, keys, mask = torch.randn(2, 3, 32), torch.randn(2, 7, 32), torch.rand(2, 7) < 0.6
    got = ours(query, {"tokens": keys}, masks={"tokens": mask})
    expected, _ = theirs(query, keys, keys, key_padding_mask=~mask)
    torch.testing.assert_close(got.output, expected, rtol=1e-4, atol=1e-5)


def test_nested_equals_padded() -> None:
    layer = GatedMultimodalAttention(32, 2, ["a", "b"])
    lengths = {"query": (3, 5), "a": (3, 0), "b": (2, 4)}
    rows = {name: [torch.randn(n, 32) for n in sizes] for name, sizes in lengths.items()}
    nested = {name: torch.nested.nested_tensor(parts, layout=torch.jagged) for name, parts in rows.items()}
    padded = {name: torch.nested.to_padded_tensor(x, 0.0) for name, x in nested.items()}
    masks = {
        name: torch.arange(padded[name].shape[1]) < torch.tensor(sizes)[:, None] for name, sizes in lengths.items()
    }
    got = layer(nested["query"], {"a": nested["a"], "b": nested["b"]})
    expected = layer(
        padded["query"],
        {"a": padded["a"], "b": padded["b"]},
        masks={"a": masks["a"], "b": masks["b"]},
        query_mask=masks["query"],
    )
    assert got.output.is_nested
    assert got.mass.is_nested
    torch.testing.assert_close(got.output.values(), expected.output[masks["query"]])


def test_the_future_cannot_be_seen(batch) -> None:
    layer = FusionBlock(64, 4, WIDTHS)
    arguments = {k: v for k, v in batch.items() if k not in ("query", "lookback")}
    before = layer(batch["query"], **arguments).output
    later = {name: time > 55 for name, time in batch["times"].items()}
    arguments["tokens"] = {
        name: torch.where(later[name][..., None], torch.randn_like(x), x) for name, x in batch["tokens"].items()
    }
    assert torch.equal(layer(batch["query"], **arguments).output, before)


def test_a_batch_built_once_serves_many_layers(batch) -> None:
    layers = [FusionBlock(64, 4, WIDTHS) for _ in range(2)]
    query, arguments = batch["query"], {k: v for k, v in batch.items() if k != "query"}
    expected = query
    for layer in layers:
        expected = layer(expected, **arguments).output
    packed = MultimodalBatch.build(query, modalities=WIDTHS, **arguments)
    x = packed.pack_query(query)
    for layer in layers:
        x = layer(x, packed).output
    torch.testing.assert_close(packed.restore_query(x, query), expected)
    for layer in (layers[0], layers[0].attention):
        with pytest.raises(ValueError, match="a batch holds its own masks, got both"):
            layer(x, packed, masks=arguments["masks"])


def test_no_modality_at_all_gives_only_the_bias() -> None:
    layer = GatedMultimodalAttention(32, 2, ["a", "b"])
    out = layer(torch.randn(2, 3, 32), {})
    torch.testing.assert_close(out.output, layer.out_proj.bias.expand(2, 3, 32))
    assert (out.mass == 0).all()


def test_a_switched_off_modality_is_not_read(batch) -> None:
    layer = GatedMultimodalAttention(64, 4, WIDTHS, threshold=0.1)
    layer.modality_gate.updates_below[1] = layer.modality_gate.patience
    arguments = {k: v for k, v in batch.items() if k != "query"}
    out = layer(batch["query"], **arguments)
    assert (out.mass[..., 1] == 0).all()
    arguments["tokens"] = {**batch["tokens"], "text": torch.full_like(batch["tokens"]["text"], math.nan)}
    assert torch.equal(layer(batch["query"], **arguments).output, out.output)


@pytest.mark.parametrize(
    "options", [{"output_gate": True}, {"softmax": "per_modality"}, {"num_kv_heads": 2}], ids=lambda x: next(iter(x))
)
@pytest.mark.parametrize("linear", [True, False])
def test_modality_scores_equal_calls_without_each_modality(options, linear, batch) -> None:
    torch.manual_seed(2)
    layer = GatedMultimodalAttention(64, 4, WIDTHS, **options)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    head = torch.nn.Linear(64, 6)
    query, tokens = batch.pop("query"), batch.pop("tokens")
    scores = layer.modality_scores(query, tokens, head if linear else head.forward, **batch)
    assert scores.shape == (3, 4, 3)
    assert (scores[~batch["query_mask"]] == 0).all()

    def answer(active: torch.Tensor | None = None) -> torch.Tensor:
        return torch.log_softmax(head(layer(query, tokens, active=active, **batch).output).double(), -1)

    full = answer()
    for modality in range(3):
        active = torch.ones(3, 3, dtype=torch.bool)
        active[:, modality] = False
        expected = (full.exp() * (full - answer(active))).sum(-1)
        torch.testing.assert_close(scores[..., modality].double(), expected, rtol=1e-4, atol=1e-6)
    assert (scores[..., 0] > 0).any()
    layer.modality_gate.update(scores[batch["query_mask"]])


@pytest.mark.parametrize("softmax", ["joint", "per_modality"])
def test_a_modality_added_after_training_leaves_the_others_as_they_were(softmax, batch) -> None:
    torch.manual_seed(0)
    block = FusionBlock(64, 4, {"price": 5, "text": 32}, softmax=softmax, threshold=0.1, patience=3)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    gate = block.attention.modality_gate
    gate.updates_below[0] = gate.patience  # price is off, and stays off
    gate.updates.fill_(1000)
    arguments = {name: batch[name] for name in ("query", "tokens", "masks")}
    before = block(**arguments)
    block.attention.add_modality("audio", 7)
    after = block(**arguments)  # audio is missing everywhere
    torch.testing.assert_close(after.output, before.output)
    torch.testing.assert_close(after.mass[..., :2], before.mass)
    assert block.modalities == {"price": 5, "text": 32, "audio": 7}
    assert gate.active(1).tolist() == [[False, True, True]]
    tokens = {**batch["tokens"], "audio": torch.randn(3, 2, 7)}
    output, mass = block(batch["query"], tokens)
    assert (mass[..., 2] > 0).all()
    output.square().sum().backward()
    assert block.attention.key_proj["audio"].weight.grad.abs().sum() > 0
    gate.update(torch.tensor([[1.0, 1.0, 1.0]]))
    assert gate.importance.tolist() == [1.0, 1.0, 1.0]  # a mean that starts anew: 0 would switch audio off
    other = FusionBlock(64, 4, block.modalities, softmax=softmax, threshold=0.1, patience=3)
    other.load_state_dict(block.state_dict())
    torch.testing.assert_close(other(batch["query"], tokens).output, block(batch["query"], tokens).output)
    with pytest.raises(ValueError, match=r"add_modality: name must be new, got 'audio'"):
        block.attention.add_modality("audio", 7)
    with pytest.raises(ValueError, match="a token width must be at least 1, got 0"):
        block.attention.add_modality("orders", 0)


class LowRank(torch.nn.Module):
    """An adapter as users put in place of a linear layer: without a weight of its own."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = torch.nn.Linear(base.in_features, 2, bias=False)
        self.up = torch.nn.Linear(2, base.out_features, bias=False)
        torch.nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


class Int8(torch.nn.Module):
    """A quantised layer, whose weight says nothing of what it takes and gives."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.register_buffer("scale", base.weight.detach().abs().amax(1, keepdim=True).clamp(min=1e-9) / 127)
        self.register_buffer("weight", (base.weight.detach() / self.scale).round().to(torch.int8))
        self.bias = base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


@pytest.mark.parametrize(("wrapper", "error"), [(LowRank, 0.0), (Int8, 0.05)])
def test_every_linear_layer_may_be_replaced(wrapper, error, batch) -> None:
    torch.manual_seed(0)
    block = FusionBlock(64, 4, WIDTHS, output_gate=True)
    arguments = {name: batch[name] for name in ("query", "tokens", "masks", "query_mask")}
    expected, head = block(**arguments).output, torch.nn.Linear(64, 3)
    scores = block.attention.modality_scores(**arguments, head=head)
    linear = [(name, layer) for name, layer in block.named_modules() if isinstance(layer, torch.nn.Linear)]
    for name, layer in linear:
        parent, _, own = name.rpartition(".")
        setattr(block.get_submodule(parent), own, wrapper(layer))
    torch.testing.assert_close(block(**arguments).output, expected, rtol=0, atol=error)
    torch.testing.assert_close(block.attention.modality_scores(**arguments, head=head), scores, rtol=0, atol=error)
