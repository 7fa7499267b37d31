"""Started by test_two_processes.py under accelerate: the same tiny run, and how many processes it had."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny  # noqa: E402

if __name__ == "__main__":
    folder, batch = Path(sys.argv[1]), int(sys.argv[2])
    trainer = tiny.trainer(folder, per_device_train_batch_size=batch, augmentation="crop_flip")
    trainer.train()
    rows = {name: info["samples"] for name, info in trainer.projection.info.items()}
    (folder / f"rank-{trainer.accelerator.process_index}.json").write_text(
        json.dumps({"processes": trainer.accelerator.num_processes, "samples": rows, "drift": trainer.results.drift})
    )
    trainer.end()
