"""Shared by all tests: the import path, single-threaded torch (tiny tensors), tiny models, the oracle data."""
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")      # no test may wait for a network
os.environ.setdefault("OMP_NUM_THREADS", "1")     # two processes of one thread beat one of two on tiny tensors

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def shared():
    """Real tokenizers and a real trained model; kept outside the repository."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("the folder of real models and tokenizers, ../shared/data, is not here")
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The first hundred training questions: tokenizing all of them is most of a short run."""
    path = tmp_path_factory.mktemp("data") / "few.jsonl"
    path.write_text("".join((ROOT / "data/tiny/train.jsonl").read_text().splitlines(keepends=True)[:100]))
    return path
