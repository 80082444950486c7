"""Shared by all tests: one thread, the shared real data when it is there, Triton's interpreter where there is no GPU, poisoned memory."""
import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton decides when it is imported: before any test file is

torch.set_num_threads(1)
torch.set_float32_matmul_precision("highest")
ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"


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
