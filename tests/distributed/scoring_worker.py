"""One process of tools/eval_fid.py for test_scoring.py: by means of blocks, slowly, and often saved."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parents[1]))

from evaluation.conftest import BlockMeans

from diffussm.commands import eval_fid
from diffussm.errors import run_command
from diffussm.evaluation import survey
from diffussm.evaluation.features import Features


class Slow(BlockMeans):
    batch_size = 10

    def __call__(self, images: np.ndarray) -> Features:
        time.sleep(0.02)
        return super().__call__(images)


survey.SAVE_SECONDS = 0.2
eval_fid.make_extractor = lambda *arguments: Slow()

if __name__ == "__main__":
    run_command(eval_fid.main)
