"""What the drop-in schedulers share: when rows are rebuilt, noise, outputs, the forward process."""

from __future__ import annotations

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor

from genfast._native import _C
from genfast.ops._force import may_compose
from genfast.ops.diffusion import add_noise
from genfast.reference import diffusion as reference
from genfast.schedulers.from_config import plan_from_config
from genfast.schedulers.plan import symbolic
from genfast.schedulers.schedules import SigmaGrid

from .rows import FROM_M, FROM_X, FROM_Z, Row, compile_row, resolve, rows_of, step

__all__ = [
    "FROM_M",
    "FROM_X",
    "FROM_Z",
    "Dropin",
    "Engine",
    "Row",
    "compile_row",
    "integer",
    "record",
    "resolve",
    "step",
]

_INTEGERS = frozenset((torch.int32, torch.int64))

#: fields of the outputs of `step`
PREV = ("prev_sample",)
PREV_X0 = ("prev_sample", "pred_original_sample")

#: record(kind, names, values): a diffusers output, made in 0.2 us rather than 3.2;
#: unchanged(attributes, watched), integer(t): csrc/bindings_diffusion.cpp
record, unchanged, integer = _C.record, _C.unchanged, _C.integer


class Engine:
    """Rows of one scheduler state, and what they were made from: while each watched attribute is
    the same object (a tensor also of the same version), they hold.

    watched: (name, object, version or None, name, ...). timesteps: the tensor.
    rows: key -> Row, or None where the peer's own step must run. source: forms by first step.
    """

    __slots__ = (
        "watched",
        "timesteps",
        "config",
        "rows",
        "source",
        "data",
        "why",
        "scale",
        "extra",
    )

    def __reduce__(self):  # a copied or unpickled scheduler makes its own
        return (_none, ())

    def __deepcopy__(self, memo):
        return None


def _none():
    return None


class Dropin:
    """Mixin before a diffusers scheduler class.

    genfast_seed: int, or int64 tensor of one seed per sample: noise of (seed, stream = step index)
        instead of torch's where `step` gets no generator. None: torch's.
    genfast_fallback: why a step ran in diffusers' own code, the latest that did since the schedule
        was set; None if none did.
    """

    genfast_seed = None
    genfast_fallback = None
    _genfast = None
    #: attributes the rows are made from
    _watched = ("sigmas", "timesteps", "_internal_dict")

    # ---- rows ------------------------------------------------------------------------------------

    def _genfast_now(self):
        """The engine that describes this scheduler as it is."""
        e = self._genfast
        if e is None or not unchanged(self.__dict__, e.watched):
            e = self._genfast_renewed()
        return e

    @torch.compiler.disable  # the planner is NumPy, which Dynamo would trace
    def _genfast_renewed(self):
        return self._genfast_engine()

    def _genfast_engine(self):
        """A new engine for the present attributes; rows are shared with equal ones."""
        e, watched = Engine(), []
        for name in self._watched:
            value, version = getattr(self, name), None
            if isinstance(value, torch.Tensor):
                if value.is_inference():  # has no version counter
                    with torch.inference_mode(False):
                        value = value.clone()
                    setattr(self, name, value)
                version = value._version
            watched += (name, value, version)
        e.watched, e.timesteps = tuple(watched), self.timesteps
        e.config, e.source, e.why = self._internal_dict, {}, {}
        e.data = self._genfast_data()
        config = repr(sorted((k, v) for k, v in e.config.items() if not k.startswith("_")))
        content = tuple(v.tobytes() if isinstance(v, np.ndarray) else v for v in e.data.values())
        key = (type(self).__name__, config, content)
        try:
            e.rows = rows_of(key)
        except TypeError:  # something unhashable among the attributes
            e.rows = {}
        self._genfast, self.genfast_fallback = e, None
        return e

    def _genfast_data(self) -> dict:
        """What the rows are made from beside the config: float64 arrays and hashable values."""
        return dict(
            sigmas=self.sigmas.detach().cpu().double().numpy(),
            timesteps=self.timesteps.detach().cpu().double().numpy(),
        )

    @torch.compiler.disable
    def _genfast_row(self, e, key):
        """e.rows[key], made now; None where no row can express it (`genfast_fallback` says why)."""
        try:
            row = self._genfast_make(e, key)
        except (ValueError, ZeroDivisionError, OverflowError, IndexError) as error:
            e.why[key] = str(error) or type(error).__name__
            row = None
        e.rows[key] = row
        return row

    def _genfast_make(self, e, key) -> Row:
        raise NotImplementedError

    def _genfast_forms(self, e, begin=0, **options):
        """Rows as linear forms from the planner, starting at step `begin`."""
        key = (begin, tuple(sorted(options.items())))
        if key not in e.source:
            with symbolic():
                e.source[key] = plan_from_config(
                    type(self).__name__,
                    {**e.config, **self._genfast_config()},
                    grid=self._genfast_grid(e),
                    alphas_cumprod=self._genfast_alphas(),
                    begin=begin,
                    **options,
                )
        return e.source[key]

    def _genfast_alphas(self):
        table = getattr(self, "alphas_cumprod", None)
        return None if table is None else table.detach().cpu().double().numpy()

    def _genfast_config(self) -> dict:
        """Config attributes that the planner shall see otherwise."""
        return {}

    _kind = "vp"

    def _genfast_grid(self, e):
        kind = "flow" if e.config.get("use_flow_sigmas") else self._kind
        return SigmaGrid(e.data["timesteps"], e.data["sigmas"], kind)

    def _genfast_why(self, e, key, otherwise="the attributes are not those of a run so far"):
        self.genfast_fallback = e.why.get(key, otherwise) if e is not None else otherwise

    def _genfast_takes(self, sample, model_output):
        """Both are floating point. diffusers promotes integers from operation to operation, each
        class in its own order: only its own code gives the dtypes and roundings that follow."""
        if sample.is_floating_point() and model_output.is_floating_point():
            return True
        self._genfast_why(None, None, "an integer sample or model output")
        return False

    # ---- noise -----------------------------------------------------------------------------------

    def _genfast_noise(self, row, x, shape, dtype, generator, seed, keep=False):
        """(z, seed) of one step: noise as a tensor, or the seed of what the kernel draws; both None
        where it is neither used nor drawn by diffusers.

        A generator, or none and no seed: torch's draws in diffusers' number, order and dtype, also
        where the coefficient is 0. seed: contract noise of (seed, stream).
        keep: the scheduler stores it, used or not.
        """
        if seed is None:
            seed = self.genfast_seed if generator is None else None
        elif generator is not None:
            raise ValueError("seed, generator: expected at most one of them, got both")
        if seed is None:
            z = randn_tensor(shape, generator=generator, device=x.device, dtype=dtype)
            return z if row.noisy or keep else None, None
        return None, seed if row.noisy or keep else None

    # ---- forward process -------------------------------------------------------------------------

    _genfast_places = (None, 0, {})  # timesteps, their version, value -> index_for_timestep

    def _genfast_indices(self, timesteps):
        """index_for_timestep of each of `timesteps` (n,), by one table instead of a search each."""
        known, version, places = self._genfast_places
        now = self.timesteps
        if known is not now or now.is_inference() or now._version != version:
            where = {}
            for i, t in enumerate(now.tolist()):
                where.setdefault(t, []).append(i)
            places = {t: at[min(1, len(at) - 1)] for t, at in where.items()}
            self._genfast_places = (now, 0 if now.is_inference() else now._version, places)
        found = []
        for t in timesteps.tolist():
            at = places.get(t)
            found.append(self._genfast_absent(t) if at is None else at)
        return found

    def _genfast_absent(self, t):
        """Index of a timestep that is not in the schedule; as diffusers."""
        return self.index_for_timestep(torch.tensor(t, dtype=self.timesteps.dtype))

    def _genfast_step_indices(self, timesteps):
        if self.begin_index is None:
            return self._genfast_indices(timesteps)
        at = self.step_index if self.step_index is not None else self.begin_index
        return [at] * timesteps.shape[0]


