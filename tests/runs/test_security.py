"""Files from strangers: each way in which a revision can be bad is refused, by name, with nothing executed or loaded.

The table damages a sound revision; `load_pretrained` must refuse it and leave the backbone that it was given as it was.
"""

from __future__ import annotations

import copy
import enum
import json
import math
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import tiny
import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from transformers import ViTForImageClassification

from pgp_hf import ProjectionConfig, load_pretrained
from pgp_hf.inference import adapters
from pgp_hf.projection import Projection
from pgp_hf.runs import reading
from pgp_hf.tuners.base.config import PromptConfig

ADAPTER, CONFIG, BASES = "adapter_model.safetensors", "adapter_config.json", "projection.safetensors"
STATE = "method.safetensors"
PROMPT, KEY = "base_model.model.vit.embeddings.l2p_prompt", "base_model.model.vit.embeddings.l2p_key"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A revision with two finished tasks of three."""
    folder = tmp_path_factory.mktemp("sound")
    with tiny.without_figures():
        trainer = tiny.trainer(folder, num_train_epochs=1)
        trainer.train_task(0)
        trainer.train_task(1)
    return folder / "task-2"


@pytest.fixture
def folder(sound, tmp_path):
    """A copy without digests: a stranger who alters a file can alter its digest as well."""
    shutil.copytree(sound, tmp_path / "bad")
    (tmp_path / "bad" / "digests.json").unlink()
    return tmp_path / "bad"


class Payload:
    """A pickle that leaves a file behind when it is read."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


# ---- ways to be bad: functions of the folder -------------------------------------------------------------------------


def pickled(name, alone=False):
    def damage(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(pickle.dumps(Payload(folder.parent / "executed")))
        if alone:
            (folder / ADAPTER).unlink()

    return damage


def content(name, /, **changes):
    """Change entries of a JSON file; a function changes the value that is there."""

    def damage(folder):
        found = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        for key, value in changes.items():
            found[key] = value(found[key]) if callable(value) else value
        (folder / name).write_text(json.dumps(found))

    return damage


def text(name, value):
    return lambda folder: (folder / name).write_text(value)


def tensors(name, change):
    """Change a safetensors file through its tensors, as somebody with the library would."""

    def damage(folder):
        found = load_file(folder / name)
        change(found)
        save_file({key: value.contiguous() for key, value in found.items()}, folder / name)

    return damage


def raw(name, change):
    def damage(folder):
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return damage


def both(one, other):
    def damage(folder):
        one(folder)
        other(folder)

    return damage


def header(name, change):
    """Rewrite a safetensors file's header, the data left as they are."""

    def replace(data):
        length = struct.unpack("<Q", data[:8])[0]
        found = json.loads(data[8 : 8 + length])
        found = change(found) or found
        new = found if isinstance(found, bytes) else json.dumps(found).encode()
        return struct.pack("<Q", len(new)) + new + data[8 + length :]

    return raw(name, replace)


def entry(key, **changes):
    return lambda found: found[key].update(changes)


def more(shape, shift=0):
    """One more tensor of float32 behind the others."""

    def change(found):
        end = max(one["data_offsets"][1] for name, one in found.items() if name != "__metadata__") + shift
        found["more"] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + 4 * math.prod(shape)]}

    return change


def deep(found):
    """An unknown key with nested content."""
    return json.dumps(found).replace('"dtype"', f'"x": {nested(100_000)}, "dtype"', 1).encode()


