"""Queries on the disk: found again by all that they depend on, whole or not at all, and never in the way."""

from __future__ import annotations

import os
from types import SimpleNamespace

import datasets
import pytest
import tiny
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file

from pgp_hf import ProjectionConfig, hub
from pgp_hf.data.images import AugmentedImages, FlippedImages, ImageCollator
from pgp_hf.data.shifts import RENDERINGS
from pgp_hf.runs.folder import RunFolder
from pgp_hf.training import queries
from pgp_hf.training.queries import QueryCache, query_key

QUERIES = torch.arange(12.0).reshape(4, 3)


@pytest.fixture
def cache(tmp_path):
    return QueryCache(tmp_path / "cache", 10**6)


def counted(trainer, calls):
    """Note the number of images of each query that the model of a trainer computes."""
    query = trainer.tuner.query

    def noting(pixel_values, **kwargs):
        calls.append(len(pixel_values))
        return query(pixel_values, **kwargs)

    trainer.tuner.query = noting
    return trainer


def test_runs_share_queries_and_agree_to_the_bit_with_live_ones(tmp_path):
    folder, calls, results = tmp_path / "shared", {}, {}
    settings = {"dataset": tiny.data(train=4, test=3), "num_tasks": 2}
    for run, given in (
        ("live", {"cache_queries": False}),
        ("first", {"query_cache": str(folder)}),
        ("second", {"query_cache": str(folder)}),
    ):
        calls[run] = []
        with tiny.without_figures():
            trainer = tiny.trainer(tmp_path / run, stream=tiny.stream(**settings), num_train_epochs=3, **given)
            counted(trainer, calls[run]).train()
        results[run] = trainer.results.to_dict(), trainer.progress.references.features
    # of two tasks: 12 training images as they are and mirrored, 9 test images, each once
    assert sum(calls["first"]) == 2 * (2 * 12 + 9) and not calls["second"] and calls["live"]
    for run in ("first", "second"):
        assert tiny.same_results(results[run][0], results["live"][0])
        for t in range(2):
            assert (results[run][1][t] == results["live"][1][t]).all()
    assert not (tmp_path / "first" / "queries").exists()


def test_a_run_keeps_its_own_and_deletes_or_uploads_none_of_them(tmp_path):
    with tiny.without_figures():
        tiny.trainer(tmp_path / "run", stream=tiny.stream(num_tasks=1), num_train_epochs=1).train()
    folder = RunFolder(tmp_path / "run")
    kept = sorted((folder.root / "queries").glob("*.safetensors"))
    assert len(kept) == 1  # of the test images: one epoch sees each training image once
    assert not [path for path in hub.listed(folder.root) if "queries" in path]
    folder.clear()
    assert folder.is_empty() and sorted((folder.root / "queries").glob("*.safetensors")) == kept
    folder.check_unused()
    calls = []
    trainer = counted(tiny.trainer(folder.root, stream=tiny.stream(num_tasks=1), num_train_epochs=1), calls)
    test = trainer.stream.test(0)
    found = trainer._passes().queries(test).clone()  # which is mapped, and the file is about to change
    assert not calls and len(found) == len(test)
    kept[0].write_bytes(kept[0].read_bytes()[:-8])
    with pytest.warns(UserWarning, match=rf"{kept[0].name} is damaged"):
        again = trainer._passes().queries(test)
    assert sum(calls) == len(test) and torch.equal(again, found)
    assert torch.equal(trainer._passes().queries(test), found) and sum(calls) == len(test)  # it was written anew


def test_what_is_read_is_what_was_written(cache):
    assert cache.read({"a": 1}, 4) is None
    cache.write({"a": 1}, QUERIES)
    assert torch.equal(cache.read({"a": 1}, 4), QUERIES) and cache.read({"a": 2}, 4) is None
    assert [path.name for path in cache.folder.iterdir() if path.suffix == ".tmp"] == []


