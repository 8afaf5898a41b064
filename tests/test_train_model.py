"""The forecaster under every fusion: what it may not see cannot reach it, and its mass adds up."""

import pytest
import torch
from torch import Tensor

from fusedmm.train.config import FUSIONS, ModelConfig
from fusedmm.train.model import Forecast, Forecaster, Sizes, encode_gap

SIZES = Sizes({"price": 3, "text": 5}, num_past=2, num_targets=2)
NOW = 1_600_000_000


class Inputs:
    """Four samples: number 1 has no text, 2 has nothing; the last price token of 3 is in the future."""

    def __init__(self) -> None:
        self.tokens = {"price": torch.randn(4, 6, 3), "text": torch.randn(4, 7, 5)}
        self.masks = {"price": torch.ones(4, 6, dtype=torch.bool), "text": torch.rand(4, 7) < 0.7}
        self.masks["text"][1] = False
        self.masks["price"][2] = self.masks["text"][2] = False
        self.time = torch.full((4,), NOW)
        self.times = {
            name: NOW - 3600 * torch.arange(mask.shape[1]).flip(0).repeat(4, 1) for name, mask in self.masks.items()
        }
        self.times["price"][3, -1] = NOW + 1
        self.past = torch.randn(4, 2)

    def run(self, model: Forecaster) -> Forecast:
        forecast: Forecast = model(self.tokens, self.masks, self.times, self.time, self.past)
        return forecast

    def hidden(self, name: str) -> Tensor:
        return ~self.masks[name] | (self.times[name] > self.time[:, None])


def build(fusion: str, **changes: object) -> Forecaster:
    model = Forecaster(SIZES, ModelConfig(**changes), fusion)  # type: ignore[arg-type]
    torch.nn.init.normal_(model.head.weight)
    return model.eval()


@pytest.mark.parametrize("fusion", FUSIONS)
def test_hidden_and_future_tokens_change_nothing(fusion: str) -> None:
    inputs, model = Inputs(), build(fusion)
    before = inputs.run(model)
    for name, tokens in inputs.tokens.items():
        tokens[inputs.hidden(name)] = 1e4
    after = inputs.run(model)
    torch.testing.assert_close(after.prediction, before.prediction)
    inputs.tokens["price"][0, 0] += 1
    assert not torch.equal(inputs.run(model).prediction[0], before.prediction[0])
    torch.testing.assert_close(inputs.run(model).prediction[1:], before.prediction[1:])


@pytest.mark.parametrize("fusion", FUSIONS)
def test_mass_adds_up_and_missing_modalities_have_none(fusion: str) -> None:
    forecast = Inputs().run(build(fusion))
    torch.testing.assert_close(forecast.mass.sum(dim=1), torch.tensor([1.0, 1.0, 0.0, 1.0]))
    assert forecast.mass[1, 1] == 0
    assert (forecast.mass[0] > 0).all()
    assert forecast.prediction.isfinite().all()


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_parameter_gets_a_gradient(fusion: str) -> None:
    model = build(fusion, layers=2)
    Inputs().run(model.train()).prediction.square().sum().backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())  # type: ignore[union-attr]


def test_per_modality_softmax_and_output_gate() -> None:
    forecast = Inputs().run(build("gated", softmax="per_modality", output_gate=True))
    torch.testing.assert_close(forecast.mass.sum(dim=1), torch.tensor([1.0, 1.0, 0.0, 1.0]))
    assert forecast.mass[1, 1] == 0
    assert forecast.prediction.isfinite().all()


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_new_model_is_its_skip(fusion: str) -> None:
    inputs, model = Inputs(), Forecaster(SIZES, ModelConfig(), fusion)
    weight, bias = torch.randn(2, 2), torch.randn(2)
    model.set_skip(weight, bias, target_scale=3.0)
    torch.testing.assert_close(inputs.run(model).prediction, inputs.past @ weight.T + bias)


def test_gap_of_seconds_and_years_stay_apart() -> None:
    gaps = torch.tensor([0, 1, 60, 3600, 86_400, 2 * 86_400, 365 * 86_400])
    distance = torch.cdist(encode_gap(gaps), encode_gap(gaps)) + 10 * torch.eye(len(gaps))
    assert distance.min() > 0.3
