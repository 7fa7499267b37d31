"""Show in the browser what a run predicts after each of its tasks, and which prompts it selects.

    pgp-hf demo out/l2p_pgp
    pgp-hf demo me/l2p-pgp-cifar100 --port 8000

The run is the output folder of a training or a repository on the Hub. A slider chooses the task after which to predict,
and a table shows how the answer has changed over the tasks. Images are uploaded or pasted; samples come with a run that
has kept some (`--keep_samples 2`) and with one on the embedded digits. Without an argument the page shows out/l2p_pgp,
where `pgp-hf train l2p` leaves its run.

The page needs gradio (`pip install gradio`, or the extra `demo` of this package). It is served to this machine only,
without telemetry; nothing but a repository and its backbone is downloaded.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .console import Parser, whole

DEFAULT_RUN = Path("out/l2p_pgp")


def main(argv: Sequence[str] | None = None, prog: str | None = None, description: str | None = __doc__) -> int:
    """Serve the page until interrupted.

    Args:
        argv: the command line without the program, `sys.argv[1:]` by default.
        prog: name of the program in its help.
        description: shown by `--help`.

    Raises:
        ImportError: gradio is missing.
        ValueError, OSError: no run, or one that is refused.
    """
    args = parse(argv, prog, description)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    try:
        import gradio as gr
    except ModuleNotFoundError as error:
        raise ImportError(f"the page needs gradio ({error}): pip install gradio") from error
    if args.run is None and not DEFAULT_RUN.is_dir():
        raise ValueError(
            f"no run is given, and there is none in {DEFAULT_RUN}. Make one with `pgp-hf train l2p` "
            "(a few minutes on a CPU), or name a run's folder or a repository on the Hub."
        )
    from . import demo_page  # after the help, since it takes seconds

    run = args.run or str(DEFAULT_RUN)
    with tempfile.TemporaryDirectory() as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        revisions = demo_page.Revisions(run, args.backbone)
        page = demo_page.build(gr, revisions, revisions.title)
        page.launch(
            server_port=args.port, share=args.share == "true", show_error=True, ssr_mode=False, footer_links=[],
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]), css=demo_page.CSS,
        )  # fmt: skip
    return 0


def parse(argv: Sequence[str] | None, prog: str | None = None, description: str | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help=f"a run's folder or a repository on the Hub (default: {DEFAULT_RUN})")
    parser.add_argument("--backbone", help="Hub id or folder of the frozen model, if the run does not name it")
    parser.add_argument(
        "--port", type=whole(0, 65535), help="port of the page (default: the first free one from 7860)"
    )
    parser.add_argument("--share", choices=("true", "false"), default="false",
                        help="true makes a public link through gradio's server (default: false)")  # fmt: skip
    return parser.parse_args(argv)
