"""Teach a model classes that nobody foresaw, without its old training images.

    python examples/learn_more.py

runs on what the package ships (a small backbone, scikit-learn's handwritten digits): no network,
about a minute on a CPU. The model learns the digits zero to five in three tasks. Their training
images are then dropped, and only their test images are kept, to see what the model still knows. Six
and seven arrive, and later eight and nine, each time for a new trainer that has nothing but the
last revision of the run.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from accelerate.utils import set_seed
from datasets import Dataset
from peft import get_peft_model

from pgp_hf import L2PConfig, PGPTrainer, PGPTrainingArguments, ProjectionConfig, TaskStream
from pgp_hf.cli.arguments import ModelArguments
from pgp_hf.cli.growth import growth_table
from pgp_hf.embedded import DIGIT_NAMES, digits

FIRST = [["zero", "one"], ["two", "three"], ["four", "five"]]
SURPRISES = [["six", "seven"], ["eight", "nine"]]


def main(argv: Sequence[str] | None = None) -> None:
    """Learn, be surprised twice, and print what is known each time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default="out/learn_more", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=42, help="default: %(default)s")
    args = parser.parse_args(argv)
    folders = [args.output_dir / name for name in ("first", "second", "third")]
    images = digits()

    def settings(folder: Path) -> PGPTrainingArguments:
        return PGPTrainingArguments(
            str(folder), num_train_epochs=3, augmentation="none", seed=args.seed, overwrite_output_dir=True
        )

    print("The digits zero to five, in three tasks", flush=True)
    backbone = ModelArguments()
    stream = TaskStream.from_dataset(images, tasks=FIRST, seed=args.seed)
    set_seed(args.seed)
    model = get_peft_model(backbone.backbone(stream), L2PConfig(head="statistics"))
    trainer = PGPTrainer(
        model, settings(folders[0]), stream, ProjectionConfig(method="functional"), backbone.processor()
    )
    trainer.train()
    print_table(trainer, known=0)

    seen = [name for task in FIRST for name in task]
    del stream, model  # and with them the training images
    for last, folder, names in zip(folders, folders[1:], SURPRISES, strict=False):
        print(
            f"\n{' and '.join(names).capitalize()} arrive; the training images of {len(seen)} digits are gone",
            flush=True,
        )
        known = trainer.stream.num_tasks
        trainer = PGPTrainer.from_pretrained(last, args=settings(folder), test_dataset=only(images["test"], seen))
        trainer.learn(only(images["train"], names), only(images["test"], names))
        print_table(trainer, known)
        seen += names

    samples = args.output_dir / "images"
    save_samples(images["test"], samples)
    last, photos = shlex.quote(str(folders[-1])), shlex.quote(str(samples))
    print(
        f"\nThe last run is {folders[-1]}, with a folder for each of its tasks; {samples} has a test image of each digit. "
        f"Next:\n  pgp-hf predict {last} {photos}\n"
        f"  pgp-hf learn {last} --train_dir FOLDER_WITH_A_SUBFOLDER_PER_CLASS --output_dir {last}_and_more"
    )


def only(rows: Dataset, names: Sequence[str]) -> Dataset:
    """Return the images of some digits."""
    labels = {DIGIT_NAMES.index(name) for name in names}
    return rows.select([i for i, label in enumerate(rows["label"]) if label in labels])


def print_table(trainer: PGPTrainer, known: int) -> None:
    """Print the accuracies on what was known, before and now, and on what is new."""
    print("\nAccuracy (%) on test images of each task\n")
    print(growth_table(trainer.results.to_dict(), trainer.stream.manifest(), known), flush=True)


def save_samples(rows: Dataset, folder: Path) -> None:
    """Write a test image of each digit as `folder/zero.png`, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for label, name in enumerate(DIGIT_NAMES):
        rows[rows["label"].index(label)]["image"].save(folder / f"{name}.png")


if __name__ == "__main__":
    main()