@pytest.mark.parametrize("damage", ["bit", "short", "empty", "count", "key"])
def test_a_damaged_file_is_named_and_counts_as_missing(cache, damage):
    key = {"a": 1}
    cache.write(key, QUERIES)
    path = cache.path(key)
    content = bytearray(path.read_bytes())
    if damage == "bit":
        content[-1] ^= 1
    path.write_bytes({"short": content[:-1], "empty": b""}.get(damage, bytes(content)))
    if damage == "key":
        os.replace(path, cache.path({"a": 2}))
        key, path = {"a": 2}, cache.path({"a": 2})
    with pytest.warns(UserWarning, match=rf"{path} is damaged \(.+\): its queries are computed again"):
        assert cache.read(key, 5 if damage == "count" else 4) is None
    cache.write(key, QUERIES)
    assert torch.equal(cache.read(key, 4), QUERIES)


def test_the_longest_unused_make_room(cache):
    size = QUERIES.numel() * 4
    for name in "abc":
        cache.write({"name": name}, QUERIES)
    files = {name: cache.path({"name": name}) for name in "abc"}
    for age, name in enumerate("cab"):
        os.utime(files[name], (1000 + age, 1000 + age))
    assert cache.read({"name": "c"}, 4) is not None  # in use from now on
    left = cache.folder / f".{files['a'].name}.123.tmp"
    left.write_bytes(b"of a process that died")
    foreign = [cache.folder / name for name in ("queries-mine.safetensors", ".queries-mine.tmp")]
    for file in foreign:
        file.write_bytes(b"of somebody else")
        os.utime(file, (1, 1))
    whole = sum(path.stat().st_size for path in files.values())
    QueryCache(cache.folder, whole).write({"name": "d"}, QUERIES)
    assert not files["a"].exists() and files["b"].exists() and files["c"].exists() and not left.exists()
    assert all(file.exists() for file in foreign)
    cache.write({"name": "f"}, torch.full_like(QUERIES, float("nan")))
    assert not cache.path({"name": "f"}).exists()
    QueryCache(cache.folder, size - 1).write({"name": "e"}, QUERIES)
    assert not cache.path({"name": "e"}).exists() and files["b"].exists()  # nothing makes room for what never fits


def test_a_cache_that_cannot_be_written_stops_nothing(cache, monkeypatch):
    monkeypatch.setattr(queries, "SECONDS", 0.05)
    cache.folder.mkdir()
    with (
        FileLock(cache.folder / queries.LOCK),
        pytest.warns(UserWarning, match="queries are not kept in .*query_cache"),
    ):
        cache.write({"a": 1}, QUERIES)
    assert cache.read({"a": 1}, 4) is None
    blocked = QueryCache(cache.folder / "file" / "below", 10**6)
    (cache.folder / "file").write_text("not a folder")
    with pytest.warns(UserWarning, match="queries are not kept in"):
        blocked.write({"a": 1}, QUERIES)


