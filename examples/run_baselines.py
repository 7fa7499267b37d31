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

`config.yaml --seed 1` takes options from a YAML or JSON file, over which those on the command line win. This script is
`pgp-hf train baseline`: the model is made in `pgp_hf/cli/trainings.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pgp_hf.cli import console, train


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and print the comparison."""
    train.train("baseline", argv)


if __name__ == "__main__":
    sys.exit(console.run(main))
