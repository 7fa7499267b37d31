"""The command line's projection settings are those of `ProjectionConfig`, with its help and its defaults."""

from __future__ import annotations

import pytest
from transformers import HfArgumentParser

from pgp_hf import ProjectionConfig
from pgp_hf.cli.arguments import RunArguments
from pgp_hf.projection import CONDITIONS


def parse(*argv: str) -> ProjectionConfig:
    return HfArgumentParser(RunArguments).parse_args_into_dataclasses(list(argv))[0].config()


def test_defaults_are_the_dataclass_defaults():
    assert parse() == ProjectionConfig()


@pytest.mark.parametrize("method", ["none", *CONDITIONS])
def test_every_method_is_a_choice(method):
    assert parse("--projection", method) == ProjectionConfig(method=method)


def test_energies_that_may_be_none_can_be_given_as_none(capsys):
    assert parse("--key_energy", "none", "--value-energy=None") == ProjectionConfig(key_energy=None, value_energy=None)
    assert type(parse("--key_energy", "0.5").key_energy) is float
    with pytest.raises(SystemExit):
        parse("--key_energy", "much")
    assert "'much' is neither a number nor 'none'" in capsys.readouterr().err


def test_every_field_is_an_argument():
    given = {
        "energy": 0.5,
        "key_energy": 0.6,
        "value_energy": 0.7,
        "apply_to": "gradient",
        "max_images": 9,
        "probes": 5,
        "probe_space": "logits",
        "hold_key_norm": False,
        "ln_penalty": 0.25,
    }
    assert {"method", *given} == set(ProjectionConfig.__dataclass_fields__)
    argv = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    assert parse("--projection", "functional", *argv) == ProjectionConfig(method="functional", **given)


@pytest.mark.parametrize(
    ("argv", "message"), [(("--projection", "gpm"), "invalid choice"), (("--probe_space", "x"), "invalid choice")]
)
def test_refuses(argv, message, capsys):
    with pytest.raises(SystemExit):
        parse(*argv)
    assert message in capsys.readouterr().err


def test_help_is_the_dataclass_help(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    for name, field in ProjectionConfig.__dataclass_fields__.items():
        assert " ".join(field.metadata["help"].split()) in text, name
