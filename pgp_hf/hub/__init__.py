"""Finished tasks on the Hugging Face Hub: one commit on `main` and one tag a task.

python -m pgp_hf.hub push OUTPUT_DIR --repo_id USER/NAME
"""

from .push import Pushed, PushError, TaskRepo, command, main, missing, push
from .snapshot import UPLOADED_FILES, listed, snapshot

__all__ = [
    "UPLOADED_FILES",
    "PushError",
    "Pushed",
    "TaskRepo",
    "command",
    "listed",
    "main",
    "missing",
    "push",
    "snapshot",
]
