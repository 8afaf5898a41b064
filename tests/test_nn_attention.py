"""GatedMultimodalAttention, FusionBlock, MultimodalBatch and ModalityGate."""

import copy
import math

import pytest
import torch

import fusedmm
from fusedmm.nn import FusionBlock, GatedMultimodalAttention, ModalityGate, MultimodalBatch

WIDTHS = {"price": 5, "text": 32, "audio": 7}


@pytest.fixture
def batch():
    tokens = {"price": torch.randn(3, 10, 5), "text": torch.randn(3, 6, 32)}  # audio is missing everywhere
    masks = {"text": torch.tensor([[1, 1, 0, 1, 0, 0], [0] * 6, [1] * 6]).bool()}
    times = {"price": torch.arange(10).expand(3, 10) * 10, "text": torch.randint(0, 100, (3, 6))}
    query_mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0]]).bool()
    return {
        "query": torch.randn(3, 4, 64),
        "tokens": tokens,
        "masks": masks,
        "query_mask": query_mask,
        "times": times,
        "query_time": torch.full((3, 4), 55),
        "lookback": {"price": 20},
    }


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


def test_gate_learns_importance_and_switches_off() -> None:
    gate = ModalityGate(16, 2, 3, threshold=0.1, patience=3)
    query, scores = torch.randn(64, 16), torch.tensor([1.0, 0.3, 0.0]).expand(64, 3)
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.1)
    assert gate.active(2).tolist() == [[True] * 3] * 2
    for _ in range(60):
        loss = gate.importance_loss(gate(query).log_prior, scores)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gate.update(scores)
    share = gate(query).log_prior.softmax(-1).mean((0, 1))
    torch.testing.assert_close(share, torch.tensor([0.77, 0.23, 0.0]), atol=0.03, rtol=0)
    torch.testing.assert_close(gate.importance, scores[0])
    assert gate.active(2).tolist() == [[True, True, False]] * 2
    assert copy.deepcopy(gate).active(1).tolist() == [[True, True, False]]


