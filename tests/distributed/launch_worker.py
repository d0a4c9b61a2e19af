"""One rank of a launch, for test_launchers.py: `launch_worker.py agree ODD_RANK`, or `launch_worker.py end CODE`."""

import os
import signal
import sys

from diffussm import errors
from diffussm.training.cluster import connect, identify
from diffussm.training.handshake import check_agreement


def agree(odd: int) -> None:
    """Check that all ranks agree, which rank ``odd`` does not."""
    cluster = connect()
    check_agreement(cluster, {"configuration": "odd" if cluster.rank == odd else "even"})
    print(f"rank {cluster.rank} agrees")


def end(code: int) -> None:
    """End rank 1 with ``code``, or by the signal -``code``; the others are busy."""
    if identify().rank == 1:
        if code < 0:
            os.kill(os.getpid(), -code)
        sys.exit(code)
    signal.pause()


if __name__ == "__main__":
    errors.WAIT_FOR_RANK_0 = 2
    work, number = {"agree": agree, "end": end}[sys.argv[1]], int(sys.argv[2])
    errors.run_command(lambda: work(number))
