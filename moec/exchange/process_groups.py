"""A process group of torch.distributed by the name that an option gives it."""

from __future__ import annotations

import torch.distributed as dist

from moec.errors import OptionError

WORLD = "world"


def group_named(name: str) -> dist.ProcessGroup:
    """`world`: all ranks; else the group of that `group_name` or, where one group alone has it, `group_desc`.

    A group of a DeviceMesh is found by what the mesh called it (`mesh["ep"].get_group().group_name`). Raises
    OptionError where torch.distributed is not initialised or this rank is in no such group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise OptionError(
            f"option experts_over={name!r}: torch.distributed is not initialised;"
            " call torch.distributed.init_process_group before the model is compiled"
        )
    world = dist.group.WORLD
    if name == WORLD and world is not None:
        return world
    groups = list(dist.distributed_c10d._world.pg_map)
    named = [g for g in groups if g.group_name == name] or [g for g in groups if g.group_desc == name]
    if len(named) != 1:
        known = ", ".join([WORLD, *(f"{g.group_name} ({g.group_desc})" for g in groups if g is not world)])
        many = f"{len(named)} process groups of this rank have that description" if named else "no such process group"
        raise OptionError(f"option experts_over={name!r}: {many}; groups of this rank: {known}")
    return named[0]
