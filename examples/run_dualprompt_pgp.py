r"""Learn a stream of tasks with DualPrompt twice: without projection, and with the general prefixes projected (PGP).

    accelerate launch examples/run_dualprompt_pgp.py

runs on what the package ships (a small backbone, scikit-learn's handwritten digits): no network, a few minutes on a
CPU. With your own backbone and data, from the Hub or from local folders:

    accelerate launch examples/run_dualprompt_pgp.py --model_name_or_path google/vit-base-patch16-224-in21k \
        --dataset_name uoft-cs/cifar100 --label_column_name fine_label --num_tasks 10 --output_dir out/cifar100

`--preset cifar100-10` uses the published settings; `--preset cifar100-10 --dry_run` prints them. For several processes:
`accelerate launch --multi_gpu --num_processes 2 ...` (on CPUs, put ACCELERATE_USE_CPU=1 in front). To continue an
interrupted run, repeat the command with `--resume_from_checkpoint true`.
"""

from __future__ import annotations

from peft import PeftModel, get_peft_model

from pgp_hf import DualPromptConfig, TaskStream
from pgp_hf.cli.arguments import Arguments
from pgp_hf.cli.experiment import run
from pgp_hf.cli.parsing import parse, prompt_arguments


def make_model(arguments: Arguments, stream: TaskStream) -> PeftModel:
    """Return the backbone with the adapter for a stream's classes."""
    backbone = arguments.model.backbone(stream)
    config = DualPromptConfig(
        **vars(arguments.prompts),
        head=arguments.run.head,
        interpolate_pos_encoding=arguments.model.interpolates(backbone),
    )
    return get_peft_model(backbone, config)


def main() -> None:
    run("DualPrompt", parse(__doc__, prompt_arguments(DualPromptConfig), method="dualprompt"), make_model)


if __name__ == "__main__":
    main()
