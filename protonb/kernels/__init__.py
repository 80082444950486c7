"""In a checkout, `protonb.kernels` is the folder `kernels/` at the top; setup.py maps the real one when it installs."""
from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2] / "kernels")]
