"""Signatures of classes whose constructor hands torch.nn's arguments on."""

from __future__ import annotations

import inspect
from typing import TypeVar

Module = TypeVar("Module", bound=type)


def signed(module: Module) -> Module:
    """A class decorator: torch.nn's arguments, then its own keywords. torch.nn.utils.skip_init
    looks for `device` there."""
    peer = inspect.signature(module.__bases__[0])
    own = inspect.signature(module.__init__).parameters.values()
    keywords = [p for p in own if p.kind is p.KEYWORD_ONLY]
    module.__signature__ = peer.replace(parameters=[*peer.parameters.values(), *keywords])
    return module
