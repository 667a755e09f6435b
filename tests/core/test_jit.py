import subprocess
import sys

import pytest

PROGRAM = """
import torch
torch.set_num_threads(1)
assert torch.get_num_threads() == 1
from infoq_fx.core.jit import usable_threads
assert usable_threads() == 2
assert torch.get_num_threads() == 1, torch.get_num_threads()
"""


@pytest.mark.slow
def test_asking_for_numbas_threads_leaves_torchs_alone(monkeypatch):
    monkeypatch.setenv("NUMBA_NUM_THREADS", "2")
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
