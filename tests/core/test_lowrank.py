import pytest
import torch
from torch import Tensor

from loftq_cli.core import lowrank
from loftq_cli.core.lowrank import check_rank, split, truncated_svd
from loftq_cli.core.residual import Residual
from loftq_cli.core.sketches import takes_exact
from loftq_cli.errors import InvalidSetting, LoftqError
from tests.core.elsewhere import DEVICE, Elsewhere, There


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (16, 16), (1, 9), (9, 1)])
def test_exact_leaves_the_tail_of_the_spectrum(shape: tuple[int, int]) -> None:
    R = torch.randn(shape)
    spectrum = torch.linalg.svdvals(R.double())
    for rank in {1, min(shape) // 2 + 1, min(shape)}:
        low_rank = truncated_svd(Residual.of(R), rank, method="exact")
        assert low_rank.U.shape == (shape[0], rank)
        assert low_rank.Vh.shape == (rank, shape[1])
        torch.testing.assert_close(low_rank.S.double(), spectrum[:rank], rtol=1e-5, atol=1e-5)
        left = (R - low_rank.dense()).double().square().sum()
        assert float(left) == pytest.approx(float(spectrum[rank:].square().sum()), abs=1e-4)
        assert low_rank.energy == pytest.approx(float(spectrum[:rank].square().sum()), rel=1e-5)


@pytest.mark.parametrize("scaling", [0.25, 1.0, 2.0, 11.3])
def test_split_folds_the_scaling_in_and_balances(scaling: float) -> None:
    low_rank = truncated_svd(Residual.of(torch.randn(30, 20)), 5, method="exact")
    A, B = split(low_rank, scaling)
    torch.testing.assert_close(scaling * B @ A, low_rank.dense(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(A @ A.t(), B.t() @ B, rtol=1e-4, atol=1e-4)


def test_bad_ranks_and_scalings() -> None:
    with pytest.raises(InvalidSetting, match="rank 9 is too large for a 8×12 weight: at most 8"):
        check_rank(9, 8, 12)
    with pytest.raises(InvalidSetting, match="rank 0 is too small"):
        truncated_svd(Residual.of(torch.zeros(4, 4)), 0)
    with pytest.raises(InvalidSetting, match="'fast' is not one of auto, exact, randomized"):
        truncated_svd(Residual.of(torch.zeros(4, 4)), 1, method="fast")


def test_retries_in_float64_when_lapack_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = torch.linalg.svd, []

    def moody(R: torch.Tensor, **options: object) -> object:
        seen.append(R.dtype)
        if R.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return real(R, **options)

    monkeypatch.setattr(lowrank.torch.linalg, "svd", moody)
    low_rank = truncated_svd(Residual.of(torch.randn(6, 5)), 2, method="exact")
    assert seen == [torch.float32, torch.float64]
    assert low_rank.U.dtype == torch.float32


def test_says_so_when_nothing_converges(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(R: torch.Tensor, **options: object) -> object:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(lowrank.torch.linalg, "svd", never)
    with pytest.raises(LoftqError, match="6×5 residual does not converge"):
        truncated_svd(Residual.of(torch.randn(6, 5)), 2, method="exact")


def spectrum_matrix(spectrum: Tensor, rows: int, columns: int, seed: int = 0) -> Tensor:
    """A matrix with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    k = spectrum.numel()
    U, _ = torch.linalg.qr(torch.randn(rows, k, generator=generator, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(columns, k, generator=generator, dtype=torch.float64))
    return ((U * spectrum) @ V.t()).float()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


SPECTRA = {
    "flat": torch.linspace(2, 1, 200, dtype=torch.float64),
    "slow": torch.arange(1, 201, dtype=torch.float64) ** -0.5,
    "fast": torch.arange(1, 201, dtype=torch.float64) ** -2.0,
    "steps": torch.tensor([1.0] * 5 + [1e-3] * 195, dtype=torch.float64),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("shape", [(300, 260), (220, 400)])
def test_randomized_leaves_hardly_more_than_exact(name: str, shape: tuple[int, int]) -> None:
    spectrum = SPECTRA[name]
    R = Residual.of(spectrum_matrix(spectrum, *shape))
    low_rank = truncated_svd(R, 12, method="randomized", generator=generator(), tolerance=1e-4)
    best = float(spectrum[12:].square().sum())
    left = R.matrix.double() - low_rank.dense().double()
    # "steps" leaves so little that the rounding of float32 products is seen in the difference.
    known = pytest.approx(R.energy - low_rank.energy, rel=1e-4, abs=1e-7 * R.energy)
    assert float(left.square().sum()) == known
    assert best * (1 - 1e-5) < float(left.square().sum()) < best * 1.005
    eye = torch.eye(12)
    torch.testing.assert_close(low_rank.U.t() @ low_rank.U, eye, rtol=0, atol=1e-3)
    torch.testing.assert_close(low_rank.Vh @ low_rank.Vh.t(), eye, rtol=0, atol=1e-3)
    assert (low_rank.S.diff() <= 0).all()


def test_a_good_start_saves_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    real = Residual.transposed_times
    monkeypatch.setattr(
        Residual, "transposed_times", lambda self, Y: passes.append(1) or real(self, Y)
    )
    M = spectrum_matrix(SPECTRA["slow"], 300, 260)
    R = Residual.of(M)
    cold = truncated_svd(R, 12, method="randomized", generator=generator(), tolerance=1e-4)
    from_scratch = len(passes)
    again = truncated_svd(R, 12, method="randomized", start=cold.subspace, tolerance=1e-4)
    assert len(passes) == from_scratch + 1
    assert again.energy >= cold.energy * (1 - 1e-7)
    near = Residual.of(M + 0.01 * torch.randn(300, 260) / 17)
    warm = truncated_svd(near, 12, method="randomized", start=cold.subspace, tolerance=1e-4)
    assert len(passes) <= from_scratch + 3
    exact = truncated_svd(near, 12, method="exact")
    assert warm.energy == pytest.approx(exact.energy, rel=1e-3)


@pytest.mark.parametrize("true_rank", [0, 1, 5, 12, 15])
def test_less_rank_than_asked_for(true_rank: int) -> None:
    generator_ = generator(1)
    left = torch.randn(300, true_rank, generator=generator_)
    R = Residual.of(left @ torch.randn(true_rank, 260, generator=generator_))
    low_rank = truncated_svd(R, 12, method="randomized", generator=generator())
    assert low_rank.U.shape == (300, 12)
    assert low_rank.S.shape == (12,)
    assert low_rank.Vh.shape == (12, 260)
    if true_rank <= 12:
        assert int((1e-5 * low_rank.S[0] < low_rank.S).sum()) == true_rank
        torch.testing.assert_close(low_rank.dense(), R.matrix, rtol=1e-4, atol=1e-4)
    # What it found is a start that another matrix can use.
    other = Residual.of(torch.randn(300, 260, generator=generator_))
    warm = truncated_svd(
        other, 12, method="randomized", start=low_rank.subspace, generator=generator()
    )
    assert warm.energy > 0.9 * truncated_svd(other, 12, method="exact").energy


def test_half_of_it_zeros() -> None:
    M = torch.randn(300, 260, generator=generator(2))
    M[:150], M[:, 100:] = 0, 0
    low_rank = truncated_svd(Residual.of(M), 12, method="randomized", generator=generator())
    exact = truncated_svd(Residual.of(M), 12, method="exact")
    assert low_rank.energy == pytest.approx(exact.energy, rel=5e-3)
    assert (low_rank.dense()[:150] == 0).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
def test_any_magnitude(scale: float) -> None:
    M = spectrum_matrix(SPECTRA["slow"], 300, 260)
    usual = truncated_svd(Residual.of(M), 12, method="randomized", generator=generator())
    scaled = truncated_svd(Residual.of(M * scale), 12, method="randomized", generator=generator())
    torch.testing.assert_close(scaled.S / scale, usual.S, rtol=1e-3, atol=0)


def test_rounded_products_are_given_up_where_they_would_be_felt() -> None:
    """A low rank that is nearly everything: bfloat16 would leave a thousandth of it behind."""
    M = spectrum_matrix(SPECTRA["steps"], 300, 260)
    exact = Residual.of(M)
    rounded = Residual(M.bfloat16(), exact.energy, reread=lambda: exact)
    low_rank = truncated_svd(rounded, 12, method="randomized", generator=generator())
    left = float((M.double() - low_rank.dense().double()).square().sum())
    assert left < 1.01 * float(SPECTRA["steps"][12:].square().sum())
    flat = spectrum_matrix(SPECTRA["flat"], 300, 260)
    energy = Residual.of(flat).energy
    unused = Residual(flat.bfloat16(), energy, reread=pytest.fail)
    low_rank = truncated_svd(unused, 12, method="randomized", generator=generator())
    left = float((flat.double() - low_rank.dense().double()).square().sum())
    assert left == pytest.approx(energy - low_rank.energy, rel=1e-5)


def test_auto_takes_the_cheaper() -> None:
    assert takes_exact((4096, 48), 16, "auto")
    assert takes_exact((256, 256), 200, "auto")
    assert not takes_exact((768, 2304), 16, "auto")
    assert not takes_exact((4096, 4096), 64, "auto")
    assert not takes_exact((4096, 48), 16, "randomized")
    assert takes_exact((4096, 20), 16, "randomized")  # the block would be all of it
    assert takes_exact((4096, 4096), 64, "exact")


def test_a_seed_decides_everything() -> None:
    R = Residual.of(torch.randn(200, 200))
    first, again, other = (
        truncated_svd(R, 8, method="randomized", generator=generator(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(first.U, again.U)
    assert torch.equal(first.Vh, again.Vh)
    assert not torch.equal(first.U, other.U)


def kinds_of_matrix() -> dict[str, Tensor]:
    made = generator(3)
    twice = torch.randn(150, 260, generator=made)
    few = torch.randn(300, 5, generator=made) @ torch.randn(5, 260, generator=made)
    slow = spectrum_matrix(SPECTRA["slow"], 300, 260)
    return {
        "zero": torch.zeros(300, 260), "of little rank": few, "rows twice": twice.repeat(2, 1),
        "slow": slow, "tiny": slow * 1e-30, "huge": slow * 1e30,
    }  # fmt: skip


@pytest.mark.parametrize("kind", kinds_of_matrix())
@pytest.mark.parametrize("begun", [False, True])
def test_on_a_device_it_is_the_same_and_waits_once_a_pass(
    kind: str, begun: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the residual, whose energy the device has, was sketched before anyone asked."""
    M = kinds_of_matrix()[kind]
    near = Residual.of(M + 0.01 * M.abs().max() * torch.randn(M.shape, generator=generator(4)))
    V = truncated_svd(near, 12, method="randomized", generator=generator()).subspace
    if V is None or not begun:
        V = None
    passes = []
    real = Residual._products
    monkeypatch.setattr(Residual, "_products", lambda *given: passes.append(1) or real(*given))
    here = truncated_svd(Residual.of(M), 12, method="randomized", start=V, generator=generator())
    counted = len(passes)
    passes.clear()
    with Elsewhere() as device:
        start = None if V is None else V.to(DEVICE)
        R = M.to(DEVICE)
        energy = R.double().square().sum()
        device.waits.clear()
        residual = Residual.of(R, start, energy)
        there = truncated_svd(residual, 12, method="randomized", start=start, generator=generator())
        assert isinstance(there.U, There)
        assert there.energy == pytest.approx(here.energy, rel=1e-6)
        # The energy by itself, where it does not come with a sketch.
        assert len(device.waits) == len(passes) + (start is None)
        product = there.dense().cpu()
    # A sketch is made before it is known that there is nothing to be seen.
    assert len(passes) == max(counted, start is not None)
    assert residual.energy == pytest.approx(float(M.double().square().sum()))
    torch.testing.assert_close(product, here.dense(), rtol=1e-4, atol=1e-5 * float(M.abs().max()))
