"""The page to try a run on, `pgp-hf demo`: its functions without gradio and, marked slow, in a real browser."""

from __future__ import annotations

import html
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import tiny
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from PIL import ImageOps
from transformers import AutoImageProcessor, AutoModelForImageClassification

from pgp_hf import ProjectionConfig, TaskStream, embedded, hub, load_pretrained
from pgp_hf.cli import console
from pgp_hf.cli import demo as command
from pgp_hf.cli import demo_page as page
from pgp_hf.runs.folder import RunFolder

SCRIPT = Path(__file__).parents[2] / "examples" / "demo.py"


@pytest.fixture
def demo():
    return page


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of three tasks that names its backbone."""
    return tiny.finished_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def photo(tmp_path):
    tiny.stream().test(1)[0]["image"].save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def text(markup: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", " ", markup))


def selected(markup: str) -> list[int]:
    """The entries that a strip marks."""
    return [int(i) for i in re.findall(r"<span class='entry selected'>(\d+)</span>", markup)]


# ---- what the page shows ---------------------------------------------------------------------------------------------


def test_each_revision_shows_what_it_predicts(demo, run, photo):
    revisions = demo.Revisions(str(run))
    assert revisions.tasks == [1, 2, 3] and revisions.samples == []
    for task in (3, 1, 2):
        known, scores, pool = revisions.show(task, photo)
        classifier = load_pretrained(run, f"task-{task}")
        (expected,) = classifier.classify(photo, top_k=5)
        assert list(scores.items()) == [(one["label"], one["score"]) for one in expected.labels]
        assert selected(pool) == sorted(expected.prompts) and pool.count("<span") == 5
        assert f"Nearest key first: {expected.prompts[0]}, {expected.prompts[1]}" in pool
        results = json.loads((run / f"task-{task}" / "results.json").read_text())
        brought = [f"class {c}" for c in classifier.manifest["tasks"][task - 1]["classes"]]
        for part in (
            f"{2 * task} of 6 classes known",
            f"after task {task} of 3, which brought: {', '.join(brought)}.",
            f"Average accuracy {results['average_accuracy']:.1f} %, forgetting {results['forgetting']:.1f} points.",
        ):
            assert part in text(known)


def test_without_an_image_there_is_no_prediction(demo, run):
    known, scores, pool = demo.Revisions(str(run)).show(2, None)
    assert "4 of 6 classes known" in known and scores is None
    assert pool == ""


def test_revisions_are_loaded_when_they_are_asked_for_and_kept(demo, run, monkeypatch):
    asked = []
    monkeypatch.setattr(
        demo, "load_pretrained", lambda *given, **more: asked.append((*given, more)) or load_pretrained(*given, **more)
    )
    revisions = demo.Revisions(str(run), str(run.parent / "backbone"))
    more = {"backbone": str(run.parent / "backbone")}
    assert asked == [(str(run), "task-3", more)]
    for task in (1, 3, 1.0, 2, 3, 1):
        revisions.show(task, None)
    assert asked[1:] == [(str(run), "task-1", more), (str(run), "task-2", more)]


def test_one_task_folder_is_one_revision(demo, run, photo):
    revisions = demo.Revisions(str(run / "task-2"))
    assert revisions.tasks == [0]
    known, scores, _ = revisions.show(0, photo)
    assert "4 of 6 classes known" in known and "after task 2 of 3" in known
    assert scores == demo.Revisions(str(run)).show(2, photo)[1]


def test_revisions_of_a_repository_are_its_tags(demo, monkeypatch):
    tags = [SimpleNamespace(name=name) for name in ("task-10", "v1", "task-2", "task-02", "task-x")]
    monkeypatch.setattr(HfApi, "list_repo_refs", lambda self, repo: {"me/run": SimpleNamespace(tags=tags)}[repo])
    assert demo.find_tasks("me/run") == [2, 10]
    monkeypatch.undo()
    with pytest.raises(ValueError, match="the folder no/such/folder does not exist: expected a run's folder"):
        demo.find_tasks("no/such/folder")

    def refuse(self, repo):
        raise HTTPError("refused")

    monkeypatch.setattr(HfApi, "list_repo_refs", refuse)
    with pytest.raises(
        ConnectionError, match="no folder me/run here, and the tags of a repository me/run cannot be read: refused"
    ):
        demo.find_tasks("me/run")


def test_the_answer_is_followed_over_the_tasks(demo, run, photo, monkeypatch):
    revisions = demo.Revisions(str(run))
    assert revisions.history(None) == "" and demo.Revisions(str(run / "task-2")).history(photo) == ""
    best = [next(iter(load_pretrained(run, f"task-{t}").classify(photo, top_k=1))).labels[0] for t in (1, 2, 3)]
    shown = text(revisions.history(photo))
    for t, one in enumerate(best, start=1):
        assert re.search(rf"after task {t} \({2 * t} classes\)\s+{one['label']}\s+{100 * one['score']:.0f} %", shown)
    monkeypatch.setattr(revisions, "load", None)
    assert text(revisions.history(photo)) == shown  # kept for the image
    markup = demo.follow([(1, 2, "<a>", 0.5), (2, 4, "<a>", 0.4), (3, 6, "b", 1.0), (4, 8, "<a>", 0.9)])
    assert markup.count("<tr class='changed'>") == 3 and "It has changed 2 times." in markup and "<a>" not in markup
    assert "never changed" in demo.follow([(1, 2, "a", 0.5), (2, 4, "a", 0.4)])


def test_of_many_tasks_some_are_followed(demo, run, monkeypatch):
    revisions, asked = demo.Revisions(str(run)), []
    label = SimpleNamespace(labels=[{"label": "a", "score": 1.0}])
    fake = SimpleNamespace(classes=[0], classify=lambda image, top_k: (label,))
    monkeypatch.setattr(revisions, "load", lambda task: asked.append(task) or fake)
    revisions.tasks = list(range(1, 101))
    revisions.history("photo.png")
    assert len(asked) == demo.FOLLOWED and (asked[0], asked[-1]) == (1, 100) and asked == sorted({*asked})


@pytest.mark.parametrize(
    ("results", "names", "source", "expected"),
    [
        ({"method": "dualprompt", "projection": "functional"}, ["a"], {"name": "/data/my/birds"},
         "DualPrompt with functional projection on birds, after 1 task"),
        ({"method": "l2p", "projection": "none"}, list(embedded.DIGIT_NAMES), None, "L2P on handwritten digits, after 1 task"),
        ({"method": "null_space_adam"}, ["a", "b"], None, "null space adam on 2 classes, after 1 task"),
    ],
)  # fmt: skip
def test_the_title_is_for_people_and_shows_no_path(demo, results, names, source, expected):
    manifest = {"label_names": names, "tasks": [{"classes": [0]}], "dataset": source}
    results = {**results, "accuracy_matrix": [[1.0]], "finished_tasks": 1}
    assert demo.title(SimpleNamespace(results=results, manifest=manifest), "/home/me/out") == expected
    assert demo.title(SimpleNamespace(results=None, manifest=None), "/home/me/out") == "out"


def test_a_run_keeps_samples_when_asked_alone(demo, run, tmp_path):
    assert not (run / "samples").exists()
    folder = tmp_path / "out"
    trainer = tiny.trainer(folder, num_train_epochs=1, keep_samples=2)
    trainer.train()
    stream, kept = trainer.stream, {path.name for path in RunFolder(folder).samples()}
    assert kept == {f"class-{c}-{k}.png" for c in range(6) for k in (1, 2)}
    assert not list(folder.glob("task-*/samples")) and not any("samples" in name for name in hub.listed(folder))
    found = demo.kept_samples(str(folder), stream.manifest())
    classes = [c for task in stream.manifest()["tasks"] for c in task["classes"]]
    assert [name for _, name in found] == [stream.label_names[c] for c in classes for _ in range(2)]
    first = stream.test(0)
    position = first.labels.tolist().index(classes[0])
    assert found[0][0].tobytes() == first[position]["image"].convert("RGB").tobytes()
    assert demo.kept_samples("me/run", stream.manifest()) == []
    (folder / "samples" / "mine.png").write_bytes(b"mine")
    RunFolder(folder).clear()
    assert [path.name for path in (folder / "samples").iterdir()] == ["mine.png"]


def test_digits_come_with_a_sample_of_each_class(demo):
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    tasks = [{"classes": order[:4]}, {"classes": order[4:]}]
    found = demo.samples({"label_names": list(embedded.DIGIT_NAMES), "tasks": tasks})
    assert [name for _, name in found] == [embedded.DIGIT_NAMES[c] for c in order]
    test = embedded.digits()["test"]
    pixels = {(image.tobytes(), label) for image, label in zip(test["image"], test["label"], strict=True)}
    assert all((image.tobytes(), label) in pixels for (image, _), label in zip(found, order, strict=True))
    assert demo.samples({"label_names": ["zero", "one"], "tasks": tasks}) == demo.samples(None) == []


def test_names_are_text_and_many_are_counted(demo):
    names = {i: f"<b>{i}</b>" for i in range(50)}
    manifest = {"num_tasks": 2, "tasks": [{"classes": list(range(25))}, {"classes": list(range(25, 50))}]}
    results = {"accuracy_matrix": [[50.0, None], [None, None]]}
    fake = SimpleNamespace(id2label=names, manifest=manifest, results=results, classes=list(range(25)))
    known = demo.known(fake)
    assert "<b>" not in known and "25 of 50 classes known" in known and "Average accuracy 50.0 %" in known
    assert "<b>19</b> and 5 more" in html.unescape(known) and "<b>20</b>" not in html.unescape(known)


def test_tasks_learned_as_one_have_no_forgetting(demo):
    names = {i: f"class {i}" for i in range(4)}
    manifest = {"num_tasks": 2, "tasks": [{"classes": [3, 1]}, {"classes": [0, 2]}]}
    results = {"accuracy_matrix": [[None, None], [50.0, 70.0]]}
    fake = SimpleNamespace(id2label=names, manifest=manifest, results=results, classes=[3, 1, 0, 2])
    known = demo.known(fake)
    assert "after 2 tasks, learned as one, which brought: class 3, class 1, class 0, class 2." in known
    assert "Average accuracy 60.0 %." in known and "forgetting" not in known


@pytest.mark.parametrize(
    ("matrix", "said"),
    [
        ([[50.0, None], [None, 70.0]], "Average accuracy not measured."),
        ([[50.0, None], [40.0, None]], "Average accuracy not measured, forgetting 10.0 points."),
        ([[None, None], [None, None]], "Average accuracy not measured."),
        ([[None, None], [40.0, 70.0]], "Average accuracy 55.0 %."),
    ],
)
def test_what_was_not_measured_is_said(demo, matrix, said):
    manifest = {"num_tasks": 2, "tasks": [{"classes": [3, 1]}, {"classes": [0]}]}
    results = {"accuracy_matrix": matrix, "finished_tasks": 2}
    names = {i: f"class {i}" for i in range(4)}
    known = demo.known(SimpleNamespace(id2label=names, manifest=manifest, results=results, classes=[3, 1, 0]))
    assert "after task 2 of 2, which brought: class 0." in known and said in known


def test_an_adapter_without_a_run(demo):
    fake = SimpleNamespace(id2label={0: "a", 1: "b"}, manifest=None, results=None, classes=None)
    assert "2 of 2 classes known" in demo.known(fake) and "without a run" in demo.known(fake)


def test_a_method_that_selects_nothing_and_a_selection_of_none(demo):
    assert "selects nothing" in demo.pool(None, None)
    assert selected(demo.pool(3, [])) == [] and "Nearest key first: none" in demo.pool(3, [])
    assert selected(demo.pool(3, [2, 0])) == [0, 2] and "Nearest key first: 2, 0" in demo.pool(3, [2, 0])


# ---- the command, with a stand-in for gradio ---------------------------------------------------------------------------


@pytest.fixture
def gradio(monkeypatch):
    """Records what is made of it."""
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    made = MagicMock()
    made.Blocks.return_value.__enter__.return_value.launch = made.launch
    monkeypatch.setitem(sys.modules, "gradio", made)
    return made


def test_the_page_is_wired_and_stays_on_this_machine(demo, run, photo, gradio, monkeypatch):
    monkeypatch.setattr(demo, "samples", lambda manifest: [("first", "one"), ("second", "two")])
    assert command.main([str(run), "--port", "1234"]) == 0
    heading = "L2P with PGP on 6 classes, after 3 tasks"
    assert gradio.Blocks.call_args.kwargs == {"title": heading, "analytics_enabled": False}
    assert gradio.Markdown.call_args.args[0].startswith(f"# {heading}\n") and str(run) not in str(
        gradio.Markdown.call_args
    )
    launched = gradio.launch.call_args.kwargs
    assert (launched["server_port"], launched["share"], launched["ssr_mode"]) == (1234, False, False)
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert gradio.Slider.call_args.args == (1, 3, 3) and gradio.Image.call_args.args == ("first",)
    image, slider = gradio.Image.return_value, gradio.Slider.return_value
    page = gradio.Blocks.return_value.__enter__.return_value
    (events, show, inputs, outputs), followed = (call.args for call in gradio.on.call_args_list)
    assert followed[0] == [page.load, image.change] and "after task 1" in followed[1](photo)
    assert events == [page.load, slider.change, image.change] and inputs == [slider, image]
    assert outputs == [gradio.HTML.return_value, gradio.Label.return_value, gradio.HTML.return_value]
    assert "4 of 6" in show(2, photo)[0]
    pick, _, target = gradio.Gallery.return_value.select.call_args.args
    assert target == image and pick(SimpleNamespace(index=1)) == "second"


@pytest.mark.parametrize("made", [True, False])
def test_without_an_argument(run, gradio, made, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    if made:
        shutil.copytree(run, tmp_path / "out" / "l2p_pgp")
    assert console.run(command.main, []) == (0 if made else 2)
    assert gradio.launch.called == made
    assert made or "`pgp-hf train l2p`" in capsys.readouterr().err


def test_a_public_link_is_made_on_request_alone(run, gradio):
    assert command.main([str(run), "--share", "true"]) == 0 and gradio.launch.call_args.kwargs["share"] is True


def test_a_run_that_is_refused(gradio, tmp_path, capsys):
    for given in (tmp_path, tmp_path / "nowhere"):
        assert console.run(command.main, [str(given)]) == 2
        with pytest.raises((ValueError, OSError)):
            console.run(command.main, [str(given), "--traceback"])
    message = capsys.readouterr().err
    assert message.count("error: ") == 2 and "Traceback" not in message and not gradio.launch.called


def test_without_gradio(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
    assert console.run(command.main, [str(run)]) == 2
    assert "pip install gradio" in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as error:
        command.main(["--help"])
    assert error.value.code == 0
    out = capsys.readouterr().out
    for part in ("--backbone", "--port", "--share", "pgp-hf train l2p", "pip install gradio", "slider"):
        assert part in out


# ---- in a browser ----------------------------------------------------------------------------------------------------

# on the path of the page's process: what it connects to or looks up beyond this machine is written down and refused
WATCH = """
import socket
log = open({log!r}, "a", buffering=1)
log.write("watching\\n")