def test_importance_survives_a_cast_and_extreme_scores() -> None:
    """The running mean stays float32 in a half-precision module, and shares of tiny scores are no 0 / 0."""
    gate = ModalityGate(16, 2, 3, threshold=0.1).bfloat16()
    assert gate(torch.randn(4, 16).bfloat16()).log_prior.dtype == torch.float32
    for step in range(1, 400):
        gate.update(torch.full((2, 3), step / 1000))
    weights = torch.tensor([max(1 / step, 0.01) for step in range(1, 400)], dtype=torch.float64)
    mean = torch.zeros((), dtype=torch.float64)
    for step, weight in enumerate(weights, 1):
        mean += weight * (step / 1000 - mean)
    torch.testing.assert_close(gate.importance, mean.float().expand(3), rtol=1e-4, atol=0)
    prior = torch.randn(5, 2, 3)
    for temperature in (0.1, 1.0, 10.0):
        loss = gate.importance_loss(prior, torch.zeros(5, 3), temperature)
        torch.testing.assert_close(loss, -prior.log_softmax(-1).mean(), msg=f"temperature {temperature}")
    scores = torch.tensor([[3e-6, 1e-6, 0.0]]).expand(5, 3)
    share = torch.tensor([0.75, 0.25, 0.0])
    expected = -(share * prior.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(gate.importance_loss(prior, scores), expected, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match=r"ModalityGate: temperature must be positive, got 0"):
        gate.importance_loss(prior, scores, temperature=0)
    with pytest.raises(fusedmm.ShapeError, match=r"importance_loss: log_prior must have 3 dimensions"):
        gate.importance_loss(scores, scores)
    with pytest.raises(fusedmm.ShapeError, match=r"ModalityGate.update: .* Use scores\[query_mask\]"):
        gate.update(scores[None])


def test_a_switched_off_modality_is_not_read(batch) -> None:
    layer = GatedMultimodalAttention(64, 4, WIDTHS, threshold=0.1)
    layer.modality_gate.updates_below[1] = layer.modality_gate.patience
    arguments = {k: v for k, v in batch.items() if k != "query"}
    out = layer(batch["query"], **arguments)
    assert (out.mass[..., 1] == 0).all()
    arguments["tokens"] = {**batch["tokens"], "text": torch.full_like(batch["tokens"]["text"], math.nan)}
    assert torch.equal(layer(batch["query"], **arguments).output, out.output)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tokens": {"prise": torch.zeros(3, 1, 5)}}, ValueError, "unknown modality, got 'prise'"),
        ({"times": None}, ValueError, r"times must be given for every modality .* got none for price, text"),
        ({"query_time": None}, ValueError, r"times must be given for every modality .* got none for query_time"),
        ({"masks": {"text": torch.ones(3, 5).bool()}}, fusedmm.ShapeError, r"mask of tokens\['text'\] must have shape"),
        ({"masks": {"text": torch.ones(3, 6)}}, TypeError, r"mask of tokens\['text'\] must be bool, got float32"),
        (
            {"tokens": {"price": torch.zeros(3, 10, 5), "text": torch.zeros(3, 6, 32).long()}},
            TypeError,
            r"tokens\['text'\] must be float16 .* got int64",
        ),
        ({"query_time": torch.zeros(3, 4)}, TypeError, "time of query must be int64, got float32"),
        ({"lookback": {"prise": 1}}, ValueError, "lookback names an unknown modality, got 'prise'"),
        ({"lookback": {"price": 1.5}}, TypeError, r"lookback\['price'\] must be an Integral, got float"),
        ({"lookback": {"price": -1}}, ValueError, r"lookback\['price'\] must be a whole number .* got -1"),
        ({"tokens": {"price": [[1.0]]}}, TypeError, r"tokens\['price'\] must be a tensor, got list"),
        ({"masks": torch.ones(3, 6).bool()}, TypeError, "masks must be a Mapping, got Tensor. Give {name: tensor}"),
        ({"query_mask": [True]}, TypeError, "mask of query must be a tensor, got list"),
        ({"query_time": [1]}, TypeError, "query_time must be a tensor, got list"),
        ({"active": [True]}, TypeError, "active must be a tensor, got list"),
        ({"active": torch.ones(3, 2).bool()}, fusedmm.ShapeError, r"active must be .* modality=3, got shape \[3, 2\]"),
        (
            {"tokens": {"price": torch.zeros(3, 10, 6), "text": torch.zeros(3, 6, 32)}},
            fusedmm.ShapeError,
            "width 5, got 6",
        ),
        ({"tokens": {"price": torch.zeros(2, 10, 5), "text": torch.zeros(3, 6, 32)}}, fusedmm.ShapeError, "batch=2"),
    ],
)
def test_bad_batches(changes, error, message, batch) -> None:
    arguments = {**batch, **changes}
    with pytest.raises(error, match=message):
        MultimodalBatch.build(modalities=WIDTHS, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((64, 5, ["a"]), "num_heads must divide embed_dim"),
        ((64, 8, ["a"]), "embed_dim / num_heads must be 16 to 256, got 8"),
        ((64, 4, []), "modalities must be a non-empty sequence"),
        ((64, 4, ["a", "a"]), "modalities must have different names"),
        ((64, 4, ["a.b"]), "a modality name must be non-empty"),
        ((64, 4, ["keys"]), "no attribute of ModuleDict, got 'keys'"),
        ((64, 0, ["a"]), "num_heads must divide embed_dim"),
        ((64.0, 4, ["a"]), "embed_dim must be an int, got float"),
        ((64, 4, {"a": 1.5}), "modalities must be names with whole token widths, got 'a': 1.5"),
        ((64, 4, {"a": 0}), "a token width must be at least 1, got 0 for 'a'"),
        ((64, 4, [1, 2]), "modalities must be names with whole token widths, got 1"),
        ((64, 4, [f"m{i}" for i in range(33)]), "modalities must be at most 32, got 33"),
    ],
)
def test_bad_modules(arguments, message) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        GatedMultimodalAttention(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"patience": 0}, "patience must be at least 1, got 0"),  # all would be off from the start
        ({"threshold": "low"}, "threshold must be a number, got str"),
    ],
)
def test_bad_options(options, message) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        FusionBlock(64, 4, WIDTHS, **options)


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


