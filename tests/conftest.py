"""Where the tests find what nobody here wrote: reference data beside the checkout, and llama.cpp's libraries."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Read where kernels are defined: on the CPU they can then be run, slowly, by whoever forces them (`ops.use("triton")`).
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real weights, tokenizers and golden results; absent data skips a test, but never in CI."""
    folder = SHARED / "data"
    if not folder.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"CI must have the reference data at {folder}")
        pytest.skip(f"the reference data is not at {folder}")
    return folder
