"""The former home of `DataArguments`."""

from .cli.arguments import DataArguments

__all__ = ["DataArguments"]