def many(count):
    """A file of empty tensors."""
    entries = ",".join(f'"t{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(count))
    header = f"{{{entries}}}".encode()
    return struct.pack("<Q", len(header)) + header


def twice(found):
    """Two entries of one name."""
    one = json.dumps({PROMPT: found[PROMPT]})[1:-1]
    return f"{json.dumps(found)[:-1]}, {one}}}".encode()


def flip(data):
    """One bit in the middle of the data."""
    at = len(data) - 40
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def first(found, **changes):
    """Change the description of the prompts' basis."""
    return {**found, **changes}


def nested(depth):
    return '{"a": ' * depth + "1" + "}" * depth


def link(name, target):
    def damage(folder):
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return damage


HUGE = 2**60
DAMAGED = f"{ADAPTER} is missing or damaged"
BAD = {
    # nothing but safetensors and JSON
    "a pickle instead of the adapter": (pickled("adapter_model.bin", alone=True), "adapter_model.bin.*can run code"),
    "a pickle beside the adapter": (pickled("adapter_model.bin"), "adapter_model.bin.*can run code"),
    "a pickle in a subfolder": (pickled("figures/x.PKL"), "figures/x.PKL.*can run code"),
    "a pickle under the adapter's name": (pickled(ADAPTER), f"{ADAPTER} is missing or damaged.*header declares"),
    "the adapter is missing": (lambda folder: (folder / ADAPTER).unlink(), f"has no {CONFIG} and {ADAPTER}"),
    "the results are missing": (lambda folder: (folder / "results.json").unlink(), "no results.json: .*incomplete"),
    "the bases are missing": (lambda folder: (folder / BASES).unlink(), f"no {BASES}: .*incomplete"),
    "a device": (link(ADAPTER, "/dev/zero"), "no adapter|has no adapter"),
    "a device as JSON": (link("results.json", "/dev/zero"), "not a regular file"),
    # requests to run code
    "auto_map in the adapter's configuration": (
        content(CONFIG, auto_map={"AutoModel": "evil.Model"}),
        rf"{CONFIG} asks for code to be run \(auto_map\)",
    ),
    "trust_remote_code": (content(CONFIG, trust_remote_code=True), r"\(trust_remote_code\)"),
    "auto_map in the processor's": (
        content("preprocessor_config.json", auto_map={"AutoImageProcessor": "evil.Processor"}),
        r"preprocessor_config.json asks for code to be run",
    ),
    "auto_map in a file for other loaders": (
        content("config.json", auto_map={"a": "b.c"}),
        "config.json asks for code",
    ),
    "auto_map deep inside": (content("processor_config.json", x=[{"y": {"auto_map": "b.c"}}]), "asks for code"),
    # names
    "another kind of adapter": (
        content(CONFIG, peft_type="IA3"),
        "peft_type='IA3': expected one of .*L2P.*registered, or LORA",
    ),
    "a path as the kind": (content(CONFIG, peft_type="../../evil"), "peft_type='../../evil'"),
    "a list as the kind": (content(CONFIG, peft_type=["L2P"]), r"peft_type=\['L2P'\]"),
    "modules of the backbone to save": (content(CONFIG, modules_to_save=["embeddings"]), "must stay frozen"),
    "modules to save that are not there": (
        content(CONFIG, modules_to_save=["../evil"]),
        "ViTForImageClassification has no module '../evil'",
    ),
    "a path among the modules to wrap": (content(CONFIG, target_modules=["../vit"]), "made for the modules"),
    "a path as a tensor's name": (
        tensors(ADAPTER, lambda found: found.update({"../../evil": torch.zeros(1)})),
        "it holds '../../evil'",
    ),
    "a path as a basis's name": (
        tensors(BASES, lambda found: found.update({"../evil": torch.zeros(3, 1)})),
        "'../evil' has a basis, but is not a parameter",
    ),
    # the adapter against its configuration and the backbone
    "a parameter is missing": (tensors(ADAPTER, lambda found: found.pop(KEY)), f"it lacks '{KEY}'"),
    "a parameter too many": (tensors(ADAPTER, lambda found: found.update(x=torch.zeros(2))), "it holds 'x'"),
    "a prompt of another shape": (
        tensors(ADAPTER, lambda found: found.update({PROMPT: torch.zeros(5, 3, 24)})),
        r"l2p_prompt' has shape \(5, 3, 24\), expected \(5, 2, 24\)",
    ),
    "a configuration for another shape": (content(CONFIG, prompt_length=3), r"expected \(5, 3, 24\)"),
    "a configuration for a huge shape": (content(CONFIG, pool_size=HUGE, top_k=1), "does not fit|expected"),
    "sizes that are no numbers": (content(CONFIG, pool_size="many"), f"{CONFIG} is not a valid adapter configuration"),
    "sizes that are fractions": (
        content(CONFIG, prompt_length=2.5),
        "prompt_length=2.5 is a float: expected a whole number",
    ),
    "an unknown setting": (content(CONFIG, run="rm -rf"), "not a valid adapter configuration.*'run'"),
    "numbers for names": (content(CONFIG, id2label={"0": 1, "1": 2}), "does not name the classes|another number"),
    "classes with gaps": (
        content(CONFIG, id2label={str(2 * c): f"class {c}" for c in range(6)}),
        "names class 1 'class 1', but id2label in adapter_config.json names it None",
    ),
    "fewer classes than the stream": (content(CONFIG, id2label={"0": "a", "1": "b"}), "has 6 classes, but id2label"),
    "not a number among the weights": (
        tensors(ADAPTER, lambda found: found[PROMPT].view(-1)[3:4].fill_(float("nan"))),
        "l2p_prompt' holds 1 values that are not finite",
    ),
    "infinity among the weights": (
        tensors(ADAPTER, lambda found: found[KEY].fill_(float("inf"))),
        "l2p_key' holds 120 values that are not finite",
    ),
    "whole numbers as weights": (
        tensors(ADAPTER, lambda found: found.update({KEY: found[KEY].long()})),
        "l2p_key' has dtype torch.int64",
    ),
    # damaged safetensors
    "cut in the data": (raw(ADAPTER, lambda data: data[:-100]), DAMAGED),
    "cut in the header": (raw(ADAPTER, lambda data: data[:40]), DAMAGED),
    "cut before the header": (raw(ADAPTER, lambda data: data[:5]), "missing or damaged"),
    "empty": (raw(ADAPTER, lambda data: b""), "missing or damaged"),
    "one bit altered": (raw(ADAPTER, flip), f"{ADAPTER} is not the file that the run wrote"),
    "one bit of the bases altered": (raw(BASES, flip), f"{BASES} is not the file that the run wrote"),
    "data behind the end": (raw(ADAPTER, lambda data: data + b"more"), DAMAGED),
    "a huge header": (raw(ADAPTER, lambda data: struct.pack("<Q", HUGE) + data[8:]), f"header declares {HUGE} bytes"),
    "a header that is too long": (
        header(ADAPTER, lambda found: json.dumps(found).encode() + b" " * reading.MAX_HEADER),
        f"header declares .* bytes, at most {reading.MAX_HEADER} are allowed",
    ),
    "a huge tensor": (header(ADAPTER, entry(PROMPT, shape=[HUGE, 2])), DAMAGED),
    "a huge tensor without data": (header(ADAPTER, entry(PROMPT, shape=[0, HUGE], data_offsets=[0, 0])), DAMAGED),
    "lengths beyond those of tensors": (header(ADAPTER, more(shape=[0, 2**63])), r"'more' has shape \(0, 9223"),
    "many dimensions": (header(ADAPTER, more(shape=[0] * 9)), "'more' has shape .*at most 8 lengths"),
    "another shape than the data": (header(ADAPTER, entry(PROMPT, shape=[5, 3, 24])), DAMAGED),
    "a tensor behind the end": (header(ADAPTER, entry(PROMPT, data_offsets=[HUGE, HUGE + 960])), DAMAGED),
    "negative offsets": (header(ADAPTER, entry(PROMPT, data_offsets=[-960, 0])), DAMAGED),
    "a fraction as a shape": (header(ADAPTER, entry(PROMPT, shape=[2.5])), DAMAGED),
    "an unknown dtype": (header(ADAPTER, entry(PROMPT, dtype="OBJECT")), DAMAGED),
    "a dtype that is never written": (header(ADAPTER, entry(PROMPT, dtype="U32")), "l2p_prompt' has dtype 'U32'"),
    "overlapping tensors": (header(ADAPTER, entry(PROMPT, data_offsets=[0, 960])), DAMAGED),
    "a gap between tensors": (
        both(header(ADAPTER, more(shape=[1], shift=4)), raw(ADAPTER, lambda data: data + bytes(8))),
        DAMAGED,
    ),
    "an entry that is odd": (
        header(ADAPTER, entry(PROMPT, loader="evil")),
        "entry of '.*l2p_prompt' must have dtype, shape and data_offsets, and nothing else",
    ),
    "an entry that lacks something": (header(ADAPTER, lambda found: found[PROMPT].pop("shape") and None), DAMAGED),
    "a name twice": (header(ADAPTER, twice), f"'{PROMPT}' occurs twice"),
    "a header that is a list": (header(ADAPTER, lambda found: b"[1, 2]"), DAMAGED),
    "a header nested deeply": (header(ADAPTER, lambda found: nested(100_000).encode()), DAMAGED),
    "an entry nested deeply": (header(ADAPTER, deep), DAMAGED),
    # bases
    "bases that are not orthonormal": (
        tensors(BASES, lambda found: found[PROMPT].mul_(1.01)),
        f"{BASES}: '{PROMPT}': .*not orthonormal",
    ),
    "bases that are no numbers": (
        tensors(BASES, lambda found: found[PROMPT].fill_(float("nan"))),
        "not finite",
    ),
    "bases of another parameter": (
        tensors(BASES, lambda found: found.update({PROMPT: torch.eye(23, 4)})),
        r"basis of '.*l2p_prompt' has shape \(23, 4\)",
    ),
    "bases of another rank": (
        tensors(BASES, lambda found: found.update({PROMPT: found[PROMPT][:, :-1]})),
        "basis of '.*l2p_prompt' has shape",
    ),
    "bases without a description": (
        lambda folder: content("projection.json", **{PROMPT: None})(folder),
        f"'{PROMPT}' is not described",
    ),
    "a description of another shape": (
        content("projection.json", **{PROMPT: lambda found: first(found, shape=[11, 24])}),
        "basis of '.*l2p_prompt'",
    ),
    "a description of a huge shape": (
        content("projection.json", **{PROMPT: lambda found: first(found, shape=[2**70, 24])}),
        "basis of '.*l2p_prompt'",
    ),
    "a description that is nonsense": (
        content("projection.json", **{PROMPT: lambda found: first(found, shape="..", batch_dims=-3)}),
        "basis of '.*l2p_prompt'",
    ),
    # JSON
    "JSON cut": (raw("results.json", lambda data: data[:50]), "results.json is missing or damaged"),
    "JSON that is a list": (text("stream.json", "[]"), "a list where an object is expected"),
    "JSON nested deeply": (text(CONFIG, nested(100_000)), "nested too deeply"),
    "JSON that is huge": (text("stream.json", " " * (reading.MAX_JSON + 1)), "bytes, at most"),
    "JSON with a name twice": (text("results.json", '{"a": 1, "a": 2}'), "'a' occurs twice"),
    "JSON with NaN": (text("results.json", '{"a": NaN}'), "NaN is not JSON"),
    "JSON with an endless number": (text("results.json", '{"a": 1e999}'), "too large"),
    "JSON with a number without end": (
        text("results.json", f'{{"a": {"9" * 5000}}}'),
        "a number of 5000 digits, at most",
    ),
    "JSON in another encoding": (raw("stream.json", lambda data: b"\xff\xfe" + data), "missing or damaged"),
    # results and manifest
    "a matrix of another size": (content("results.json", accuracy_matrix=[[50.0]]), "not 3 rows of 3 numbers"),
    "a matrix with words": (
        content("results.json", accuracy_matrix=lambda found: [["good", None, None], *found[1:]]),
        "not 3 rows of 3 numbers",
    ),
    "a matrix beyond 100 percent": (
        content("results.json", accuracy_matrix=lambda found: [[101.0, None, None], *found[1:]]),
        "in 0 to 100",
    ),
    "a matrix with a gap": (
        content("results.json", accuracy_matrix=lambda found: [found[0], [50.0, None, None], found[2]]),
        "accuracy_matrix lacks entries",
    ),
    "a matrix whose first row is missing in part": (
        content("results.json", accuracy_matrix=lambda found: [[None, 50.0, None], *found[1:]]),
        "accuracy_matrix lacks entries",
    ),
    "a matrix that ends in a hole behind missing rows": (
        content("results.json", accuracy_matrix=lambda found: [[None] * 3, [50.0, None, None], found[2]]),
        "accuracy_matrix lacks entries",
    ),
    "a matrix without rows": (content("results.json", accuracy_matrix=[[None] * 3] * 3), "lacks entries"),
    "drift that is too short": (content("results.json", drift=[0.0]), "drift=.0.0. is not 2 numbers"),
    "another number of tasks": (content("results.json", num_tasks=4), "disagree about num_tasks"),
    "another scenario": (content("results.json", scenario="online"), "disagree about num_tasks or scenario"),
    "digests that are none": (content("results.json", sha256=["a"]), "sha256 is not an object"),
    "a stream without tasks": (content("stream.json", tasks=None), "does not describe a stream"),
    "a stream with a class twice": (
        content("stream.json", tasks=lambda found: [found[0], found[0], found[2]]),
        "expected tasks with the classes 0 to",
    ),
    "a stream of other classes": (content("stream.json", num_classes=7), "expected tasks with the classes 0 to"),
    "a stream of more classes than memory": (
        content("stream.json", num_classes=HUGE),
        "expected tasks with the classes 0 to",
    ),
    "a thousand million classes": (
        content("stream.json", num_classes=10**9),
        "stream.json has num_classes=1000000000",
    ),
    "a thousand million tasks": (
        lambda folder: [content(name, num_tasks=10**9)(folder) for name in ("stream.json", "results.json")],
        "stream.json has num_classes=6: expected tasks with the classes",
    ),
    "more names than anybody reads": (
        raw(ADAPTER, lambda data: many(120_000)),
        f"{ADAPTER} is missing or damaged .its header has 120000 entries, at most 50000 are allowed",
    ),
    "class names that are none": (content("stream.json", label_names=[1] * 6), "label_names are not 6 strings"),
    # the method's files
    "the method's state is missing": (
        lambda folder: (folder / STATE).unlink(),
        f"has method.json, but no {STATE}: .*incomplete",
    ),
    "the method's description is missing": (
        lambda folder: (folder / "method.json").unlink(),
        f"has {STATE}, but no method.json: .*incomplete",
    ),
    "the method's files are missing": (
        lambda folder: [(folder / name).unlink() for name in (STATE, "method.json")],
        f"has a digest of {STATE}, but no {STATE}: .*incomplete",
    ),
    "another state of the method": (
        tensors(STATE, lambda found: found.update(more=torch.zeros(2))),
        f"{STATE} is not the file that the run wrote",
    ),
    "not a number in the method's state": (
        tensors(STATE, lambda found: found.update(more=torch.full((2,), float("nan")))),
        f"{STATE}: 'more' holds 2 values that are not finite",
    ),
    "the method's state cut": (raw(STATE, lambda data: data[:5]), f"{STATE} is missing or damaged"),
    "a method without a name": (content("method.json", name=None), "method.json has name=None"),
    "a method whose name is a number": (content("method.json", name=3), "method.json has name=3"),
    "a method without settings": (
        lambda folder: (folder / "method.json").write_text('{"name": "x"}'),
        "method.json has settings=None: expected an object",
    ),
    "settings of a method that are a list": (content("method.json", settings=[]), r"has settings=\[\]"),
    "a method's state that is a word": (content("method.json", state="x"), "has state=x: expected an object"),
    "a method's card that is a list": (content("method.json", card=[1]), r"has card=\[1\]: expected an object"),
    "auto_map in the method's file": (content("method.json", auto_map={"a": "b.c"}), "method.json asks for code"),
    # the image processor
    "a processor of an unknown kind": (
        content("preprocessor_config.json", image_processor_type="os.system"),
        "no image processor can be loaded from",
    ),
}


def snapshot(model):
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [type(module) for module in model.modules()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        copy.deepcopy(model.config.to_dict()),
    )


def unchanged(model, before):
    weights, *rest = snapshot(model)
    return (
        rest == list(before[1:])
        and weights.keys() == before[0].keys()
        and all(torch.equal(value, before[0][name]) for name, value in weights.items())
    )


def test_the_sound_revision_loads(folder):
    loaded = load_pretrained(folder, backbone=tiny.backbone())
    assert len(loaded.classes) == 4 and loaded.projection.rank > 0


def test_a_revision_of_before_there_were_files_of_a_method_loads(folder):
    (folder / STATE).unlink()
    (folder / "method.json").unlink()
    content("results.json", sha256=lambda found: {name: one for name, one in found.items() if name != STATE})(folder)
    assert load_pretrained(folder, backbone=tiny.backbone()).classes


def test_the_kinds_of_adapters_are_those_that_are_registered(folder, monkeypatch):
    known = {kind: cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items() if kind.value not in ("L2P", "DUALPROMPT")}
    known[enum.Enum("Kind", {"OTHER": "OTHER_PROMPT"}).OTHER] = type("OtherConfig", (PromptConfig,), {})
    monkeypatch.setattr(adapters, "PEFT_TYPE_TO_CONFIG_MAPPING", known)
    with pytest.raises(ValueError, match="peft_type='L2P': expected one of CLIP_PROMPT, OTHER_PROMPT, the prompt"):
        load_pretrained(folder, backbone=tiny.backbone())


@pytest.mark.parametrize("how", BAD)
@pytest.mark.filterwarnings("error::UserWarning")
def test_a_bad_revision_is_refused_and_nothing_is_touched(folder, how):
    damage, message = BAD[how]
    damage(folder)
    backbone = tiny.backbone()
    before = snapshot(backbone)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_pretrained(folder, backbone=backbone)
    assert unchanged(backbone, before)
    assert not (folder.parent / "executed").exists()


@pytest.mark.parametrize("how", ["one bit altered", "a pickle beside the adapter", "bases that are not orthonormal"])
def test_a_bad_revision_is_not_continued(folder, tmp_path, how):
    BAD[how][0](folder)
    trainer = tiny.trainer(tmp_path / "out", num_train_epochs=1)
    before = snapshot(trainer.model)
    with pytest.raises(ValueError, match=f"(?s){BAD[how][1]}"):
        trainer.train(resume_from_checkpoint=str(folder))
    assert unchanged(trainer.model, before)
    assert not trainer.results.matrix and not trainer.projection.bases and not list((tmp_path / "out").glob("task-*"))


@pytest.mark.parametrize("how", ["one bit of the bases altered", "bases of another rank", "JSON nested deeply"])
def test_bad_bases_are_refused_on_their_own(folder, how):
    BAD[how][0](folder)
    with pytest.raises(ValueError, match=f"(?s){BAD[how][1]}"):
        Projection.from_pretrained(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"energy": 2.0}, r"energy=2.0 is outside \(0, 1\]"),
        ({"method": "../evil"}, "method='../evil' is unknown"),
        ({"surprise": 1}, "'surprise'"),
    ],
)
def test_bad_projection_settings(folder, settings, message):
    content("projection.json", **settings)(folder)
    with pytest.raises(ValueError, match=f"projection.json does not describe a projection .*{message}"):
        ProjectionConfig.from_pretrained(folder)


