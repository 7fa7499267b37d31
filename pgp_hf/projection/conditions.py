"""What each projection protects: which rows a parameter's movement must be orthogonal to.

A method is a function of a model, a batch of inputs and its context that yields `Observation`s. It knows the model only
through the methods that a prompt tuner offers, so that projections and tuners stay independent of each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import starmap
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .config import ProjectionConfig


class Observation(NamedTuple):
    """Rows that one batch of old inputs shows to one parameter.

    Attributes:
        name: the parameter's name as in the adapter's checkpoint, with ".T" behind it where the rows belong to the
            parameter with its last two dimensions swapped.
        role: "prompt", "key" (of a pool) or "value" (of a prefix, or over the tokens of a prompt), each with its own
            energy; "all" protects every row.
        rows: `(*batch, N, n)`: the parameter, reshaped to `(*batch, rows, n)`, shall not move along them.
    """

    name: str
    role: str
    rows: Tensor


@dataclass
class Context:
    """What a method may know besides a model and its inputs.

    Attributes:
        config: the projection's settings.
        images: position of each image of the batch within its task; None where the caller does not say.
        task: 0-based.
        seed: of the run.
        classes: seen so far, this task's included; None for all.
    """

    config: ProjectionConfig
    images: Sequence[int] | None = None
    task: int = 0
    seed: int = 0
    classes: Sequence[int] | None = None


Method = Callable[[Any, dict[str, Tensor], Context], Iterable[Observation]]


def pgp(model: Any, inputs: dict[str, Tensor], context: Context) -> Iterable[Observation]:
    """Prompt gradient projection (Qiao et al., ICLR 2024): `x_t dp^T = 0` and `p_t dp^T = 0`.

    The attention of an old input is kept when each token row x_t and each prompt row p_t of the old task is
    orthogonal to the prompt's change (Eqs. 5 to 9). Both conditions hold for the rows stacked, never for their sum.
    Keys are held likewise against the old queries, `q_t dk^T = 0`.
    """
    return starmap(Observation, model.protected_rows(**inputs))


def attention(model: Any, inputs: dict[str, Tensor], context: Context) -> Iterable[Observation]:
    """Visual prompt tuning in null space (Lu et al., NeurIPS 2024): the first attention of old inputs is consistent.

    Prompt tokens move orthogonally to the old queries as they meet W_k, head by head, and, along the token axis, to
    the attention that old queries pay to them; both given that each token's mean and deviation stay, which
    `ProjectionConfig.ln_penalty` asks of the training loss. Prefix keys and values meet the attention directly. The
    rows and their derivation are the tuner's (`attention_rows`).
    """
    return starmap(Observation, model.attention_rows(**inputs))


def functional(model: Any, inputs: dict[str, Tensor], context: Context) -> Iterable[Observation]:
    """What the head reads of old images stays, to first order and through the whole network.

    Let f(p, x) be the head's input (`probe_space="features"`) or its scores for the classes seen so far ("logits"), p
    one protected parameter flattened, of n values (one pool entry of L2P, one layer's prefix keys or values, CLIP's
    image prompt), and `J_x = df(p, x)/dp` at the end of x's task. For a movement D of p,

        f(p + D, x) = f(p, x) + J_x D + O(|D|^2).

    What drifts first is `sum_x |J_x D|^2 = D^T G D` with `G = sum_x J_x^T J_x` over the images shown (`max_images`). Since `E[v v^T] = I` for a Gaussian v,
    `G = sum_x E_v[g g^T]` with `g = J_x^T v = d<v, f(p, x)>/dp`: one backward pass for each probe v, and its g are the
    rows. Let the columns of M be the basis that the energy rule finds, `tr(M^T G M) >= energy * tr(G)`. With D
    orthogonal to M,

        sum_x |J_x D|^2 <= min((1 - energy) tr(G), l) |D|^2

    where l is the largest eigenvalue of G outside the basis (the first that was left out, when the basis is this
    task's own): the worst direction holds at most all the energy that is left, and the average direction of the null
    space at most (1 - energy) tr(G) / (n - r). Where several parameters move by D_1 .. D_k together, the drift is at most
    k times the sum of these bounds (Cauchy-Schwarz). `probes` draws per image estimate G, times `probes`, without bias;
    the bound holds for the estimate.

    In `probe_space="statistics"` drift is measured as a statistics head measures distances, by the inverse of the
    covariance Sigma that the classes share: probes are `Sigma^-1/2 v`, and G is `sum_x J_x^T Sigma^-1 J_x`.

    Preserved is therefore what the head reads of old images, along every path: attention and values, the residual
    stream, LayerNorms, all layers. To first order only: the remainder grows with |D|^2, D being all that has been
    moved since x's task ended. And as long as each image selects the same entries: that is what the keys of a pool are
    protected for, as in `pgp`. DualPrompt has a key a task instead: finished keys never move, yet nothing keeps a later
    task's key from winning an old image. `changed_selections` measures both.

    Cost at a task's end: for each image one forward pass (two where its query is not at hand) and `probes` backward
    passes, with the memory of one training batch. For each protected parameter (of L2P: each entry of the pool) a
    second moment of n x n values, or a sketch of `2 * SKETCH` x n once that is smaller (`moments.py`), and its
    eigenvectors. While later tasks train, a basis of n x r float64 values each, r <= n, which every step multiplies
    with: for a pool of M entries at most 8 M n^2 bytes, n being the prompt's length times the width.

    Raises:
        ValueError: the images of the batch are not numbered, one index each; `probe_space="statistics"` without a
            statistics head that knows the task.
    """
    count, config = len(inputs["pixel_values"]), context.config
    if context.images is None or len(context.images) != count:
        given = "none" if context.images is None else len(context.images)
        raise ValueError(
            f"{count} images and {given} indices: probes are drawn for each image by its index within the task, so "
            "pass images=[...] to observe, one index per image."
        )
    with torch.enable_grad():
        traced = model.traced(**inputs)
        output = model.linear_logits(traced.features) if config.probe_space == "logits" else traced.features
        if config.probe_space == "logits" and context.classes is not None:
            output = output[:, list(context.classes)]
        output = output.float()  # of a pass in bfloat16 too: its gradients are float32
        values = [copies.values for copies in traced.copies.values()]
        turn = _head_metric(model).to(output) if config.probe_space == "statistics" else None
        gradients = []
        for probe in range(config.probes if values else 0):
            directions = probes(context, probe, output)
            directions = directions if turn is None else directions @ turn.mT
            gradients.append(torch.autograd.grad(output, values, directions, retain_graph=probe + 1 < config.probes))
    for (name, copies), own in zip(traced.copies.items(), zip(*gradients, strict=True), strict=True):
        # an image's probes side by side: the order of rows does not depend on the batch size
        rows = torch.stack([copies.rows(gradient) for gradient in own], dim=-2)
        yield Observation(name, "prompt", rows.flatten(-3, -2))
    for name, rows in traced.keys.items():
        yield Observation(name, "key", rows)


def _head_metric(model: Any) -> Tensor:
    if model.statistics is None:
        raise ValueError(
            "probe_space='statistics' needs a statistics head, which this adapter lacks: set head='statistics' in its "
            "configuration, or choose another probe_space."
        )
    return model.statistics.whitening()


def probes(context: Context, probe: int, output: Tensor) -> Tensor:
    """One standard Gaussian direction per image, like `output` `(B, c)`.

    Each is a function of (seed, task, image, probe) alone: neither batches nor processes change it, and no other
    random number is consumed.
    """
    directions = []
    for image in context.images:
        counters = f"{context.seed} {context.task} {int(image)} {probe}"
        seed = int.from_bytes(hashlib.blake2b(counters.encode(), digest_size=4).digest(), "little")
        directions.append(torch.randn(output.shape[1], generator=torch.Generator().manual_seed(seed)))
    return torch.stack(directions).to(output)


def frozen(model: Any, inputs: dict[str, Tensor], context: Context) -> Iterable[Observation]:
    """The baseline whose shared prompts and keys learn with the first task only: no direction is free after it.

    What belongs to one task (DualPrompt's experts and their keys, CLIP's contexts) goes on learning.
    """
    for name, parameter in model.prompt_parameters().items():
        rows = torch.eye(parameter.shape[-1], device=parameter.device)
        yield Observation(name, "all", rows)


CONDITIONS: dict[str, Method] = {"pgp": pgp, "attention": attention, "functional": functional, "frozen": frozen}
WITHOUT_IMAGES = {"frozen"}  # methods that ask nothing of the old images
