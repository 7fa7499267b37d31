"""Started by test_signals.py in two processes, or with workers of data loaders: a run that is signalled, and resumed."""

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny  # noqa: E402
from transformers import TrainerCallback  # noqa: E402


class SignalAt(TrainerCallback):
    """Send SIGTERM to this process, or to its group, within the third step of the second task."""

    def __init__(self, group: bool) -> None:
        self.group, self.task = group, 0

    def on_task_begin(self, *args: object, task: int, **kwargs: object) -> None:
        self.task = task

    def on_pre_optimizer_step(self, args: object, state: object, control: object, **kwargs: object) -> None:
        if self.task == 1 and state.global_step == 2:
            (os.killpg if self.group else os.kill)(os.getpgid(0) if self.group else os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    folder, workers = Path(sys.argv[1]), int(sys.argv[2])
    rank = int(os.environ.get("RANK", 0))
    settings = {"per_device_train_batch_size": 2, "dataloader_num_workers": workers, "save_strategy": "no"}
    with tiny.without_figures():
        tiny.trainer(folder / "straight", **settings).train()
        received = workers or rank == 1
        callbacks = [SignalAt(bool(workers))] if received else []
        code = None
        try:
            tiny.trainer(folder / "stopped", callbacks=callbacks, **settings).train()
        except SystemExit as stopped:
            code = stopped.code
        again = tiny.trainer(folder / "stopped", **settings)
        again.train(resume_from_checkpoint=True)
        (folder / f"rank-{rank}.json").write_text(json.dumps({"code": code}))
        again.accelerator.end_training()
    sys.exit(code)
