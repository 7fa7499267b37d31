"""Make the page of `pgp-hf demo`: what a run predicts after each of its tasks, and which prompts it selects."""

# no `annotations` from __future__: gradio finds the event argument by its annotation, if not a string
import html
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from PIL import Image

from .. import embedded, metrics
from ..data.markup import shorten_names
from ..inference import PromptClassifier, load_pretrained
from ..report.names import public_name
from ..report.sentences import dataset_names
from ..runs.checks import finished_tasks, first_task
from ..runs.folder import SAMPLE, RunFolder
from ..runs.sources import TASK, check_id

TOP = 5  # predictions shown
KEPT = 4  # revisions in memory, each with its own backbone
NAMED = 20  # classes named; the others of a task are counted
FOLLOWED = 10  # tasks after which the answer is shown; of more, some at equal distances
METHODS = {"l2p": "L2P", "dualprompt": "DualPrompt", "clip_prompt": "CLIP prompts", "ewc": "EWC", "lwf": "LwF"}
PROJECTIONS = {"pgp": "PGP", "none": None}
CSS = """
#image .image-frame img { width: 100%; height: 100%; object-fit: contain }
#samples .grid-wrap { height: auto; min-height: 0; overflow: hidden; padding-top: 2.4em }
#samples .grid-container { grid-template-columns: repeat(auto-fill, minmax(3em, 1fr)) }
#samples .thumbnail-item { aspect-ratio: auto; height: auto }
#samples .thumbnail-item img { aspect-ratio: 1 }
#samples .caption-label { position: static; max-width: none; padding: 2px 0; border: 0; text-align: center }
#prompts { padding-top: 1.2em }
#prompts .pool { display: flex; flex-wrap: wrap; gap: 4px; margin: 6px 0 }
#prompts .entry { min-width: 2.2em; padding: 6px 4px; text-align: center; border-radius: 4px;
    border: 1px solid var(--border-color-primary); color: var(--body-text-color) }
#prompts .selected { background: var(--primary-600); border-color: var(--primary-600); color: white; font-weight: 600 }
#known .count { font-size: var(--text-xl); font-weight: 600 }
#history table { width: 100%; border-collapse: collapse }
#history td { padding: 4px 8px; border-bottom: 1px solid var(--border-color-primary) }
#history .changed td:nth-child(2) { font-weight: 600 }
#history .bar { height: 0.5em; border-radius: 2px; background: var(--primary-600) }
"""


class Revisions:
    """Load a run's task revisions on demand, and compute what the page shows of them, without gradio.

    Args:
        run: a run's folder, one of its task folders, or a repository on the Hub.
        backbone: the frozen model's Hub id or folder, if the run does not name it.

    Attributes:
        tasks: 1-based numbers of the revisions `task-1`, ...; `[0]` if `run` is a single revision without such a name.
        load: returns the classifier of one of them.
        title: what was learned, and by what, for the heading of the page.
        samples: images to try, with their class names, in the order in which these are learned.

    Raises:
        ValueError, OSError: as `load_pretrained`, of the last revision.
    """

    def __init__(self, run: str, backbone: str | None = None) -> None:
        self.tasks = find_tasks(run) or [0]
        self.load = lru_cache(KEPT)(
            lambda task: load_pretrained(run, f"task-{task}" if task else None, backbone=backbone)
        )
        classifier = self.load(self.tasks[-1])
        self.title = title(classifier, run)
        self.samples = kept_samples(run, classifier.manifest) or samples(classifier.manifest)
        self.answers = lru_cache(64)(self._answers)

    def show(self, task: int, image: str | None) -> tuple[str, dict[str, float] | None, str]:
        """Return what is known after a task, the best predictions (probability by class) and the selected prompts."""
        classifier = self.load(int(task))
        if image is None:
            return known(classifier), None, ""
        (found,) = classifier.classify(image, top_k=TOP)
        scores = {label["label"]: label["score"] for label in found.labels}
        return known(classifier), scores, pool(classifier.pool_size, found.prompts)

    def history(self, image: str | None) -> str:
        """Return as HTML the best prediction after each task, or after some of many; empty without an image."""
        return "" if image is None or len(self.tasks) < 2 else follow(self.answers(image))

    def _answers(self, image: str) -> list[tuple[int, int, str, float]]:
        """Return by task its number, the number of classes known, and the best label with its score."""
        last, found = len(self.tasks) - 1, []
        places = range(last + 1) if last < FOLLOWED else [round(k * last / (FOLLOWED - 1)) for k in range(FOLLOWED)]
        for task in (self.tasks[place] for place in places):
            classifier = self.load(task)
            (best,) = classifier.classify(image, top_k=1)
            label = best.labels[0]
            found.append((task, len(classifier.classes or classifier.id2label), label["label"], label["score"]))
        return found


