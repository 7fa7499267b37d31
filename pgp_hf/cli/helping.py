"""The short help of the training commands: the package's own options, with nothing imported that takes seconds."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from ..report.formatting import WIDTH

_INDENT = 32  # of an option's text

_TITLES = {
    "l2p": "Learn a stream of tasks with L2P prompts, with and without projection, and compare.",
    "dualprompt": "Learn a stream of tasks with DualPrompt, its general prefixes projected and not, and compare.",
    "clip": "Learn a stream of tasks with CLIP prompts, the image prompt projected and not, and compare.",
    "baseline": "Learn a stream of tasks by a method that trains the model itself, to compare prompts with.",
    "learn": "Teach a finished run the classes of new images. None of its old images is needed. A new\n"
    "--output_dir gets a run of its own, with the earlier tasks and the new one; in that of the run\n"
    "itself, the new task is added. Settings are those of the run, unless options say otherwise.",
}
_USAGES = {"learn": "[CONFIG] RUN_OR_REPO --train_dir DIR --output_dir DIR [--OPTION VALUE ...]"}
_COMMANDS = {
    "l2p": """\
{prog}                              # what the package ships, without a network
{prog} --train_dir photos --num_tasks 5 --output_dir out/photos
{prog} config.yaml --seed 1         # options in a YAML or JSON file
accelerate launch -m pgp_hf train {method} --output_dir out/{method}   # several processes""",
    "baseline": """\
{prog} --method ewc                 # on what the package ships, without a network
{prog} --method ewc --help          # with the settings of that method
{prog} --method all --preset imagenet-r-10""",
    "learn": """\
{prog} out/l2p_pgp --train_dir new_photos --output_dir out/more
{prog} me/my-run --revision task-3 --train_dir new_photos --output_dir out/more""",
}
_FIELDS = {
    "images": """\
dataset_name NAME|Hub id, or folder of images; by default, scikit-learn's digits
train_dir DIR|folder of training images, with one subfolder per class
validation_dir DIR|folder of test images, likewise, in place of --test_fraction 0.2
num_tasks N|tasks that the classes are divided into (default: 10)
scenario NAME|class_incremental (default), task_incremental, or online: one epoch
train_val_split SHARE|evaluate on this share of the training images, which is held out
also|shift increment init_classes dataset_config_name dataset_revision dataset_split image_column_name label_column_name \
class_order class_order_seed test_fraction max_train_samples_per_class max_eval_samples_per_class""",
    "backbone": """\
model_name_or_path NAME|Hub id or folder; by default the small one that the package ships
also|model_revision image_size image_mean image_std attn_implementation dtype""",
    "L2P": """\
pool_size N|prompts in the pool, each with a key (default: 10)
prompt_length N|tokens per prompt (default: 5)
top_k N|prompts selected for each image (default: 5)
head_type NAME|what the head reads: prompt (default), their mean, or token: CLS
also|grow_pool pull_constraint_coeff batchwise_prompt""",
    "DualPrompt": """\
general_length N|length of the general prefixes (default: 5)
expert_length N|length of the expert prefixes (default: 5)
general_layers N ...|layers, from 0, with general prefixes (default: 0 1)
expert_layers N ...|layers, from 0, with expert prefixes (default: 2 3 4)
also|selection pool_size grow_pool copy_previous pull_constraint_coeff""",
    "CLIP": """\
text_length N|context tokens before each class name (default: 16)
image_length N|image prompt tokens after CLS (default: 10)
template TEXT|around each class name, such as 'a photo of a {}.' (default: {})""",
    "method and comparison": """\
preset NAME|published settings, such as cifar100-10: `pgp-hf presets` lists them
projection NAME|none, pgp (default), attention, frozen, or functional (used on digits)
energy SHARE|how much of what old images show is protected (default: 0.99)
head NAME|linear (default), or statistics (used on digits): means, covariance
no_compare|train this run alone, without its twin and the frozen rows
dry_run|print all settings that result, and stop
also|key_energy value_energy apply_to softness max_images all_keys equal_images bf16_probes probes probe_space \
hold_key_norm ln_penalty""",
    "method": """\
method NAME|see below, or all of them (default: fine_tuning)
trainable WHAT|all (default), last:N, its last N blocks, head, or lora:R
preset NAME ...|a data set, a recipe, or both: `pgp-hf presets` lists them
no_compare|leave out the classifiers on frozen features
dry_run|print all settings that result, and stop""",
    "new images": """\
train_dir DIR|folder of new training images, with one subfolder per class
test_dir DIR|or --validation_dir: of test images, in place of --test_fraction 0.2
dataset_name NAME|Hub id, or folder of images, in place of --train_dir
class_names NAME ...|where labels are integers: names of 0, 1, ..., or 3=cat 7=dog
known_test_dir DIR ...|test images of known classes, to measure how well they are kept
also|known_test_dataset dataset_config_name dataset_revision dataset_split image_column_name label_column_name \
test_fraction max_train_samples_per_class max_eval_samples_per_class""",
    "the run": """\
revision TASK|task-1, task-2, ...: go on from there (default: the last)
backbone NAME|Hub id or folder of the frozen model, if the run does not name it""",
    "training": """\
output_dir DIR|of the run{output}
overwrite_output_dir|delete an earlier run there
resume_from_checkpoint true|go on where the run in --output_dir stopped
num_train_epochs N|per task{epochs}
learning_rate RATE|{rate}
seed N|of everything{seed}
push_to_hub|upload each finished task to the Hub, as {repo}
also|{also}""",
}
_OWN = {"repo": "--hub_model_id OWNER/NAME", "epochs": " (default: 5)", "seed": " (default: 42)"}
_ALSO = """per_device_train_batch_size per_device_eval_batch_size augmentation crop_min_scale crop_views lr_scheduler_type optim \
reinit_optimizer train_mask eval_mask exact_images process_on_device verify_images save_strategy save_full_weights figures \
keep_samples hub_model_id hub_private_repo hub_strategy hub_base_model hub_exemplars hub_license hub_wait"""
PROMPTS_ALONE = """later_prompt_learning_rate compensate_drift last_block skip_fixed compile_trunk cache_queries query_cache \
query_cache_gb"""  # refused for a model without prompts, or without effect there
_PROMPTS = {
    **_OWN,
    "output": " (default: out/{method}_pgp, or out/{method}_PRESET)",
    "rate": "constant (default: 0.001875)",
    "also": f"{PROMPTS_ALONE} {_ALSO}",
}
_TRAINING: Mapping[str, Mapping[str, str]] = {
    "baseline": {
        **_OWN,
        "output": " (default: out/baselines_METHOD)",
        "rate": "of all but the head (default: 5e-05); --head_learning_rate 0.001",
        "also": f"head_learning_rate {_ALSO}",
    },
    "learn": {
        **_OWN,
        **dict.fromkeys(("epochs", "seed"), ""),
        "output": ", a new folder",
        "rate": "of the new task",
        "also": f"{PROMPTS_ALONE} {_ALSO}",
    },
}
_GROUPS = {
    "l2p": ("images", "backbone", "L2P", "method and comparison", "training"),
    "dualprompt": ("images", "backbone", "DualPrompt", "method and comparison", "training"),
    "clip": ("images", "backbone", "CLIP", "method and comparison", "training"),
    "baseline": ("method", "images", "backbone", "training"),
    "learn": ("new images", "the run", "training"),
}
BASELINES = {  # in one line: --help_all has their full titles
    "fine_tuning": "sequential training, a lower bound",
    "joint": "all tasks at once, an upper bound",
    "ewc": "elastic weight consolidation",
    "lwf": "learning without forgetting",
    "gpm": "gradient projection memory",
    "null_space_adam": "Adam-NSCL",
    "icarl": "iCaRL",
    "bic": "bias correction",
    "derpp": "dark experience replay",
    "der_mcg": "DER with a multi-centroid gate",
}


