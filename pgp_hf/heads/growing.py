"""Grow a linear head by rows for new classes; torch alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_LINEAR = {"weight", "bias"}


def generator(seed: int, purpose: str, number: int) -> torch.Generator:
    """Return a generator whose random numbers depend on these three alone."""
    digest = hashlib.blake2b(f"{seed} {purpose} {number}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def new_names(names: Sequence[str], known: Mapping[int, str] | None, owner: nn.Module) -> list[str]:
    """Return the names of new classes, after checking them.

    Args:
        names: of the new classes.
        known: the names so far; None for a model without a head.
        owner: the model, for the message.

    Raises:
        TypeError: a model without a head, or names that are not a sequence of strings.
        ValueError: a name that is known or occurs twice.
    """
    if known is None:
        raise TypeError(
            f"{type(owner).__name__} has no classifier that could grow: open one by pgp_hf.models.open_head(model)."
        )
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"names={names!r:.80} of new classes: expected a sequence of strings, one for each class.")
    there = set(known.values())
    for name in names:
        if name in there:
            raise ValueError(f"there is a class {name!r} already: give each new class a name of its own.")
        there.add(name)
    return list(names)


# ---- rows of a linear head -------------------------------------------------------------------------------------------


class GrownLayer(NamedTuple):
    """A linear layer with the parameters that it is to have."""

    layer: nn.Linear
    weight: nn.Parameter
    bias: nn.Parameter | None

    def put(self) -> None:
        """Give the layer these parameters."""
        self.layer.weight, self.layer.out_features = self.weight, len(self.weight)
        if self.bias is not None:
            self.layer.bias = self.bias


@torch.no_grad()
def grown_layers(model: nn.Module, known: int, count: int, seed: int) -> list[GrownLayer]:
    """Return the layers of a model's `classifier` with rows for new classes; nothing is changed yet.

    Rows of known classes keep their values. A new row has the distribution that `nn.Linear` draws from, by the seed and
    its class id alone. PEFT keeps an original of a classifier and a copy for each adapter: all of them are returned.

    Args:
        model: has a `classifier`.
        known: number of rows that it must have.
        count: number of rows to add.
        seed: of the run.

    Raises:
        TypeError: a classifier that does not end in a linear layer.
        ValueError: one that is sharded, or has another number of rows.
    """
    grown = []
    for parent, name in ends(model, "classifier"):
        layer = checked_linear(parent.get_submodule(name), known)
        bound, width = layer.in_features**-0.5 if layer.in_features else 0.0, layer.in_features + 1
        drawn = torch.empty(count, width)
        for label, row in enumerate(drawn, known):
            row.uniform_(-bound, bound, generator=generator(seed, "class", label))
        bias = None if layer.bias is None else _longer(layer.bias, drawn[:, -1])
        grown.append(GrownLayer(layer, _longer(layer.weight, drawn[:, :-1]), bias))
    return grown


def _longer(parameter: Tensor, rows: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.cat([parameter, rows.to(parameter)]), requires_grad=parameter.requires_grad)


def grow_classifier(model: nn.Module, known: Mapping[int, str], new: Sequence[str], seed: int) -> None:
    """Add rows for new classes to a model's `classifier`, and their names to the model; raise what `grown_layers` does."""
    for grown in grown_layers(model, len(known), len(new), seed):
        grown.put()
    name_classes(model, {**known, **dict(enumerate(new, len(known)))})


def ends(parent: nn.Module, name: str) -> list[tuple[nn.Module, str]]:
    """Return where the last layer of a classifier is, as parent and name: several places where PEFT has copied it."""
    module = parent.get_submodule(name)
    copies = getattr(module, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict):
        places = [(module, "original_module"), *((copies, adapter) for adapter in copies)]
        return [end for place in places for end in ends(*place)]
    if isinstance(module, nn.Sequential) and len(module):
        return ends(module, str(len(module) - 1))
    return [(parent, name)]


def checked_linear(layer: nn.Module, rows: int | None = None) -> nn.Linear:
    """Return a layer that can grow; raise TypeError or ValueError for any other."""
    own = dict(layer.named_parameters())
    weight = own.get("weight")
    if not isinstance(layer, nn.Linear) or weight is None or not weight.is_floating_point() or own.keys() > _LINEAR:
        raise TypeError(
            f"the head ends in a {type(layer).__name__}, which cannot grow by a class: use a model whose classifier is, or "
            "ends in, a linear layer of floating point numbers (torch.nn.Linear)."
        )
    if hasattr(weight, "to_local") or tuple(weight.shape) != (layer.out_features, layer.in_features):
        raise ValueError(
            f"the head's weight is sharded (shape {tuple(weight.shape)} here, {layer.out_features} x {layer.in_features} as "
            "a whole) and cannot grow: use plain data parallelism, in which each process has all of it."
        )
    if rows not in (None, layer.out_features):
        raise ValueError(
            f"the head has {layer.out_features} rows for {rows} class names: it grows where they agree. Load the backbone "
            f"with num_labels={rows}, or begin with pgp_hf.models.open_head(model)."
        )
    return layer


def name_classes(model: nn.Module, names: Mapping[int, str]) -> None:
    """Note the names of all classes in a model and its configuration."""
    config: Any = model.config
    config.id2label, config.label2id = dict(names), {name: label for label, name in names.items()}
    if hasattr(model, "num_labels"):
        vars(model)["num_labels"] = len(names)