def follow(answers: Sequence[tuple[int, int, str, float]]) -> str:
    """Return a table in HTML of answers after tasks; those that differ from the one before are bold."""
    rows, before = [], None
    for task, known, label, score in answers:
        changed = " class='changed'" if label != before else ""
        rows.append(
            f"<tr{changed}><td>after task {task} ({known} classes)</td><td>{html.escape(label)}</td>"
            f"<td>{100 * score:.0f} %</td><td><div class='bar' style='width: {4 * score:.2f}em'></div></td></tr>"
        )
        before = label
    times = len([1 for one, other in zip(answers, answers[1:], strict=False) if one[2] != other[2]])
    said = "It has never changed." if not times else f"It has changed {times} time{'s' if times > 1 else ''}."
    return f"<table>{''.join(rows)}</table><p>{said} A class cannot be the answer before its task.</p>"


def title(classifier: PromptClassifier, run: str) -> str:
    """Return what was learned, and by what; the last part of the run's name for an adapter without a run."""
    results, manifest = classifier.results, classifier.manifest
    if results is None or manifest is None:
        return public_name(run)
    method, projection = results.get("method", "A model"), results.get("projection", "none")
    by = METHODS.get(method, method.replace("_", " "))
    protected = PROJECTIONS.get(projection, f"{projection} projection")
    names = [public_name(name) for name in dataset_names(manifest)]
    digits = manifest["label_names"] == list(embedded.DIGIT_NAMES)
    data = "handwritten digits" if digits else " and ".join(names) or f"{len(manifest['label_names'])} classes"
    tasks = finished_tasks(results)
    return f"{by}{f' with {protected}' if protected else ''} on {data}, after {tasks} task{'s' if tasks > 1 else ''}"


def kept_samples(run: str, manifest: dict[str, Any] | None) -> list[tuple[Image.Image, str]]:
    """Return the test images that a local run has kept, with their class names, in the order of the tasks."""
    if manifest is None or not Path(run).is_dir():
        return []
    found: dict[int, list[Path]] = {}
    for path in RunFolder(run).samples():
        if match := SAMPLE.fullmatch(path.name):
            found.setdefault(int(match[1]), []).append(path)
    names, order = manifest["label_names"], dict.fromkeys(c for task in manifest["tasks"] for c in task["classes"])
    return [(Image.open(path).convert("RGB"), names[c]) for c in order for path in found.get(c, ())]


def find_tasks(run: str) -> list[int]:
    """Return the numbers of the finished tasks in a folder, or among the tags of a repository."""
    if Path(run).is_dir():
        names = [folder.name for folder in Path(run).iterdir() if folder.is_dir()]
    else:
        repo = check_id(run, "a run's folder")
        try:
            names = [tag.name for tag in HfApi().list_repo_refs(repo).tags]
        except HTTPError as error:
            raise ConnectionError(
                f"there is no folder {run} here, and the tags of a repository {run} cannot be read: {error}"
            ) from error
    return sorted(int(match[1]) for name in names if (match := TASK.fullmatch(name)))


def samples(manifest: dict[str, Any] | None) -> list[tuple[Image.Image, str]]:
    """Return a test image of each class with its name if the run has learned the embedded digits; else none."""
    if manifest is None or manifest["label_names"] != list(embedded.DIGIT_NAMES):
        return []
    test = embedded.digits()["test"]
    labels, order = list(test["label"]), [c for task in manifest["tasks"] for c in task["classes"]]
    return [(test[labels.index(c)]["image"], embedded.DIGIT_NAMES[c]) for c in order]