def other_weights():
    backbone = tiny.backbone()
    with torch.no_grad():
        backbone.vit.layers[1].mlp.fc2.bias[5] += 1e-3
    return backbone


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny.backbone(hidden_size=36), "hidden size 24, this one has 36"),
        (lambda: tiny.backbone().vit, "does not fit this ViTModel: .*made for the modules.*vit.embeddings"),
        (lambda: tiny.backbone("clip"), "does not fit this CLIPModel"),
        (other_weights, "weights are not those that .* was trained on"),
        (lambda: torch.nn.Linear(2, 2), "backbone is a Linear"),
        (lambda: tiny.model(), "backbone is a PeftModel: pass a transformers model without an adapter"),
        (lambda: tiny.model().get_base_model(), "without an adapter"),
    ],
)
def test_a_wrong_backbone_is_refused_and_left_as_it_was(folder, make, message):
    backbone = make()
    before = [(name, value.clone()) for name, value in backbone.state_dict().items()]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_pretrained(folder, backbone=backbone)
    after = list(backbone.state_dict().items())
    assert [name for name, _ in after] == [name for name, _ in before]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(after, before, strict=True))


def test_a_deeper_backbone_has_other_weights(folder):
    with pytest.raises(ValueError, match="weights are not those"):
        load_pretrained(folder, backbone=tiny.backbone(num_hidden_layers=3))


