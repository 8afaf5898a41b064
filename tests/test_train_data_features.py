"""Features and batches: fitted on train rows only, padded exactly, and the same batches on any number of ranks."""

import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from fusedmm.train.batches import BatchSampler, MultimodalDataset, collate, evaluation_batches
from fusedmm.train.features import FeatureConfig, Features, Featurizer, Scaler, spread, token_rows
from fusedmm.train.format import Dataset, DatasetInfo, ModalityInfo, TokenTable, read_dataset, write_dataset
from fusedmm.train.simulate import MarketConfig, simulate
from fusedmm.train.text import HashingEncoder, MissingPackage

TRAIN = np.arange(0, 240)
CONFIG = FeatureConfig(text_dim=6, text_buckets=256)


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    directory = tmp_path_factory.mktemp("market")
    write_dataset(directory, *simulate(MarketConfig(days=60, entities=6, seed=1)))
    return read_dataset(directory)


@pytest.fixture(scope="module")
def features(market: Dataset) -> Features:
    return Featurizer.fit(market, TRAIN, CONFIG).transform(market)


def test_only_train_rows_are_fitted(market: Dataset, features: Features) -> None:
    """Everything outside the train rows is replaced; the train rows come out bit for bit the same."""
    tokens = {}
    for name, table in market.tokens.items():
        cut = table.offsets[TRAIN[-1] + 1]
        values, text = table.values, table.text
        if values is not None:
            values = values.copy()
            values[cut:] = 1e6
        if text is not None:
            text = pa.array([*text[:cut].to_pylist(), *["unheard of"] * (len(text) - cut)], pa.large_string())
        tokens[name] = TokenTable(table.time, values, text, table.offsets)
    samples = market.samples.copy()
    columns = market.columns("target_") + market.columns("past_")
    samples.loc[TRAIN[-1] + 1 :, columns] = 1e6
    other = Featurizer.fit(Dataset(market.info, samples, tokens), TRAIN, CONFIG).transform(market)
    for name, table in features.tokens.items():
        np.testing.assert_array_equal(table.values, other.tokens[name].values)
    np.testing.assert_array_equal(features.past, other.past)
    np.testing.assert_array_equal(features.target_mean, other.target_mean)
    np.testing.assert_array_equal(features.target_std, other.target_std)


def test_fit_is_deterministic(market: Dataset, features: Features) -> None:
    again = Featurizer.fit(market, TRAIN, CONFIG).transform(market)
    for name, table in features.tokens.items():
        np.testing.assert_array_equal(table.values, again.tokens[name].values)


def test_features_are_finite_clipped_and_of_unit_scale(market: Dataset, features: Features) -> None:
    assert features.names == tuple(market.info.modalities)
    assert features.widths == {"price": 6, "text": 6, "audio": 8, "chart": 66, "weather": 6, "orders": 6}
    for name, table in features.tokens.items():
        assert table.values.dtype == np.float32
        assert np.isfinite(table.values).all()
        assert np.abs(table.values).max() <= CONFIG.clip
        rows = token_rows(table.offsets, TRAIN)
        assert 0.5 < table.values[rows].std() < 1.6, name
    np.testing.assert_allclose(features.target_mean, market.matrix("target_")[TRAIN].mean(axis=0), rtol=1e-5)
    np.testing.assert_array_equal(features.targets, market.matrix("target_").astype(np.float32))


def test_robust_scaler_ignores_outliers_and_undefined_values() -> None:
    column = np.random.default_rng(0).standard_normal(10_000)
    column[:50] = 1e9
    column[50:90] = np.nan
    scaler = Scaler.fit_robust(np.stack([column, np.full(10_000, 3.0), np.full(10_000, np.nan)], axis=1), clip=4.0)
    np.testing.assert_allclose(scaler.center, [0, 3, 0], atol=0.05)
    np.testing.assert_allclose(scaler.scale, [1, 1, 1], atol=0.05)
    scaled = scaler.transform(np.array([[np.nan, 3.0, 1.0], [1e9, 5.0, np.nan]]))
    np.testing.assert_array_equal(scaled[0, :2], [0, 0])
    assert scaled[1].tolist() == [4.0, 2.0, 0.0]


