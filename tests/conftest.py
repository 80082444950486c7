"""Shared by all tests: one thread (PROTONB_TEST_THREADS for another number), the shared real data when it is there, Triton's interpreter where
there is no GPU, poisoned memory, and `--rough-blas`, which runs whatever is asked for with products that add in an order of their own."""
import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton decides when it is imported: before any test file is

torch.set_num_threads(int(os.environ.get("PROTONB_TEST_THREADS", 1)))
torch.set_float32_matmul_precision("highest")
ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"


def pytest_addoption(parser):
    parser.addoption("--rough-blas", action="store_true", help="products by tests/rough_blas.py: what only one BLAS can pass is red everywhere")


@pytest.fixture(autouse=True)
def rough_blas(request):
    """The rough BLAS where it is asked for; tests of compiled code and of memory count what it would do itself, and say so with a marker."""
    if not request.config.getoption("--rough-blas"):
        yield
        return
    if request.node.get_closest_marker("own_blas"):
        pytest.skip("counts memory or compiles: the rough BLAS would be part of it")
    from rough_blas import RoughBLAS
    with RoughBLAS(): yield


@pytest.fixture
def data():
    """Folder of real photos and label files beside the project; tests skip visibly without it."""
    if not DATA.exists():
        pytest.skip("needs ../shared/data")
    return DATA


@pytest.fixture
def poison(monkeypatch):
    """Memory nobody has written holds NaN (or the largest integer), so that what an operation forgets to write shows."""
    def poisoned(make):
        def call(*args, **kwargs):
            t = make(*args, **kwargs)
            if t.is_meta or t.numel() == 0: return t
            with torch.no_grad():
                return t.fill_(float("nan") if t.is_floating_point() else True if t.dtype == torch.bool else torch.iinfo(t.dtype).max)
        return call
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
