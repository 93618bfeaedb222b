"""The roads of a call: direct kernel, autograd.Function, composite reference, registered op.

Every public function asks `gate` once (about 0.4 us) and takes the first road that fits:

* DIRECT: plain tensors, no gradient wanted. Allocate and call the kernel.
* GRAD: plain tensors, a gradient is wanted. `Node`, in `forward(ctx, ...)` style. The gate has
  looked at the backend that was asked for, so tensors on the CPU (`is_cpu`) have a kernel, and what
  that does not take raises TypeError; looking again (`on_kernel`) would cost 6 us of 60.
* otherwise `slow`: checks that name the wrong argument, then the registered op (tracing, fake
  tensors, subclasses) or, under function transforms, forward-mode AD and in fp64, the reference
  composed with native noise: plain torch maths that differentiates any number of times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.autograd import Function, forward_ad

from genfast._native import _C
from genfast.ops import _force

SLOW, DIRECT, GRAD = 0, 1, 2

gate = _C.gate
cpu_gate = _C.cpu_gate  # of what has CPU kernels and no registered op
plain_gate = _C.plain_gate  # whichever backend was asked for
is_compiling = torch.compiler.is_compiling

# fp64 runs on the reference: the kernels accumulate in fp32.
KERNEL_DTYPES = frozenset((torch.float32, torch.float16, torch.bfloat16))

LIB = torch.library.Library("genfast", "FRAGMENT")

_is_legacy_batch = torch._C._functorch.is_legacy_batchedtensor


class Node(Function):
    """An autograd.Function of the GRAD road, whose gate has looked for functorch.

    quick: `apply` without its own look at every argument, 3 to 5 us of 8 to 11. It takes what has
    outlived a transform for a tensor, which the kernel then refuses: where refusal means `slow`.
    """

    quick = vars(torch._C._FunctionBase)["apply"]


def transforming() -> bool:
    """A functorch transform or a forward-mode AD level is active.

    While compiling only forward mode counts: the registered op would drop the tangent there, and
    serves the other transforms.
    """
    if forward_ad._current_level >= 0:
        return True
    return not is_compiling() and torch._C._functorch.maybe_current_level() is not None


def readable(*tensors: torch.Tensor | None) -> bool:
    """Values that a check can look at: on the CPU, so without a sync, and real."""
    if is_compiling() or transforming() or torch._C._len_torch_dispatch_stack():
        return False
    plain_types = (torch.Tensor, torch.nn.Parameter)
    return all(t is None or (type(t) in plain_types and t.is_cpu) for t in tensors)


def define(
    schema: str,
    impl: Callable,
    fake: Callable,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
):
    """Registers `genfast::<schema>` for every device and returns its default overload."""
    name = schema.split("(", 1)[0]
    LIB.define(schema, tags=torch.Tag.pt2_compliant_tag)
    LIB.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"genfast::{name}", fake, lib=LIB)
    if backward is not None:
        torch.library.register_autograd(
            f"genfast::{name}",
            _force.resumed(backward),
            setup_context=_force.remembering(setup_context),
            lib=LIB,
        )
    return getattr(torch.ops.genfast, name).default


def plain(*grads: torch.Tensor | None) -> bool:
    """Gradients that reach a backward kernel: no negative view, no batch of vmap.

    Fake tensors and other modes are the op's business: it can be traced.
    """
    if transforming():
        return False
    for g in grads:
        # the second: autograd.grad(is_grads_batched=True)
        if g is not None and (g.is_neg() or _is_legacy_batch(g)):
            return False
    return True


def taken(found):
    """What a node's forward kernel gave; where it refused, the call goes the slow road."""
    if found is None:
        raise TypeError("genfast: the kernel does not take these tensors")
    return found


def ran(took: bool) -> None:
    """Of a backward kernel: no other road is left."""
    if not took:
        raise RuntimeError("genfast: the backward kernel refused what the forward kernel took")


def wants_graph() -> bool:
    """Inside a backward: is a differentiable backward asked for (create_graph=True)?"""
    if not torch.is_grad_enabled() or torch.compiler.is_dynamo_compiling():
        return False
    # `is_compiling` alone is of the process: another thread may be the one that compiles.
    return not (is_compiling() and torch._C._len_torch_dispatch_stack() > 0)


def differentiable_backward(
    composite: Callable, inputs: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of `composite(*inputs)` (a tensor or a tuple), differentiable where wanted.

    inputs: the saved tensors, still part of the outer graph. grads: one per output, or None.
    """
    graph = wants_graph()
    with torch.enable_grad():
        # Aliases cut paths between the inputs (logvar may be a function of mu, or mu itself).
        inputs = [x.view_as(x) if x.requires_grad else x for x in inputs]
        outputs = _force.composed(composite, *inputs) if graph else composite(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [
            (o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad
        ]
        wanted = [x for x in inputs if x.requires_grad]
        if not pairs or not wanted:
            return tuple(None for _ in inputs)
        found = iter(
            torch.autograd.grad(
                [o for o, _ in pairs],
                wanted,
                [g for _, g in pairs],
                create_graph=graph,
                allow_unused=True,
            )
        )
        return tuple(next(found) if x.requires_grad else None for x in inputs)
