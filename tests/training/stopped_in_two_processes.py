"""Started by test_checkpoints.py under accelerate: a run with dropout, straight, and stopped and continued."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny  # noqa: E402
import torch  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from pgp_hf.methods import FineTuning  # noqa: E402


class Draws(TrainerCallback):
    """Draws a number at each step that another process does not draw, and stops at one."""

    def __init__(self, rank: int, last: int) -> None:
        self.rank, self.last, self.seen = rank, last, {}

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            torch.manual_seed(self.rank)
        self.seen[state.global_step] = float(torch.rand(()))

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.last:
            raise KeyboardInterrupt


def train(folder: Path, last: int, resume: bool = False) -> tuple[dict, int]:
    model = tiny.plain("full", tiny.backbone(hidden_dropout_prob=0.2))
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "per_device_train_batch_size": 2}
    trainer = tiny.trainer(folder, model=model, method=FineTuning(), stream=tiny.stream(num_tasks=1), **settings)
    draws = Draws(trainer.accelerator.process_index, last)
    trainer.add_callback(draws)
    try:
        trainer.train(resume_from_checkpoint=resume)
    except KeyboardInterrupt:
        trainer.accelerator.wait_for_everyone()
    return draws.seen, trainer.accelerator.process_index


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with tiny.without_figures():
        straight, rank = train(folder / "straight", 100)
        train(folder / "stopped", 5)
        torch.manual_seed(99)
        resumed, _ = train(folder / "stopped", 100, resume=True)
    (folder / f"rank-{rank}.json").write_text(json.dumps([straight, resumed]))
    torch.distributed.destroy_process_group()
