"""A projection over a stream: statistics, bases per parameter, files, several processes."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch

from pgp_hf.projection import CONDITIONS, Basis, Projection, ProjectionConfig, SecondMoment

SHAPES = {"prompt": (6, 2, 12), "key": (6, 8), "heads": (2, 3, 10)}


class Tuner:
    """Stand for a prompt tuner: its inputs are the rows that its parameters see."""

    def protected_rows(self, **inputs):
        for name, rows in inputs.items():
            yield name, "key" if name == "key" else "prompt", rows


def batch(seed, count=5):
    """Rows that lie mostly in two dimensions, which change from ten seeds to ten seeds."""
    generator = torch.Generator().manual_seed(seed)
    rows = {}
    for name, shape in SHAPES.items():
        heads = shape[:1] if name == "heads" else ()
        rows[name] = torch.randn(*heads, count, shape[-1], generator=generator)
        first = 2 * (seed // 10)
        rows[name] *= torch.tensor([1.0 if first <= i < first + 2 else 0.01 for i in range(shape[-1])])
    return rows


def finish(projection, seeds, **kwargs):
    for seed in seeds:
        projection.observe(Tuner(), batch(seed))
    projection.end_task(SHAPES, **kwargs)
    return projection


def tensors(projection):
    return {name: basis.columns for name, basis in projection.bases.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_bases_are_the_rule_on_what_was_observed():
    projection = finish(Projection(ProjectionConfig(energy=0.9, key_energy=0.6)), [1, 2, 3])
    for name, shape in SHAPES.items():
        rows = torch.cat([batch(seed)[name] for seed in (1, 2, 3)], dim=-2)
        moment = SecondMoment(shape[-1], rows.shape[:-2]).update(rows)
        energy = 0.6 if name == "key" else 0.9
        expected = Basis.empty(moment.dim, moment.batch_shape).extend(moment, energy)
        assert projection.bases[name].rank == expected.rank
        assert torch.allclose(
            projection.bases[name].columns @ projection.bases[name].columns.mT,
            expected.columns @ expected.columns.mT,
            atol=1e-9,
        )
        assert projection.info[name]["energy"] == energy
    assert projection.rank == max(basis.rank for basis in projection.bases.values())


def test_info_describes_how_a_parameter_is_read():
    projection = finish(Projection(), [1, 2])
    finish(projection, [11])
    shapes = {name: (i["shape"], i["batch_dims"], i["samples"]) for name, i in projection.info.items()}
    assert shapes == {"prompt": ([12, 12], 0, 15), "key": ([6, 8], 0, 15), "heads": ([2, 3, 10], 1, 15)}
    for name, info in projection.info.items():
        basis = projection.bases[name]
        torch.zeros(SHAPES[name]).reshape(info["shape"])
        assert (info["shape"][: info["batch_dims"]], info["shape"][-1]) == ([*basis.batch_shape], basis.dim)
        assert info["rank"] == info["rank_per_task"][-1] == basis.rank


def test_rank_never_falls_and_statistics_are_those_of_the_task():
    projection = Projection(ProjectionConfig(energy=0.7, key_energy=0.7))
    assert projection.rank == 0
    before = {}
    for task in range(4):
        finish(projection, [10 * task])
        for name, basis in projection.bases.items():
            old = before.get(name, basis.columns[..., :0])
            if name != "heads":  # where ranks differ within a batch, padding makes room first
                assert torch.equal(basis.columns[..., : old.shape[-1]], old)
            assert (torch.linalg.matrix_rank(basis.columns) >= torch.linalg.matrix_rank(old)).all()
        before = tensors(projection)
    ranks = projection.info["prompt"]["rank_per_task"]
    assert len(ranks) == 4 and ranks == sorted(ranks) and ranks[0] < ranks[-1]
    projection.end_task(SHAPES)  # nothing was observed since: nothing is left over
    assert same(tensors(projection), before)


def test_keys_may_be_left_alone():
    projection = finish(Projection(ProjectionConfig(key_energy=None)), [1])
    assert projection.bases.keys() == projection.info.keys() == {"prompt", "heads"}


def test_none_projects_nothing():
    projection = finish(Projection(ProjectionConfig(method="none")), [1])
    assert not projection.active and projection.bases == {} and projection.rank == 0
    assert Projection().active and Projection().config.method == "pgp"


def test_full_basis_warns_once_the_parameter_cannot_move():
    full, rest = {"key": torch.eye(8)}, {"prompt": torch.eye(12)[:3]}
    projection = Projection(ProjectionConfig(energy=1, key_energy=1))
    projection.observe(Tuner(), {**full, **rest})
    with pytest.warns(UserWarning, match="basis of key has full rank 8.*Lower its energy") as record:
        projection.end_task(SHAPES)
    assert len(record) == 1
    assert projection.bases["key"].full and not projection.bases["prompt"].full


def test_new_bases_ask_for_a_new_anchor():
    """The last task's anchor would pull parameters back by what that task has learnt."""
    parameters = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    for change in (lambda p: finish(p, [11]), lambda p: p.load_state(*p.state())):
        projection = finish(Projection(), [1])
        projection.projector.anchor(parameters.items())
        projection.projector.project_updates_(parameters.items())
        change(projection)
        with pytest.raises(RuntimeError, match="anchor"):
            projection.projector.project_updates_(parameters.items())


