"""Started by test_two_processes.py under accelerate: the same tiny run, and how many processes it had."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny  # noqa: E402

from pgp_hf import ProjectionConfig  # noqa: E402
from pgp_hf.projection import moments  # noqa: E402

if __name__ == "__main__":
    folder, batch, method = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    moments.SKETCH = 23  # the functional method's gradients, of 48 values, are kept as a sketch
    model, projection = tiny.model(head="statistics"), ProjectionConfig(method=method, energy=0.9, key_energy=0.9)
    settings = {"per_device_train_batch_size": batch, "augmentation": "flip", "projection": projection}
    trainer = tiny.trainer(folder, model=model, compensate_drift=True, **settings)
    trainer.train()
    rows = {name: info["samples"] for name, info in trainer.projection.info.items()}
    (folder / f"rank-{trainer.accelerator.process_index}.json").write_text(
        json.dumps({"processes": trainer.accelerator.num_processes, "samples": rows, "drift": trainer.results.drift})
    )
    trainer.end()