def test_peft_too_refuses_a_bare_backbone(folder):
    """It would keep random prompts, with no more than a warning about names."""
    with pytest.raises(
        ValueError, match="made for the modules .*ViTForImageClassification instead of a bare ViTModel"
    ):
        PeftModel.from_pretrained(tiny.backbone().vit, folder)
    assert isinstance(PeftModel.from_pretrained(tiny.backbone(), folder), PeftModel)


def test_another_backbone_is_not_continued_on(folder, tmp_path):
    trainer = tiny.trainer(tmp_path / "out", model=tiny.model(base=other_weights()), num_train_epochs=1)
    with pytest.raises(ValueError, match="weights are not those"):
        trainer.train(resume_from_checkpoint=str(folder))


def test_a_backbone_in_another_format_is_not_read(folder, tmp_path):
    backbone = tiny.backbone()
    backbone.save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "model.safetensors").unlink()
    (tmp_path / "vit" / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    with pytest.raises(ValueError, match="must be in safetensors format"):
        load_pretrained(folder, backbone=tmp_path / "vit")
    assert not (tmp_path / "executed").exists()


def test_a_backbone_that_asks_for_code_gets_none(folder, tmp_path):
    backbone = tiny.backbone()
    backbone.save_pretrained(tmp_path / "vit")
    config = json.loads((tmp_path / "vit" / "config.json").read_text())
    config.update(model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"})
    (tmp_path / "vit" / "config.json").write_text(json.dumps(config))
    (tmp_path / "vit" / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_pretrained(folder, backbone=tmp_path / "vit")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("revision", ["../sound", "task-0", "task-01", "task-1/..", "/tmp", "features", ""])
def test_a_revision_is_no_path(sound, revision):
    with pytest.raises(ValueError, match="revision="):
        load_pretrained(sound.parent, revision, backbone=tiny.backbone())


def test_a_revision_under_another_name(sound, tmp_path):
    shutil.copytree(sound, tmp_path / "task-1")
    shutil.copy(sound / CONFIG, tmp_path)
    with pytest.raises(ValueError, match="shows 2 finished tasks, but the revision is called 'task-1'"):
        load_pretrained(tmp_path, "task-1", backbone=tiny.backbone())


def test_checkpoints_of_a_task_in_training_do_not_stop_a_finished_one(sound, tmp_path):
    shutil.copytree(sound.parent, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "task-3").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "task-3" / "optimizer.pt").write_bytes(b"")
    assert load_pretrained(tmp_path / "run", backbone=tiny.backbone()).classes


def test_the_digest_does_not_see_the_adapter():
    from pgp_hf.runs.digest import backbone_sha256

    plain, wrapped = tiny.backbone(), tiny.model()
    digest = backbone_sha256(plain, ["classifier"])
    assert digest == backbone_sha256(wrapped.get_base_model(), ["classifier"])
    assert digest != backbone_sha256(plain, None)
    assert digest != backbone_sha256(other_weights(), ["classifier"])
    assert isinstance(ViTForImageClassification(plain.config), torch.nn.Module)
    assert digest != backbone_sha256(ViTForImageClassification(plain.config), ["classifier"])