def test_state_round_trip_through_files(tmp_path):
    """Loaded from safetensors and JSON, the stream goes on to the same bases, to the bit."""
    safetensors = pytest.importorskip("safetensors.torch")
    projection = finish(Projection(ProjectionConfig(energy=0.8)), [1])
    bases, description = projection.state()
    safetensors.save_file(bases, tmp_path / "projection.safetensors")
    (tmp_path / "projection.json").write_text(json.dumps(description))
    loaded = Projection(ProjectionConfig(energy=0.8))
    loaded.load_state(
        safetensors.load_file(tmp_path / "projection.safetensors"),
        json.loads((tmp_path / "projection.json").read_text()),
    )
    assert same(tensors(loaded), tensors(projection)) and loaded.info == projection.info
    assert description["method"] == "pgp" and description["energy"] == 0.8
    finish(projection, [11])
    finish(loaded, [11])
    assert same(tensors(loaded), tensors(projection)) and loaded.info == projection.info


def test_refuses_foreign_state():
    bases, description = finish(Projection(), [1]).state()
    with pytest.raises(ValueError, match="method='pgp'.*'none'"):
        Projection(ProjectionConfig(method="none")).load_state(bases, description)
    with pytest.raises(ValueError, match="lacks the parameter 'key'"):
        Projection().load_state(bases, {k: v for k, v in description.items() if k != "key"})
    with pytest.raises(ValueError, match="not orthonormal"):
        Projection().load_state({**bases, "key": 2 * bases["key"]}, description)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [6, 9]}, r"basis of 'key' has shape \(8, 2\), its description says \(9, 2\)"),
        ({"rank": 3}, r"says \(8, 3\)"),
        ({"shape": [2, 3, 8], "batch_dims": 1}, r"says \(2, 8, 2\)"),
        ({"batch_dims": 1}, r"shape=\[6, 8\] and batch_dims=1: expected"),
        ({"shape": None}, "shape=None"),
        ({"role": "head"}, "role='head': expected one of prompt, key"),
    ],
)
def test_refuses_a_description_that_contradicts_its_bases(change, message):
    bases, description = finish(Projection(ProjectionConfig(key_energy=0.999)), [1]).state()
    assert bases["key"].shape == (8, 2)
    before = finish(Projection(ProjectionConfig(key_energy=0.999)), [1])
    description["key"] = {**description["key"], **change}
    with pytest.raises(ValueError, match=message):
        before.load_state(bases, description)
    assert before.info["key"]["rank"] == 2 and before.bases["key"].rank == 2  # what was there stays


