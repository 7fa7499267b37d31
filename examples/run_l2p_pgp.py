"""Learn a stream of tasks with L2P prompts, projected (PGP) and not, side by side.

    accelerate launch examples/run_l2p_pgp.py

runs on what the package ships (a small backbone, scikit-learn's handwritten digits): no network, a few minutes on a
CPU. With a backbone and data of your own, from the Hub or from local folders:

    accelerate launch examples/run_l2p_pgp.py --model_name_or_path google/vit-base-patch16-224-in21k \
        --dataset_name uoft-cs/cifar100 --label_column_name fine_label --num_tasks 10 --output_dir out/cifar100

The published settings by name: `--preset cifar100-10`; `--preset cifar100-10 --dry_run` prints what they are.
Several processes: `accelerate launch --multi_gpu --num_processes 2 ...` (on CPUs with ACCELERATE_USE_CPU=1 before it).
An interrupted run continues with the same command and `--resume_from_checkpoint true`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import PeftModel, get_peft_model

from pgp_hf import L2PConfig, TaskStream
from pgp_hf.cli.experiment import parse, run

# used when neither a model nor data are named; anything given on the command line wins
EMBEDDED = "--output_dir out/l2p_pgp --num_tasks 5 --num_train_epochs 3 --augmentation none".split()


@dataclass
class L2PArguments:
    """The prompt pool."""

    pool_size: int = field(default=10, metadata={"help": "prompts in the pool"})
    prompt_length: int = field(default=5, metadata={"help": "tokens per prompt"})
    top_k: int = field(default=5, metadata={"help": "prompts selected for each image"})
    pull_constraint_coeff: float = field(
        default=0.1, metadata={"help": "weight of the term that draws keys to queries"}
    )
    head_type: str = field(
        default="prompt", metadata={"help": "what the head reads: prompt (tokens' mean) or token (CLS)"}
    )
    batchwise_prompt: bool = field(
        default=False,
        metadata={"help": "let the batch vote on the prompts, as released code does; for comparison only"},
    )


def main() -> None:
    model_args, data_args, prompt_args, run_args, training_args = parse(__doc__, L2PArguments, EMBEDDED, method="l2p")

    def make_model(stream: TaskStream) -> PeftModel:
        backbone = model_args.backbone(stream)
        interpolate = model_args.interpolates(backbone)
        config = L2PConfig(**vars(prompt_args), head=run_args.head, interpolate_pos_encoding=interpolate)
        return get_peft_model(backbone, config)

    run("L2P", model_args, data_args, run_args, training_args, make_model)


if __name__ == "__main__":
    main()
