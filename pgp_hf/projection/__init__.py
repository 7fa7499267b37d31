"""Gradient projection for continual learning, on torch alone.

A protected parameter is seen as rows of length `n`. While a task is finished, the vectors that its inputs showed the
parameter are summed into a second moment (`SecondMoment`, or a `FrequentDirections` of bounded size); the energy rule turns it
into an orthonormal `Basis` of the directions worth protecting; while later tasks train, `NullSpaceProjector` keeps
every row's movement orthogonal to that basis, whatever the optimizer does. `Projection` strings the three together
over a stream of tasks.

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
from .state import Projection

__all__ = [
    "CONDITIONS",
    "Basis",
    "Context",
    "NullSpaceProjector",
    "Observation",
    "Projection",
    "ProjectionConfig",
    "SecondMoment",
    "FrequentDirections",
    "second_moment",
]
