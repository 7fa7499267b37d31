"""Gradient projection for continual learning, on torch alone.

A protected parameter is read as rows of length `n`. When a task ends, the vectors that its inputs show to the parameter
are summed into a second moment (`SecondMoment`, or a `FrequentDirections` of bounded size), and the energy rule turns it
into an orthonormal `Basis` of the directions worth protecting. While later tasks train, `NullSpaceProjector` keeps the
movement of every row orthogonal to that basis, whatever the optimizer does. `Projection` connects the three over a
stream of tasks; it meets a model as a `Protectable`.

    moment = SecondMoment(dim=64)
    for rows in old_inputs:                      # each (N, 64)
        moment.update(rows)
    projector = NullSpaceProjector({"weight": Basis.empty(64).extend(moment, energy=0.99)})
    projector.anchor(module.named_parameters())
    projector.attach(optimizer, module.named_parameters)
"""

from .basis import Basis
from .conditions import CONDITIONS, Context, Observation
from .config import ProjectionConfig
from .moments import FrequentDirections, SecondMoment, second_moment
from .projector import NullSpaceProjector
from .protocol import HasKeys, PerSample, Protectable, Traced
from .state import Projection, set_readers

__all__ = [
    "CONDITIONS",
    "Basis",
    "Context",
    "FrequentDirections",
    "HasKeys",
    "NullSpaceProjector",
    "Observation",
    "PerSample",
    "Projection",
    "ProjectionConfig",
    "Protectable",
    "SecondMoment",
    "Traced",
    "second_moment",
    "set_readers",
]
