import os
from pathlib import Path

# Two threads on a busy machine stall small operations; set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile(
    "medssl", deadline=None, max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("medssl")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of openly licensed real volumes; tests that need it skip where it is not set."""
    folder = os.environ.get("MEDSSL_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("MEDSSL_TEST_DATA does not point at a folder with the real test volumes")
    return Path(folder).resolve()
