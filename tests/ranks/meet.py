"""One rank of a meeting: add, share, wait, and say what came of it as one line of JSON."""

import json
import os

import torch

from pipeline.runtime.device import open_device
from pipeline.runtime.ranks import join, leave, place

device = open_device("cpu", "auto", False, place()[2], 0)
ranks = join(device, 30)
total = torch.tensor([1.0, 10.0]) * (ranks.rank + 1)
ranks.sum_([total])
said = ranks.share({"from": ranks.rank, "host": os.environ["HOST"]})
ranks.wait("the end")
print("\n" + json.dumps({"rank": ranks.rank, "world": ranks.world, "sum": total.tolist(), "said": said}))
leave()