def test_image_scaler_does_not_blow_up_dark_pixels() -> None:
    values = np.zeros((1000, 3), np.float32)
    values[:, 1] = np.linspace(0, 1, 1000)
    values[7, 2] = 1.0  # lit once
    scaled = Scaler.fit_image(values, clip=50.0).transform(values)
    assert np.abs(scaled).max() < 7
    assert (scaled[:, 0] == 0).all()


def test_token_rows_are_those_of_the_samples() -> None:
    offsets = np.array([0, 2, 2, 5, 6])
    assert token_rows(offsets, np.array([2, 0])).tolist() == [2, 3, 4, 0, 1]
    assert token_rows(offsets, np.array([1])).tolist() == []
    assert spread(np.arange(100), 5).tolist() == [0, 24, 49, 74, 99]
    assert spread(np.arange(3), 5).tolist() == [0, 1, 2]


def test_hashing_encoder_tells_sentences_apart_and_unknown_words_do_not_break_it() -> None:
    train = ["profit rose", "profit fell", "guidance raised", "guidance cut"] * 25
    encoder = HashingEncoder.fit(train, dim=3, buckets=512, seed=0)
    encoded = encoder.transform([*train[:4], "zebra", ""])
    assert encoded.shape == (6, 3)
    assert encoded.dtype == np.float32
    assert np.isfinite(encoded).all()
    distances = np.linalg.norm(encoded[:4, None] - encoded[None, :4], axis=-1) + 10 * np.eye(4)
    assert distances.min() > 0.5
    np.testing.assert_allclose(encoder.transform(train).std(axis=0), 1, rtol=1e-3)


def test_hashing_encoder_with_fewer_words_than_dimensions_pads_with_zeros() -> None:
    encoded = HashingEncoder.fit(["one", "one"], dim=4, buckets=64, seed=0).transform(["one", "two"])
    assert encoded.shape == (2, 4)
    assert np.isfinite(encoded).all()
    assert (encoded[:, 2:] == 0).all()


def fake_sentence_transformers(calls: list[int]) -> types.ModuleType:
    """A stand-in with the interface that is used: a sentence's vector is drawn from its letters."""

    class SentenceTransformer:
        def __init__(self, name: str) -> None:
            assert name == "a-model"

        def encode(self, sentences: list[str], **_: object) -> np.ndarray:
            calls.append(len(sentences))
            return np.stack([np.random.default_rng(list(text.encode())).standard_normal(12) for text in sentences])

    module = types.ModuleType("sentence_transformers")
    module.SentenceTransformer = SentenceTransformer  # type: ignore[attr-defined]
    return module


