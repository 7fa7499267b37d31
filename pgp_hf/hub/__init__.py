"""Share finished tasks on the Hugging Face Hub, each as one commit on `main` and one tag.

python -m pgp_hf.hub push OUTPUT_DIR --repo_id OWNER/NAME
"""

from .command_line import main
from .origin import check_origin, choose_repo, origin_of
from .push import Outcome, Pushed, PushError, TaskRepo, check_license, command, missing, push
from .snapshot import UPLOADED_FILES, listed, snapshot

__all__ = [
    "UPLOADED_FILES",
    "Outcome",
    "PushError",
    "Pushed",
    "TaskRepo",
    "check_license",
    "check_origin",
    "choose_repo",
    "command",
    "listed",
    "main",
    "missing",
    "origin_of",
    "push",
    "snapshot",
]
