"""Tasks on the Hub: what arrives there from a run, whatever the network does, and what never leaves the machine."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import tiny
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from loopback import READER, STRANGER, TOKEN, environment
from loopback.server import Repo, metadata_errors

from pgp_hf import PGPTrainingArguments, ProjectionConfig
from pgp_hf.cli import experiment
from pgp_hf.hub.push import TaskRepo, _title
from pgp_hf.hub.snapshot import is_ours
from pgp_hf.runs.digests import Digests
from pgp_hf.training.pushing import PushTasks

TRAIN = """
import tiny
from pgp_hf import hub
arguments = {"push_to_hub": True, "hub_model_id": "me/run", "num_train_epochs": 1, **settings}
trainer = tiny.trainer(folder, **arguments)
trainer.train(resume_from_checkpoint=resume)
result = trainer.results.to_dict()
"""
PUSH = "from pgp_hf import hub; result = hub.main(['push', *argv])"


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> tuple[Path, dict]:
    """A run that pushes nothing: its folder and its results."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    run = tiny.trainer(folder, num_train_epochs=1)
    run.train()
    return folder, run.results.to_dict()


@pytest.fixture
def train(python, tmp_path):
    """Train with pushing; the answer, and the folder."""

    def run(resume=None, **settings):
        return python(TRAIN, folder=str(tmp_path / "run"), resume=resume, settings=settings)

    return run


def titles(repo: Repo) -> list[str]:
    return [commit.title.split(":")[0] for commit in repo.history()][1:]


def check_complete(repo: Repo, folder: Path, tasks: int = 3) -> None:
    """Every finished task is one commit on main, in order, with a tag and the files of its folder."""
    assert titles(repo) == [f"Task {k} of 3" for k in range(1, tasks + 1)]
    assert list(repo.tags.items()) == [
        (f"task-{k}", commit.oid) for k, commit in enumerate(repo.history()[1:], start=1)
    ]
    assert repo.main == repo.tags[f"task-{tasks}"]
    for k in range(1, tasks + 1):
        task, there = folder / f"task-{k}", repo.files(f"task-{k}")
        files = {file.relative_to(task).as_posix(): file.read_bytes() for file in task.rglob("*") if file.is_file()}
        assert set(there) == {path for path in files if not path.endswith(".svg")}
        card, digests = there.pop("README.md").decode(), json.loads(there.pop("digests.json"))
        assert all(there[path] == files[path] for path in there)
        for path, digest in digests["files"].items():
            assert digest["sha256"] == hashlib.sha256(there[path]).hexdigest()
        assert f'"{repo.name}"' in card and "path/to/this/folder" not in card


def state(repo: Repo) -> tuple:
    return repo.main, dict(repo.tags), len(repo.commits)


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it never came")


# ---- a run shares itself while it learns ------------------------------------------------------------------------------


def test_every_task_is_a_commit_and_a_tag(hub, train, expected, tmp_path, python):
    answer = train(hub_token=TOKEN)
    check_complete(hub.repos["me/run"], tmp_path / "run")
    assert tiny.same_results(answer.value, expected[1])
    # nothing else was asked for: no checkpoint, no branch, no second repository
    assert set(hub.repos) == {"me/run"}
    asked = [json.loads(one.body)["files"] for one in hub.requests if "/preupload/" in one.path]
    assert all(is_ours(file["path"]) for files in asked for file in files)
    sent = b"".join(one.body for one in hub.requests) + b"".join(hub.objects.values())
    for repo in hub.repos.values():
        sent += b"".join(data for tag in repo.tags for data in repo.files(tag).values())
    for secret in (TOKEN, str(tmp_path), str(Path.cwd()), str(Path.home()) + "/"):
        assert secret.encode() not in sent
    assert TOKEN not in answer.out and TOKEN not in python.log.read_text()


def test_a_license_is_one_that_somebody_has_chosen(tmp_path):
    args = PGPTrainingArguments(
        str(tmp_path), push_to_hub=True, hub_model_id="me/run", hub_license="mit", use_cpu=True
    )
    assert args.hub_repo().license == "mit" and TaskRepo("me/run").license is None
    with pytest.raises(ValueError, match="license='My own' is not the id of a license"):
        TaskRepo("me/run", license="My own")


