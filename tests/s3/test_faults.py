"""An epoch through a proxy that spoils what the server answers: exactly the right samples, or one line that names a
shard; never fewer, never others, and in time."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from s3.conftest import BUCKET
from s3.fault_proxy import Fault, FaultProxy, drip, early_close, flip, refuse, reset, shorten, stall

from benchmarks.seaweed import ACCESS_KEY, SECRET_KEY
from diffussm.data.cache import ShardCache
from diffussm.data.index import SAMPLE_DTYPE, Index, Shard, publish_index, shard_name
from diffussm.data.order import SampleOrder
from diffussm.data.reader import SampleReader
from diffussm.data.s3 import S3Store
from diffussm.data.shards import ShardBuilder
from diffussm.data.store import open_store
from diffussm.data.stream import LatentStream
from diffussm.errors import UserError

pytestmark = pytest.mark.s3