def test_model_embeddings_are_cached_and_reduced_on_train(
    market: Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[int] = []
    monkeypatch.setitem(sys.modules, "sentence_transformers", fake_sentence_transformers(calls))
    config = FeatureConfig(text_dim=4, text_model="a-model", text_cache=str(tmp_path))
    encoded = Featurizer.fit(market, TRAIN, config).transform(market).tokens["text"].values
    count = len(market.tokens["text"].time)
    assert calls == [count]  # fit and transform share one run of the model
    assert encoded.shape == (count, 4)
    rows = token_rows(market.tokens["text"].offsets, TRAIN)
    np.testing.assert_allclose(encoded[rows].std(axis=0), 1, atol=0.02)
    again = Featurizer.fit(market, TRAIN, config).transform(market).tokens["text"].values
    assert calls == [count]
    np.testing.assert_array_equal(encoded, again)


def test_model_without_its_package(market: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(MissingPackage, match="text_model needs the package sentence-transformers, got none"):
        Featurizer.fit(market, TRAIN, FeatureConfig(text_model="a-model"))


def test_model_with_fewer_train_sentences_than_dimensions(market: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", fake_sentence_transformers([]))
    with pytest.raises(ValueError, match="text_dim must be at most 12"):
        Featurizer.fit(market, TRAIN, FeatureConfig(text_model="a-model", text_dim=13))


def test_fit_without_rows_or_sentences(market: Dataset) -> None:
    with pytest.raises(ValueError, match="train must have at least one row, got 0"):
        Featurizer.fit(market, np.zeros(0, np.int64), CONFIG)
    silent = np.flatnonzero(np.diff(market.tokens["text"].offsets) == 0)[:3]
    with pytest.raises(ValueError, match="modality text must have a sentence on the train rows, got none"):
        Featurizer.fit(market, silent, CONFIG)


def test_batch_holds_what_the_samples_hold(features: Features) -> None:
    rows = np.array([5, 100, 37])
    dataset = MultimodalDataset(features, rows)
    assert len(dataset) == 3
    batch = collate([dataset[i] for i in range(3)])
    assert batch.sample.tolist() == features.sample[rows].tolist()
    assert batch.time.tolist() == features.time[rows].tolist()
    np.testing.assert_array_equal(batch.targets, features.targets[rows])
    np.testing.assert_array_equal(batch.past, features.past[rows])
    for name, table in features.tokens.items():
        assert batch.tokens[name].dtype == torch.float32
        assert batch.times[name].dtype == torch.int64
        for i, row in enumerate(rows):
            start, stop = table.offsets[row], table.offsets[row + 1]
            mask = batch.masks[name][i]
            assert mask.tolist() == [True] * (stop - start) + [False] * (len(mask) - (stop - start))
            np.testing.assert_array_equal(batch.tokens[name][i][mask], table.values[start:stop])
            np.testing.assert_array_equal(batch.times[name][i][mask], table.time[start:stop])
            assert (batch.tokens[name][i][~mask] == 0).all()
            assert (batch.times[name][i][~mask] == batch.time[i]).all()
            assert (batch.times[name][i].diff() >= 0).all()
        assert batch.masks[name].any(dim=0).all()  # no column is padding only


def test_the_latest_tokens_are_kept(features: Features) -> None:
    dataset = MultimodalDataset(features, TRAIN, max_tokens={"price": 3, "weather": 1000})
    table = features.tokens["price"]
    np.testing.assert_array_equal(dataset[8].tokens["price"], table.values[table.offsets[9] - 3 : table.offsets[9]])
    assert len(dataset[8].tokens["weather"]) in (0, 32)


def test_missing_modality_has_no_tokens(features: Features) -> None:
    missing = np.flatnonzero(np.diff(features.tokens["text"].offsets) == 0)
    batch = collate([MultimodalDataset(features, missing)[i] for i in range(2)])
    assert batch.tokens["text"].shape == (2, 0, 6)
    assert batch.masks["text"].shape == (2, 0)
    present = np.flatnonzero(np.diff(features.tokens["text"].offsets) > 0)
    mixed = MultimodalDataset(features, np.array([missing[0], present[0]]))
    batch = collate([mixed[0], mixed[1]])
    assert batch.masks["text"].any(dim=1).tolist() == [False, True]


def test_batch_moves_and_pins_as_one(features: Features) -> None:
    dataset = MultimodalDataset(features, TRAIN)
    moved = collate([dataset[0], dataset[1]]).to("meta")
    assert {
        tensor.device.type for tensor in (*moved.tokens.values(), *moved.masks.values(), *moved.times.values())
    } == {"meta"}
    assert {tensor.device.type for tensor in moved[3:]} == {"meta"}
    loader = torch.utils.data.DataLoader(dataset, batch_size=16, collate_fn=collate)
    assert sum(len(batch.sample) for batch in loader) == len(TRAIN)


def test_dataset_refuses_bad_arguments(features: Features) -> None:
    with pytest.raises(ValueError, match=r"max_tokens must name modalities of the data \(price, .*\), got 'video'"):
        MultimodalDataset(features, TRAIN, {"video": 3})
    with pytest.raises(ValueError, match=r"max_tokens\['text'\] must be at least 1, got 0"):
        MultimodalDataset(features, TRAIN, {"text": 0})
    with pytest.raises(ValueError, match="rows must be from 0 to 359, got 0 to 360"):
        MultimodalDataset(features, np.array([0, 360]))
    with pytest.raises(ValueError, match="samples must hold at least one sample, got none"):
        collate([])


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_global_batches_do_not_depend_on_the_ranks(world_size: int) -> None:
    one = BatchSampler(num_rows=100, batch_size=16, seed=3)
    ranks = [BatchSampler(100, 16, 3, rank, world_size) for rank in range(world_size)]
    for step in (0, 5, 6, 123):
        together = np.concatenate([rank.indices(step) for rank in ranks])
        assert sorted(together) == sorted(one.indices(step))
        assert {len(rank.indices(step)) for rank in ranks} == {16 // world_size}


def test_an_epoch_sees_each_row_at_most_once_and_epochs_differ() -> None:
    sampler = BatchSampler(num_rows=100, batch_size=16, seed=0)
    assert sampler.steps_per_epoch == 6
    epochs = [np.concatenate([sampler.indices(epoch * 6 + step) for step in range(6)]) for epoch in range(2)]
    for rows in epochs:
        assert len(np.unique(rows)) == 96
        assert rows.min() >= 0
        assert rows.max() < 100
    assert (epochs[0] != epochs[1]).any()
    np.testing.assert_array_equal(sampler.indices(9), BatchSampler(100, 16, 0).indices(9))
    assert (sampler.indices(0) != BatchSampler(100, 16, 1).indices(0)).any()


def test_sampler_refuses_what_cannot_be_shared() -> None:
    with pytest.raises(ValueError, match="batch_size must be a positive multiple of world_size=3, got 16"):
        BatchSampler(100, 16, 0, 0, 3)
    with pytest.raises(ValueError, match="num_rows must be at least batch_size=16, got 5"):
        BatchSampler(5, 16, 0)


@pytest.mark.parametrize(("rows", "batch", "world"), [(1, 8, 4), (17, 4, 2), (64, 8, 1), (65, 8, 2), (0, 8, 2)])
def test_evaluation_covers_every_row_in_equally_many_batches(rows: int, batch: int, world: int) -> None:
    shares = [evaluation_batches(rows, batch, rank, world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    seen = [index for share in shares for indices in share for index in indices]
    assert sorted(set(seen)) == list(range(rows))
    assert all(len(indices) <= batch for share in shares for indices in share)
    assert len(seen) - rows < max(1, len(shares[0])) * world


def test_classes_are_integers(tmp_path: Path) -> None:
    day = np.arange(6)
    samples = pd.DataFrame({"sample": day, "entity": "A", "time": day * 86_400, "day": day.astype(np.int32)})
    samples["target_up"] = [0.0, 1.0, 1.0, 0.0, 2.0, 1.0]
    info = DatasetInfo("c", "classification", "", "", {"x": ModalityInfo("numeric")}, classes=3)
    table = TokenTable(samples["time"].to_numpy(), np.ones((6, 1), np.float32), None, np.arange(7))
    dataset = Dataset(info, samples, {"x": table})
    features = Featurizer.fit(dataset, np.arange(4)).transform(dataset)
    assert features.classes == 3
    assert features.past.shape == (6, 0)
    rows = MultimodalDataset(features, np.arange(6))
    batch = collate([rows[i] for i in range(6)])
    assert batch.targets.dtype == torch.int64
    assert batch.targets[:, 0].tolist() == [0, 1, 1, 0, 2, 1]
    assert (features.target_mean, features.target_std) == (0, 1)
