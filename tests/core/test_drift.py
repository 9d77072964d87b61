"""A calibrated start for inputs that quantized layers leave, against the float64 textbook."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_calibrated import FORMAT, NF4, WEIGHTS, correlated_inputs, moments_of, normal
from torch import Tensor

from loftq_cli.core.calibrated import initialize_calibrated
from loftq_cli.core.input_moments import DAMPING, DampedMoments, Drift
from loftq_cli.core.integers import IntegerFormat
from loftq_cli.core.quantizers import BlocksQuantizer, Blockwise, Integers
from loftq_cli.errors import InvalidSetting, LoftqError


def streams(samples: int, features: int, far: float = 0.1) -> tuple[Tensor, Tensor]:
    """What the original gives a layer (samples × features), and a quantized model."""
    X = correlated_inputs(samples, features)
    # Off in directions of its own, and by a share of what there is.
    off = correlated_inputs(samples, features, seed=40) + X @ normal(features, features, seed=50)
    return X, X - far * off * float(X.norm() / off.norm())


def drift_of(W: Tensor, X: Tensor, X_now: Tensor) -> Drift:
    off = (X - X_now).double()
    outputs = off @ W.double().t()
    return Drift(
        (off.t() @ X_now.double() / len(X)).float(), float(outputs.square().sum()) / len(X)
    )


def with_stream(W: Tensor, X: Tensor, X_now: Tensor, lost: Tensor) -> Drift:
    """The drift of a layer that writes to a stream which has ``lost`` h − h̃ (samples × out)."""
    stream = lost.double().t() @ X_now.double() / len(X)
    return replace(drift_of(W, X, X_now), stream=stream.float())


def lost_before(W: Tensor, X: Tensor, X_now: Tensor, far: float = 1.0) -> Tensor:
    """As much as the layer's own output is off, most of it what the inputs tell."""
    off = float(((X - X_now).double() @ W.double().t()).norm())
    lost = (X_now @ normal(W.shape[1], W.shape[0], seed=70)).double()
    lost = lost / lost.norm() + 0.3 * (noise := normal(*lost.shape, seed=71)) / noise.norm()
    return lost * far * off


def approximation(result: Any, quantizer: BlocksQuantizer, scaling: float = 1.0) -> Tensor:
    Q: Tensor = quantizer.dequantize(result.quantized).double()
    product: Tensor = scaling * result.lora_B.double() @ result.lora_A.double()
    return Q + product


@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("weight", ["normal", "zero", "large", "small", "ragged blocks"])
@pytest.mark.parametrize(
    "quantizer",
    [NF4, Blockwise(replace(FORMAT, double_quant=True, bits=2)), Integers(IntegerFormat(3))],
    ids=str,
)
def test_errors_are_those_of_the_outputs(
    weight: str, quantizer: BlocksQuantizer, writes: bool
) -> None:
    """Whether a stream is made good or not."""
    W = WEIGHTS[weight]
    X, X_now = streams(800, W.shape[1])
    drift = drift_of(W, X, X_now)
    if writes:
        drift = with_stream(W, X, X_now, lost_before(W, X, X_now))
    result = initialize_calibrated(W, moments_of(X_now), quantizer, 4, drift=drift, scaling=2.0)
    before = X.double() @ W.double().t()
    norm = float(before.norm())
    plain, _ = quantizer.plain().steps(W).quantize()
    for found, Q in (
        (result.output_error, approximation(result, quantizer, 2.0)),
        (result.quantized_only_output_error, quantizer.dequantize(plain).double()),
    ):
        expected = float((before - X_now.double() @ Q.t()).norm()) / (norm or 1.0)
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert result.output_norm == pytest.approx(norm / len(X) ** 0.5, rel=1e-4, abs=1e-30)
    # Of the weight itself, whatever it was made for.
    error = float((W.double() - approximation(result, quantizer, 2.0)).norm())
    assert result.error == pytest.approx(error / (float(W.double().norm()) or 1.0), abs=1e-5)


@pytest.mark.parametrize("far", [0.0, 2.0], ids=["writes nothing", "writes to a stream"])
def test_the_target_is_the_closed_form(far: float) -> None:
    """Without codes and rank in the way: in many bits the codes are next to the target."""
    W, (X, X_now) = normal(48, 64), streams(500, 64)
    quantizer = Integers(IntegerFormat(8, 64))
    moments = moments_of(X_now)
    lost = lost_before(W, X, X_now, far)
    drift = with_stream(W, X, X_now, lost) if far else drift_of(W, X, X_now)
    result = initialize_calibrated(W, moments, quantizer, 0, drift=drift)
    H, C = (Y.double().t() @ X_now.double() / len(X) for Y in (X_now, X))
    damping = DAMPING * H.diagonal().mean() * torch.eye(64).double()
    S = lost.double().t() @ X_now.double() / len(X)
    target = (W.double() @ (C + damping) + S) @ torch.linalg.inv(H + damping)
    found = approximation(result, quantizer)
    # No weight near it is better in what is minimized.
    inputs = DampedMoments.of(moments)

    def objective(V: Tensor) -> float:
        outputs = lost.double() + X.double() @ W.double().t() - X_now.double() @ V.t()
        outputs = outputs.square().sum() / len(X)
        return float(outputs + damping[0, 0] * (W.double() - V).square().sum())

    least = objective(target)
    for seed in range(10):
        assert objective(target + 1e-3 * normal(48, 64, seed=seed)) > least
    assert objective(found) - least < 0.01 * (objective(W.double()) - least)
    metric = inputs.moments.double() / inputs.unit
    rest = found - target
    assert objective(found) - least == pytest.approx(float((rest @ metric * rest).sum()), rel=1e-3)


