"""Shared by all tests: the import path, single-threaded torch (tiny tensors), tiny models, the oracle data."""
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")      # no test may wait for a network
os.environ.setdefault("OMP_NUM_THREADS", "1")     # two processes of one thread beat one of two on tiny tensors

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

torch.set_num_threads(1)

# Tests of other processes alone, marked `early`, begin with the session: on the second core, one after the
# other.  When their turn comes they are waited for.  They may use tmp_path and their parameters.
EARLY = ThreadPoolExecutor(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "early: begins with the session, see tests/conftest.py")


def pytest_collection_finish(session):
    for item in session.items:
        if item.get_closest_marker("early") and not session.config.option.collectonly:
            params = getattr(item, "callspec", None) and item.callspec.params or {}
            folder = session.config._tmp_path_factory.mktemp("early")
            item.begun = EARLY.submit(item.function, tmp_path=folder, **params)


def pytest_pyfunc_call(pyfuncitem):
    if hasattr(pyfuncitem, "begun"):
        pyfuncitem.begun.result()
        return True


def pytest_unconfigure():
    EARLY.shutdown(cancel_futures=True)


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


class Watch(TorchDispatchMode):
    """Inside, notes what torch runs: on the CPU, or on "meta", where any size is free.

        with Watch() as watch:
            step()
        assert not watch.syncs

    ops     (name, entries of its largest tensor) in order, without views and what reads few entries
    syncs   names of what would make the host wait for a GPU.  A loop without any keeps it busy
    """
    WAIT = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select",
            "_unique2", "unique_dim", "unique_consecutive", "bincount"}
    READ_FEW = {"index", "gather", "index_select", "embedding", "detach", "_embedding_bag",
                "_embedding_bag_forward_only", "_embedding_bag_per_sample_weights_backward"}

    def __init__(self):
        super().__init__()
        self.ops, self.syncs = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if name in self.WAIT or waits(name, args, kwargs):
            self.syncs.append(name)
        out = func(*args, **kwargs)
        is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        if not is_view and name not in self.READ_FEW:
            self.ops.append((name, max((t.numel() for t in tensors), default=0)))
        return out


def waits(name, args, kwargs):
    """A choice by bool tensor, whose size is data; or a copy between devices that is waited for."""
    if name in ("index", "index_put", "index_put_"):
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    if name == "_to_copy":
        there = torch.device(kwargs.get("device") or args[0].device)
        return there.type != args[0].device.type and not kwargs.get("non_blocking")
    if name == "copy_":
        return args[0].device.type != args[1].device.type and not (args[2:] or (False,))[0]
    return False
