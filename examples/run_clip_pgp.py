r"""Learn a stream of tasks with CLIP prompts twice: without projection, and with the image prompt projected (PGP).

    accelerate launch examples/run_clip_pgp.py

runs on what the package ships (a small CLIP model, scikit-learn's handwritten digits): no network, a few minutes on a
CPU. With your own backbone and data, from the Hub or from local folders:

    accelerate launch examples/run_clip_pgp.py --model_name_or_path openai/clip-vit-base-patch16 \
        --dataset_name uoft-cs/cifar100 --label_column_name fine_label --num_tasks 10 --output_dir out/clip_cifar100

`--preset cifar100-10` uses the published settings; `--preset cifar100-10 --dry_run` prints them. For several processes:
`accelerate launch --multi_gpu --num_processes 2 ...` (on CPUs, put ACCELERATE_USE_CPU=1 in front). To continue an
interrupted run, repeat the command with `--resume_from_checkpoint true`.
"""

from __future__ import annotations

from dataclasses import field

from peft import PeftModel, get_peft_model

from pgp_hf import ClipPromptConfig, TaskStream
from pgp_hf.cli.arguments import Arguments
from pgp_hf.cli.experiment import run
from pgp_hf.cli.parsing import parse, prompt_arguments


def make_model(arguments: Arguments, stream: TaskStream) -> PeftModel:
    """Return the backbone with the adapter for a stream's classes."""
    backbone = arguments.model.clip()
    config = ClipPromptConfig.for_classes(
        arguments.model.tokenizer(),
        stream.label_names,
        **vars(arguments.prompts),
        head=arguments.run.head,
        pool_size=stream.num_tasks,
        interpolate_pos_encoding=arguments.model.interpolates(backbone),
    )
    return get_peft_model(backbone, config)


def main() -> None:
    template = field(default="{}", metadata={"help": "text around each class name, such as 'a photo of a {}.'"})
    run("CLIP", parse(__doc__, prompt_arguments(ClipPromptConfig, template=template), method="clip"), make_model)


if __name__ == "__main__":
    main()
