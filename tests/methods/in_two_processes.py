"""Started by test_in_two_processes.py under accelerate: the same tiny run of a method, and what each process remembers."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from pgp_hf import PGPTrainingArguments, StreamTrainer, methods  # noqa: E402
from pgp_hf.report import figures  # noqa: E402

SETTINGS = {
    "ewc": {"strength": 300.0},
    "derpp": {"memory_size": 9},
    "lwf": {"strength": 5.0},
    "icarl": {"memory_size": 9},
    "bic": {"memory_size": 16, "validation_share": 0.25},
    "der_mcg": {"memory_size": 16, "tuning_epochs": 4, "gate_epochs": 2, "gate_batch_size": 6},
    "gpm": {"energy": 0.8},
    "null_space_adam": {"energy": 0.8},
}
PLAIN = ("der_mcg", "gpm", "null_space_adam")  # methods for models without prompts

if __name__ == "__main__":
    folder, batch, name = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    figures.save_figures = lambda *args: []
    args = PGPTrainingArguments(
        str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=batch,
        learning_rate=0.01,
        augmentation="flip",
        disable_tqdm=True,
        optim="sgd",
    )
    method = methods.create(name, **SETTINGS[name])
    trainer = StreamTrainer(
        tiny.plain() if name in PLAIN else tiny.model(), args, tiny.stream(), method, tiny.processor()
    )
    trainer.train_task(0)
    trainer.train_task(1)
    state = method.state()
    numbers = {key: torch.tensor(value) for key, value in state.values.items() if isinstance(value, float)}
    tensors = {**numbers, **{key: tensor.clone() for key, tensor in state.tensors.items()}}
    save_file(tensors, folder / f"rank-{args.process_index}-of-{args.world_size}.safetensors")
    trainer.accelerator.end_training()
