"""One line switches a whole model over to genfast, one line switches it back.

    genfast.accelerate(model)
    genfast.restore(model)

Every row of SWAPS turns one kind of module over in place and returns what undoes it. Parameters,
buffers, hooks and state dicts are never touched, so optimisers and checkpoints do not notice.
Of a diffusers pipeline the scheduler and every module are turned over.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from genfast.integrations import torch_sdpa
from genfast.nn.attention import MultiheadAttention
from genfast.nn.convolution import Conv2d
from genfast.nn.linear import Linear
from genfast.nn.transformer import TransformerDecoderLayer, TransformerEncoderLayer

Undo = Callable[[], None]
Model = TypeVar("Model")

# Exact types (a subclass may have its own forward) and the classes that take their place.
CLASSES = {
    nn.Linear: Linear,
    nn.Conv2d: Conv2d,
    nn.MultiheadAttention: MultiheadAttention,
    nn.TransformerEncoderLayer: TransformerEncoderLayer,
    nn.TransformerDecoderLayer: TransformerDecoderLayer,
}


def _swap_classes(model) -> list[Undo]:
    undo = []
    for module in model.modules():
        own = type(module)
        if own in CLASSES:
            module.__class__ = CLASSES[own]
            # Weak: `_undo` would else keep the model that is its key alive.
            undo.append(partial(_swap_back, weakref.ref(module), own))
    return undo


def _swap_back(seen, own) -> None:
    module = seen()
    if type(module) is CLASSES[own]:  # not one made of it since, as parametrizations do
        module.__class__ = own


def _implementations(config, of: Callable[[str | None], str | None]):
    """of(attn_implementation) of a config and its sub-configs, as `set_attn_implementation` takes
    them."""
    parts = {name: getattr(config, name) for name in config.sub_configs}
    found = {name: _implementations(c, of) for name, c in parts.items() if c is not None}
    own = of(config._attn_implementation)
    return {"": own, **found} if found else own


def _swap_transformers(model) -> list[Undo]:
    """Hugging Face models, and those in a wrapper (PEFT's): attn_implementation, where it was
    "sdpa" or "eager"; not of one that is to return its attention weights."""
    library = sys.modules.get("transformers")
    if library is None:
        return []
    if not isinstance(model, library.PreTrainedModel):
        return [undo for part in model.children() for undo in _swap_transformers(part)]
    from genfast.integrations import transformers as door

    ours = dict.fromkeys(("sdpa", "eager", None), door.NAME)
    before = _implementations(model.config, lambda name: name)
    wanted = _implementations(model.config, lambda name: ours.get(name, name))
    weights = getattr(model.config, "output_attentions", False)
    known = getattr(model, "_supports_sdpa", False) or model.config.model_type in door.LIKE_SDPA
    if wanted == before or weights or not known:
        return []
    door.register()
    model.set_attn_implementation(wanted)
    return [partial(_put_back, weakref.ref(model), before)]


def _put_back(seen, before) -> None:
    """The implementations of `_implementations`. Of a part without a module of its own it may be
    None, which `set_attn_implementation` refuses."""

    def known(found):
        if not isinstance(found, dict):
            return found
        return {name: known(one) for name, one in found.items() if one is not None}

    def forget(config, found):
        for name, one in found.items() if isinstance(found, dict) else ():
            part = getattr(config, name) if name else config
            if one is None:
                part._attn_implementation_internal = None
            elif name:
                forget(part, one)

    model = seen()
    model.set_attn_implementation(known(before))
    forget(model.config, before)


def _swap_functional(model) -> list[Undo]:
    """Models that call F.scaled_dot_product_attention: rerouted while they run."""
    route = _Route()
    enter = model.register_forward_pre_hook(route.enter, prepend=True)
    leave = model.register_forward_hook(route.leave, always_call=True)
    return [enter.remove, leave.remove, route.end]


class _Route:  # a class with a name: a model with these hooks can be pickled
    """Calls that have begun and not ended: torch runs no hook after a KeyboardInterrupt. Under
    torch.compile the hooks do nothing: the lock would break the graph. They ask dynamo, whose
    answer is the trace's: `is_compiling` is the process's, and may turn between the two."""

    def __init__(self):
        self.begun = 0

    def enter(self, *_) -> None:
        if not torch.compiler.is_dynamo_compiling():
            torch_sdpa.enable()
            self.begun += 1

    def leave(self, *_) -> None:
        if not torch.compiler.is_dynamo_compiling() and self.begun:
            self.begun -= 1
            torch_sdpa.disable()

    def end(self) -> None:
        while self.begun:
            self.leave()


def _swap_pipeline(pipe) -> list[Undo] | None:
    """A diffusers pipeline: its scheduler and its modules; a scheduler by itself. None: neither."""
    library = sys.modules.get("diffusers")
    if library is None:
        return None
    kinds = ("DiffusionPipeline", "ModularPipeline", "SchedulerMixin")
    if not isinstance(pipe, tuple(getattr(library, k) for k in kinds if hasattr(library, k))):
        return None
    from genfast.integrations import diffusers as door

    undo = door.swap_scheduler(pipe)
    for part in getattr(pipe, "components", {}).values():
        scripted = isinstance(part, torch.jit.ScriptModule)
        if isinstance(part, nn.Module) and not scripted and part not in _undo:
            accelerate(part)
            undo.append(partial(_restore_seen, weakref.ref(part)))  # it may be given up
    return undo


def _restore_seen(seen) -> None:
    part = seen()
    if part is not None:
        restore(part)


# In this order; a row that does not know the model returns nothing.
SWAPS: list[Callable[[nn.Module], list[Undo]]] = [
    _swap_classes,
    _swap_transformers,
    _swap_functional,
]

_undo: weakref.WeakKeyDictionary[nn.Module, list[Undo]] = weakref.WeakKeyDictionary()


def accelerate(model: Model) -> Model:
    """Switches `model` (a torch.nn.Module, a diffusers pipeline or a diffusers scheduler) over in
    place and returns it; twice is once.

    torch.nn's Linear, Conv2d, MultiheadAttention and Transformer layers take the forward of
    genfast.nn's classes of the same names, Hugging Face models
    attn_implementation="genfast", other calls of F.scaled_dot_product_attention are rerouted while
    the model runs, except under torch.compile, where they stay PyTorch's: there call
    genfast.integrations.torch_sdpa.enable() before the model is compiled. Schedulers take the class
    of the same name of genfast.integrations.diffusers.
    TypeError for anything else, TorchScript included.

    A copy of the model (copy.deepcopy, pickle, torch.save) stays switched over and cannot be
    switched back, and a pipeline made of it (from_pipe) is saved with genfast's scheduler: restore,
    then copy. torch.ao.quantization.quantize_dynamic knows nn.Linear by its exact class: quantize
    first, or restore.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"model: expected a torch.nn.Module that runs in Python, got {type(model).__name__}, "
            "whose calls TorchScript makes; accelerate the module that it was made of"
        )
    if not isinstance(model, nn.Module):
        done = _swap_pipeline(model)
        if done is None:
            raise TypeError(
                "model: expected a torch.nn.Module, a diffusers pipeline or scheduler, "
                f"got {type(model).__name__}"
            )
        if done:  # nothing new to do the second time
            _undo[model] = _undo.get(model, []) + done
        return model
    if model not in _undo:
        done = []
        for swap in SWAPS:
            done.extend(swap(model))
        _undo[model] = done
    return model


def restore(model: Model) -> Model:
    """Undoes `accelerate`; a model that was not accelerated stays as it is. Returns it. TypeError
    for what no model is."""
    if not hasattr(model, "__weakref__") or isinstance(model, torch.Tensor):
        raise TypeError(
            f"model: expected what `genfast.accelerate` takes, got {type(model).__name__}"
        )
    errors = []
    for undo in reversed(_undo.pop(model, [])):
        try:
            undo()
        except Exception as error:  # the others are undone all the same
            errors.append(error)
    if errors:
        raise errors[0]
    return model
