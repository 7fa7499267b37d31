"""The embedded backbones and digits: they load, they are what they say, and the script makes them again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch
from sklearn.datasets import load_digits
from transformers import AutoImageProcessor, AutoModelForImageClassification, CLIPModel, CLIPTokenizer, ViTModel

from pgp_hf.embedded import DIGIT_NAMES, clip_path, digits, glyphs, vit_path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "pretrain_embedded.py"


@pytest.fixture(scope="module")
def script():
    with tiny.script(SCRIPT) as module:
        yield module


@pytest.fixture(scope="module")
def rendered():
    return glyphs.render_glyphs()


@pytest.fixture(scope="module")
def classes(rendered):
    return glyphs.glyph_classes(rendered)


@pytest.fixture(scope="module")
def report():
    return json.loads((vit_path() / "pretraining.json").read_text(encoding="utf-8"))


def pixels_of(split):
    return [image.tobytes() for image in split["image"]]


def test_weights_load_completely_and_are_small():
    _, loading = ViTModel.from_pretrained(vit_path(), add_pooling_layer=False, output_loading_info=True)
    assert not any(loading.values()), loading
    assert (vit_path() / "model.safetensors").stat().st_size < 6_000_000


def test_only_the_classifier_is_new_in_an_image_classifier():
    model, loading = AutoModelForImageClassification.from_pretrained(
        vit_path(), num_labels=10, output_loading_info=True
    )
    assert set(loading["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert not loading["unexpected_keys"] and not loading["mismatched_keys"]
    bare = ViTModel.from_pretrained(vit_path(), add_pooling_layer=False)
    for name, value in bare.state_dict().items():
        assert torch.equal(model.vit.state_dict()[name], value), name


def test_image_processor_makes_three_channels_of_a_grey_scan_in_the_range_trained_on(script):
    processor = AutoImageProcessor.from_pretrained(vit_path(), backend="pil")
    images = digits()["test"][:4]["image"]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (4, 3, 32, 32)
    assert pixels.min() == -1 and 0.9 < pixels.max() <= 1
    torch.testing.assert_close(pixels, script.build_processor()(images, return_tensors="pt")["pixel_values"])


def test_digits_are_all_the_real_scans_with_their_labels():
    data = digits()
    scans, labels = load_digits(return_X_y=True)
    expected = Counter(
        (tuple(int(v / 16 * 255 + 0.5) for v in scan), int(y)) for scan, y in zip(scans, labels, strict=True)
    )
    found = Counter(
        (tuple(image), label)
        for split in data.values()
        for image, label in zip(pixels_of(split), split["label"], strict=True)
    )
    assert found.total() == 1797 and found == expected  # a multiset: nothing lost, nothing in both splits
    assert data["train"].features["label"].int2str([0, 9]) == ["zero", "nine"]
    assert data["train"][0]["image"].size == (8, 8) and data["train"][0]["image"].format == "PNG"


@pytest.mark.parametrize("test_fraction", [0.1, 0.2, 0.5])
def test_digits_split_is_stratified(test_fraction):
    data = digits(seed=3, test_fraction=test_fraction)
    train, test = (Counter(data[name]["label"]) for name in ("train", "test"))
    assert set(train) == set(test) == set(range(10))
    for label in range(10):
        assert abs(test[label] - test_fraction * (train[label] + test[label])) <= 1


def test_digits_split_depends_on_the_seed_alone():
    first, again, other = digits(seed=1)["test"], digits(seed=1)["test"], digits(seed=2)["test"]
    assert pixels_of(first) == pixels_of(again) and first["label"] == again["label"]
    assert pixels_of(first) != pixels_of(other)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"seed": -1}, ValueError, "seed must lie in 0.*-1"),
        ({"seed": "a"}, TypeError, "seed must be an int, got 'a'"),
        ({"test_fraction": 1.0}, ValueError, "strictly between 0 and 1, got 1.0"),
        ({"test_fraction": 0.001}, ValueError, "test_fraction=0.001 leaves 2 of 1797"),
        ({"test_fraction": None}, TypeError, "test_fraction must be a float, got None"),
    ],
)
def test_digits_refuse_nonsense(arguments, error, words):
    with pytest.raises(error, match=words):
        digits(**arguments)


def test_missing_weights_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr("pgp_hf.embedded.__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(FileNotFoundError, match="pretrain_embedded.py`"):
        vit_path()
    with pytest.raises(FileNotFoundError, match="pretrain_embedded.py --clip`"):
        clip_path()


def test_features_beat_random_weights_and_the_report_is_true(script, report):
    processor = AutoImageProcessor.from_pretrained(vit_path(), backend="pil")
    backbone = ViTModel.from_pretrained(vit_path(), add_pooling_layer=False)
    pretrained = script.measure(backbone, processor)
    random = script.measure(script.build_backbone(seed=report["seed"]), processor)
    assert pretrained["nearest_class_mean"] > random["nearest_class_mean"] + 30
    assert pretrained["shrinkage_lda"] > random["shrinkage_lda"] + 5
    assert report["digits_accuracy"]["pretrained"] == pytest.approx(pretrained, abs=2)
    assert report["digits_accuracy"]["random"] == pytest.approx(random, abs=2)


def test_no_digit_is_among_the_glyphs(classes, report):
    characters = [character for group in classes for character in group]
    assert len(characters) == len(set(characters)) > len(classes)
    assert {"L", "S"} <= {unicodedata.category(character)[0] for character in characters}
    for character in [*characters, *"".join(report["classes"])]:
        assert not glyphs.is_digit(character), character
        assert unicodedata.numeric(character, None) is None, character
        assert unicodedata.category(character)[0] != "N", character
        assert "DIGIT" not in unicodedata.name(character), character


@pytest.mark.parametrize("character", "0 7 ² ⁵ ½ Ⅷ ⑨ ❸ ٣ ३ ๕ 𝟘 一 ↊ ƻ ƽ ⚂ ㍙ Ↄ".split())
def test_numbers_in_any_dress_are_digits(character):
    assert glyphs.is_digit(character)


@pytest.mark.parametrize("character", "A O I l Z ж ა @ + ∞".split())
def test_letters_and_symbols_are_not_digits(character):
    assert not glyphs.is_digit(character)


def test_look_alikes_share_a_class(classes):
    of = {character: index for index, group in enumerate(classes) for character in group}
    assert of["A"] == of["Α"] == of["А"]  # Latin, Greek, Cyrillic
    assert len({of[letter] for letter in "ABEKMSVWXZ"}) == 10


def test_augmented_batches_are_light_on_dark_varied_and_balanced(rendered, classes):
    torch.manual_seed(0)
    sampler = glyphs.GlyphSampler(rendered, classes, "cpu")
    images, labels = sampler(96)
    assert images.shape == (96, 3, 32, 32) and images.isfinite().all()
    assert images.min() >= -1 and images.max() <= 1 and images.mean() < 0
    assert labels.unique().numel() > 48
    glyph = sampler.images[:1].float().expand(96, -1, -1, -1) / 255
    assert glyphs.augment(glyph).std(dim=0).mean() > 0.1


@pytest.mark.slow
def test_script_runs_from_the_command_line(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(SCRIPT), "--steps", "3", "--seed", "5", "--output_dir", str(tmp_path / "vit")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "nearest class mean" in done.stdout
    names = {"config.json", "model.safetensors", "preprocessor_config.json", "pretraining.json"}
    assert {path.name for path in (tmp_path / "vit").iterdir()} == names  # and no scratch folder
    report = json.loads((tmp_path / "vit" / "pretraining.json").read_text(encoding="utf-8"))
    assert (report["steps"], report["seed"]) == (3, 5)
    fresh = ViTModel.from_pretrained(tmp_path / "vit", add_pooling_layer=False)
    assert sum(parameter.numel() for parameter in fresh.parameters()) == report["parameters"]


# --- the embedded CLIP ---


@pytest.fixture(scope="module")
def clip():
    return CLIPModel.from_pretrained(clip_path())


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer.from_pretrained(clip_path())


@pytest.fixture(scope="module")
def clip_report():
    return json.loads((clip_path() / "pretraining.json").read_text(encoding="utf-8"))


def test_clip_loads_completely_and_is_small(tokenizer):
    model, loading = CLIPModel.from_pretrained(clip_path(), output_loading_info=True)
    assert not any(loading.values()), loading
    assert sum(path.stat().st_size for path in clip_path().iterdir()) < 8_000_000
    text = model.config.text_config
    ids = (text.bos_token_id, text.eos_token_id, text.pad_token_id)
    assert ids == (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert text.vocab_size == len(tokenizer) == text.eos_token_id + 1
    assert text.max_position_embeddings == tokenizer.model_max_length >= 40
    assert 0 < model.logit_scale.exp() <= 100.01
    images = digits()["test"][:2]["image"]
    pixels, vit_pixels = (
        AutoImageProcessor.from_pretrained(folder, backend="pil")(images, return_tensors="pt")["pixel_values"]
        for folder in (clip_path(), vit_path())
    )
    assert torch.equal(pixels, vit_pixels)


def test_tokenizer_keeps_every_name_and_any_text(script, tokenizer, clip_report):
    names = [name for group in clip_report["classes"] for c in group for name in script.glyph_names(c)]
    assert set(DIGIT_NAMES) < set(names)
    longest = 0
    for name in names:
        ids = tokenizer(name)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id and ids.index(tokenizer.eos_token_id) == len(ids) - 1
        decoded = tokenizer.decode(ids, skip_special_tokens=True)
        assert decoded.replace(" ", "") == name.replace(" ", ""), (name, decoded)  # a hyphen is a word of its own
        longest = max(longest, len(ids))
    assert longest + 16 <= tokenizer.model_max_length  # room for the usual learned context
    assert all(len(tokenizer(name)["input_ids"]) == 3 for name in DIGIT_NAMES)  # a class name is one token
    for text in ("Ωmega żółw 猫 €", "unheardof"):  # bytes: nothing is unknown
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text.lower()


def test_tokenizer_is_made_the_same_again(script, tokenizer, clip_report):
    names = [name for group in clip_report["classes"] for c in group for name in script.glyph_names(c)]
    again = script.build_tokenizer(names)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again("a photo of the seven.")["input_ids"] == tokenizer("a photo of the seven.")["input_ids"]


@torch.no_grad()
def test_clip_pools_at_the_end_token_whatever_the_padding(clip, tokenizer):
    texts = ["seven", "latin small letter a with a long name behind it", "digit zero"]
    padded = clip.get_text_features(**tokenizer(texts, padding="max_length", return_tensors="pt")).pooler_output
    alone = [clip.get_text_features(**tokenizer(text, return_tensors="pt")).pooler_output for text in texts]
    torch.testing.assert_close(padded, torch.cat(alone), atol=1e-5, rtol=1e-5)
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    output = clip.text_model(**tokens)
    ends = tokens["attention_mask"].sum(1) - 1
    assert torch.equal(output.pooler_output, output.last_hidden_state[torch.arange(3), ends])


def test_clip_digits_have_classes_of_their_own(classes, clip_report):
    digit_classes = [group for group in clip_report["classes"] if any(c.isdigit() for c in group)]
    assert digit_classes == list("0123456789")
    others = set("".join(clip_report["classes"])) - set("0123456789")
    assert others and not others & set("IOlЗб")  # what looks like a digit is left out
    assert not any(glyphs.is_digit(c) for c in others)


def test_clip_batches_have_no_class_twice(script, tokenizer, monkeypatch):
    """Contrastive pairs: a second copy of a class would be a negative of its own text."""
    seen = []

    class Sampler:
        def augmented(self, labels):
            seen.append(labels)
            return torch.zeros(len(labels), 3, 32, 32)

    letters = list("0123456789") + list("ABCDEFGHJKLMNP")
    vit = ViTModel.from_pretrained(vit_path(), add_pooling_layer=False)
    model = script.build_clip(tokenizer, vit.config, seed=0)
    script.pretrain_clip(model, tokenizer, Sampler(), letters, seed=0, steps=4, batch_size=12, learning_rate=1e-3)
    assert len(seen) == 4 and all(len(labels.unique()) == 12 for labels in seen)
    assert sum((labels < 10).sum().item() for labels in seen) > 4 * 6  # digits are drawn more often


@torch.no_grad()
def test_vision_tower_starts_as_the_vit(script, tokenizer):
    """With the norm before the blocks taken out, the two towers are the same function."""
    vit = ViTModel.from_pretrained(vit_path(), add_pooling_layer=False)
    model = script.build_clip(tokenizer, vit.config, seed=0).eval()
    script.start_from_vit(model, vit)
    model.vision_model.pre_layrnorm = torch.nn.Identity()
    pixels = torch.randn(2, 3, 32, 32)
    expected = vit(pixel_values=pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(model.vision_model(pixel_values=pixels).pooler_output, expected, atol=1e-4, rtol=1e-4)


def test_zero_shot_beats_chance_and_the_clip_report_is_true(script, clip, tokenizer, clip_report):
    processor = AutoImageProcessor.from_pretrained(clip_path(), backend="pil")
    found = script.measure_clip(clip, tokenizer, processor)
    assert clip_report["digits_accuracy"]["pretrained"] == pytest.approx(found, abs=2)
    assert min(found["zero_shot"], found["zero_shot_test_split"]) > 50  # chance is 10
    assert found["nearest_class_mean"] > clip_report["digits_accuracy"]["random"]["nearest_class_mean"] + 30
    # the same by CLIPModel's own forward pass
    data = digits()["test"]
    tokens = tokenizer(list(DIGIT_NAMES), padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = clip(**tokens, **processor(list(data["image"]), return_tensors="pt")).logits_per_image
    right = (logits.argmax(1) == torch.tensor(data["label"])).float().mean().item()
    assert 100 * right == pytest.approx(found["zero_shot_test_split"], abs=0.5)


@pytest.mark.slow
def test_script_trains_clip_from_the_command_line(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(SCRIPT), "--clip", "--steps", "3", "--seed", "5", "--output_dir", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "zero shot" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in clip_path().iterdir()}
    report = json.loads((tmp_path / "pretraining.json").read_text(encoding="utf-8"))
    assert (report["steps"], report["seed"], report["prompt"]) == (3, 5, "{}")
    fresh = CLIPModel.from_pretrained(tmp_path)
    assert sum(parameter.numel() for parameter in fresh.parameters()) == report["parameters"]
    assert len(CLIPTokenizer.from_pretrained(tmp_path)) == report["vocabulary"]
