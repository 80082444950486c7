"""Density kernel against the plain PyTorch density: interpreted without a GPU, natively with one."""
import math

import pytest
import torch
from test_kernels_contrast import BF16, DEVICE, F16, F32, vectors

from protonb import density as plain
from protonb.kernels import common
from protonb.kernels import density as kernels

pytestmark = pytest.mark.usefixtures("poison")


def table(x, temperature):
    """The formula with the whole (N,N) table: products in the vectors' type, softmax in float32 (or float64) -> (N,)."""
    s = (x @ x.T).to(torch.promote_types(x.dtype, F32)) / temperature
    return torch.special.entr(s.fill_diagonal_(-math.inf).softmax(1)).sum(1)


def assert_right(x, temperature=0.05):
    """At most twice PyTorch's own error, and a hundred-thousandth."""
    got, own, truth = kernels.density_fwd(x, temperature), table(x, temperature), table(x.double(), temperature)
    assert got.dtype == F32 and got.shape == (len(x),)
    error, base = (got.double() - truth).abs().max(), (own.double() - truth).abs().max()
    assert error <= 2 * base + 1e-5, f"kernel off by {error:.1e}, PyTorch by {base:.1e}"
    assert (kernels.density_fwd(x, temperature) == got).all()  # the same bits each time
    return got


CASES = dict(
    two_rows=(2, 1, F32, "rows"),
    probabilities=(300, 19, F32, "rows"),
    probabilities_half=(300, 19, F16, "rows"),
    features=(257, 64, F32, "rows"),
    features_half=(257, 64, BF16, "rows"),
    one_channel=(70, 1, F32, "rows"),
    uneven=(130, 130, F32, "crop"),
    crop_half=(130, 130, BF16, "crop"),
    transposed=(130, 64, F32, "transposed"),
    transposed_half=(130, 64, F16, "transposed"),
    wide=(40, 300, F32, "rows"),
    wide_half=(40, 640, BF16, "rows"),
    expanded=(70, 16, F32, "expanded"),
)


@pytest.mark.parametrize("name", CASES)
def test_matches_the_table(name):
    N, C, dtype, layout = CASES[name]
    assert_right(vectors(N, C, dtype, layout, 0))


@pytest.mark.parametrize("processors", [1, 132])
def test_shared_walks(processors, monkeypatch):
    """However many programs share a walk; one of them may get a block of padding and the diagonal only."""
    monkeypatch.setattr(common, "processors", lambda device: processors)
    started, launch = [], common.launch
    monkeypatch.setattr(common, "launch", lambda kernel, grid, **a: (started.append(a["splits"]), launch(kernel, grid, **a)))
    got = assert_right(vectors(1025, 16, F32, "rows", 0))
    assert (started[0] > 1) == (processors == 132)
    torch.testing.assert_close(got, plain.density_fwd(vectors(1025, 16, F32, "rows", 0), 0.05), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype, size", [(F32, 1e-3), (F32, 30.0), (F32, 1e3), (BF16, 30.0), (F16, 30.0)], ids=str)
def test_scores_of_any_size(dtype, size):
    """Raw features: all neighbours equally close, or one that leaves nothing to the others."""
    assert_right(vectors(90, 16, dtype, "rows", 0, size))


@pytest.mark.parametrize("n", [0, 1])
def test_nobody_else_there(n):
    x = vectors(2, 8, F32, "rows", 0)[:n]
    assert kernels.density_fwd(x, 0.05).tolist() == [0.0] * n == plain.density_fwd(x, 0.05).tolist()


def test_equal_rows_are_equally_close():
    for dtype in (F32, BF16):
        got = kernels.density_fwd(torch.ones(200, 16, device=DEVICE, dtype=dtype) / 4, 0.05)
        torch.testing.assert_close(got, torch.full_like(got, math.log(199)), rtol=1e-6, atol=1e-5)


def test_nan_shows():
    x = vectors(90, 16, F32, "rows", 0).clone()
    x[3, 2] = math.nan
    assert kernels.density_fwd(x, 0.05).isnan().any() and plain.density_fwd(x, 0.05).isnan().any()


def test_no_value_is_read_on_the_host(monkeypatch):
    """On the meta device there are no values: what would wait for the device raises."""
    started = []
    monkeypatch.setattr(common, "launch", lambda kernel, grid, **a: started.append(kernel.__name__))
    assert kernels.density_fwd(torch.empty(16384, 64, device="meta"), 0.05).shape == (16384,)
    assert started == ["density_kernel"]
