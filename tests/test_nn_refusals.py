"""What modules and batches refuse, and the words that they do it in."""

import pytest
import torch

import fusedmm
from fusedmm.nn import FusionBlock, GatedMultimodalAttention, MultimodalBatch
from tests.nn_batch import WIDTHS, padded_batch


@pytest.fixture
def batch():
    return padded_batch()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tokens": {"prise": torch.zeros(3, 1, 5)}}, ValueError, "unknown modality, got 'prise'"),
        ({"times": None}, ValueError, r"times must be given for every modality .* got none for price, text"),
        ({"query_time": None}, ValueError, r"times must be given for every modality .* got none for query_time"),
        ({"masks": {"text": torch.ones(3, 5).bool()}}, fusedmm.ShapeError, r"masks\['text'\] must have shape"),
        ({"masks": {"text": torch.ones(3, 6)}}, TypeError, r"masks\['text'\] must be bool, got float32"),
        (
            {"tokens": {"price": torch.zeros(3, 10, 5), "text": torch.zeros(3, 6, 32).long()}},
            TypeError,
            r"tokens\['text'\] must be float16 .* got int64",
        ),
        ({"query_time": torch.zeros(3, 4)}, TypeError, "query_time must be int64, got float32"),
        (
            {"times": {"price": torch.zeros(3, 9).long(), "text": torch.zeros(3, 6).long()}},
            fusedmm.ShapeError,
            r"times\['price'\] must have shape \[3, 10\], got \[3, 9\]",
        ),
        (
            {"times": {"price": torch.zeros(3, 10), "text": torch.zeros(3, 6).long()}},
            TypeError,
            r"times\['price'\] must be int64, got float32",
        ),
        ({"query_mask": torch.ones(3, 5).bool()}, fusedmm.ShapeError, "query_mask must have shape"),
        ({"lookback": {"prise": 1}}, ValueError, "lookback names an unknown modality, got 'prise'"),
        ({"lookback": {"price": 1.5}}, TypeError, r"lookback\['price'\] must be an Integral, got float"),
        ({"lookback": {"price": -1}}, ValueError, r"lookback\['price'\] must be a whole number .* got -1"),
        ({"tokens": {"price": [[1.0]]}}, TypeError, r"tokens\['price'\] must be a tensor, got list"),
        ({"masks": torch.ones(3, 6).bool()}, TypeError, "masks must be a Mapping, got Tensor. Give {name: tensor}"),
        ({"query_mask": [True]}, TypeError, "query_mask must be a tensor, got list"),
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
        ((64, 4, ["training"]), "no attribute of ModuleDict, got 'training'"),
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


def test_what_a_newcomer_gets_wrong_is_named(batch) -> None:
    layer = GatedMultimodalAttention(64, 4, WIDTHS)
    query, tokens = batch["query"], batch["tokens"]
    with pytest.raises(fusedmm.ShapeError, match="query must have width 64, the module's embed_dim, got 63"):
        layer(query[..., :63], tokens)
    with pytest.raises(TypeError, match=r"tokens\['audio'\] must be a tensor, got None. Leave a missing modality out"):
        layer(query, {**tokens, "audio": None})
    with pytest.raises(fusedmm.ShapeError, match=r"query_time must have .* Use query_time\[:, None\].expand"):
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
