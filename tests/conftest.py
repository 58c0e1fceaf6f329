"""Shared by all tests: the import path, single-threaded torch (tiny tensors), tiny models, the oracle data."""
import json
import os
import subprocess
import sys
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

# The suite runs in two processes, a core each: a child runs these files, and when the others are done its
# reports are told here.  Fewer than ten files are run in one process.
OF_THE_CHILD = {f"test_{name}" for name in
                "claims cuda curves formats fuzz kill model torchrun train variants".split()}
REPORTS = os.environ.get("RESA_REPORTS")          # in the child: the file of its reports


def pytest_collection_modifyitems(config, items):
    if REPORTS:
        items[:] = [item for item in items if item.path.stem in OF_THE_CHILD]
    elif len({item.path for item in items}) >= 10 and not config.option.collectonly:
        items.sort(key=lambda item: item.path.stem in OF_THE_CHILD)         # stable: these come last
        config.reports = config._tmp_path_factory.mktemp("child") / "reports"
        config.reports.touch()
        invoked = config.invocation_params
        config.child = subprocess.Popen(
            [sys.executable, "-m", "pytest", *invoked.args], cwd=invoked.dir, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | {"RESA_REPORTS": str(config.reports)})


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item):
    """A test of the child: waits for all of them, then tells its reports.  Without any it has failed."""
    config = item.config
    if not hasattr(config, "child") or item.path.stem not in OF_THE_CHILD:
        return None
    if not hasattr(config, "told"):
        config.told, said = {}, config.child.communicate()[0]
        for line in config.reports.read_text().splitlines():
            report = config.hook.pytest_report_from_serializable(config=config, data=json.loads(line))
            config.told.setdefault(report.nodeid, []).append(report)
        config.said = said[-4000:]
    reports = config.told.get(item.nodeid)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in reports or [pytest.TestReport(item.nodeid, item.location, {}, "failed", config.said, "call")]:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_unconfigure(config):
    if hasattr(config, "child"):
        config.child.kill()


class Child:
    """In the child: writes down what there is to report."""

    def __init__(self, config):
        self.config = config

    def pytest_runtest_logreport(self, report):
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        with open(REPORTS, "a", encoding="utf-8") as file:
            file.write(json.dumps(data) + "\n")


def pytest_configure(config):
    if REPORTS:
        config.pluginmanager.register(Child(config))


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
