"""Runs a script under FSDP2 on CPU processes: accelerate shards on accelerators only, so these are told to be ones.

python -m torch.distributed.run --nproc_per_node 2 tests/sharded.py SCRIPT [FLAG ...]
"""

import os
import runpy
import sys

os.environ |= {
    "ACCELERATE_USE_FSDP": "true",  # what `accelerate launch --use_fsdp --fsdp_version 2 ...` sets
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "false",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
os.environ.setdefault("FSDP_AUTO_WRAP_POLICY", "NO_WRAP")

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

START = PartialState.__init__


def start(self, *args, **kwargs):
    START(self, *args, **kwargs)
    if self._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
        self._shared_state["distributed_type"] = DistributedType.MULTI_XPU


PartialState.__init__ = start
torch.set_num_threads(1)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