def test_cards_are_what_the_hub_parses(hub, expected, python):
    python(PUSH, argv=[str(expected[0]), "--repo_id", "me/run", "--base_model", "google/vit-x", "--license", "mit"])
    for k in (1, 2, 3):
        files = hub.repos["me/run"].files(f"task-{k}")
        text, results = files["README.md"].decode(), json.loads(files["results.json"])
        assert metadata_errors(text) == [] and metadata_errors(text.replace("type: accuracy", "")) != []
        data = ModelCard(text).data
        assert data.library_name == "peft" and data.base_model == "google/vit-x" and data.license == "mit"
        name, found = model_index_to_eval_results(data.to_dict()["model-index"])
        values = {one.metric_type: one.metric_value for one in found}
        assert name == "run" and values == {
            "accuracy": pytest.approx(results["average_accuracy"], abs=0.01),
            "forgetting": pytest.approx(results["forgetting"], abs=0.01),
        }
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "google/vit-x"
    python(
        "from huggingface_hub import ModelCard; ModelCard.load('me/run').validate()\n"
        "try: ModelCard('---\\nbase_model: a b/c\\n---\\n').validate()\n"
        "except ValueError as error: assert 'base_model' in str(error)\n"
        "else: raise AssertionError('the server validates nothing')"
    )


def test_an_interrupted_run_goes_on_with_its_uploads(hub, python, train, tmp_path):
    alone = "import tiny\nt = tiny.trainer(folder, num_train_epochs=1)\nt.train_task(0)\nt.train_task(1)"
    python(alone, folder=str(tmp_path / "run"))  # two tasks that were never uploaded
    train(resume=True)
    check_complete(hub.repos["me/run"], tmp_path / "run")
    before = state(hub.repos["me/run"])
    train(resume=True)  # all is trained and uploaded
    assert state(hub.repos["me/run"]) == before


def test_tasks_trained_one_by_one_and_pushed_at_the_end(hub, python, tmp_path):
    code = """
    import tiny
    hub = {"push_to_hub": True, "hub_strategy": "end", "hub_model_id": "run", "hub_private_repo": True}
    t = tiny.trainer(folder, num_train_epochs=1, **hub)
    t.train_task(0)
    t.save_model()  # a Trainer would push the folder now
    before, pushed, again = t.hub_model_id, t.push_to_hub(), t.push_to_hub()
    result = [before, pushed.repo_id, pushed.uploaded, pushed.present, again.uploaded, again.present]
    """
    answer = python(code, folder=str(tmp_path / "run"))
    assert answer.value == ["run", "me/run", ["task-1"], [], [], ["task-1"]]
    assert hub.repos["me/run"].private
    check_complete(hub.repos["me/run"], tmp_path / "run", tasks=1)


JOINT = """
import tiny
from pgp_hf import methods
trainer = tiny.trainer(folder, method=methods.create("joint"), num_train_epochs=1, **settings)
trainer.train(resume_from_checkpoint=resume)
result = trainer.results.to_dict()["accuracy_matrix"]
"""


@pytest.mark.slow
def test_tasks_learned_as_one_are_one_commit_and_one_tag(hub, python, tmp_path):
    def train(name, resume=None, push=True):
        settings = {"push_to_hub": push, "hub_model_id": "me/run"}
        return python(JOINT, folder=str(tmp_path / name), resume=resume, settings=settings)

    row = train("run").value[2]
    train("run", resume=True)  # all is trained and uploaded
    assert python(PUSH, argv=[str(tmp_path / "run"), "--repo_id", "me/run"]).out.startswith("task-3 is there already")
    repo = hub.repos["me/run"]
    assert list(repo.tags) == ["task-3"] and repo.main == repo.tags["task-3"] and len(repo.commits) == 2
    assert repo.history()[1].title == f"Task 3 of 3: average accuracy {sum(row) / 3:.2f} %"
    files = repo.files("task-3")
    assert json.loads(files["results.json"])["accuracy_matrix"] == [[None] * 3] * 2 + [row]
    assert '"me/run", revision="task-3"' in files["README.md"].decode() and "continued.json" not in files
    assert metadata_errors(files["README.md"].decode()) == []

    before = state(repo)
    assert "me/run already holds a run (tag task-3), and this is a new one" in train("new").out
    assert state(repo) == before
    assert train("continued", resume="me/run@task-3", push=False).value[2] == row
    assert json.loads((tmp_path / "continued" / "continued.json").read_text()) == {"first": 2}
    out = python(PUSH, argv=[str(tmp_path / "new"), "--repo_id", "me/new"]).out
    assert out.startswith("task-3 uploaded") and list(hub.repos["me/new"].tags) == ["task-3"]


