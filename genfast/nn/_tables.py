"""Buffers that no state dict has, as functions of a module's settings."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Tables(nn.Module):
    """A module's tables move and change dtype with it, and get their values again each time:
    rounded to 16 bits and back they would stay rounded, and after `to_empty` be what lay in memory,
    which `load_state_dict` does not replace.
    """

    table_dtype: torch.dtype | None = None  # the module's
    _tables: dict[str, Tensor] = {}

    def set_tables(self, **values: Tensor) -> None:
        """Registers them, float32, on the default device."""
        default = torch.empty(0).device
        self._tables = {name: value.detach().float() for name, value in values.items()}
        for name, value in self._tables.items():
            device = value.device if default.type == "meta" else default
            self.register_buffer(name, value.to(device, copy=True), persistent=False)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        for name, value in self._tables.items():
            now = getattr(self, name)
            if self.table_dtype is not None and now.dtype != self.table_dtype:
                now = torch.empty_like(now, dtype=self.table_dtype)
                setattr(self, name, now)
            if type(now) is Tensor and not now.is_meta:
                with torch.no_grad():
                    now.copy_(value)
        return self
