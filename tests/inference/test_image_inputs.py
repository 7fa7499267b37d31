"""Whatever is an image is predicted as it was trained on, or refused by name; sizes of training and prediction agree."""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from transformers import AutoImageProcessor, pipeline

from pgp_hf import TaskStream, load_pretrained
from pgp_hf.cli.model_arguments import ModelArguments
from pgp_hf.inference import to_image

pytestmark = pytest.mark.usefixtures("without_figures")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    with tiny.without_figures():
        return load_pretrained(tiny.finished_run(tmp_path_factory.mktemp("images")))


@pytest.fixture
def photo() -> Image.Image:
    return tiny.data()["test"][0]["image"]


def encoded(image: Image.Image, kind: str = "PNG", **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


# ---- EXIF ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_image_is_upright_in_training_and_however_it_is_given(tmp_path, orientation, kind):
    exif = Image.Exif()
    exif[274] = orientation
    noise = np.random.default_rng(0).integers(0, 256, (20, 32, 3), dtype=np.uint8)
    path = tmp_path / f"photo.{kind.lower()}"
    path.write_bytes(encoded(Image.fromarray(noise), kind, exif=exif))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = datasets.Dataset.from_dict({"image": [str(path)] * 4, "label": [0, 1, 0, 1]}, features=features)
    stream = TaskStream.from_dataset(datasets.DatasetDict(train=rows, test=rows), num_tasks=1, seed=None)
    trained = np.asarray(stream.train(0)[0]["image"])
    assert trained.shape == ((32, 20, 3) if orientation > 4 else (20, 32, 3))
    opened, loaded = Image.open(path), Image.open(path)
    loaded.load()
    with path.open("rb") as file:
        given = [path, str(path), opened, loaded, loaded.convert("RGB"), path.read_bytes(), file, rows[0]]
        for image in given:
            assert np.array_equal(to_image(image), trained), type(image)
        assert np.array_equal(to_image(to_image(path)), trained)  # turned once


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("damaged", [b"Exif\0\0not a header", b"Exif\0\0MM\0*\0\0\xff\xff", b"Exif\0\0II"])
def test_damaged_exif_is_as_none(photo, tmp_path, kind, damaged):
    data = encoded(photo, kind, exif=damaged)
    path = tmp_path / f"photo.{kind.lower()}"
    path.write_bytes(data)
    plain = np.asarray(to_image(encoded(photo, kind)))
    for given in (path, data, Image.open(path), {"image": Image.open(path)}):
        assert np.array_equal(to_image(given), plain), type(given)


def test_a_truncated_image_is_not_taken_for_one_with_damaged_exif(photo):
    exif = Image.Exif()
    exif[274] = 6
    data = encoded(photo, exif=exif)
    with pytest.raises(OSError, match=r"truncated|broken"):
        to_image(Image.open(io.BytesIO(data[: len(data) // 2])))


# ---- kinds of input --------------------------------------------------------------------------------------------------


def test_every_kind_of_image_alone_or_among_others_gives_the_same_prediction(classifier, photo, tmp_path):
    photo.save(tmp_path / "photo.png")
    data, array = encoded(photo), np.asarray(photo)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = datasets.Dataset.from_dict({"image": [photo, photo], "label": [0, 0]}, features=features)
    undecoded = rows.cast_column("image", datasets.Image(decode=False))
    kinds = {
        "path": lambda: tmp_path / "photo.png",
        "text": lambda: str(tmp_path / "photo.png"),
        "PIL": lambda: photo,
        "array": lambda: array,
        "tensor": lambda: torch.tensor(array).permute(2, 0, 1),
        "bytes": lambda: data,
        "bytearray": lambda: bytearray(data),
        "memoryview": lambda: memoryview(data),
        "file": lambda: io.BytesIO(data),
        "item": lambda: rows[0],
        "undecoded item": lambda: undecoded[0],
        "undecoded": lambda: {"bytes": data, "path": None},
        "by path": lambda: {"bytes": None, "path": str(tmp_path / "photo.png")},
        "another column": lambda: {"photo": photo, "label": 3},
    }
    alone, pair = classifier.predict([photo], top_k=6), classifier.predict([photo, photo], top_k=6)
    for kind, make in kinds.items():
        assert classifier.predict(make(), top_k=6) == alone, kind
        assert classifier.predict([make(), make()], top_k=6) == pair, kind
    for several in (rows, rows["image"], undecoded, np.stack([array, array]), (photo for _ in range(2))):
        assert classifier.predict(several, top_k=6) == pair


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_tensor_in_8_bit_floats(dtype):
    pixels = torch.rand(3, 4, 5).to(dtype)
    assert np.array_equal(to_image(pixels), to_image(pixels.float()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_tensor_of_any_precision(dtype):
    pixels = torch.rand(3, 4, 5).mul(255).round() / 255
    expected = np.asarray(to_image(pixels.float()), dtype=int)
    found = np.asarray(to_image(pixels.to(dtype).requires_grad_()), dtype=int)
    assert np.abs(found - expected).max() <= (1 if dtype == torch.bfloat16 else 0)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (7, TypeError, r"images is a int: pass a path, .* several of them, or a folder"),
        (None, TypeError, r"images is a NoneType"),
        ([None], TypeError, r"an image cannot be of type NoneType"),
        ([[1, 2]], TypeError, r"an image cannot be of type list"),
        (
            {"pixel_values": torch.rand(3, 4, 4)},
            TypeError,
            r"the keys 'pixel_values' is not an image.*item\['photo'\]",
        ),
        ({"image": [1, 2], "label": [0, 0]}, TypeError, r"an image cannot be of type list"),
        ({"bytes": None, "path": None}, TypeError, r"keys 'bytes', 'path' is not an image"),
        ({}, TypeError, r"a mapping with the keys  is not an image"),
        (b"no image", ValueError, r"a file in memory cannot be read as an image"),
        (io.BytesIO(b""), ValueError, r"a file in memory cannot be read as an image"),
        ({"bytes": b"", "path": "a.png"}, ValueError, r"a file in memory cannot be read"),
        (torch.rand(3, 4, 5, dtype=torch.complex64), ValueError, r"array of complex64 is not an image"),
    ],
)
def test_what_is_no_image_is_refused_by_name(classifier, images, error, message):
    with pytest.raises(error, match=message):
        classifier.predict(images)


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["l2p", "dualprompt", "clip"])
def larger(request, tmp_path_factory) -> tuple[str, Path]:
    """A run on images of twice the backbone's size, and the name of its adapter."""
    folder, adapter = tmp_path_factory.mktemp("larger"), request.param
    base = tiny.backbone(tiny.ADAPTERS[adapter])
    base.save_pretrained(folder / "backbone")
    tiny.processor().save_pretrained(folder / "backbone")
    model = tiny.model(adapter, base=base, interpolate_pos_encoding=True)
    model.base_model.adapter_config.base_model_name_or_path = str(folder / "backbone")
    own = ModelArguments(str(folder / "backbone"), image_size=2 * tiny.SIDE).processor()
    with tiny.without_figures():
        tiny.trainer(folder / "run", model=model, processing_class=own, num_train_epochs=1).train()
    return adapter, folder / "run"


def test_images_of_another_size_than_in_training_are_refused(larger):
    _, run = larger
    classifier = load_pretrained(run)
    with pytest.raises(ValueError, match=r"20 x 20, and the prompts were trained on 40 x 40.*image_processor=FOLDER"):
        classifier.model(pixel_values=tiny.images(2))
    classifier.model.base_model.adapter_config.image_size = None  # as the message says
    classifier.model(pixel_values=tiny.images(2))


def test_the_pipeline_predicts_as_in_training_or_not_at_all(larger, photo):
    adapter, run = larger
    if adapter == "clip":
        pytest.skip("the pipeline knows no head of a CLIPModel by its folder")
    classifier = load_pretrained(run)
    processor = AutoImageProcessor.from_pretrained(run, backend="pil")
    right = pipeline("image-classification", model=str(run), image_processor=processor)
    expected = {found["label"]: found["score"] for found in classifier.predict(photo, top_k=6)[0]}
    assert {found["label"]: pytest.approx(found["score"]) for found in right(photo, top_k=6)} == expected
    wrong = pipeline("image-classification", model=str(run))
    with pytest.raises(ValueError, match="trained on 40 x 40"):
        wrong(photo)


def test_a_training_on_several_sizes_leaves_the_size_open():
    model = tiny.model(interpolate_pos_encoding=True)
    model.base_model.begin_task(0)
    for side in (20, 30):
        model.train()(pixel_values=tiny.images(2, side))
    model.eval()(pixel_values=tiny.images(2, 40))
    assert model.base_model.adapter_config.image_size == []


def test_an_adapter_without_a_size_takes_any():
    model = tiny.model(interpolate_pos_encoding=True)
    for side in (20, 30):
        model(pixel_values=tiny.images(2, side))
    assert model.base_model.adapter_config.image_size is None