def guard(call, host):
    def guarded(*args, **kwargs):
        if (name := host(*args)) not in ("127.0.0.1", "localhost", "::1", None):
            log.write(f"{{name}}\\n")
            raise ConnectionRefusedError(name)
        return call(*args, **kwargs)
    return guarded

target = lambda self, address: address[0] if isinstance(address, tuple) else None
socket.socket.connect = guard(socket.socket.connect, target)
socket.socket.connect_ex = guard(socket.socket.connect_ex, target)
socket.getaddrinfo = guard(socket.getaddrinfo, lambda host, *rest: host)
"""


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """Five tasks of the embedded digits, with a handful of images."""
    stream = TaskStream.from_dataset(
        embedded.digits(), num_tasks=5, max_train_samples_per_class=10, max_eval_samples_per_class=2
    )
    names = {"id2label": stream.id2label, "label2id": {name: i for i, name in stream.id2label.items()}}
    with tiny.seeded(0):
        base = AutoModelForImageClassification.from_pretrained(embedded.vit_path(), num_labels=10, **names)
    folder = tmp_path_factory.mktemp("digits") / "run"
    arguments = {"num_train_epochs": 1, "per_device_train_batch_size": 5, "learning_rate": 0.03}
    with tiny.without_figures():
        tiny.trainer(
            folder,
            model=tiny.model(base=base, pool_size=10, top_k=3),
            stream=stream,
            projection=ProjectionConfig(),
            processing_class=AutoImageProcessor.from_pretrained(embedded.vit_path(), backend="pil"),
            augmentation="none",
            **arguments,
        ).train()
    return folder


@pytest.fixture
def browser(tmp_path):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    more = (
        f"disable-component-update disable-sync disable-dev-shm-usage window-size=1280,900 user-data-dir={tmp_path}/me"
    )
    for flag in f"{flags} {more}".split():
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield browser
    browser.quit()


@pytest.fixture
def served(digits_run, tmp_path):
    """The page's address; it runs as a process of its own, without the tests' settings for no network."""
    (tmp_path / "watch").mkdir()
    (tmp_path / "watch" / "sitecustomize.py").write_text(WATCH.format(log=str(tmp_path / "network.txt")))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    env.update(PYTHONPATH=os.pathsep.join([str(tmp_path / "watch"), str(SCRIPT.parents[1])]), PYTHONUNBUFFERED="1")
    with (tmp_path / "page.txt").open("w") as log:
        command = [sys.executable, str(SCRIPT), str(digits_run), "--port", str(port)]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
    try:
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 150
        while address not in (said := (tmp_path / "page.txt").read_text()):
            assert process.poll() is None and time.monotonic() < deadline, said
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(20)


LACKING = [name for name in ("gradio", "selenium") if importlib.util.find_spec(name) is None]
LACKING += [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]


@pytest.mark.slow
@pytest.mark.skipif(bool(LACKING), reason=f"not installed (extra demo-test; browser): {', '.join(LACKING)}")
def test_the_page_in_a_browser(served, browser, digits_run, demo, tmp_path):
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.common.keys import Keys

    def all_of(selector):
        return browser.find_elements("css selector", selector)

    def shown():
        """Known classes, predictions with their probabilities, and marked entries, as somebody sees them."""
        meters = [(one.get_attribute("aria-label"), float(one.get_attribute("value"))) for one in all_of("meter")]
        entries = [int(one.text) for one in all_of("#prompts .selected")]
        order = [one.text for one in all_of("#prompts p")]
        return [one.text for one in all_of("#known p, #prediction h2")], meters, entries, order

    def await_state(task, image):
        """Wait for what the library says of an image after a task; the prediction and the prompts."""
        classifier = load_pretrained(digits_run, f"task-{task}")
        (expected,) = classifier.classify(image, top_k=5)
        assert [expected.labels] == classifier.predict(image, top_k=5)
        meters = [(one["label"], pytest.approx(one["score"], abs=1e-5)) for one in expected.labels]
        results = json.loads((digits_run / f"task-{task}" / "results.json").read_text())
        last, deadline = None, time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                last = known, found, entries, order = shown()
            except (StaleElementReferenceException, ValueError, IndexError):
                continue
            if (
                known[:1] + known[2:] == [f"{2 * task} of 10 classes known", expected.labels[0]["label"]]
                and f"after task {task} of 5" in known[1]
                and f"Average accuracy {results['average_accuracy']:.1f} %" in known[1]
                and found == meters
                and entries == sorted(expected.prompts)
                and order == [f"Nearest key first: {', '.join(map(str, expected.prompts))}"]
            ):
                return expected.labels[0]["label"], expected.prompts
            time.sleep(0.1)
        browser.save_screenshot(str(tmp_path / "page.png"))
        raise AssertionError(f"the page shows {last}, not {expected} after task {task} (see {tmp_path}/page.png)")

    def move(key, times=1):
        all_of("#task input[type=range]")[0].send_keys(key * times)

    samples = demo.samples(json.loads((digits_run / "stream.json").read_text()))
    browser.get(served)
    states = [await_state(5, samples[0][0])]  # the last revision and the first sample
    assert [one.text for one in all_of("#samples .caption-label")] == [name for _, name in samples]
    move(Keys.ARROW_LEFT, 4)
    states.append(await_state(1, samples[0][0]))
    for index, task in ((9, 1), (2, 1)):
        all_of("#samples button.thumbnail-item")[index].click()
        states.append(await_state(task, samples[index][0]))
    move(Keys.ARROW_RIGHT)
    states.append(await_state(2, samples[2][0]))

    own = tmp_path / "own.jpg"
    ImageOps.expand(samples[7][0].resize((40, 40)), 12).convert("RGB").save(own)
    all_of("#image input[type=file]")[0].send_keys(str(own))
    states.append(await_state(2, own))
    move(Keys.ARROW_RIGHT, 2)
    states.append(await_state(4, own))
    assert len({label for label, _ in states}) > 1 and len({tuple(prompts) for _, prompts in states}) > 2, states

    requests = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [one["params"]["request"]["url"] for one in requests if one["method"] == "Network.requestWillBeSent"]
    assert len([url for url in asked if url.startswith(served)]) > 10
    assert [url for url in asked if not url.startswith((served, "data:", "blob:", "chrome:"))] == []
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert "Traceback" not in (tmp_path / "page.txt").read_text()

    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    all_of("#image input[type=file]")[0].send_keys(str(broken))
    deadline = time.monotonic() + 30
    while not any("cannot identify image file" in one.text for one in all_of(".toast-body")):
        assert time.monotonic() < deadline, [one.text for one in all_of(".toast-body")]
        time.sleep(0.1)
    all_of("#samples button.thumbnail-item")[4].click()
    await_state(4, samples[4][0])
    assert (tmp_path / "network.txt").read_text().split() == ["watching"]


def test_the_watch_on_the_network_sees(tmp_path):
    """What the browser test relies on: connections and look-ups elsewhere are written down and refused."""
    (tmp_path / "sitecustomize.py").write_text(WATCH.format(log=str(tmp_path / "log")))
    code = (
        "import socket\n"
        "for call in (lambda: socket.create_connection(('example.invalid', 80)),\n"
        "             lambda: socket.socket().connect(('192.0.2.1', 80))):\n"
        "    try: call()\n"
        "    except ConnectionRefusedError: print('refused')\n"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["refused", "refused"], done.stderr
    assert (tmp_path / "log").read_text().split() == ["watching", "example.invalid", "192.0.2.1"]
