"""Keep `DataArguments` importable from where it used to be defined."""

from .cli.arguments import DataArguments

__all__ = ["DataArguments"]