def test_only_the_run_itself_is_pushed_not_its_twin(tmp_path, monkeypatch):
    pushed = {}

    class Trainer:
        def __init__(self, model, args, *others, **kwargs):
            pushed[args.output_dir] = args.push_to_hub
            self.results = self.accelerator = self.stream_model = mock.MagicMock()

        def is_world_process_zero(self):
            return False

        def train(self, **kwargs):
            pass

        end = train

    monkeypatch.setattr(experiment, "PGPTrainer", Trainer)
    args = PGPTrainingArguments(str(tmp_path), use_cpu=True, push_to_hub=True, hub_model_id="me/run")
    arguments = mock.MagicMock(
        training=args, run=mock.MagicMock(no_compare=False, main_job=False, config=ProjectionConfig)
    )
    experiment.run("L2P", arguments, mock.MagicMock())
    assert pushed == {str(tmp_path / "baseline"): False, str(tmp_path): True}


def test_other_processes_upload_nothing_and_wait_for_nothing(tmp_path):
    args = PGPTrainingArguments(str(tmp_path), use_cpu=True, push_to_hub=True, hub_model_id="me/run")
    push, state = PushTasks(), mock.MagicMock(is_world_process_zero=False)
    push.on_stream_begin(args, state, None, first_task=0)
    push.on_task_end(args, state, None, task=0, results={}, folder=tmp_path)
    push.on_stream_end(args, state, None, results={"num_tasks": 1})
    assert push.uploads is None


def test_a_task_after_the_end_of_a_stream_is_uploaded(tmp_path, monkeypatch):
    """By `train_task`, after a stream whose uploads have ended."""
    put = []
    monkeypatch.setattr(TaskRepo, "create", lambda repo: None)
    monkeypatch.setattr(TaskRepo, "put", lambda repo, t, folder: put.append(t))
    args = PGPTrainingArguments(
        str(tmp_path), use_cpu=True, push_to_hub=True, hub_model_id="me/run", disable_tqdm=True
    )
    push, state = PushTasks(), mock.MagicMock(is_world_process_zero=True)
    push.on_stream_begin(args, state, None, first_task=0)
    for t in range(2):
        (tmp_path / f"task-{t + 1}").mkdir()
        (tmp_path / f"task-{t + 1}" / "results.json").write_text("{}")
        push.on_task_end(args, state, None, task=t, results={}, folder=tmp_path / f"task-{t + 1}")
        assert push.uploads.wait(5)
        if not t:
            push.on_stream_end(args, state, None, results={})
    push.uploads.close()
    assert put == [0, 1]


# ---- whatever the network does ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_hub_that_comes_back(hub, train, python, expected, tmp_path):
    hub.stop()
    settings = {"push_to_hub": True, "hub_model_id": "me/run", "num_train_epochs": 1}
    python.start(TRAIN, folder=str(tmp_path / "run"), resume=None, settings=settings)
    try:
        wait_until((tmp_path / "run" / "task-1").is_dir)  # refused until the first task is finished
    finally:
        hub.start()
    hub.fail(r"POST .*/commit/main", status=500, times=2)
    answer = python.answer()
    assert all(fault.hits == fault.times for fault in hub.faults)
    assert tiny.same_results(answer.value, expected[1])
    check_complete(hub.repos["me/run"], tmp_path / "run")


