"""Configurations: what is read, and what is refused in one line."""

import pytest

from diffussm.config import Config, config_names, from_dict, parse, to_dict
from diffussm.errors import UserError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("name", config_names())
def test_shipped_configs_are_valid_and_survive_their_own_yaml(name, tmp_path):
    config = parse(["--config", name]).config
    path = tmp_path / "again.yaml"
    path.write_text(config.to_yaml())
    assert to_dict(parse(["--config", str(path)]).config) == to_dict(config)
    assert to_dict(from_dict(to_dict(config))) == to_dict(config)


def test_the_default_is_fashion32_and_dotted_keys_override_it():
    launch = parse(["--deepspeed", "x.json", "--local_rank=1", "--train.lr", "2e-4", "--model.width=64"])
    assert launch.deepspeed == "x.json"
    assert launch.config.run_dir == "runs/fashion32"
    assert (launch.config.train.lr, launch.config.model.width) == (2e-4, 64)
    assert launch.config.train.global_batch == 32


def test_the_defaults_are_the_papers():
    train = Config().train
    assert (train.lr, train.global_batch, train.weight_decay, train.total_images) == (1e-4, 256, 0.0, 660_000_000)
    assert 2.718281828 ** (-train.global_batch / train.ema_images) == pytest.approx(0.9999, abs=1e-8)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--train.lrr", "1"], r"unknown config key train.lrr: did you mean train.lr\?"),
        (["--nonsense"], "unknown config key nonsense"),
        (["--train.lr", "fast"], "train.lr"),
        (["--train.global_batch", "2.5"], "train.global_batch"),
        (["--train.precision", "fp8"], "train.precision"),
        (["--train.lr"], "train.lr"),
        (["--config", "xl9"], "'xl9' is neither a file nor one of .*fashion32"),
        (["--train.betas", "[2,3]"], "train.betas .* must be in"),
        (["--train.lr", "-1"], "train.lr -1.0 must be positive"),
        (["--train.total_images", "10"], "train.total_images 10 must be ≥ train.global_batch 32"),
        (["--sample.steps", "1001"], r"sample.steps 1001 must be in 1..1000"),
        (["--diffusion.label_drop", "1"], "diffusion.label_drop"),
        (["--model.hourglass", "3"], "model.hourglass 3"),
    ],
)
def test_bad_arguments_are_one_line_that_names_the_key(arguments, line):
    with pytest.raises(UserError, match=line) as error:
        parse(arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("train:\n  lrr: 1\n", r"unknown config key train.lrr: did you mean train.lr\?"),
        ("train:\n  lr: fast\n", "train.lr"),
        ("trian:\n  lr: 1\n", "unknown config key trian"),
        ("train: [\n", "not YAML"),
        ("- 1\n", "the file is not a mapping"),
        ("train: 3\n", "train is not a mapping"),
    ],
)
def test_bad_files_are_one_line(tmp_path, content, line):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=line) as error:
        parse(["--config", str(path)])
    assert "\n" not in str(error.value)


def test_yaml_is_read_safely(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("run_dir: !!python/object/apply:os.system ['touch pwned']\n")
    with pytest.raises(UserError, match="not YAML"):
        parse(["--config", str(path)])


def test_a_key_of_another_version_is_named():
    values = to_dict(Config())
    values["train"]["old"] = 1
    with pytest.raises(UserError, match="old"):
        from_dict(values)