@pytest.mark.parametrize("quantizer", [NF4, Integers(IntegerFormat(2, 64))], ids=str)
def test_without_drift_it_is_the_same_to_the_bit(quantizer: BlocksQuantizer) -> None:
    W, G = normal(48, 128), moments_of(correlated_inputs(600, 128))
    still = Drift(torch.zeros(128, 128), 0.0)
    # Where nothing was lost it is the damped error that tells which iterate is better.
    nothing_lost, three = replace(still, stream=torch.zeros(48, 128)), {"iterations": 3}
    for drift, options in ((still, {}), (nothing_lost, three)):
        one, other = (
            initialize_calibrated(W, G, quantizer, 4, drift=each, **options)
            for each in (None, drift)
        )
        assert torch.equal(
            quantizer.dequantize(one.quantized), quantizer.dequantize(other.quantized)
        )
        assert torch.equal(one.lora_A, other.lora_A)
        assert torch.equal(one.lora_B, other.lora_B)
        assert one.errors == other.errors


@pytest.mark.parametrize("bits", [4, 2])
def test_it_makes_good_what_was_lost_before(bits: int) -> None:
    """Better than either start that does not know both inputs, on tokens that were not seen too."""
    W, (X, X_now) = normal(96, 128), streams(6000, 128)
    quantizer = Blockwise(replace(FORMAT, bits=bits))
    seen, held_out = slice(None, 3000), slice(3000, None)
    G, H = moments_of(X[seen]), moments_of(X_now[seen])
    drift = drift_of(W, X[seen], X_now[seen])

    def left(moments: Tensor, drift: Drift | None) -> float:
        found = initialize_calibrated(W, moments, quantizer, 8, drift=drift)
        Q = approximation(found, quantizer)
        outputs = X[held_out].double() @ W.double().t() - X_now[held_out].double() @ Q.t()
        return float(outputs.norm())

    assert left(H, drift) < 0.9 * min(left(G, None), left(H, None))


@pytest.mark.parametrize("bits", [4, 2])
def test_it_makes_good_what_the_stream_has_lost(bits: int) -> None:
    """On tokens that were not seen too, at the cost of the layer's own output."""
    W, (X, X_now) = normal(96, 128), streams(6000, 128)
    lost, quantizer = lost_before(W, X, X_now, 3.0), Blockwise(replace(FORMAT, bits=bits))
    seen, held_out = slice(None, 3000), slice(3000, None)
    those = W, X[seen], X_now[seen]
    outputs, stream = [], []
    for drift in (drift_of(*those), with_stream(*those, lost[seen])):
        found = initialize_calibrated(W, moments_of(X_now[seen]), quantizer, 8, drift=drift)
        Q = approximation(found, quantizer)
        off = X[held_out].double() @ W.double().t() - X_now[held_out].double() @ Q.t()
        outputs.append(found.output_error)
        stream.append(float((off + lost[held_out].double()).norm()))
    assert stream[1] < 0.9 * stream[0]
    assert outputs[1] > outputs[0]


def test_errors_of_a_start_do_not_rise() -> None:
    W, (X, X_now) = normal(48, 128), streams(900, 128)
    drift = drift_of(W, X, X_now)
    found = initialize_calibrated(W, moments_of(X_now), NF4, 4, drift=drift).errors
    assert found == sorted(found, reverse=True)


def test_what_no_token_reached_is_quantized_by_its_weights() -> None:
    W = normal(48, 64)
    nothing, zeros = Drift(torch.zeros(64, 64), 0.0), torch.zeros(64, 64)
    one, other = (initialize_calibrated(W, zeros, NF4, 4, drift=d) for d in (nothing, None))
    assert torch.equal(one.lora_A, other.lora_A)
    assert one.output_norm == 0.0


def test_what_cannot_be() -> None:
    W, G = normal(48, 64), torch.eye(64)
    for drift in (Drift(torch.zeros(48, 48), 0.0), Drift(torch.zeros(64), 0.0)):
        with pytest.raises(InvalidSetting, match="do not belong"):
            initialize_calibrated(W, G, NF4, 4, drift=drift)
    stream = torch.zeros(64, 48)  # transposed
    with pytest.raises(InvalidSetting, match="with 48 outputs and 64 inputs"):
        initialize_calibrated(W, G, NF4, 4, drift=Drift(torch.zeros(64, 64), 0.0, stream))
    with pytest.raises(LoftqError, match="hold NaN"):
        initialize_calibrated(W, G, NF4, 4, drift=Drift(torch.full((64, 64), torch.nan), 0.0))
    for method in ("qera", "qera-diagonal"):
        with pytest.raises(InvalidSetting, match="inputs of the original"):
            initialize_calibrated(
                W, G, NF4, 4, drift=Drift(torch.zeros(64, 64), 0.0), method=method
            )
