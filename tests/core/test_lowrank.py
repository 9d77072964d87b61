import math

import pytest
import torch

from loftq_cli.core import lowrank
from loftq_cli.core.lowrank import check_rank, lora_scaling, split, truncated_svd
from loftq_cli.errors import InvalidSetting, LoftqError


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (16, 16), (1, 9), (9, 1)])
def test_exact_leaves_the_tail_of_the_spectrum(shape: tuple[int, int]) -> None:
    R = torch.randn(shape)
    spectrum = torch.linalg.svdvals(R.double())
    for rank in {1, min(shape) // 2 + 1, min(shape)}:
        low_rank = truncated_svd(R, rank, method="exact")
        assert low_rank.U.shape == (shape[0], rank)
        assert low_rank.Vh.shape == (rank, shape[1])
        torch.testing.assert_close(low_rank.S.double(), spectrum[:rank], rtol=1e-5, atol=1e-5)
        left = (R - low_rank.dense()).double().square().sum()
        assert float(left) == pytest.approx(float(spectrum[rank:].square().sum()), abs=1e-4)
        assert low_rank.energy == pytest.approx(float(spectrum[:rank].square().sum()), rel=1e-5)


@pytest.mark.parametrize(
    ("alpha", "rslora", "expected"), [(16, False, 1.0), (8, False, 0.5), (32, True, 8.0)]
)
def test_lora_scaling_is_that_of_peft(alpha: int, rslora: bool, expected: float) -> None:
    from peft import LoraConfig, get_peft_model

    assert lora_scaling(16, alpha, rslora) == expected
    config = LoraConfig(r=16, lora_alpha=alpha, use_rslora=rslora, target_modules=["0"])
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(32, 32)), config)
    assert model.base_model.model[0].scaling["default"] == pytest.approx(expected)


@pytest.mark.parametrize("scaling", [0.25, 1.0, 2.0, 11.3])
def test_split_folds_the_scaling_in_and_balances(scaling: float) -> None:
    low_rank = truncated_svd(torch.randn(30, 20), 5, method="exact")
    A, B = split(low_rank, scaling)
    torch.testing.assert_close(scaling * B @ A, low_rank.dense(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(A @ A.t(), B.t() @ B, rtol=1e-4, atol=1e-4)


def test_bad_ranks_and_scalings() -> None:
    with pytest.raises(InvalidSetting, match="rank 9 is too large for a 8×12 weight: at most 8"):
        check_rank(9, 8, 12)
    with pytest.raises(InvalidSetting, match="rank 0 is too small"):
        truncated_svd(torch.zeros(4, 4), 0)
    with pytest.raises(InvalidSetting, match="'fast' is not one of exact, randomized, auto"):
        truncated_svd(torch.zeros(4, 4), 1, method="fast")
    for alpha in (0, -1, math.nan, math.inf):
        with pytest.raises(InvalidSetting, match="lora_alpha"):
            lora_scaling(8, alpha)


def test_retries_in_float64_when_lapack_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = torch.linalg.svd, []

    def moody(R: torch.Tensor, **options: object) -> object:
        seen.append(R.dtype)
        if R.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return real(R, **options)

    monkeypatch.setattr(lowrank.torch.linalg, "svd", moody)
    low_rank = truncated_svd(torch.randn(6, 5), 2, method="exact")
    assert seen == [torch.float32, torch.float64]
    assert low_rank.U.dtype == torch.float32


def test_says_so_when_nothing_converges(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(R: torch.Tensor, **options: object) -> object:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(lowrank.torch.linalg, "svd", never)
    with pytest.raises(LoftqError, match="6×5 residual does not converge"):
        truncated_svd(torch.randn(6, 5), 2, method="exact")
