"""What importing costs, that the adapters register with PEFT in every order, and what of PEFT they rely on.

Import order can only be tested in fresh processes. To save seconds, one process imports torch and transformers and
forks for each order.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys

import pytest
import tiny

BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("transformers", "peft", "datasets", "accelerate", "safetensors", "evaluate"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
import pgp_hf
assert "torch" not in sys.modules, "the package itself is free"
assert set(pgp_hf.__all__) <= set(dir(pgp_hf)) and pgp_hf.__version__
import torch
from pgp_hf import ProjectionConfig
from pgp_hf.heads import ClassStatistics
from pgp_hf.projection import NullSpaceProjector, Projection, SecondMoment, Basis
weight = torch.nn.Parameter(torch.zeros(2, 3))
basis = Basis.empty(3).extend(SecondMoment(3).update(torch.eye(3)[:1]), ProjectionConfig().energy)
projector = NullSpaceProjector({"w": basis})
projector.anchor([("w", weight)])
weight.data += 1
projector.project_updates_([("w", weight)])
assert weight.tolist() == [[0, 1, 1]] * 2
statistics = ClassStatistics(2, 3).update(torch.eye(3), torch.tensor([0, 1, 1]))
assert statistics(torch.eye(3)).argmax(-1).tolist() == [0, 1, 1]
"""

# by a name for each order: what a user's program may import before it loads a saved adapter
ORDERS = {
    "pgp_hf first": "import pgp_hf; from peft import PeftModel",
    "peft first": "from peft import PeftModel; import pgp_hf",
    "tuners directly": "import pgp_hf.tuners; from peft import PeftModel",
    "config first": "from pgp_hf import L2PConfig; from peft import PeftModel",
    "peft looked for, then imported": "import pgp_hf, importlib.util as u; assert u.find_spec('peft')\n"
    "from peft import PeftModel",
    "transformers asks for peft": "import pgp_hf; from transformers.utils import is_peft_available as f; assert f()\n"
    "from peft import PeftModel",
}

FORK = """
import os, sys, traceback
from transformers import ViTConfig, ViTForImageClassification
assert "peft" not in sys.modules
folder, order = sys.argv[1], None
sizes = dict(hidden_size=8, num_attention_heads=1, num_hidden_layers=1, intermediate_size=8, image_size=4, patch_size=2)
failed = []
for name, order in {orders!r}.items():
    child = os.fork()
    if child == 0:
        try:
            exec(order)
            model = PeftModel.from_pretrained(ViTForImageClassification(ViTConfig(**sizes)), folder)
            assert type(model.base_model).__name__ == "L2PModel"
            import pgp_hf
            assert type(model.peft_config["default"]) is pgp_hf.L2PConfig
            from peft.utils.peft_types import PeftType
            assert PeftType("L2P") is PeftType.L2P and list(PeftType).count("L2P") == 1
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed.append(name)
print(failed)
sys.exit(bool(failed))
"""


def python(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, env={**os.environ}
    )


def test_projection_needs_torch_alone():
    done = python(BLOCKED)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    "orders",
    [
        pytest.param(["peft first", "transformers asks for peft"], id="some"),
        pytest.param(list(ORDERS), id="all", marks=pytest.mark.slow),
    ],
)
def test_adapters_register_in_every_order_of_imports(tmp_path, orders):
    sizes = {"hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8, "image_size": 4, "patch_size": 2}
    base = tiny.backbone(num_labels=2, num_hidden_layers=1, **sizes)
    tiny.model(base=base).save_pretrained(tmp_path, save_embedding_layers=False)
    done = python(FORK.replace("{orders!r}", repr({name: ORDERS[name] for name in orders})), str(tmp_path))
    assert done.returncode == 0, f"not registered: {done.stdout}\n{done.stderr}"


def test_public_names():
    import pgp_hf

    for name in pgp_hf.__all__:
        assert getattr(pgp_hf, name).__name__ == name and name in dir(pgp_hf)
    from pgp_hf import arguments
    from pgp_hf.cli.arguments import DataArguments

    assert arguments.DataArguments is DataArguments  # where it was once
    with pytest.raises(AttributeError, match="'pgp_hf' has no attribute 'L3PConfig'"):
        pgp_hf.L3PConfig  # noqa: B018


def test_registration_is_idempotent_and_guards_its_name(monkeypatch):
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils.peft_types import PeftType

    from pgp_hf.tuners import L2PConfig, L2PModel, register
    from pgp_hf.tuners.base.peft_type import extend_peft_type

    before = list(PeftType)
    register(L2PConfig, L2PModel)
    assert list(PeftType) == before and extend_peft_type("L2P") is PeftType("L2P") is PeftType["L2P"]
    assert PEFT_TYPE_TO_TUNER_MAPPING["L2P"] is L2PModel and PEFT_TYPE_TO_CONFIG_MAPPING["L2P"] is L2PConfig
    assert PEFT_TYPE_TO_PREFIX_MAPPING["L2P"] == "l2p_"
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, "L2P", dict)
    with pytest.raises(RuntimeError, match="already has a method 'l2p'"):
        register(L2PConfig, L2PModel)


@pytest.mark.parametrize(
    ("hook", "parameters"),
    [
        ("_prepare_adapter_config", ["self", "peft_config", "model_config"]),
        ("_prepare_model", ["self", "peft_config", "model"]),
        ("_create_and_replace", ["self", "peft_config", "adapter_name", "target", "target_name", "parent"]),
        ("_post_injection_hook", ["self", "model", "config", "adapter_name"]),
        ("_check_merge_allowed", ["self"]),
        ("unload", ["self"]),
    ],
)
def test_canary_tuner_hooks_of_peft(hook, parameters):
    """Internal to PEFT: when one of these fails after an upgrade, look at pgp_hf/tuners/base/."""
    from peft.tuners.tuners_utils import BaseTuner

    from pgp_hf.tuners import L2PModel

    assert list(inspect.signature(getattr(BaseTuner, hook)).parameters)[: len(parameters)] == parameters
    assert getattr(L2PModel, hook) is not getattr(BaseTuner, hook)  # it is overridden, else the canary can go
    assert list(inspect.signature(getattr(L2PModel, hook)).parameters)[: len(parameters)] == parameters


def test_canary_layer_hooks_of_peft():
    """The same for the wrapped modules, the registration and unloading."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper
    from peft.utils.peft_types import register_peft_method

    move = inspect.signature(BaseTunerLayer._move_adapter_to_device_of_base_layer)
    assert list(move.parameters)[:2] == ["self", "adapter_name"]
    assert list(inspect.signature(BaseTunerLayer._get_base_layer_device_and_dtype).parameters) == [
        "self",
        "base_layer",
    ]
    assert list(inspect.signature(BaseTunerLayer.set_adapter).parameters) == [
        "self",
        "adapter_names",
        "inference_mode",
    ]
    assert {"active_adapters", "disable_adapters"} <= set(dir(BaseTunerLayer))
    assert {"name", "config_cls", "model_cls", "prefix"} <= set(inspect.signature(register_peft_method).parameters)
    assert "module_to_save" in inspect.signature(ModulesToSaveWrapper).parameters