@pytest.mark.slow
def test_connections_cut_in_mid_upload(hub, train, expected, tmp_path):
    hub.fail(r"POST /api/repos/create", cut="before")
    hub.fail(r"PUT /lfs/", cut="body")
    hub.fail(r"POST .*/commit/main", cut="body")
    hub.fail(r"POST .*/commit/main", cut="reply")  # made, but the client does not know
    hub.fail(r"POST .*/tag/", cut="reply")
    answer = train()
    assert all(fault.hits == 1 for fault in hub.faults)
    assert tiny.same_results(answer.value, expected[1])
    check_complete(hub.repos["me/run"], tmp_path / "run")


@pytest.mark.slow
def test_a_refused_token_is_told_at_once_and_the_command_finishes(hub, train, expected, tmp_path, home):
    answer = train(hub_token="hf_notAToken", hub_private_repo=True)
    assert tiny.same_results(answer.value, expected[1])
    assert hub.repos == {}
    assert "UserWarning: Uploading to the Hub failed. The Hub does not recognise the token" in answer.out
    assert "Not on the Hub: task-1, task-2, task-3." in answer.out and "hf_notAToken" not in answer.out
    line = answer.out.rstrip().rpartition("\n")[2].split()
    assert line == f"python -m pgp_hf.hub push {tmp_path / 'run'} --repo_id me/run --private".split()
    done = subprocess.run(
        [sys.executable, *line[1:]], env=environment(hub, home), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == [f"task-{k} uploaded: {hub.url}/me/run/tree/task-{k}" for k in (1, 2, 3)]
    check_complete(hub.repos["me/run"], tmp_path / "run")
    assert hub.repos["me/run"].private


@pytest.mark.slow
def test_a_slow_hub_is_waited_for_no_longer_than_told(hub, train, python, expected, tmp_path):
    gate = threading.Event()
    hub.fail(r"POST .*/commit/main", gate=gate)
    try:
        answer = train(hub_wait=0.1)
        assert tiny.same_results(answer.value, expected[1])
        assert "Not on the Hub: task-1, task-2, task-3. The upload has not finished." in answer.out
        pushed = python(PUSH, argv=[str(tmp_path / "run"), "--repo_id", "me/run"])  # the first is still under way
        assert pushed.value == 0, pushed.out
    finally:
        gate.set()
    wait_until(lambda: any(one.status == 412 for one in hub.requests))  # too late, and it changes nothing
    check_complete(hub.repos["me/run"], tmp_path / "run")


def test_a_hub_that_stays_away_is_reported(hub, python, expected):
    hub.stop()
    try:
        answer = python(PUSH, argv=[str(expected[0]), "--repo_id", "me/run", "--wait", "0.2"])
    finally:
        hub.start()
    assert answer.value == 1 and "Not on the Hub: task-1, task-2, task-3. ConnectError" in answer.out
    assert f"python -m pgp_hf.hub push {expected[0]} --repo_id me/run" in answer.out


@pytest.mark.slow
def test_a_training_that_breaks_off_reports_when_the_program_ends(hub, home, expected, tmp_path):
    script = """
from types import SimpleNamespace
from pgp_hf import PGPTrainingArguments
from pgp_hf.runs.digests import Digests
from pgp_hf.training.pushing import PushTasks
args = PGPTrainingArguments(FOLDER, use_cpu=True, push_to_hub=True, hub_model_id="me/run")
push, state = PushTasks(), SimpleNamespace(is_world_process_zero=True)
push.on_task_end(args, state, None, task=2, results={}, folder=None)
push.uploads.wait(60)
raise FloatingPointError("the loss became nan")
"""
    folder = shutil.copytree(expected[0], tmp_path / "run")
    hub.fail("POST .*/commit/main", status=403, times=None, message="read only")
    done = subprocess.run(
        [sys.executable, "-c", script.replace("FOLDER", repr(str(folder)))],
        env=environment(hub, home),
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 1 and "the loss became nan" in done.stderr
    assert "Not on the Hub: task-1, task-2, task-3. The token has no write access there (403)" in done.stdout
    assert done.stdout.rstrip().endswith(f"python -m pgp_hf.hub push {folder} --repo_id me/run")


# ---- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_package_is_a_command(hub, home, expected):
    def run(*argv):
        command = [sys.executable, "-m", "pgp_hf.hub", *argv]
        return subprocess.run(command, env=environment(hub, home), capture_output=True, text=True, timeout=120)

    told = run("push", "--help")
    assert told.returncode == 0 and told.stdout.startswith("usage: python -m pgp_hf.hub push")
    for option in ("output_dir", "--repo_id", "--private", "--no-private", "--token", "--base_model", "--wait"):
        assert option in told.stdout
    assert run().returncode == run("push", str(expected[0])).returncode == 2  # no command, no repository
    done = run("push", str(expected[0]), "--repo_id", "run")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    check_complete(hub.repos["me/run"], expected[0])


def test_the_console_command_pushes_alike(hub, python, expected):
    code = "from pgp_hf.cli.main import main; result = main(['push', *argv])"
    argv = [str(expected[0]), "run", "--private", "--base_model", "me/backbone"]
    done = python(code, argv=argv)
    assert done.value == 0, done.out
    assert done.out.splitlines() == [f"task-{k} uploaded: {hub.url}/me/run/tree/task-{k}" for k in (1, 2, 3)]
    assert hub.repos["me/run"].private
    assert python(code, argv=argv).out.count("is there already") == 3
    refused = python(code, argv=[str(expected[0].parent), "me/run"])
    assert refused.value == 2 and refused.out.startswith(f"error: {expected[0].parent} holds no finished task")


def test_pushing_again_changes_nothing(hub, python, expected):
    argv = [str(expected[0]), "--repo_id", "team/run"]
    plain, hub.lfs = hub.lfs, lambda path: False  # a Hub that takes everything as plain git files
    try:
        assert python(PUSH, argv=argv).value == 0
    finally:
        hub.lfs = plain
    repo = hub.repos["team/run"]
    check_complete(repo, expected[0])
    before = state(repo)
    hub.requests.clear()
    again = python(PUSH, argv=argv)
    assert again.out.splitlines() == [
        f"task-{k} is there already: {hub.url}/team/run/tree/task-{k}" for k in (1, 2, 3)
    ]
    assert state(repo) == before
    assert [one.path for one in hub.requests if one.method != "GET"] == ["/api/repos/create"]


def test_what_people_do_to_the_repository(hub, python, expected, tmp_path):
    """A card edited by hand, a licence added, a tag lost, a file of an earlier task that is no more."""
    folder = tmp_path / "run"
    for k in (1, 2):
        shutil.copytree(expected[0] / f"task-{k}", folder / f"task-{k}")
    (folder / "task-2" / "optimizer.pt").write_bytes(b"pickle")
    (folder / "task-2" / "figures").mkdir(exist_ok=True)
    (folder / "task-2" / "figures" / "notes.txt").write_text("mine")
    argv = [str(folder), "--repo_id", "me/run"]
    assert python(PUSH, argv=argv).value == 0
    repo = hub.repos["me/run"]
    assert not {"optimizer.pt", "figures/notes.txt"} & set(repo.files())
    repo.edit(**{"README.md": b"---\nlicense: mit\n---\n", "LICENSE": b"text"})
    del repo.tags["task-2"]
    assert python(PUSH, argv=argv).value == 0
    assert repo.tags["task-2"] == repo.main and repo.files()["README.md"].startswith(b"---\nlicense: mit")
    repo.edit(**{"figures/prompt_usage.png": b"old"})
    shutil.copytree(expected[0] / "task-3", folder / "task-3")
    (folder / "task-3" / "figures" / "prompt_usage.png").unlink()
    lost = repo.tags.pop("task-1")
    answer = python(PUSH, argv=argv)
    assert answer.value == 0, answer.out
    assert repo.tags["task-1"] == lost  # restored where it was
    now = repo.files()
    assert now["LICENSE"] == b"text" and "figures/prompt_usage.png" not in now
    assert b"model-index" in now["README.md"] and titles(repo)[-1] == "Task 3 of 3"


def test_published_revisions_are_never_changed(hub, python, expected, tmp_path):
    folder, argv = tmp_path / "other", ["--repo_id", "me/run"]
    assert python(PUSH, argv=[str(expected[0]), *argv]).value == 0
    repo = hub.repos["me/run"]
    before = state(repo)
    shutil.copytree(expected[0], folder)
    results = json.loads((folder / "task-1" / "results.json").read_text())
    (folder / "task-1" / "results.json").write_text(json.dumps({**results, "seed": 77}))
    answer = python(PUSH, argv=[str(folder), *argv])
    assert answer.value == 1 and "results.json is not the file that the run wrote" in answer.out
    Digests.of(folder / "task-1").write()
    answer = python(PUSH, argv=[str(folder), *argv])
    assert answer.value == 1 and "its task-1 differs from the one here in results.json" in answer.out
    del repo.tags["task-1"]
    answer = python(PUSH, argv=[str(folder), *argv])
    assert answer.value == 1 and "me/run already holds task-2, task-3, and main never goes back" in answer.out
    repo.tags["task-1"] = before[1]["task-1"]
    code = """
    from types import SimpleNamespace
    from pgp_hf import PGPTrainingArguments
    from pgp_hf.training.pushing import PushTasks
    args = PGPTrainingArguments(folder, use_cpu=True, push_to_hub=True, hub_model_id="me/run")
    for first_task in (1, 0):  # a resumed run, a new one
        push = PushTasks()
        push.on_stream_begin(args, SimpleNamespace(is_world_process_zero=True), None, first_task=first_task)
        push.uploads.wait(60)
        print(first_task, push.uploads.error)
    """
    out = python(code, folder=str(folder)).out
    assert (
        "1 me/run holds another run: its task-1 differs" in out and "0 me/run already holds a run (tag task-1)" in out
    )
    assert state(repo) == before


@pytest.mark.parametrize(
    "options, code, message",
    [
        (["--repo_id", "me/run", "--token", READER], 1, "The token has no write access there (403)"),
        (["--repo_id", "me/run", "--token", STRANGER], 1, "The token has no write access there (403)"),
        (["--repo_id", "elsewhere/run"], 1, "The token has no write access there (403)"),
        (["--repo_id", "me/run/task-1"], 2, "repo_id='me/run/task-1' is not 'name' or 'owner/name'"),
        (["--repo_id", "me/run", "--base_model", "/models/vit"], 2, "base_model='/models/vit' is not"),
        (["--repo_id", "me/open", "--private"], 1, "me/open exists and is public"),
    ],
)
def test_refusals(hub, python, expected, options, code, message):
    hub.repos["me/open"] = Repo("me/open", private=False)
    answer = python(PUSH, argv=[str(expected[0]), *options])
    assert answer.value == code and message in answer.out
    assert READER not in answer.out and STRANGER not in answer.out
    assert set(hub.repos) == {"me/open"} and len(hub.repos["me/open"].commits) == 1


def test_private_repositories_are_closed_to_strangers(hub, python, expected):
    assert python(PUSH, argv=[str(expected[0]), "--repo_id", "team/run", "--private"]).value == 0
    code = """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RepositoryNotFoundError
    try:
        result = hf_hub_download("team/run", "results.json", revision="task-2", token=token)
    except RepositoryNotFoundError:
        result = None
    """
    assert python(code, token=STRANGER).value is None and python(code, token=False).value is None
    downloaded = Path(python(code, token=READER).value)
    assert downloaded.read_bytes() == (expected[0] / "task-2" / "results.json").read_bytes()


def test_a_folder_without_tasks(hub, python, tmp_path):
    answer = python(PUSH, argv=[str(tmp_path), "--repo_id", "me/run"])
    assert answer.value == 2 and "holds no finished task" in answer.out and hub.repos == {}


@pytest.mark.parametrize(
    ("average", "lost", "said"),
    [(71.234, 2.0, "71.23 %, forgetting 2.00"), (71.234, None, "71.23 %"), (None, None, "not measured")],
)
def test_a_commit_says_what_was_measured(average, lost, said):
    results = {"num_tasks": 4, "average_accuracy": average, "forgetting": lost}
    assert _title(2, results) == f"Task 3 of 4: average accuracy {said}"
