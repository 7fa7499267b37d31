r"""Learn a stream of tasks with a method that trains the model itself, to compare prompts with.

    accelerate launch examples/run_baselines.py --method ewc

runs on what the package ships (a small backbone, scikit-learn's handwritten digits): no network, about a minute on a
CPU. `--method ewc --help` shows the settings of that method. `--method all` trains one method after another and writes
one table; repeated, the command skips finished runs and resumes an interrupted one. With your own backbone and data,
from the Hub or from local folders:

    accelerate launch examples/run_baselines.py --method all --model_name_or_path google/vit-base-patch16-224-in21k \
        --dataset_name uoft-cs/cifar100 --label_column_name fine_label --num_tasks 10 --output_dir out/cifar100

`--trainable` says what of the model learns: all of it (the default), last:N, head or lora:R. Whatever learns has a
learning rate of 5e-5, the head one of 1e-3, both with cosine decay within each task; batches of 16, AdamW without
weight decay, a fresh optimizer for each task, and gradients clipped at norm 1. Five epochs per task are the default,
three for the digits. `--preset` names a data set with this recipe, a second recipe, or one of each:

    accelerate launch examples/run_baselines.py --method all --preset imagenet-r-10 sgd-1e-3
"""

from __future__ import annotations

from peft import PeftModel
from transformers import PreTrainedModel

from pgp_hf import TaskStream, set_trainable
from pgp_hf.cli.baseline_arguments import parse
from pgp_hf.cli.baselines import run


def main() -> None:
    arguments = parse(__doc__)

    def make_model(stream: TaskStream) -> PreTrainedModel | PeftModel:
        backbone = arguments.model.backbone(stream, resize=True)
        return set_trainable(backbone, arguments.run.trainable)

    run(arguments, make_model)


if __name__ == "__main__":
    main()