def is_integer(timestep) -> bool:
    """What diffusers' sigma schedulers refuse as a timestep."""
    kind = timestep.__class__
    return kind is int or (kind is torch.Tensor and timestep.dtype in _INTEGERS)


def shape_of_sum(x, m):
    """Of x + m; torch.broadcast_shapes takes 14 us."""
    return x.shape if x.shape == m.shape else torch.broadcast_shapes(x.shape, m.shape)


def mix(x, noise, a, s):
    """a x + s noise, a and s () or (n,) along the first dimension, never rounded to 16 bit."""
    dtype = torch.promote_types(x.dtype, noise.dtype)
    if x.dtype is not noise.dtype:
        x, noise = x.to(dtype), noise.to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    a, s = (c.to(device=x.device, dtype=wide) for c in (a, s))
    if a.numel() == 1:
        a, s = a.reshape(()), s.reshape(())
    if x.shape == noise.shape and (a.dim() == 0 or x.dim() and len(a) == len(x)):
        return add_noise(x, a, s, noise=noise)
    may_compose("add_noise", x, noise, lacks="one sample at many timesteps")
    return reference.add_noise(x, noise, a, s)


def alpha_sigma(scheduler, x, timesteps):
    """(sqrt(alpha_bar), sqrt(1 - alpha_bar)) at timesteps, (n,) each, float32 (fp64 for fp64 x).
    The table moves to x's device, as in diffusers.
    """
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(device=x.device)
    table = scheduler.alphas_cumprod
    table = table.double() if x.dtype == torch.float64 else table.float()
    a = table[timesteps.to(x.device)].flatten()
    return a.sqrt(), (1 - a).sqrt()


class AlphaForward:
    """add_noise of the classes on integer timesteps."""

    def add_noise(self, original_samples, noise, timesteps):
        return mix(original_samples, noise, *alpha_sigma(self, original_samples, timesteps))


class AlphaVelocity(AlphaForward):
    """The same for those that have get_velocity."""

    def get_velocity(self, sample, noise, timesteps):
        a, s = alpha_sigma(self, sample, timesteps)
        return mix(noise, sample, a, -s)


class SigmaForward:
    """add_noise of the classes in sigma."""

    def add_noise(self, original_samples, noise, timesteps):
        sigma = self.sigmas[self._genfast_step_indices(timesteps)].flatten()
        return mix(original_samples, noise, *self._genfast_alpha_sigma(sigma))

    def _genfast_alpha_sigma(self, sigma):
        return torch.ones_like(sigma), sigma


class LambdaForward(SigmaForward):
    """add_noise of the solvers in log(alpha / sigma)."""

    def _genfast_alpha_sigma(self, sigma):
        return self._sigma_to_alpha_sigma_t(sigma)
