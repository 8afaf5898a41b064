"""A small market whose truth is known: which modality matters is set by a regime that changes with time.

For each sample every informative modality m carries a signal s_m ~ N(0, 1), read with noise by its tokens; a regime r,
shown by four noisy indicators in the price tokens, decides which of them moves the target:

    target = sum_m w[r, m] s_m + 0.5 e,    sum_m w[r, m]^2 = 1,    e ~ N(0, 1), in part shared by the day

A modality that does not count today still carries a signal, so a model has to read the regime to know whom to trust;
two further modalities are pure noise, with more tokens than any other. Streams have different rates, and any of them
but the price may be missing. The file holds the truth: the share of each modality in what can be explained
(``importance_*``), and E[target | tokens, regime] (``oracle_*``), whose error no model can beat.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from fusedmm.train.chart import cut_patches
from fusedmm.train.dataset import SECONDS_PER_DAY, DatasetInfo, Float64Array, Int64Array, ModalityInfo
from fusedmm.train.format import RawTokens, write_dataset

REGIMES = ("quiet", "earnings", "speeches", "technical")
INFORMATIVE = ("price", "text", "audio", "chart")
NOISE = ("weather", "orders")
# Squares are shares of the explainable variance. Rows: regimes; columns: INFORMATIVE.
WEIGHTS = {
    "near": np.sqrt(
        [[0.94, 0.02, 0.02, 0.02], [0.10, 0.86, 0.02, 0.02], [0.10, 0.02, 0.86, 0.02], [0.10, 0.02, 0.02, 0.86]]
    ),
    "far": np.sqrt(
        [[0.94, 0.02, 0.02, 0.02], [0.30, 0.66, 0.02, 0.02], [0.30, 0.02, 0.66, 0.02], [0.30, 0.02, 0.02, 0.66]]
    ),
}
TARGET_NOISE = 0.5
MISSING = {"price": 0.0, "text": 0.15, "audio": 0.15, "chart": 0.10, "weather": 0.10, "orders": 0.10}
PRICE_BARS, PRICE_NOISE = 20, 1.5
TEXT_NOISE, AUDIO_NOISE, CHART_NOISE = 0.8, 1.0, 1.0
AUDIO_FEATURES = tuple(f"feature {number}" for number in range(1, 8))
NOISE_WIDTH = 6
CHART_ROWS, CHART_COLUMNS = 8, 32
# Readings of -2, -1.5, ..., 2. With the filler these are fewer words than the 32 dimensions of a sentence: an SVD keeps
# frequent words first, and the strongest verbs are the rarest.
GRADED = ("collapsed", "plunged", "fell", "eased", "held", "firmed", "rose", "jumped", "soared")
FILLER = ("the", "quarter", "we", "our", "guidance", "margin", "segment", "cash", "cost", "year", "plan", "demand")
START_DAY = 18_262  # 2020-01-01
CLOSE = 21 * 3600  # bars are knowable at 21:00 UTC
DECISION = 22 * 3600


@dataclass(frozen=True)
class MarketConfig:
    """Size and seed of a simulated market; one sample for each entity and day."""

    days: int = 400
    entities: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.days < 1 or self.entities < 1:
            raise ValueError(
                f"MarketConfig: days and entities must be at least 1, got {self.days} and {self.entities}."
            )


class Reading(NamedTuple):
    """What the tokens of one modality tell about its signal: their rows, and for each sample the precision and the
    posterior mean of s_m."""

    tokens: RawTokens
    explained: Float64Array  # [N] 1 - Var[s_m | tokens]; 0 where the modality is missing
    mean: Float64Array  # [N] E[s_m | tokens]


def simulate(config: MarketConfig) -> tuple[DatasetInfo, pd.DataFrame, dict[str, RawTokens]]:
    """Draw a market: what `write_dataset` takes. 4,000 samples take about a second; the same config gives the same
    bytes."""
    rng = np.random.default_rng(config.seed)
    count = config.days * config.entities
    day = START_DAY + np.repeat(np.arange(config.days), config.entities)
    time = (day * SECONDS_PER_DAY + DECISION).astype(np.int64)
    regime = np.repeat(_regimes(rng, config.days), config.entities)
    signal = rng.standard_normal((len(INFORMATIVE), count))
    present = {name: rng.random(count) >= MISSING[name] for name in INFORMATIVE + NOISE}

    readings = {
        "price": _price(rng, time, regime, signal[0]),
        "text": _text(rng, time, present["text"], signal[1]),
        "audio": _audio(rng, time, present["audio"], signal[2]),
        "chart": _chart(rng, time, present["chart"], signal[3]),
    }
    tokens = {name: reading.tokens for name, reading in readings.items()}
    tokens["weather"] = _noise_stream(rng, time, present["weather"], tokens_each=32, every=3600)
    tokens["orders"] = _noise_stream(rng, time, present["orders"], tokens_each=24, every=7)

    samples = pd.DataFrame(
        {
            "sample": np.arange(count, dtype=np.int64),
            "entity": np.tile([f"E{entity:02d}" for entity in range(config.entities)], config.days),
            "time": time,
            "day": day.astype(np.int32),
            "label_end": time + 3 * SECONDS_PER_DAY,
            "regime": np.array(REGIMES)[regime],
        }
    )
    explained = np.stack([readings[name].explained for name in INFORMATIVE])
    mean = np.stack([readings[name].mean for name in INFORMATIVE])
    shares = np.zeros((len(INFORMATIVE), count))
    for target, weights in WEIGHTS.items():
        weight = weights[regime].T  # [informative, N]
        shared = np.repeat(rng.standard_normal(config.days), config.entities)
        noise = np.sqrt(0.3) * shared + np.sqrt(0.7) * rng.standard_normal(count)
        samples[f"target_{target}"] = (weight * signal).sum(axis=0) + TARGET_NOISE * noise
        samples[f"oracle_{target}"] = (weight * mean).sum(axis=0)
        shares += weight**2 * explained
    assert tokens["price"].values is not None
    bars = tokens["price"].values[:, 0].reshape(count, PRICE_BARS).astype(np.float64)
    samples["past_level"] = bars.mean(axis=1)
    samples["past_last"] = bars[:, -1]
    samples["past_range"] = np.ptp(bars, axis=1)
    for name in tokens:
        share = shares[INFORMATIVE.index(name)] / shares.sum(axis=0) if name in INFORMATIVE else np.zeros(count)
        samples[f"importance_{name}"] = share
    return _info(config), samples, tokens


def _regimes(rng: np.random.Generator, days: int) -> Int64Array:
    """Regimes take turns of 5 to 15 days, so that every 40 days or so hold all four."""
    turns = rng.integers(5, 16, size=days // 5 + 1)
    return (np.repeat(np.arange(len(turns)), turns)[:days] % len(REGIMES)).astype(np.int64)


def _posterior(
    sample: Int64Array, reading: Float64Array, samples: int, noise: float
) -> tuple[Float64Array, Float64Array]:
    """Of s ~ N(0, 1), read with variance ``noise^2`` by the tokens of ``sample``: explained variance and mean."""
    total, count = np.bincount(sample, reading, samples), np.bincount(sample, minlength=samples)
    explained = count / (count + noise**2)
    return explained, total / (count + noise**2)


def _price(rng: np.random.Generator, time: Int64Array, regime: Int64Array, signal: Float64Array) -> Reading:
    """One bar a day: the reading, a volume without meaning, and four noisy indicators of the regime."""
    count = len(time)
    reading = signal[:, None] + PRICE_NOISE * rng.standard_normal((count, PRICE_BARS))
    volume = rng.standard_normal((count, PRICE_BARS))
    state = np.eye(len(REGIMES))[regime][:, None, :] + 0.5 * rng.standard_normal((count, PRICE_BARS, len(REGIMES)))
    values = np.concatenate([reading[..., None], volume[..., None], state], axis=2).astype(np.float32)
    age = np.arange(PRICE_BARS - 1, -1, -1) * SECONDS_PER_DAY + (DECISION - CLOSE)
    tokens = RawTokens(
        np.repeat(np.arange(count), PRICE_BARS), (time[:, None] - age).reshape(-1), values.reshape(-1, values.shape[2])
    )
    return Reading(tokens, *_posterior(tokens.sample, reading.reshape(-1), count, PRICE_NOISE))


def _arrivals(
    rng: np.random.Generator, time: Int64Array, present: npt.NDArray[np.bool_], mean: float
) -> tuple[Int64Array, Int64Array]:
    """Sample and time of a random number of tokens of the last eight hours, at least two where the modality is
    present."""
    lengths = np.where(present, 2 + rng.poisson(mean, len(time)), 0)
    sample = np.repeat(np.arange(len(time)), lengths).astype(np.int64)
    return sample, time[sample] - rng.integers(0, 8 * 3600, len(sample))


def _informed(rng: np.random.Generator, sample: Int64Array, share: float) -> npt.NDArray[np.bool_]:
    """Which tokens carry a reading: the first of each sample, and a random share of the others."""
    first = np.ones(len(sample), bool)
    first[1:] = sample[1:] != sample[:-1]
    return first | (rng.random(len(sample)) < share)


def _text(rng: np.random.Generator, time: Int64Array, present: npt.NDArray[np.bool_], signal: Float64Array) -> Reading:
    """Sentences of filler; half of them hold one of nine graded verbs, the reading rounded to 0.5."""
    sample, arrival = _arrivals(rng, time, present, mean=5.0)
    informed = _informed(rng, sample, 0.5)
    reading = signal[sample] + TEXT_NOISE * rng.standard_normal(len(sample))
    grade = np.clip(np.rint(reading / 0.5), -4, 4).astype(int) + 4
    words = np.array(FILLER)[rng.integers(0, len(FILLER), (len(sample), 7))]
    place = rng.integers(0, words.shape[1], len(sample))
    words[informed, place[informed]] = np.array(GRADED)[grade[informed]]
    tokens = RawTokens(sample, arrival, text=[" ".join(row) for row in words])
    return Reading(tokens, *_posterior(sample[informed], reading[informed], len(time), TEXT_NOISE))


def _audio(rng: np.random.Generator, time: Int64Array, present: npt.NDArray[np.bool_], signal: Float64Array) -> Reading:
    """Frames of eight features: a reading along one direction where the first feature says voiced, a decoy of the same
    size elsewhere."""
    sample, arrival = _arrivals(rng, time, present, mean=8.0)
    voiced = _informed(rng, sample, 0.6)
    spread = np.sqrt(1 + AUDIO_NOISE**2)
    reading = np.where(
        voiced,
        signal[sample] + AUDIO_NOISE * rng.standard_normal(len(sample)),
        spread * rng.standard_normal(len(sample)),
    )
    direction = rng.standard_normal(len(AUDIO_FEATURES))
    direction *= np.sqrt(len(AUDIO_FEATURES)) / np.linalg.norm(direction)
    features = reading[:, None] * direction + 0.3 * rng.standard_normal((len(sample), len(AUDIO_FEATURES)))
    values = np.concatenate([voiced[:, None], features], axis=1).astype(np.float32)
    tokens = RawTokens(sample, arrival, values)
    return Reading(tokens, *_posterior(sample[voiced], reading[voiced], len(time), AUDIO_NOISE))


def _chart(rng: np.random.Generator, time: Int64Array, present: npt.NDArray[np.bool_], signal: Float64Array) -> Reading:
    """A picture of 8 x 32 pixels in four patches: one bright pixel a column, as high as the reading from -4 to 4."""
    rows = np.flatnonzero(present)
    reading = signal[rows, None] + CHART_NOISE * rng.standard_normal((len(rows), CHART_COLUMNS))
    height = np.clip(np.rint((4 - reading) / 8 * (CHART_ROWS - 1)), 0, CHART_ROWS - 1)
    images = (np.arange(CHART_ROWS)[None, :, None] == height[:, None, :]).astype(np.float32)
    patches = cut_patches(images)
    sample = np.repeat(rows, patches.shape[1]).astype(np.int64)
    tokens = RawTokens(sample, time[sample] - (DECISION - CLOSE), patches.reshape(-1, patches.shape[2]))
    return Reading(tokens, *_posterior(rows.repeat(CHART_COLUMNS), reading.reshape(-1), len(time), CHART_NOISE))


def _noise_stream(
    rng: np.random.Generator, time: Int64Array, present: npt.NDArray[np.bool_], tokens_each: int, every: int
) -> RawTokens:
    """Heavy-tailed values that mean nothing, ``every`` seconds."""
    rows = np.flatnonzero(present)
    sample = np.repeat(rows, tokens_each).astype(np.int64)
    values = rng.standard_t(4, (len(sample), NOISE_WIDTH)).astype(np.float32)
    return RawTokens(sample, time[sample] - np.tile(np.arange(tokens_each, 0, -1) * every, len(rows)), values)


def _info(config: MarketConfig) -> DatasetInfo:
    return DatasetInfo(
        name="simulated-market",
        task="regression",
        source=f"fusedmm.train.simulate --seed {config.seed} --days {config.days} --entities {config.entities}",
        licence="Apache-2.0",
        modalities={
            "price": ModalityInfo(
                "numeric", ("reading", "volume", *REGIMES), "one bar a day; four indicators of the regime"
            ),
            "text": ModalityInfo("text", (), "0 or 2 to 20 sentences; graded verbs carry the reading"),
            "audio": ModalityInfo("numeric", ("voiced", *AUDIO_FEATURES), "voiced frames carry the reading"),
            "chart": ModalityInfo("image", (), "four patches of 8 x 8 pixels, then row and column"),
            "weather": ModalityInfo("numeric", (), "noise, hourly"),
            "orders": ModalityInfo("numeric", (), "noise, every seven seconds"),
        },
    )


def main() -> None:
    """``python -m fusedmm.train.simulate OUT``: write a simulated market."""
    parser = argparse.ArgumentParser(
        prog="python -m fusedmm.train.simulate", description="Write a simulated market whose truth is known."
    )
    parser.add_argument("out", type=Path, help="directory of the data set")
    for name, default in (("seed", 0), ("days", 400), ("entities", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    info, samples, tokens = simulate(
        MarketConfig(days=arguments.days, entities=arguments.entities, seed=arguments.seed)
    )
    write_dataset(arguments.out, info, samples, tokens)
    for target in WEIGHTS:
        error = (samples[f"target_{target}"] - samples[f"oracle_{target}"]) ** 2
        print(f"target_{target}: variance {samples[f'target_{target}'].var():.3f}, oracle MSE {error.mean():.3f}")
    print(f"{len(samples)} samples in {arguments.out}")


if __name__ == "__main__":
    main()
