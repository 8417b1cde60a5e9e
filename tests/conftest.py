import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch

# The tensors in these tests are too small to share between threads.
torch.set_num_threads(1)


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """The CPU and, on a machine that has one, the GPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return torch.device(request.param)
