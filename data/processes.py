"""A run that the processes of torchrun share: who takes what, and what they tell each other.

    torchrun --nproc-per-node 2 train.py --stage sae ...     each takes its share of every batch

They start from one seed and average their gradients: weights stay equal without being sent.
"""

import os
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

def world():
    """(number of this process, how many there are) under torchrun, else (0, 1)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

@contextmanager
def shared_run():
    """Inside, the processes of torchrun can reach each other, and only the first prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=30))     # one may take days longer
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        out, err = (nowhere, nowhere) if world()[0] else (sys.stdout, sys.stderr)
        with redirect_stdout(out), redirect_stderr(err):     # errors end this block: all are seen
            yield
    wait_for_all()                       # nobody hangs up while another still listens
    dist.destroy_process_group()

def reduce_(tensor, op="SUM"):
    """In place, the SUM (or MIN, MAX) of this tensor over the processes -> the tensor."""
    if dist.is_initialized():
        try:
            dist.all_reduce(tensor, getattr(dist.ReduceOp, op))
        except RuntimeError as error:    # its traceback would bury what that process said
            raise ValueError(f"another process of this run has ended: {error}") from None
    return tensor

def add_up(numbers):
    """Each of these numbers, summed over the processes."""
    return reduce_(torch.tensor(numbers, dtype=torch.float64)).tolist()

def wait_for_all():
    add_up([0])                          # of nothing, nobody would wait

@contextmanager
def first_alone():
    """Process 0 leaves the block before the others enter: what it fetched is there for them."""
    if world()[0] > 0:
        wait_for_all()
    yield
    if world()[0] == 0:
        wait_for_all()

def share(parts):
    """The parts, next to each other, that this process takes.  Settings check: all take as many."""
    rank, processes = world()
    size = len(parts) // processes
    return parts[rank * size:(rank + 1) * size]

def average_gradients(parameters):
    """Each gradient becomes its mean over the processes: one message."""
    # The model alone decides which have one: the same on all processes.
    grads = [p.grad for p in parameters if p.grad is not None]
    if world()[1] > 1:
        flat = reduce_(torch.cat([grad.flatten() for grad in grads])) / world()[1]
        for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads])):
            grad.copy_(mean.view_as(grad))

def seed_step(seed, step):
    """Dropout and noise of this process in this step.  A lone one goes on with a single stream."""
    rank, processes = world()
    if processes > 1:
        key = np.random.SeedSequence([seed, step, rank])     # resumed, a run draws the same
        torch.manual_seed(int(key.generate_state(1)[0]))
