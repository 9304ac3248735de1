"""One of two ranks: rank 1 freezes, its connections open, while rank 0 waits for it in a sum of its own limit."""

import os
import signal

import torch
import torch.distributed as dist

from pipeline.runtime.device import open_device
from pipeline.runtime.ranks import join, place

ranks = join(open_device("cpu", "auto", False, place()[2], 0), 2.0)
group = dist.new_group()  # the library's limit for it is half an hour
dist.all_reduce(torch.ones(1), group=group)
if ranks.rank == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
dist.all_reduce(torch.ones(1), group=group)
