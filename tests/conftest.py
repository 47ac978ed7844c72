import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network by accident

import torch

torch.set_num_threads(2)
