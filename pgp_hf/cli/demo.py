"""Show in the browser what a run predicts after each of its tasks, and which prompts it selects.

    pgp-hf demo out/l2p_pgp
    pgp-hf demo me/l2p-pgp-cifar100 --port 8000

The run is the output folder of a training or a repository on the Hub. A slider chooses the task after which to predict;
images are uploaded or pasted, and a run on the embedded digits comes with samples. Without an argument the page shows
out/l2p_pgp, where `pgp-hf train l2p` leaves its run.

The page needs gradio (`pip install gradio`, or the extra `demo` of this package). It is served to this machine only,
without telemetry; nothing but a repository and its backbone is downloaded.
"""

import argparse  # no `annotations` from __future__: gradio finds the event argument by its annotation, if not a string
import html
import os
import sys
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError
from PIL import Image

from .. import embedded, metrics
from ..inference import PromptClassifier, load_pretrained
from ..runs.checks import finished_tasks, first_task
from ..runs.sources import TASK

DEFAULT_RUN = Path("out/l2p_pgp")
TOP = 5  # predictions shown
KEPT = 4  # revisions in memory, each with its own backbone
NAMED = 20  # classes named; the others of a task are counted
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
"""


class Revisions:
    """Load a run's task revisions on demand, and compute what the page shows of them, without gradio.

    Args:
        run: a run's folder, one of its task folders, or a repository on the Hub.
        backbone: the frozen model's Hub id or folder, if the run does not name it.

    Attributes:
        tasks: 1-based numbers of the revisions `task-1`, ...; `[0]` if `run` is a single revision without such a name.
        load: returns the classifier of one of them.
        samples: images to try, with their class names: one for each class, in the order in which they are learned.

    Raises:
        ValueError, OSError: as `load_pretrained`, of the last revision.
    """

    def __init__(self, run: str, backbone: str | None = None) -> None:
        self.tasks = find_tasks(run) or [0]
        self.load = lru_cache(KEPT)(
            lambda task: load_pretrained(run, f"task-{task}" if task else None, backbone=backbone)
        )
        self.samples = samples(self.load(self.tasks[-1]).manifest)

    def show(self, task: int, image: str | None) -> tuple[str, dict[str, float] | None, str]:
        """Return what is known after a task, the best predictions (probability by class) and the selected prompts."""
        classifier = self.load(int(task))
        if image is None:
            return known(classifier), None, ""
        (found,) = classifier.classify(image, top_k=TOP)
        scores = {label["label"]: label["score"] for label in found.labels}
        return known(classifier), scores, pool(classifier.pool_size, found.prompts)


def find_tasks(run: str) -> list[int]:
    """Return the numbers of the finished tasks in a folder, or among the tags of a repository."""
    if Path(run).is_dir():
        names = [folder.name for folder in Path(run).iterdir() if folder.is_dir()]
    else:
        try:
            names = [tag.name for tag in HfApi().list_repo_refs(run).tags]
        except HFValidationError as error:
            raise ValueError(f"{run!r} is neither a folder here nor the id of a repository on the Hub.") from error
        except HTTPError as error:
            raise ConnectionError(
                f"the tags of {run!r} cannot be read: name a run's folder instead. {error}"
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
    names = ", ".join(html.escape(classifier.id2label[c]) for c in brought[:NAMED])
    more = f" and {len(brought) - NAMED} more" if len(brought) > NAMED else ""
    return (
        f"<p class='count'>{len(classifier.classes)} of {everything} classes known</p>"
        f"<p>after {after}, which brought: {names}{more}.<br>{accuracy}.</p>"
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
        gr.Markdown(f"# {html.escape(title)}\nWhat the run predicts after each of its tasks. No task id is given.")
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

        def pick(event: gr.SelectData) -> Image.Image:
            return images[event.index][0]

        gallery.select(pick, None, image, show_progress="hidden", api_visibility="private")
        changes = [page.load, slider.change, image.change]
        gr.on(changes, revisions.show, [slider, image], [text, label, strip], show_progress="minimal",
              trigger_mode="always_last", concurrency_limit=1, api_visibility="private")  # fmt: skip
    return page


def main(argv: Sequence[str] | None = None, prog: str | None = None, description: str | None = __doc__) -> int:
    """Serve the page until interrupted; return 1 if that is not possible.

    Args:
        argv: the command line without the program, `sys.argv[1:]` by default.
        prog: name of the program in its help.
        description: shown by `--help`.
    """
    args = parse(argv, prog, description)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    try:
        import gradio as gr
    except ModuleNotFoundError as error:
        return fail(f"the page needs gradio ({error}): pip install gradio")
    if args.run is None and not DEFAULT_RUN.is_dir():
        return fail(
            f"no run is given, and there is none in {DEFAULT_RUN}. Make one with `pgp-hf train l2p` "
            "(a few minutes on a CPU), or name a run's folder or a repository on the Hub."
        )
    run = args.run or str(DEFAULT_RUN)
    with tempfile.TemporaryDirectory() as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        try:
            page = build(gr, Revisions(run, args.backbone), run)
            page.launch(
                server_port=args.port, share=args.share == "true", show_error=True, ssr_mode=False, footer_links=[],
                theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]), css=CSS,
            )  # fmt: skip
        except (ValueError, OSError) as error:
            return fail(str(error))
    return 0


def fail(message: str) -> int:
    """Print an error; return the exit code."""
    print(f"error: {message}", file=sys.stderr)
    return 1


def parse(argv: Sequence[str] | None, prog: str | None = None, description: str | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", help=f"a run's folder or a repository on the Hub (default: {DEFAULT_RUN})")
    parser.add_argument("--backbone", help="Hub id or folder of the frozen model, if the run does not name it")
    parser.add_argument("--port", type=int, help="port of the page (default: the first free one from 7860)")
    parser.add_argument("--share", choices=("true", "false"), default="false",
                        help="true makes a public link through gradio's server (default: false)")  # fmt: skip
    return parser.parse_args(argv)
