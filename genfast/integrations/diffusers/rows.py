"""One solver step as a row of 36 coefficients, and the one place where it is executed.

A `Row` is what genfast/schedulers/plan.py calls a row, with one difference: its history entries are
not slots of a plan but named places, filled at each step from the public attributes of a diffusers
scheduler (`model_outputs`, `ets`, ...). What a row stores is a tensor it computes, or, where the
solver keeps the sample, the model output or the noise as they came, a reference to that tensor.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np
import torch

from genfast.ops import _road
from genfast.ops._backend import kernels
from genfast.ops._force import get_backend, may_compose
from genfast.ops.diffusion import dynamic_threshold
from genfast.ops.rng import randn_like
from genfast.reference import diffusion as reference
from genfast.schedulers.plan import CLIP, COEF, COLUMNS, D_M, D_X, INPUT_SCALE, Lin, M, X, Z
from genfast.schedulers.plan import VARIANCE as VARIANCE_MODES

#: where a stored or returned tensor comes from when it is not an output
FROM_X, FROM_M, FROM_Z = -1, -2, -3
_REFERENCES = ((X, FROM_X, "x"), (M, FROM_M, "m"), (Z, FROM_Z, "z"))

_gate, _plain_gate, _DIRECT = _road.gate, _road.plain_gate, _road.DIRECT
_is_traced = torch.compiler.is_dynamo_compiling
_step_row, _kernel = _road._C.step_row, _road._C.diffusion_step


class Row:
    """See the module's head. Immutable but for the tables on other devices.

    table: (1, 36) float32; exact: (36,) float64. n_out: 1..3 tensors are computed.
    reads: names of the history entries H1, H2, ... in this order.
    prev, denoised, saves: places, an index of an output or FROM_* (see `resolve`); saves is one per
        form given to `compile_row`.
    draws: the peer draws noise here; noisy: it has a nonzero coefficient.
    note: whatever else the solver's step needs (an order, a scale).
    """

    __slots__ = (
        "table",
        "exact",
        "n_out",
        "reads",
        "prev",
        "denoised",
        "saves",
        "draws",
        "noisy",
        "variance",
        "threshold",
        "extras",
        "note",
        "_elsewhere",
    )

    def table_on(self, device):
        if device.type == "cpu":
            return self.table
        if device not in self._elsewhere:
            self._elsewhere[device] = self.table.to(device)
        return self._elsewhere[device]


def compile_row(
    x0: Lin,
    prev: Lin,
    saves=(),
    *,
    denoised: Lin | None = None,
    clip: float = np.inf,
    threshold=None,
    variance: str = "fixed",
    logvar=(0.0, 0.0),
    draws: bool = False,
    refer: str = "xmz",
    merge: bool = True,
    note=None,
) -> Row:
    """x0: unclamped form in x and m. prev: next sample. saves: forms to store. Names in the forms
    beyond x, m, x0, z are history entries. Raises ValueError where no row can express it.
    refer: which of x, m and z are stored by reference. Not where the peer stores a copy: a model in
        a CUDA graph overwrites its output. merge: denoised may be the same tensor as prev.
    """
    row = Row()
    outs, held = [], []

    def place(form, refer="xmz"):
        for known, code, letter in _REFERENCES:
            # with a learned variance m has twice the channels
            if form == known and letter in refer and (letter != "m" or variance == "fixed"):
                return code
        if form not in outs[0 if merge else 1 :]:
            outs.append(form)
        return len(outs) - 1 - outs[::-1].index(form)

    outs.append(prev)
    row.prev = 0
    row.saves = tuple(place(f, refer) for f in saves)
    # diffusers returns m itself for a predicted sample, and computes every other estimate
    row.denoised = None if denoised is None else place(denoised, "m")
    if len(outs) > 3:
        raise ValueError(f"a row has at most 3 outputs, this one needs {len(outs)}")
    exact = np.zeros(COLUMNS)
    exact[[D_X, D_M]] = x0.terms.get("x", 0.0), x0.terms.get("m", 0.0)
    exact[CLIP], exact[INPUT_SCALE] = clip, 1.0
    exact[INPUT_SCALE + 1 : COEF] = logvar
    fixed = {"x": 0, "m": 1, "x0": 2, "z": 9}
    for i, form in enumerate(outs):
        for name, c in form.terms.items():
            if name not in fixed and name not in held:
                held.append(name)
            exact[COEF + 10 * i + fixed.get(name, 3 + held.index(name) if name in held else 0)] = c
    if len(held) > 6:
        raise ValueError(f"a row reads at most 6 history entries, this one needs {len(held)}")
    if not np.isfinite(np.delete(exact, CLIP)).all():
        raise ValueError("a coefficient is not finite: this noise level says nothing about x0")
    row.exact, row.n_out, row.reads = exact, len(outs), tuple(held)
    row.table = torch.from_numpy(exact.astype(np.float32).reshape(1, COLUMNS))
    row.noisy = any("z" in f.terms for f in outs)
    row.draws = draws or row.noisy
    row.variance, row.threshold, row.note = VARIANCE_MODES[variance], threshold, note
    row.extras = _extras(row.variance)
    row._elsewhere = {}
    return row


def _extras(variance, threshold=None):
    """What the kernel takes beyond the affine map, None where it is nothing."""
    if variance == 0 and threshold is None:
        return None
    return (variance, threshold, None, None, None, None, None, None)


def step(row: Row, x, m, held=(), z=None, upcast=False, seed=None, stream=0):
    """Executes a row: the tuple of its outputs.

    x: sample. m: model output. held: one tensor per name in row.reads. z: noise, or None.
    seed, stream: noise drawn in the same pass instead, where the row has a coefficient for it.
    upcast: output 0 in m's dtype and the others in float32 (Euler and its kin compute so), else all
        in the dtype x and m promote to.
    """
    extras = row.extras if row.threshold is None else _thresholded(row, x, m)
    if extras is not _REFUSED:
        real = x.is_cuda and type(x) is torch.Tensor  # a row keeps its table
        real = real and not (_is_traced() or _road.transforming())
        table = row.table_on(x.device) if real else row.table
        outs = _step_row(
            table, 0, row.n_out, x, m, held, z, seed, stream, extras, 2 if upcast else 1
        )  # fmt: skip
        if outs is None:
            outs = _mixed(row, x, m, held, z, upcast, seed, stream, extras)
        if outs is not None:
            return outs
    if seed is not None:
        like = x if x.dtype == torch.float64 else x.to(torch.float32)
        z = randn_like(like, seed=seed, stream=stream)
    return _composite(row, x, m, held, z, upcast)


def resolve(code, outs, x, m):
    """The tensor of a place of a row: an output of `step`, or x or m as it came."""
    return outs[code] if code >= 0 else (x, m)[~code]


_REFUSED = ()
_COMPOSED = ("auto", "torch", "reference")  # behind the gate


def _kernel_for(*tensors):
    """The step's: without a layer, or of a backend asked for by name. None: PyTorch composes it."""
    if _gate(*tensors) == _DIRECT:
        return _kernel
    named = _plain_gate(*tensors) == _DIRECT and get_backend() not in _COMPOSED
    return kernels.diffusion_step if named else None


