"""PEFT's enum of methods, which has to know ours."""

from __future__ import annotations

from peft.utils.peft_types import PeftType


def extend_peft_type(name: str) -> PeftType:
    """Return the member `name` of PEFT's enum of methods; it is added unless it is there."""
    if name in PeftType.__members__:
        return PeftType[name]
    # `register_peft_method` accepts members of the enum alone, saved configurations are read back by it, and an enum
    # cannot be subclassed once it has members: what follows is what Python does for each member of a new enum
    member = str.__new__(PeftType, name)
    vars(member).update(_name_=name, _value_=name, __objclass__=PeftType, _sort_order_=len(PeftType._member_names_))
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)  # EnumMeta guards re-assignment only
    return member
