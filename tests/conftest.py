"""Shared by all tests: one thread, the shared real data when it is there."""
from pathlib import Path

import pytest
import torch

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
