"""torch.fx: a call of one of our modules is one node of the graph, as one of torch.nn's is.

torch.fx takes a module as a whole by the name of the file that its class is from, and traces into
all others. Ours see at their call that the arguments are not tensors, and record it themselves.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Proxy


def record_call(module: nn.Module, input: Any, hx: Any, **options: Any) -> Any:
    """Record the call of a module with what torch.fx traces with.

    Args:
        module: the module.
        input: of the call.
        hx: of the call.
        options: of the call, by keyword; those that are None or false were not given.

    Returns:
        What stands for the result; None if nothing is traced, or the module by itself.

    Raises:
        RuntimeError: the module has hooks, which have been recorded and would run once more.
    """
    options = {
        name: value for name, value in options.items() if value is not None and value is not False
    }
    values = [input]
    for value in (hx, *options.values()):
        values += value if isinstance(value, (tuple, list)) else [value]
    tracer: Any = next((v.tracer for v in values if isinstance(v, Proxy)), None)
    if tracer is None or getattr(tracer, "root", module) is module:
        return None
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    # Those of torch.nn.utils write a weight, and change neither arguments nor result.
    if not all(type(hook).__module__.startswith("torch.nn.utils.") for hook in hooks):
        raise RuntimeError(
            f"torch.fx cannot trace a {type(module).__name__} of lstm_ext with hooks, unless by a "
            "torch.fx.Tracer whose is_leaf_module is true for it; or remove the hooks first"
        )
    args = (input,) if hx is None else (input, hx)
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, options)
