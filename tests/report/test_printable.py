"""Names from elsewhere reach a terminal as text: they neither steer it nor hide."""

from __future__ import annotations

import json
import shutil
import unicodedata

import pytest
import tiny

from pgp_hf.cli import growth, predict
from pgp_hf.report.formatting import printable

HOSTILE = "cat\x1b[2J\x1b]0;owned\x07\u202egnp\r\u2028\x9b1m"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("snow leopard", "snow leopard"),
        ("größte Katze 猫 🐈", "größte Katze 猫 🐈"),
        ("می‌خواهم", "می‌خواهم"),  # which needs its invisible character
        ("a\x1b[2Jb", r"a\x1b[2Jb"),
        ("a\nb\tc\r", r"a\nb\tc\r"),
        ("👩\u200d🚀", "👩\u200d🚀"),
        ("a\u200bb\u00adc\ufeffd\u2060e", r"a\u200bb\xadc\ufeffd\u2060e"),
        ("a\U000e0041", r"a\U000e0041"),
        ("\u202eabc", r"\u202eabc"),
        ("caf\udce9.png", r"caf\udce9.png"),  # the name of a file in another encoding
    ],
)
def test_only_what_steers_is_written_out(text, expected):
    assert printable(text) == expected
    assert printable(text).encode()


def test_no_character_that_steers_is_left():
    every = printable("".join(map(chr, range(0x110000))))
    assert not {unicodedata.category(c) for c in every} & {"Cc", "Cs", "Zl", "Zp"}
    assert [c for c in every if unicodedata.category(c) == "Cf"] == ["\u200c", "\u200d"]
    turns = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    assert not any(unicodedata.bidirectional(c) in turns for c in every)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose class names and files come from somebody hostile."""
    folder = tiny.finished_run(tmp_path_factory.mktemp("run"))
    for name, key in (("adapter_config.json", "id2label"), ("stream.json", "label_names")):
        content = json.loads((folder / name).read_text())
        names = [f"{HOSTILE} {c}" for c in range(6)]
        content[key] = names if key == "label_names" else {str(c): one for c, one in enumerate(names)}
        (folder / name).write_text(json.dumps(content))
    (folder / "digests.json").unlink()
    return folder


@pytest.mark.parametrize("options", [[], ["--json_lines"]])
def test_predictions_of_such_a_run_leave_the_terminal_alone(run, tmp_path, capsys, options):
    photos = tmp_path / f"photos{HOSTILE}"
    photos.mkdir()
    tiny.stream().test(0)[0]["image"].save(photos / "a\x1b[31m.png")
    (photos / "b\x1b[31m.png").write_text("no image")
    assert predict.main([str(run), str(photos), "--top_k", "2", *options]) == 1
    out, err = capsys.readouterr()
    assert "cat" in out and "owned" in out and "b" in err
    for text in (out, err):
        assert printable(text.replace("\n", "")) == text.replace("\n", "")
    shutil.rmtree(photos)


def test_a_table_of_what_is_known_leaves_the_terminal_alone():
    stream = tiny.stream()
    manifest = {**stream.manifest(), "label_names": [HOSTILE] * 6}
    text = growth.growth_table({"accuracy_matrix": [[50.0, None, None], [50.0] * 3, [50.0] * 3]}, manifest, 1)
    assert "cat" in text and printable(text.replace("\n", "")) == text.replace("\n", "")