def known(classifier: PromptClassifier) -> str:
    """Return as HTML how many classes are known, which ones the last task brought, and the results so far."""
    everything, manifest, results = len(classifier.id2label), classifier.manifest, classifier.results
    if manifest is None or results is None or classifier.classes is None:
        return f"<p class='count'>{everything} of {everything} classes known</p><p>An adapter without a run.</p>"
    count, summary = finished_tasks(results), metrics.summarize(results["accuracy_matrix"], finished_tasks(results))
    brought, after = manifest["tasks"][count - 1]["classes"], f"task {count} of {manifest['num_tasks']}"
    if first_task(results):
        brought, after = classifier.classes, f"{count} tasks, learned as one"
    average, lost = summary["average_accuracy"], summary["forgetting"]
    accuracy = "Average accuracy not measured" if average is None else f"Average accuracy {average:.1f} %"
    accuracy += "" if lost is None else f", forgetting {lost:.1f} points"
    names = shorten_names([html.escape(classifier.id2label[c]) for c in brought], NAMED)
    return (
        f"<p class='count'>{len(classifier.classes)} of {everything} classes known</p>"
        f"<p>after {after}, which brought: {names}.<br>{accuracy}.</p>"
    )


def pool(size: int | None, selected: list[int] | None) -> str:
    """Return the prompt pool as a strip in HTML, with the selected entries marked."""
    if size is None or selected is None:
        return "<p>This method selects nothing: every image gets the same prompts.</p>"
    cells = "".join(f"<span class='entry{' selected' if i in selected else ''}'>{i}</span>" for i in range(size))
    return f"<div class='pool'>{cells}</div><p>Nearest key first: {', '.join(map(str, selected)) or 'none'}</p>"


def build(gr: Any, revisions: Revisions, title: str) -> Any:
    """Return the page, as `gradio.Blocks`.

    Args:
        gr: the module gradio, which is imported on demand.
        revisions: what to show.
        title: heading of the page.
    """
    first, last, images = revisions.tasks[0], revisions.tasks[-1], revisions.samples
    with gr.Blocks(title=title, analytics_enabled=False) as page:
        gr.Markdown(f"# {html.escape(title)}\nWhat it predicts after each of its tasks. No task id is given.")
        with gr.Row():
            with gr.Column():
                image = gr.Image(
                    images[0][0] if images else None, label="Image", type="filepath", image_mode=None, format="png",
                    sources=["upload", "clipboard"], height=300, elem_id="image",
                )  # fmt: skip
                gallery = gr.Gallery(
                    images, label="Samples: test images, in the order of their tasks", format="png", columns=10,
                    height="auto", allow_preview=False, interactive=False, buttons=[], visible=bool(images),
                    elem_id="samples",
                )  # fmt: skip
            with gr.Column():
                slider = gr.Slider(
                    first, max(last, first + 1), last, step=1, label="State after task", visible=first < last,
                    elem_id="task",
                )  # fmt: skip
                text = gr.HTML(elem_id="known")
                label = gr.Label(num_top_classes=TOP, label="Prediction", elem_id="prediction")
                strip = gr.HTML(label="Selected prompts", show_label=True, container=True, elem_id="prompts")
                history = gr.HTML(
                    label="The answer over the tasks", show_label=True, container=True, visible=first < last,
                    elem_id="history",
                )  # fmt: skip

        def pick(event: gr.SelectData) -> Image.Image:
            return images[event.index][0]

        gallery.select(pick, None, image, show_progress="hidden", api_visibility="private")
        changes = [page.load, slider.change, image.change]
        gr.on(changes, revisions.show, [slider, image], [text, label, strip], show_progress="minimal",
              trigger_mode="always_last", concurrency_limit=1, api_visibility="private")  # fmt: skip
        gr.on([page.load, image.change], revisions.history, [image], [history], show_progress="minimal",
              trigger_mode="always_last", concurrency_limit=1, api_visibility="private")  # fmt: skip
    return page
