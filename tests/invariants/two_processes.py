"""Work of each process of test_two_processes.py: the same tiny run, and how many processes it had."""

from __future__ import annotations

import json
from pathlib import Path

import tiny

from pgp_hf import PGPTrainer, ProjectionConfig, TaskStream
from pgp_hf.projection import moments


def learned(folder: Path, **settings: object) -> PGPTrainer:
    """Return a trainer that has learned three surprises, the last of them after loading the run again."""
    first = folder.with_name(f"{folder.name}-first")
    tiny.backbone("backbone").save_pretrained(first / "backbone")
    model = tiny.model(head="statistics", kind="backbone")
    model.base_model.adapter_config.base_model_name_or_path = str(first / "backbone")
    data, classes = tiny.data(), [(0, 1), (2, 3), (4, 5)]
    parts = [data.filter(lambda label, own=own: label in own, input_columns="label") for own in classes]
    trainer = tiny.trainer(first / "run", model=model, stream=TaskStream.empty(seed=0), **settings)
    for part in parts[:2]:
        trainer.learn(part)
    args = trainer.args
    args.output_dir = str(folder)
    trainer = PGPTrainer.from_pretrained(first / "run", args=args, test_dataset=data["test"])
    trainer.learn(parts[2])
    return trainer


def work(folder: Path, batch: int, method: str) -> None:
    """Train in this process, and leave what it had in `folder`."""
    surprises, method = method == "surprises", method.replace("surprises", "functional")
    moments.SKETCH = 23  # the functional method's gradients, of 48 values, are kept as a sketch
    model, projection = tiny.model(head="statistics"), ProjectionConfig(method=method, energy=0.9, key_energy=0.9)
    settings = {"per_device_train_batch_size": batch, "augmentation": "flip", "projection": projection}
    if surprises:
        trainer = learned(folder, compensate_drift=True, **settings)
    else:
        trainer = tiny.trainer(folder, model=model, compensate_drift=True, **settings)
        trainer.train()
    rows = {name: info["samples"] for name, info in trainer.projection.info.items()}
    (folder / f"rank-{trainer.accelerator.process_index}.json").write_text(
        json.dumps({"processes": trainer.accelerator.num_processes, "samples": rows, "drift": trainer.results.drift})
    )
    trainer.end()
