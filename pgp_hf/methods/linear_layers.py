"""Read and hold the linear layers of a backbone that learns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ..models import PlainModel
from ..projection import Basis, NullSpaceProjector, SecondMoment


def linear_layers(model: PlainModel) -> dict[str, nn.Linear]:
    """Return the linear layers that learn, by name, without those of the head."""
    head = set(model.head.modules())
    return {
        name: module
        for name, module in model.base.named_modules()
        if isinstance(module, nn.Linear) and module.weight.requires_grad and module not in head
    }


@contextmanager
def watched(
    layers: Mapping[str, nn.Linear], callback: Callable[[str, nn.Linear, tuple[Tensor, ...]], None]
) -> Iterator[None]:
    """Call `callback` with the name, the module and the inputs of each layer when it is run inside the block."""
    handles = [layer.register_forward_pre_hook(partial(callback, name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def same_input(layers: Mapping[str, nn.Linear], forward: Callable[[], object]) -> list[list[str]]:
    """Return the names of layers in groups that read the same tensor in a forward pass.

    Layers with and without a bias are apart, and so are those that are run several times, unless all their inputs are
    the same. A layer that is not run is in no group.
    """
    read: dict[str, list[tuple[int, int]]] = {}
    alive: list[Tensor] = []  # a freed tensor's identity would be given to another one

    def note(name: str, layer: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
        alive.append(inputs[0])
        read.setdefault(name, []).append((id(inputs[0]), inputs[0]._version))  # it may be changed in place

    with watched(layers, note):
        forward()
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, tensors in read.items():
        groups.setdefault((layers[name].bias is None, *tensors), []).append(name)
    return list(groups.values())


def add(moments: dict[str, SecondMoment], name: str, layer: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
    """Add what a layer reads to its second moment."""
    rows = inputs[0].detach().flatten(0, -2)
    if layer.bias is not None:
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
    if name not in moments:
        moments[name] = SecondMoment(rows.shape[-1], device=rows.device)
    moments[name].update(rows)


def joined(layers: Sequence[nn.Linear]) -> Tensor:
    """Return `[W b]` of layers that read the same input, one below the other, `(rows, n)`; without biases, W."""
    return torch.cat(
        [layer.weight if layer.bias is None else torch.cat([layer.weight, layer.bias[:, None]], 1) for layer in layers]
    ).detach()


def put(layers: Sequence[nn.Linear], matrix: Tensor) -> None:
    """Give layers the weights and biases of a matrix as `joined` returns it."""
    for layer, part in zip(layers, torch.split(matrix, [layer.out_features for layer in layers]), strict=True):
        layer.weight.copy_(part[:, : layer.in_features])
        if layer.bias is not None:
            layer.bias.copy_(part[:, -1])


class Guard:
    """Hold a model, after each optimizer step, to what older tasks leave free.

    Linear layers move in the null space of their bases. Everything else in the backbone stays as it is, buffers such as
    running statistics included. The head is left alone.

    Args:
        model: as the last task has left it.
        groups: names of the layers that share a basis, by the name of the basis.
        bases: the bases.

    Raises:
        ValueError: layers that the model does not have, or of other sizes.
    """

    def __init__(self, model: PlainModel, groups: Mapping[str, Sequence[str]], bases: Mapping[str, Basis]) -> None:
        found = linear_layers(model)
        if missing := sorted({name for names in groups.values() for name in names} - found.keys()):
            raise ValueError(
                f"the bases of this run belong to {missing[0]!r}, which is not a trained linear layer of this "
                f"{type(model.base).__name__}: continue with the model that the run was begun with."
            )
        self.layers = {basis: [found[name] for name in names] for basis, names in groups.items()}
        self.projector = NullSpaceProjector(dict(bases))
        self.projector.anchor(self._matrices().items())
        learning = [layer for layers in self.layers.values() for layer in layers]
        moving = {id(tensor) for module in (*learning, model.head) for tensor in _tensors(module)}
        self.still = [
            (tensor, tensor.detach().clone())
            for tensor in (*model.trainable().values(), *model.base.buffers())
            if id(tensor) not in moving
        ]

    def _matrices(self) -> dict[str, Tensor]:
        return {name: joined(layers) for name, layers in self.layers.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Undo whatever part of the movement since the task's start is not free."""
        matrices = self._matrices()
        self.projector.project_updates_(matrices.items())
        for name, layers in self.layers.items():
            put(layers, matrices[name])
        for tensor, value in self.still:
            tensor.copy_(value)

    def check(self) -> None:
        """Raise RuntimeError if anything has moved, since the last `restore`, that must not."""
        self.projector.check(self._matrices().items())
        if not all(torch.equal(tensor, value) for tensor, value in self.still):
            raise RuntimeError(
                "weights outside the linear layers have moved after the last step, where older tasks need them as they "
                "were: an optimizer moves them in the backward pass or in eval(), or a callback does. Leave that out."
            )


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


# ---- symmetric matrices ----------------------------------------------------------------------------------------------


def packed(matrix: Tensor) -> Tensor:
    """Return the upper triangle of a symmetric matrix, row by row, on the CPU."""
    rows, columns = torch.triu_indices(*matrix.shape, device=matrix.device)
    return matrix[rows, columns].cpu()


def unpacked(triangle: Tensor, n: int) -> Tensor:
    """Return the symmetric matrix `(n, n)` with this upper triangle."""
    rows, columns = torch.triu_indices(n, n, device=triangle.device)
    matrix = triangle.new_zeros(n, n)
    matrix[rows, columns] = triangle
    matrix[columns, rows] = triangle
    return matrix
