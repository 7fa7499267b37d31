"""Collect the methods of learning a stream, one file each; `create` makes one by its name.

    StreamTrainer(model, args, stream, method=pgp_hf.methods.create("fine_tuning"), processing_class=processor)

A method of your own is a subclass of `ContinualMethod`, registered by `register`.
"""

from .base import Batch, Collectives, ContinualMethod, MethodCard, MethodState, Observed, TaskContext
from .bic import BiC, BiCConfig
from .der_mcg import DERMCG, DERMCGConfig
from .derpp import DERpp, DERppConfig
from .ewc import EWC, EWCConfig
from .exemplars import ExemplarConfig
from .fine_tuning import FineTuning, Joint
from .icarl import ICaRL
from .layer_inputs import GPM, GPMConfig, NullSpaceAdam, NullSpaceAdamConfig
from .lwf import LwF, LwFConfig
from .projected_prompts import ProjectedPrompts
from .registry import METHODS, create, register

__all__ = [
    "DERMCG",
    "EWC",
    "GPM",
    "METHODS",
    "Batch",
    "BiC",
    "BiCConfig",
    "Collectives",
    "ContinualMethod",
    "DERMCGConfig",
    "DERpp",
    "DERppConfig",
    "EWCConfig",
    "ExemplarConfig",
    "FineTuning",
    "GPMConfig",
    "ICaRL",
    "Joint",
    "LwF",
    "LwFConfig",
    "MethodCard",
    "MethodState",
    "NullSpaceAdam",
    "NullSpaceAdamConfig",
    "Observed",
    "ProjectedPrompts",
    "TaskContext",
    "create",
    "register",
]