def _thresholded(row, x, m):
    """The extras of a row with dynamic thresholding; _REFUSED where the kernel cannot serve."""
    raw = m[:, : x.shape[1]] if row.variance else m
    if x.dtype == torch.float64 or _kernel_for(x, raw) is None:
        return _REFUSED
    if not x.is_cpu and get_backend() == "auto":
        return _REFUSED
    s = dynamic_threshold(x, *row.threshold, m=raw, table=row.table_on(x.device))
    return _extras(row.variance, s)


def _mixed(row, x, m, held, z, upcast, seed, stream, extras):
    """Outputs of several dtypes by the kernel, None where it does not take these tensors."""
    kernel = _kernel_for(x, m, z, *held)
    if kernel is None:
        return None
    first, rest = _out_dtypes(x, m, upcast)
    outs = (torch.empty_like(x, dtype=first),)
    outs += tuple([torch.empty_like(x, dtype=rest) for _ in range(row.n_out - 1)])
    number, seeds = (0, seed) if isinstance(seed, torch.Tensor) else (seed or 0, None)
    table = row.table_on(x.device)
    done = kernel(
        outs, x, (m,), None, table, None, 0, held, z, number, seeds, stream, 0, seed is not None,
        extras,
    )  # fmt: skip
    return outs if done else None


def _out_dtypes(x, m, upcast):
    """(dtype of output 0, of the others)."""
    promoted = torch.promote_types(x.dtype, m.dtype)
    if upcast:
        return m.dtype, torch.promote_types(promoted, torch.float32)
    return promoted, promoted


def _composite(row, x, m, held, z, upcast):
    """float64, autograd, other devices, and whatever else the kernel refuses."""
    learned = torch.is_grad_enabled() and any(t.requires_grad for t in (x, m, *held))
    may_compose("diffusion_step", x, m, *held, lacks="a gradient" if learned else None)
    first, rest = _out_dtypes(x, m, upcast)
    wide = any(t is not None and t.dtype == torch.float64 for t in (x, m, z, *held))
    dtype = torch.float64 if wide else torch.float32
    x, m = x.to(dtype), m.to(dtype)
    threshold = None
    if row.threshold is not None:
        raw = m[:, : x.shape[1]] if row.variance else m
        raw = float(row.exact[D_X]) * x + float(row.exact[D_M]) * raw
        threshold = reference.dynamic_threshold(raw, *row.threshold)
    outs = reference.diffusion_step(
        x,
        m,
        torch.from_numpy(row.exact),
        history=[h.to(dtype) for h in held],
        noise=None if z is None else z.to(dtype),
        threshold=threshold,
        variance_mode=row.variance,
        n_out=row.n_out,
    )
    return tuple(o.to(rest if i else first) for i, o in enumerate(outs))


# --------------------------------------------------------------------------------------------------
# rows are functions of a config and a grid: kept across runs, as pipelines set timesteps every call

_KEPT = 64
_rows: OrderedDict = OrderedDict()
_lock = threading.Lock()


def rows_of(key) -> dict:
    """The rows already made for this key (class, config, grid, options); least recently used keys
    go first.
    """
    with _lock:
        found = _rows.setdefault(key, {})
        _rows.move_to_end(key)
        while len(_rows) > _KEPT:
            _rows.popitem(last=False)
        return found