def text(command: str, prog: str, settings: Mapping[str, str] | None = None) -> str:
    """Return the help of a training command, at most 60 lines of 100 columns.

    Args:
        command: "l2p", "dualprompt", "clip", "baseline" or "learn".
        prog: name of the program.
        settings: help of further options by their names, those of a baseline's method.
    """
    usage = _USAGES.get(command, "[CONFIG] [--OPTION VALUE ...]")
    commands = _COMMANDS.get(command, _COMMANDS["l2p"]).format(prog=prog, method=command)
    parts = [f"usage: {prog} {usage}\n", _TITLES[command], "", *textwrap.indent(commands, "  ").splitlines()]
    for group in _GROUPS[command]:
        parts += ["", f"{group}:", *_lines(command, _FIELDS[group])]
        if group == "method":
            parts += _methods() if settings is None else [_option(*one) for one in settings.items()]
    parts += [
        "",
        "CONFIG: options in YAML or JSON. --help_all: all options, in full. --traceback: where errors arise.",
    ]
    return "\n".join(parts)


def _lines(command: str, fields: str) -> list[str]:
    """Return the options of a group; the values of its placeholders are those of a command."""
    for name, value in _TRAINING.get(command, _PROMPTS).items():
        fields = fields.replace(f"{{{name}}}", value.replace("{method}", command))
    return [_option(*line.split("|", 1)) for line in fields.splitlines()]


def _option(name: str, what: str) -> str:
    """Return an option with its text; of "also", the options that it names."""
    if name == "also":
        names = " ".join(f"--{one}" for one in what.split())
        return textwrap.fill(
            names, WIDTH, initial_indent="  also ", subsequent_indent="       ", break_on_hyphens=False
        )
    first = f"  --{name}".ljust(_INDENT - 1) + " "
    return textwrap.fill(first + what, WIDTH, subsequent_indent=" " * _INDENT, break_on_hyphens=False)


def _methods() -> list[str]:
    """Return the methods of the baselines, in two columns."""
    cells = [f"{name:<15} {what}" for name, what in BASELINES.items()]
    half = (len(cells) + 1) // 2
    rows = zip(cells[:half], [*cells[half:], ""][:half], strict=True)
    return [f"  {left:<52}{right}".rstrip() for left, right in rows]
