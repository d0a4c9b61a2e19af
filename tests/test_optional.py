"""Packages of the extras: where one is missing, what needs it says so in one line, before anything is written."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from diffussm.autoencoders.kl import AutoencoderKLCodec
from diffussm.data.index import Index
from diffussm.data.reader import SampleReader
from diffussm.data.shards import ShardBuilder
from diffussm.data.sources import open_source
from diffussm.data.store import open_store
from diffussm.errors import UserError
from diffussm.training import cluster
from diffussm.training.cluster import Identity, connect
from diffussm.training.monitor import Monitor

pytestmark = pytest.mark.unit

RUN = Path("run")


def open_lsun() -> None:
    folder = Path("church_lmdb")
    folder.mkdir()
    (folder / "data.mdb").touch()
    open_source("lsun", str(folder))


@pytest.mark.parametrize(
    ("missing", "use", "line"),
    [
        ("deepspeed", lambda: connect(Identity("none")), "training needs deepspeed: pip install 'diffussm[train]'"),
        (
            "tensorboard",
            lambda: Monitor(Path("run"), 0, 8),
            "training needs tensorboard: pip install 'diffussm[train]'",
        ),
        (
            "psutil",
            lambda: cluster._interface_towards("127.0.0.1"),
            "choosing the network's interface needs psutil: pip install 'diffussm[train]'",
        ),
        ("webdataset", lambda: ShardBuilder(0), "encoding needs webdataset: pip install 'diffussm[data]'"),
        (
            "braceexpand",
            lambda: open_source("webdataset", "x.tar"),
            "--source webdataset needs braceexpand: pip install 'diffussm[data]'",
        ),
        ("lmdb", open_lsun, "--source lsun needs lmdb: pip install 'diffussm[lsun]'"),
        ("boto3", lambda: open_store("s3://b/data"), "s3://b/data needs boto3: pip install 'diffussm[s3]'"),
        (
            "diffusers",
            lambda: AutoencoderKLCodec.open("some/vae", 64),
            "autoencoder some/vae needs diffusers: pip install 'diffussm[hub]'",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isalnum() else "",
)
def test_what_needs_a_package_that_is_missing_says_so(
    missing: str, use: Callable[[], object], line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name == missing or name.startswith(f"{missing}.")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("diffussm.data.s3", "diffussm.data.s3_requests", "torch.utils.tensorboard"):  # that import them
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError) as error:
        use()
    assert str(error.value) == line
    assert not list(tmp_path.glob("run/*"))


def test_samples_are_checked_without_isal_too(shades: Path) -> None:
    code = (
        "import sys; sys.modules['isal'] = None\n"
        "import numpy as np\n"
        "from diffussm.data.index import Index\n"
        "from diffussm.data.reader import SampleReader, crc32_of\n"
        "from diffussm.data.store import open_store\n"
        "store = open_store(sys.argv[1])\n"
        "moments, _ = SampleReader(store, Index.load(store)).read(np.arange(9))\n"
        "print(crc32_of.__module__, moments.astype(int).sum())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(shades / "train")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    store = open_store(shades / "train")
    moments, _ = SampleReader(store, Index.load(store)).read(np.arange(9))
    assert done.stdout.split() == ["zlib", str(moments.astype(int).sum())]
