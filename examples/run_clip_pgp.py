"""Learn a stream of tasks with CLIP prompts, the image prompt projected (PGP) and not, side by side.

    accelerate launch examples/run_clip_pgp.py

runs on what the package ships (a small CLIP model, scikit-learn's handwritten digits): no network, a few minutes on a
CPU. With a backbone and data of your own, from the Hub or from local folders:

    accelerate launch examples/run_clip_pgp.py --model_name_or_path openai/clip-vit-base-patch16 \
        --dataset_name uoft-cs/cifar100 --label_column_name fine_label --num_tasks 10 --output_dir out/clip_cifar100

The published settings by name: `--preset cifar100-10`; `--preset cifar100-10 --dry_run` prints what they are.
Several processes: `accelerate launch --multi_gpu --num_processes 2 ...` (on CPUs with ACCELERATE_USE_CPU=1 before it).
An interrupted run continues with the same command and `--resume_from_checkpoint true`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import PeftModel, get_peft_model

from pgp_hf import ClipPromptConfig, TaskStream
from pgp_hf.cli.experiment import parse, run

# used when neither a model nor data are named; anything given on the command line wins
EMBEDDED = "--output_dir out/clip_pgp --num_tasks 5 --num_train_epochs 3 --augmentation none".split()


@dataclass
class ClipArguments:
    """The prompts."""

    text_length: int = field(default=16, metadata={"help": "context tokens before each class name, learned per task"})
    image_length: int = field(default=10, metadata={"help": "image prompt tokens, shared by all tasks"})
    template: str = field(default="{}", metadata={"help": "text around the class name, such as 'a photo of a {}.'"})


def main() -> None:
    model_args, data_args, prompt_args, run_args, training_args = parse(
        __doc__, ClipArguments, EMBEDDED, method="clip"
    )

    def make_model(stream: TaskStream) -> PeftModel:
        backbone = model_args.clip()
        config = ClipPromptConfig.for_classes(
            model_args.tokenizer(),
            stream.label_names,
            **vars(prompt_args),
            head=run_args.head,
            pool_size=stream.num_tasks,
            interpolate_pos_encoding=model_args.interpolates(backbone),
        )
        return get_peft_model(backbone, config)

    run("CLIP", model_args, data_args, run_args, training_args, make_model)


if __name__ == "__main__":
    main()
