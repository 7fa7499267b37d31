"""Define the conditions that a projection can hold, each by the rows along which a parameter must not move.

A condition is a function of a model, a batch of inputs and a context that yields `Observation`s. It knows the model
only as a `Protectable`, so that projections and tuners stay independent of each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import starmap
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .protocol import Protectable, Traced


class Observation(NamedTuple):
    """Rows that one batch of old inputs shows to one parameter.

    Attributes:
        name: name of the parameter in the adapter's checkpoint, followed by ".T" where the rows belong to the
            parameter with its last two dimensions swapped.
        role: "prompt", "key" (of a pool) or "value" (of a prefix, or over the tokens of a prompt), each with its own
            energy; "all" protects every row.
        rows: `(*batch, N, n)`: the parameter, reshaped to `(*batch, rows, n)`, must not move along them.
    """

    name: str
    role: str
    rows: Tensor


class ConditionSettings(Protocol):
    """The settings that a condition reads, a part of `ProjectionConfig`."""

    probes: int
    probe_space: str
    equal_images: bool
    bf16_probes: bool


@dataclass
class Context:
    """The information that a condition may use besides a model and its inputs.

    Attributes:
        config: the projection's settings.
        images: position of each image of the batch within its task; None if unknown.
        task: 0-based.
        seed: the run's seed.
        classes: label ids seen so far, including this task's; None for all.
    """

    config: ConditionSettings
    images: Sequence[int] | None = None
    task: int = 0
    seed: int = 0
    classes: Sequence[int] | None = None


Condition = Callable[[Protectable, Mapping[str, Tensor], Context], Iterable[Observation]]


def pgp(model: Protectable, inputs: Mapping[str, Tensor], context: Context) -> Iterable[Observation]:
    """Protect by prompt gradient projection (Qiao et al., ICLR 2024): `x_t dp^T = 0` and `p_t dp^T = 0`.

    The attention of an old input is preserved when every token row x_t and every prompt row p_t of the old task is
    orthogonal to the prompt's change (Eqs. 5 to 9). Both conditions hold for the stacked rows, never for their sum.
    Keys likewise move orthogonally to the old queries, `q_t dk^T = 0`.
    """
    return starmap(Observation, model.protected_rows(**inputs))


def attention(model: Protectable, inputs: Mapping[str, Tensor], context: Context) -> Iterable[Observation]:
    """Keep the first attention of old inputs, as visual prompt tuning in null space does (Lu et al., NeurIPS 2024).

    Prompt tokens move orthogonally to the old queries multiplied by W_k, head by head, and, along the token axis, to
    the attention that old queries pay to them. Both conditions assume that each token keeps its mean and standard
    deviation, which `ProjectionConfig.ln_penalty` encourages in the training loss. Prefix keys and values meet the
    attention directly. The tuner derives the rows (`attention_rows`).
    """
    return starmap(Observation, model.attention_rows(**inputs))


def functional(model: Protectable, inputs: Mapping[str, Tensor], context: Context) -> Iterable[Observation]:
    """Keep what the head reads of old images, to first order and through the whole network.

    Let f(p, x) be the head's input (`probe_space="features"`) or its scores for the classes seen so far ("logits"), p
    one protected parameter, flattened to n values (one pool entry of L2P, one layer's prefix keys or values, CLIP's
    image prompt), and `J_x = df(p, x)/dp` at the end of x's task. For a movement D of p,

        f(p + D, x) = f(p, x) + J_x D + O(|D|^2).

    To first order, the drift is `sum_x |J_x D|^2 = D^T G D` with `G = sum_x J_x^T J_x` over the images observed
    (`max_images`). Since `E[v v^T] = I` for a Gaussian v, it is `G = sum_x E_v[g g^T]` with
    `g = J_x^T v = d<v, f(p, x)>/dp`: each probe v costs one backward pass, and its g are the rows. Let the columns of
    M be the basis that the energy rule finds, `tr(M^T G M) >= energy * tr(G)`. For D orthogonal to M,

        sum_x |J_x D|^2 <= min((1 - energy) tr(G), l) |D|^2

    where l is the largest eigenvalue of G outside the basis (the first one left out, when the basis is this task's
    own): the worst direction holds at most all the remaining energy, and the average direction of the null space at
    most (1 - energy) tr(G) / (n - r). Where several parameters move by D_1 .. D_k together, the drift is at most k
    times the sum of these bounds (Cauchy-Schwarz). The draws of `probes` per image give an unbiased estimate of G
    times `probes`; the bound holds for the estimate.

    With `probe_space="statistics"`, drift is measured as a statistics head measures distances, by the inverse of the
    covariance Sigma that the classes share: probes are `Sigma^-1/2 v`, and G is `sum_x J_x^T Sigma^-1 J_x`.

    With `equal_images`, the rows of each image are divided by their norm: G is then a mean over images of what each
    depends on, in which those that prompts move far count no more than others.

    This preserves what the head reads of old images along every path: attention and values, the residual stream,
    LayerNorms, all layers. It does so to first order only: the remainder grows with |D|^2, where D is the whole
    movement since x's task ended. It also assumes that each image selects the same entries, which is why the keys of a
    pool are protected as in `pgp`. DualPrompt has one key per task instead: finished keys never move, yet nothing
    keeps a later task's key from winning an old image. `changed_selections` measures both.

    At a task's end, each image costs one forward pass (two if its query has to be computed) and `probes` backward
    passes, each of which takes a little longer, with the memory of one training batch. Half of the probes do not give
    the same basis: at equal rank, it holds less of what other images of the task depend on. Passes in bfloat16 do.
    Each protected parameter (of L2P: each entry of the pool) needs a second moment of n x n values, or a sketch of `2
    * SKETCH` x n once that is smaller (`moments.py`), and its eigenvectors. While later tasks train, each has a basis
    of n x r values, r <= n, by which every step is multiplied: for a pool of M entries at most 4 M n^2 bytes in single
    precision (all but small bases), where n is the prompt's length times the width; above 64 MB at most 2 M n^2,
    because entries above half of all dimensions are kept by their complements.

    With `bf16_probes`, both passes run in bfloat16, from features and to gradients in float32.

    Raises:
        ValueError: the batch does not come with one index per image; `probe_space="statistics"` without a statistics
            head that knows the task.
    """
    _check_images(inputs, context)
    with torch.enable_grad():
        precision = {"autocast": torch.bfloat16} if context.config.bf16_probes else {}
        traced = model.traced(**inputs, **precision)
        gradients = _probe_gradients(model, traced, context)
    for name, per_probe in gradients.items():
        # an image's probes stay together, so that the order of rows does not depend on the batch size
        rows = torch.stack([traced.copies[name].rows(gradient) for gradient in per_probe], dim=-2)
        if context.config.equal_images:  # zeros, of an entry that an image did not select, stay
            rows = rows / rows.norm(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
        yield Observation(name, "prompt", rows.flatten(-3, -2))
    for name, rows in traced.keys.items():
        yield Observation(name, "key", rows)


def frozen(model: Protectable, inputs: Mapping[str, Tensor], context: Context) -> Iterable[Observation]:
    """Freeze shared prompts and keys after the first task: no direction is left free. This is a baseline.

    Whatever belongs to a single task (DualPrompt's experts and their keys, CLIP's contexts) continues to learn.
    """
    for name, parameter in model.prompt_parameters().items():
        rows = torch.eye(parameter.shape[-1], device=parameter.device)
        yield Observation(name, "all", rows)


CONDITIONS: dict[str, Condition] = {"pgp": pgp, "attention": attention, "functional": functional, "frozen": frozen}
WITHOUT_IMAGES = {"frozen"}  # conditions that do not depend on old images


def probes(context: Context, probe: int, output: Tensor) -> Tensor:
    """Draw one standard Gaussian direction per image of `context.images`, shaped like `output`, `(B, c)`.

    Each is a function of (seed, task, image, probe) alone: it does not depend on batches or processes, and no other
    random number generator advances.
    """
    directions = []
    for image in context.images or ():
        counters = f"{context.seed} {context.task} {int(image)} {probe}"
        seed = int.from_bytes(hashlib.blake2b(counters.encode(), digest_size=4).digest(), "little")
        directions.append(torch.randn(output.shape[1], generator=torch.Generator().manual_seed(seed)))
    return torch.stack(directions).to(output)


def _check_images(inputs: Mapping[str, Tensor], context: Context) -> None:
    count = len(inputs["pixel_values"])
    if context.images is None or len(context.images) != count:
        given = "none" if context.images is None else len(context.images)
        raise ValueError(
            f"{count} images and {given} indices: probes are drawn for each image by its index within the task, so "
            "pass images=[...] to observe, one index per image."
        )


def _probe_gradients(model: Protectable, traced: Traced, context: Context) -> dict[str, list[Tensor]]:
    """Return the gradients `(B, ...)` of each parameter's copies, one for each probe."""
    config = context.config
    output = model.linear_logits(traced.features) if config.probe_space == "logits" else traced.features
    if config.probe_space == "logits" and context.classes is not None:
        output = output[:, list(context.classes)]
    output = output.float()  # a pass in bfloat16 has float32 gradients too
    metric = _head_metric(model).to(output) if config.probe_space == "statistics" else None
    gradients: dict[str, list[Tensor]] = {name: [] for name in traced.copies}
    values = [copies.values for copies in traced.copies.values()]
    for probe in range(config.probes if values else 0):
        directions = probes(context, probe, output)
        directions = directions if metric is None else directions @ metric.mT
        found = torch.autograd.grad(output, values, directions, retain_graph=probe + 1 < config.probes)
        for name, gradient in zip(gradients, found, strict=True):
            gradients[name].append(gradient)
    return gradients


def _head_metric(model: Protectable) -> Tensor:
    if model.statistics is None:
        raise ValueError(
            "probe_space='statistics' needs a statistics head, which this adapter lacks: set head='statistics' in its "
            "configuration, or choose another probe_space."
        )
    return model.statistics.whitening()