def test_a_full_disk_stops_nothing(cache, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(queries, "save_file", full)
    with pytest.warns(UserWarning, match="queries are not kept in .*No space left"):
        cache.write({"a": 1}, QUERIES)
    assert [path.name for path in cache.folder.iterdir()] == [queries.LOCK]


@pytest.mark.parametrize("opened", [False, True])
def test_a_file_that_makes_room_while_it_is_read_is_missing_and_not_damaged(cache, monkeypatch, recwarn, opened):
    cache.write({"a": 1}, QUERIES)
    safe_open = queries.safe_open

    def late(path, framework):
        path.unlink()
        if opened:  # by safetensors, and then by torch, which maps it
            raise RuntimeError(f"unable to open file <{path}> in read-only mode")
        return safe_open(path, framework)

    monkeypatch.setattr(queries, "safe_open", late)
    assert cache.read({"a": 1}, 4) is None and not len(recwarn)


def test_a_key_tells_renderings_apart_where_first_and_last_image_do_not():
    """Hashes are of the stored images, and grey images look the same in grey."""
    data, grey = tiny.data(classes=2, train=3), RENDERINGS["grey"]
    images = [grey(image) if i in (0, 5) else image for i, image in enumerate(data["train"]["image"])]
    columns = {"image": images, "label": data["train"]["label"]}
    data["train"] = datasets.Dataset.from_dict(columns, features=data["train"].features)
    model, collate = tiny.model(base=tiny.backbone(num_labels=2)).base_model, ImageCollator(tiny.processor())
    texts = set()
    for rendering in (None, "grey"):
        images = tiny.stream(dataset=data, num_tasks=1).train(0)
        if rendering is not None:
            images._source.renderings = dict.fromkeys(range(2), rendering)
        crops = AugmentedImages(images, "crop_flip", 0.3, seed=1, task=0, crop_views=1).views()
        for view in (images, FlippedImages(images), *crops):
            texts.add(queries._text(query_key(model, model.digest(), view, collate, {})))
    assert len(texts) == 6


def test_a_key_has_all_that_queries_depend_on():
    stream, how = tiny.stream(), {"batch": 8, "precision": "no"}

    def key(model=None, images=None, collate=None, how=how):
        learner = (model or tiny.model()).base_model
        return query_key(learner, learner.digest(), images or stream.test(0), collate or ImageCollator(processor), how)

    processor, own = tiny.processor(), tiny.processor()
    own.image_mean = [0.4, 0.5, 0.5]
    plain = key()
    assert plain == key() == key(model=tiny.model(seed=5))  # prompts do not enter
    crops = AugmentedImages(stream.test(0), "crop_flip", 0.3, seed=1, task=0, crop_views=2).views()
    others = [
        key(images=stream.test(1)),
        key(images=FlippedImages(stream.test(0))),
        *(key(images=view) for view in crops),
        key(model=tiny.model(base=tiny.backbone(seed=8))),
        key(model=tiny.model(base=tiny.backbone(layer_norm_eps=1e-6))),
        key(model=tiny.model(attention="eager")),
        key(collate=ImageCollator(own)),
        key(how={**how, "batch": 4}),
    ]
    texts = {queries._text(one) for one in (plain, *others)}
    assert None not in others and len(texts) == 1 + len(others)
    assert key(collate=SimpleNamespace(processor=processor)) is None  # it may augment
    assert key(collate=type("Own", (ImageCollator,), {})(processor)) is None
    assert key(collate=ImageCollator(lambda images, **_: processor(images, return_tensors="pt"))) is None


def test_crops_take_turns_and_their_queries_are_kept(tmp_path):
    calls = []
    settings = {"dataset": tiny.data(train=4, test=3), "num_tasks": 1}
    with tiny.without_figures():
        trainer = tiny.trainer(
            tmp_path, stream=tiny.stream(**settings), augmentation="crop_flip", crop_views=2, num_train_epochs=3
        )
        counted(trainer, calls).train()
    images = trainer.train_dataset
    assert images.queries.shape == (2, 24, 24)
    # two crops of 24 images, 18 test images; the statistics of the projection see the images whole
    assert sum(calls) == 2 * 24 + 18 + 24
    seen = []
    for epoch in range(4):
        images.set_epoch(epoch)
        item = images[5]
        seen.append(item["image"].tobytes())
        assert torch.equal(item["prompt_query"], images.queries[epoch % 2, 5])
    assert seen[:2] == seen[2:] and seen[0] != seen[1]
    pixels = trainer.data_collator([images.views()[1][5]])["pixel_values"]
    assert torch.allclose(trainer.tuner.query(pixels)[0], images.queries[1, 5], atol=1e-5)
    assert trainer.results.training["crop_views"] == 2
    with pytest.raises(ValueError, match="crop_views=2 with augmentation='flip'"):
        tiny.arguments(tmp_path, crop_views=2)


def test_statistics_share_the_queries_of_images_in_random_crops(tmp_path):
    """Those of the head and of the projection go over the images as they are: one query for both, equal to the bit."""
    calls, files = {}, {}
    settings = {"dataset": tiny.data(train=4, test=3), "num_tasks": 1}
    for name, kept in (("live", False), ("kept", True)):
        calls[name] = []
        with tiny.without_figures():
            trainer = tiny.trainer(
                tmp_path / name,
                model=tiny.model(head="statistics"),
                stream=tiny.stream(**settings),
                projection=ProjectionConfig(method="functional", energy=0.9, key_energy=0.9),
                augmentation="crop_flip",
                num_train_epochs=1,
                cache_queries=kept,
            )
            counted(trainer, calls[name]).train()
        files[name] = [
            load_file(tmp_path / name / file) for file in ("projection.safetensors", "adapter_model.safetensors")
        ]
    assert sum(calls["live"]) - sum(calls["kept"]) >= 24
    for live, kept in zip(files["live"], files["kept"], strict=True):
        assert live.keys() == kept.keys() and all(torch.equal(live[name], kept[name]) for name in live)
