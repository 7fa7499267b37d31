"""The loopback Hub: see `loopback.fixtures`."""

from loopback.fixtures import _python, _server, home, hub, python  # noqa: F401 (fixtures)