def test_what_a_newcomer_gets_wrong_is_named(batch) -> None:
    layer = GatedMultimodalAttention(64, 4, WIDTHS)
    query, tokens = batch["query"], batch["tokens"]
    with pytest.raises(fusedmm.ShapeError, match="query must have width 64, the module's embed_dim, got 63"):
        layer(query[..., :63], tokens)
    with pytest.raises(TypeError, match=r"tokens\['audio'\] must be a tensor, got None. Leave a missing modality out"):
        layer(query, {**tokens, "audio": None})
    with pytest.raises(fusedmm.ShapeError, match=r"time of query must have .* Use query_time\[:, None\].expand"):
        layer(query, tokens, times=batch["times"], query_time=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="mask"):
        layer(query, tokens, mask=batch["masks"])
    with pytest.raises(TypeError, match="query must be a tensor and tokens must map names to tensors, got dict"):
        layer(tokens, query)
    with pytest.raises(fusedmm.ShapeError, match=r"active must be \[batch, modality\] or .* got shape \[3\]"):
        layer(query, tokens, active=torch.ones(3, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"modalities must map names to token widths, got list\. Pass the module's"):
        MultimodalBatch.build(query, tokens, list(WIDTHS))
    packed = MultimodalBatch.build(query, tokens, WIDTHS)
    with pytest.raises(fusedmm.ShapeError, match=r"the shape that the batch was built with, \[3, 4\], got \[4, 3\]"):
        layer(query.reshape(4, 3, 64), packed)
    with pytest.raises(TypeError, match="query must be a tensor, got list"):
        layer([1.0], packed)
    with pytest.raises(TypeError, match="query must be float32, got float64"):
        layer(query.double(), packed)
    with pytest.raises(TypeError, match=r"tokens\['price'\] must be float32, got float16"):
        layer(query, {**tokens, "price": tokens["price"].half()})
    with pytest.raises(ValueError, match=r"query must be on the device of the batch \(cpu\), got meta"):
        layer(query.to("meta"), packed)


def test_a_batch_for_other_modalities_is_refused(batch) -> None:
    """In another order it would fit, and every token would be read as another's."""
    layer = GatedMultimodalAttention(64, 4, {"price": 5, "audio": 5})
    query, tokens = batch["query"], {name: torch.randn(3, 4, 5) for name in ("price", "audio")}
    for modalities in ({"audio": 5, "price": 5}, {"price": 5}, {"price": 5, "audio": 5, "text": 32}):
        given = {name: x for name, x in tokens.items() if name in modalities}
        other = MultimodalBatch.build(query, given, modalities)
        with pytest.raises(ValueError, match=r"a batch must have the module's modalities in its order, .* got"):
            layer(query, other)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_nested_tensors_of_another_kind_are_refused(batch) -> None:
    """One with holes has other lengths than its offsets say."""
    layer = GatedMultimodalAttention(64, 4, WIDTHS)
    start, length = torch.tensor([0, 1, 2]), torch.tensor([3, 0, 2])
    holes = torch.nested.narrow(torch.randn(3, 9, 5), 1, start, length, layout=torch.jagged)
    with pytest.raises(ValueError, match=r"tokens\['price'\] must be contiguous, .* Use .contiguous\(\)"):
        layer(batch["query"], {"price": holes})
    mass = layer(batch["query"], {"price": holes.contiguous()}).mass
    assert (mass[1] == 0).all()  # nothing there
    strided = torch.nested.nested_tensor([torch.randn(n, 5) for n in (2, 1, 3)])
    with pytest.raises(TypeError, match=r"tokens\['price'\] must be a jagged nested tensor, got the strided layout"):
        layer(batch["query"], {"price": strided})


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
