r"""Learn a stream of tasks with CLIP prompts, with gradient projection and without.

    accelerate launch examples/run_clip_pgp.py

runs on what the package ships (a small CLIP model, scikit-learn's handwritten digits): no network, under three minutes on
two CPU cores. Three runs end in one table and a verdict: functional projection with a head of class statistics (in
out/clip_pgp), its twin without projection (in baseline/), and PGP as published (in published/). Any option of the
projection or of the head trains what it says and its twin, as do a backbone and data of your own, from the Hub or from
local folders:

    accelerate launch examples/run_clip_pgp.py --model_name_or_path openai/clip-vit-base-patch16 \
        --dataset_name uoft-cs/cifar100 --label_column_name fine_label --num_tasks 10 --output_dir out/clip_cifar100

`--preset cifar100-10` uses the published settings; `--preset cifar100-10 --dry_run` prints them. For several processes:
`accelerate launch --multi_gpu --num_processes 2 ...` (on CPUs, put ACCELERATE_USE_CPU=1 in front). To continue an
interrupted run, repeat the command with `--resume_from_checkpoint true`.

`config.yaml --seed 1` takes options from a YAML or JSON file, over which those on the command line win. This script is
`pgp-hf train clip`: the model is made in `pgp_hf/cli/trainings.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pgp_hf.cli import console, train


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and print the comparison."""
    train.train("clip", argv)


if __name__ == "__main__":
    sys.exit(console.run(main))