def test_halves_with_a_summing_reduce_are_the_whole():
    """Two processes that saw half of the images each, and one that saw all of them."""
    for task_seeds in ([1, 2, 3], [11, 12, 13]):
        if task_seeds[0] == 1:
            whole, first, second = (Projection(ProjectionConfig(energy=0.95)) for _ in range(3))
        finish(whole, task_seeds)
        first.observe(Tuner(), batch(task_seeds[0]))
        for seed in task_seeds[1:]:
            second.observe(Tuner(), batch(seed))
        sent = []  # what the other process contributes, in the order of the reductions
        for own in (first, second):
            sent.append([])
            copy.deepcopy(own).end_task(SHAPES, reduce=lambda t, log=sent[-1]: log.append(t.clone()) or t)
        for own, other in ((first, iter(sent[1])), (second, iter(sent[0]))):
            own.end_task(SHAPES, reduce=lambda t, other=other: t + next(other))
        assert same(tensors(first), tensors(second))
        assert first.info == second.info == whole.info
        for name, basis in whole.bases.items():
            assert torch.allclose(basis.columns @ basis.columns.mT, dense(first.bases[name]), atol=1e-8)


def dense(basis):
    return basis.columns @ basis.columns.mT


def test_every_process_takes_over_the_main_process_basis():
    """Eigenvectors have no sign and thresholds no mercy: only one process decides, also on the rank."""
    main = finish(Projection(ProjectionConfig(energy=0.99, key_energy=0.99)), [1, 2])
    for seeds in ([3], [1, 2, 3, 11, 12]):  # ranks of its own, lower or higher
        sent = []
        for name in sorted(main.bases):
            sent += [torch.tensor(main.bases[name].rank), main.bases[name].columns]
        sent = iter(sent)
        other = finish(Projection(ProjectionConfig(energy=0.5)), seeds, broadcast=lambda t, sent=sent: next(sent))
        assert same(tensors(other), tensors(main))


def test_broadcast_buffers_have_the_main_process_shape():
    """A collective needs the same shape everywhere, whatever rank this process found."""
    for rank in (1, 5):
        shapes = []

        def broadcast(tensor, rank=rank, shapes=shapes):
            if tensor.ndim == 0:
                return torch.tensor(rank)
            shapes.append(tuple(tensor.shape))
            return torch.eye(12, dtype=torch.float64)[:, :rank]

        projection = Projection()
        projection.observe(Tuner(), {"prompt": torch.randn(3, 12)})
        projection.end_task(SHAPES, broadcast=broadcast)
        assert shapes == [(12, rank)] and projection.bases["prompt"].rank == rank


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"method": "gpm"}, "method='gpm'.*none, pgp"),
        ({"apply_to": "weights"}, "apply_to='weights'.*update, gradient, both"),
        ({"energy": 0}, r"energy=0 is outside \(0, 1\]"),
        ({"energy": 1.5}, "energy=1.5"),
        ({"key_energy": -1}, "key_energy=-1"),
        ({"max_images": 0}, "max_images=0"),
        ({"probes": 0}, "probes=0"),
        ({"probe_space": "pixels"}, "probe_space='pixels'.*features, logits, statistics"),
        ({"max_images": 0.5}, "max_images=0.5"),
        ({"probes": 2.5}, "probes=2.5"),
        ({"ln_penalty": -1.0}, "ln_penalty=-1.0"),
        ({"ln_penalty": 0.5, "method": "none"}, "ln_penalty=0.5 does nothing with method='none'"),
        ({"ln_penalty": 0.5, "method": "frozen"}, "ln_penalty=0.5 does nothing with method='frozen'"),
        ({"method": "frozen", "apply_to": "gradient"}, "momentum and weight decay"),
        ({"ln_penalty": float("nan")}, "ln_penalty=nan"),
    ],
)
def test_config_refuses(setting, message):
    with pytest.raises(ValueError, match=message):
        ProjectionConfig(**setting)


def test_help_explains_every_setting():
    arguments = ProjectionConfig.__doc__.partition("Args:")[2].partition("Raises:")[0]
    for name in ProjectionConfig.__dataclass_fields__:
        assert f"\n        {name}: " in arguments


def test_config_defaults_and_methods():
    config = ProjectionConfig()
    assert (config.method, config.apply_to, config.max_images) == ("pgp", "update", None)
    assert ProjectionConfig(**json.loads(json.dumps(config.to_dict()))) == config
    assert (
        set(CONDITIONS) == {"pgp", "attention", "functional", "frozen"} and Projection().projector.apply_to == "update"
    )
    assert Projection(ProjectionConfig(apply_to="gradient")).projector.apply_to == "gradient"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ProjectionConfig(energy=1, key_energy=1)
