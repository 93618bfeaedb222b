"""Solvers with a history of model outputs: DPM-Solver multistep and singlestep, EDM DPM-Solver,
DEIS, UniPC, SA-Solver, LMS.

The history is read from `model_outputs` (LMS: `derivatives`) and `last_sample` / `sample` /
`last_noise`, and how much of it counts from `lower_order_nums` and `this_order`, at every step.
"""

from __future__ import annotations

import re

import torch
from diffusers.schedulers import (
    scheduling_deis_multistep,
    scheduling_dpmsolver_multistep,
    scheduling_dpmsolver_singlestep,
    scheduling_edm_dpmsolver_multistep,
    scheduling_lms_discrete,
    scheduling_sasolver,
    scheduling_unipc_multistep,
)

from genfast.ops.rng import randn_like
from genfast.schedulers.convert import ve
from genfast.schedulers.dpm import singlestep_orders
from genfast.schedulers.euler import lms_coefficients
from genfast.schedulers.plan import Lin, X, sym

from .base import (
    FROM_M,
    PREV,
    PREV_X0,
    AlphaForward,
    Dropin,
    LambdaForward,
    compile_row,
    record,
    resolve,
    shape_of_sum,
    step,
)
from .sigma import ScaledInput

_ENTRY = re.compile(r"[DE](\d+)|(saved|noise)\d+")
#: what the planner calls an entry that is not in the list -> attribute
_ATTRIBUTES = {"saved": "last_sample", "noise": "last_noise"}


def _relative(form: Lin, i: int) -> Lin:
    """form of row i with D7 renamed to its place in the list before the step ("-2" for i = 9)."""
    names = {}
    for name in form.terms:
        found = _ENTRY.fullmatch(name)
        if found:
            names[name] = f"-{i - int(found[1])}" if found[1] else found[2]
    return Lin({names.get(n, n): c for n, c in form.terms.items()})


def _places(row):
    """Where each history entry is: an index of the list, or the name of an attribute."""
    return tuple([int(n) if n.startswith("-") else _ATTRIBUTES[n] for n in row.reads])


def _in_dtype(outs, saved, dtype):
    """outs with the next sample and the corrected one in the dtype diffusers casts them to."""
    return tuple([o.to(dtype) if i in (0, saved) else o for i, o in enumerate(outs)])


def _stored_like(row, x, m):
    """(shape, dtype) of the model output as it is stored, which the peer's noise follows."""
    if row.saves[0] == FROM_M:
        return m.shape, m.dtype
    return shape_of_sum(x, m), torch.promote_types(x.dtype, m.dtype)


class _History(Dropin):
    """Rows keyed by (step index, history available, ...)."""

    _refer = "xmz"  # an unchanged model output is stored as it came

    def _genfast_depth(self, e):
        """lower_order_nums stops there."""
        return e.config["solver_order"]

    def _genfast_make(self, e, key):
        i, n = key[:2]
        if not 0 <= n <= i:
            raise ValueError(f"{n} past outputs at step {i}")
        begin = 0 if n >= self._genfast_depth(e) else i - n
        return self._genfast_compile(e, i, begin)

    def _genfast_compile(self, e, i, begin, note=None):
        plan = self._genfast_forms(e, begin)
        row = plan.rows[i - begin]
        made = compile_row(
            row["x0"],
            _relative(row["prev"], i),
            [_relative(f, i) for f in row["save"].values()],
            clip=plan.clip,
            threshold=plan.threshold,
            draws=row["draws"],
            refer=self._refer,
        )
        made.note = _places(made), note
        return made

    def _genfast_engine(self):
        e = super()._genfast_engine()
        c = e.config
        # diffusers takes the first three channels of a model with variance channels, literally
        e.extra = (
            c["solver_order"] if "solver_order" in c else 0,
            c.get("variance_type") in ("learned", "learned_range")
            and c["prediction_type"] == "epsilon",
        )
        return e

    def _genfast_listed(self, model_output, timestep, sample, generator, seed, dtype=None, z=None):
        """One step on `model_outputs` and `lower_order_nums`: (next sample,), or None."""
        if self.num_inference_steps is None:
            return None
        e = self._genfast_now()
        if not self._genfast_takes(sample, model_output):
            return None
        i = self._step_index
        if i is None:
            self._init_step_index(timestep)
            i = self._step_index
        order, learned = e.extra
        n = self.lower_order_nums
        key = (i, n)
        try:
            row = e.rows[key]
        except KeyError:
            row = self._genfast_row(e, key)
        outputs = self.model_outputs
        if row is None or len(outputs) != order:
            self._genfast_why(e, key)
            return None
        held = tuple([outputs[k] for k in row.note[0]])
        for h in held:
            if h is None:
                self._genfast_why(None, key, "a model output of the history is missing")
                return None
        if learned:
            model_output = model_output[:, :3]
        if row.draws:
            if z is None:
                shape, own = _stored_like(row, sample, model_output)
                dtype = dtype or own
                z, seed = self._genfast_noise(row, sample, shape, dtype, generator, seed)
            else:
                z, seed = z if row.noisy else None, None
        outs = step(row, sample, model_output, held, z, False, seed, i)
        del outputs[0]
        at = row.saves[0]
        outputs.append(resolve(at, outs, sample, model_output))
        if n < order:
            self.lower_order_nums = n + 1
        self._step_index = i + 1
        return outs[:1]


def _zero_ends_first_order(config):
    """diffusers ends in a first order step if the config says that sigma does, whatever it is."""
    ends = config["euler_at_final"] or config["final_sigmas_type"] == "zero"
    return dict(euler_at_final=ends)


class DPMSolverMultistepScheduler(
    LambdaForward, _History, scheduling_dpmsolver_multistep.DPMSolverMultistepScheduler
):
    __doc__ = scheduling_dpmsolver_multistep.DPMSolverMultistepScheduler.__doc__

    def _genfast_config(self):
        return _zero_ends_first_order(self._internal_dict)

    def step(
        self,
        model_output,
        timestep,
        sample,
        generator=None,
        variance_noise=None,
        return_dict=True,
        *,
        seed=None,
    ):
        z = variance_noise
        if z is not None:
            z = z.to(device=model_output.device, dtype=torch.float32)
        found = self._genfast_listed(
            model_output, timestep, sample, generator, seed, torch.float32, z
        )
        if found is None:
            return super().step(
                model_output, timestep, sample, generator, variance_noise, return_dict
            )
        kind = scheduling_dpmsolver_multistep.SchedulerOutput
        return record(kind, PREV, found) if return_dict else found


class EDMDPMSolverMultistepScheduler(
    ScaledInput, _History, scheduling_edm_dpmsolver_multistep.EDMDPMSolverMultistepScheduler
):
    __doc__ = scheduling_edm_dpmsolver_multistep.EDMDPMSolverMultistepScheduler.__doc__
    _kind = "edm"
    _refer = ""

    def _genfast_config(self):
        return _zero_ends_first_order(self._internal_dict)

    def step(self, model_output, timestep, sample, generator=None, return_dict=True, *, seed=None):
        found = self._genfast_listed(model_output, timestep, sample, generator, seed)
        if found is None:
            return super().step(model_output, timestep, sample, generator, return_dict)
        kind = scheduling_edm_dpmsolver_multistep.SchedulerOutput
        return record(kind, PREV, found) if return_dict else found


class DEISMultistepScheduler(
    LambdaForward, _History, scheduling_deis_multistep.DEISMultistepScheduler
):
    __doc__ = scheduling_deis_multistep.DEISMultistepScheduler.__doc__
    _refer = ""

    def step(self, model_output, timestep, sample, return_dict=True):
        found = self._genfast_listed(model_output, timestep, sample, None, None)
        if found is None:
            return super().step(model_output, timestep, sample, return_dict)
        kind = scheduling_deis_multistep.SchedulerOutput
        return record(kind, PREV, found) if return_dict else found


class DPMSolverSinglestepScheduler(
    LambdaForward, _History, scheduling_dpmsolver_singlestep.DPMSolverSinglestepScheduler
):
    __doc__ = scheduling_dpmsolver_singlestep.DPMSolverSinglestepScheduler.__doc__

    def _genfast_make(self, e, key):
        i, p = key
        c, s = e.config, e.data["sigmas"]
        orders = singlestep_orders(
            len(s) - 1, c["solver_order"], c["lower_order_final"], s[-1] == 0
        )
        if orders[i] < p or p > i + 1:
            raise ValueError(f"order_list asks for order {p} at step {i}")
        return self._genfast_compile(e, i, 0 if orders[i] == p else i - p + 1)

    def step(self, model_output, timestep, sample, generator=None, return_dict=True, *, seed=None):
        found = self._genfast_block(model_output, timestep, sample, generator, seed)
        if found is None:
            return super().step(model_output, timestep, sample, generator, return_dict)
        kind = scheduling_dpmsolver_singlestep.SchedulerOutput
        return record(kind, PREV, found) if return_dict else found

    def _genfast_block(self, model_output, timestep, sample, generator, seed):
        if self.num_inference_steps is None:
            return None
        e = self._genfast_now()
        if not self._genfast_takes(sample, model_output):
            return None
        i = self._step_index
        if i is None:
            self._init_step_index(timestep)
            i = self._step_index
        order, learned = e.extra
        outputs = self.model_outputs
        p = self.order_list[i] if i < len(self.order_list) else 0
        while p > 1 and outputs[1 - p] is None:
            p -= 1
        key = (i, p)
        try:
            row = e.rows[key]
        except KeyError:
            row = self._genfast_row(e, key)
        if row is None or p < 1 or len(outputs) != order or (p > 1 and self.sample is None):
            self._genfast_why(e, key)
            return None
        held = tuple([outputs[k] if k.__class__ is int else self.sample for k in row.note[0]])
        if learned:
            model_output = model_output[:, :3]
        z = None
        if row.draws:
            shape, dtype = _stored_like(row, sample, model_output)
            z, seed = self._genfast_noise(row, sample, shape, dtype, generator, seed)
        outs = step(row, sample, model_output, held, z, False, seed, i)
        del outputs[0]
        at = row.saves[0]
        outputs.append(resolve(at, outs, sample, model_output))
        if p == 1:
            self.sample = sample
        self._step_index = i + 1
        return outs[:1]


class UniPCMultistepScheduler(
    LambdaForward, _History, scheduling_unipc_multistep.UniPCMultistepScheduler
):
    __doc__ = scheduling_unipc_multistep.UniPCMultistepScheduler.__doc__

    _watched = (*_History._watched, "predict_x0")

    def _genfast_now(self):
        e = super()._genfast_now()
        if e.data["uncorrected"] != tuple(self.disable_corrector):  # a list: edited in place
            e = self._genfast_renewed()
        return e

    def _genfast_data(self):
        own = dict(predict_x0=self.predict_x0, uncorrected=tuple(self.disable_corrector))
        return dict(super()._genfast_data(), **own)

    def _genfast_config(self):
        return dict(predict_x0=self.predict_x0, disable_corrector=tuple(self.disable_corrector))

    def _genfast_order(self, e, i, n):
        """this_order of step i with n past outputs."""
        order, N = e.config["solver_order"], len(e.data["timesteps"])
        return min(min(order, N - i) if e.config["lower_order_final"] else order, n + 1)

    def _genfast_make(self, e, key):
        i, n, corrects = key
        order = e.config["solver_order"]
        if not 0 <= n <= i or corrects != (n > 0 and i - 1 not in self.disable_corrector):
            raise ValueError("last_sample is not that of a run so far")
        before = min(n - 1, order - 1) if n else 0
        note = self._genfast_order(e, i, n), self._genfast_order(e, i - 1, before)
        return self._genfast_compile(e, i, 0 if n >= order else i - n, note)

    def step(self, model_output, timestep, sample, return_dict=True):
        found = self._genfast_unipc(model_output, timestep, sample)
        if found is None:
            return super().step(model_output, timestep, sample, return_dict)
        kind = scheduling_unipc_multistep.SchedulerOutput
        return record(kind, PREV, found) if return_dict else found

    def _genfast_unipc(self, model_output, timestep, sample):
        if self.num_inference_steps is None or self.solver_p:
            self._genfast_why(None, None, "solver_p is set, or set_timesteps was not called")
            return None
        e = self._genfast_now()
        if not self._genfast_takes(sample, model_output):
            return None
        i = self._step_index
        if i is None:
            self._init_step_index(timestep)
            i = self._step_index
        order, _ = e.extra
        n, last = self.lower_order_nums, self.last_sample
        corrects = i > 0 and last is not None and i - 1 not in self.disable_corrector
        key = (i, n, corrects)
        try:
            row = e.rows[key]
        except KeyError:
            row = self._genfast_row(e, key)
        outputs = self.model_outputs
        if row is None or len(outputs) != order or (corrects and self.this_order != row.note[1][1]):
            self._genfast_why(e, key)
            return None
        held = tuple([outputs[k] if k.__class__ is int else last for k in row.note[0]])
        for h in held:
            if h is None:
                self._genfast_why(None, key, "a model output of the history is missing")
                return None
        outs = step(row, sample, model_output, held)
        if sample.dtype is not model_output.dtype:
            outs = _in_dtype(outs, row.saves[1], last.dtype if corrects else sample.dtype)
        del outputs[0]
        output, saved = row.saves
        outputs.append(resolve(output, outs, sample, model_output))
        times = self.timestep_list
        del times[0]
        times.append(timestep)
        self.this_order = row.note[1][0]
        self.last_sample = resolve(saved, outs, sample, model_output)
        if n < order:
            self.lower_order_nums = n + 1
        self._step_index = i + 1
        return outs[:1]


class SASolverScheduler(AlphaForward, _History, scheduling_sasolver.SASolverScheduler):
    __doc__ = scheduling_sasolver.SASolverScheduler.__doc__

    _watched = (*_History._watched, "tau_func")

    def _genfast_data(self):
        data = super()._genfast_data()
        return dict(data, tau=tuple(float(self.tau_func(t)) for t in data["timesteps"]))

    def _genfast_config(self):
        return dict(tau_func=self.tau_func)

    def _genfast_depth(self, e):
        return max(e.config["predictor_order"], e.config["corrector_order"] - 1)

    def _genfast_orders(self, e, i, n):
        """(this_predictor_order, this_corrector_order) of step i with n past outputs."""
        p, c = e.config["predictor_order"], e.config["corrector_order"]
        if e.config["lower_order_final"]:
            left = len(e.data["timesteps"]) - i
            p, c = min(p, left), min(c, left + 1)
        return min(p, n + 1), min(c, n + 2)

    def _genfast_make(self, e, key):
        i, n, corrects = key
        depth = self._genfast_depth(e)
        if not 0 <= n <= i or corrects != (n > 0):
            raise ValueError("last_sample is not that of a run so far")
        before = min(n - 1, depth) if n < depth else min(i - 1, depth)
        note = self._genfast_orders(e, i, n), self._genfast_orders(e, i - 1, max(before, 0))[1]
        return self._genfast_compile(e, i, 0 if n >= depth else i - n, note)

    def step(self, model_output, timestep, sample, generator=None, return_dict=True, *, seed=None):
        found = self._genfast_sa(model_output, timestep, sample, generator, seed)
        if found is None:
            return super().step(model_output, timestep, sample, generator, return_dict)
        kind = scheduling_sasolver.SchedulerOutput
        return record(kind, PREV, found) if return_dict else found

    def _genfast_sa(self, model_output, timestep, sample, generator, seed):
        if self.num_inference_steps is None:
            return None
        e = self._genfast_now()
        if not self._genfast_takes(sample, model_output):
            return None
        i = self._step_index
        if i is None:
            self._init_step_index(timestep)
            i = self._step_index
        n, last, known = self.lower_order_nums, self.last_sample, e.data["timesteps"]
        corrects = i > 0 and last is not None
        key = (i, n, corrects)
        try:
            row = e.rows[key]
        except KeyError:
            row = self._genfast_row(e, key)
        outputs, times = self.model_outputs, self.timestep_list
        if (
            row is None
            or i >= len(known)
            or float(timestep) != known[i]
            or len(outputs) != self._genfast_depth(e)
            or corrects
            and (self.this_corrector_order != row.note[1][1] or float(times[-1]) != known[i - 1])
        ):
            self._genfast_why(e, key)
            return None
        held = []
        for k in row.note[0]:
            held.append(outputs[k] if k.__class__ is int else getattr(self, k))
            if held[-1] is None:
                self._genfast_why(None, key, "a model output of the history is missing")
                return None
        shape, dtype = model_output.shape, model_output.dtype
        if e.extra[1]:
            model_output = model_output[:, :3]
            if shape != model_output.shape:  # diffusers draws for all channels and fails
                return None
        z, seed = self._genfast_noise(row, sample, shape, dtype, generator, seed, keep=True)
        if seed is not None:  # kept in last_noise, so it must be a tensor
            z = randn_like(sample, seed=seed, stream=i, dtype=dtype)
        outs = step(row, sample, model_output, tuple(held), z if row.noisy else None)
        if sample.dtype is not dtype:
            outs = _in_dtype(outs, row.saves[1], last.dtype if corrects else sample.dtype)
        output, saved, _ = row.saves
        del outputs[0], times[0]
        outputs.append(resolve(output, outs, sample, model_output))
        times.append(timestep)
        self.this_predictor_order, self.this_corrector_order = row.note[1][0]
        self.last_sample = resolve(saved, outs, sample, model_output)
        self.last_noise = z
        if n < len(outputs):
            self.lower_order_nums = n + 1
        self._step_index = i + 1
        return outs[:1]


class LMSDiscreteScheduler(ScaledInput, Dropin, scheduling_lms_discrete.LMSDiscreteScheduler):
    __doc__ = scheduling_lms_discrete.LMSDiscreteScheduler.__doc__

    def _genfast_make(self, e, key):
        i, kept, order = key
        s = e.data["sigmas"]
        form = ve(e.config["prediction_type"], s[i])
        d = (X - form) / s[i]
        c = lms_coefficients(s, i, min(i + 1, order))[:kept]
        prev = X + c[0] * d + sum(ck * sym(f"-{k}") for k, ck in enumerate(c) if k)
        row = compile_row(form, prev, (d,), denoised=form, refer="")
        row.note = tuple([int(n) for n in row.reads])
        return row

    def step(self, model_output, timestep, sample, order=4, return_dict=True):
        if not self.is_scale_input_called:
            return super().step(model_output, timestep, sample, order, return_dict)
        e = self._genfast_now()
        if not self._genfast_takes(sample, model_output):
            return super().step(model_output, timestep, sample, order, return_dict)
        i = self._step_index
        if i is None:
            self._init_step_index(timestep)
            i = self._step_index
        past = self.derivatives
        kept = len(past) + 1
        key = (i, kept if kept < order else order, order)
        try:
            row = e.rows[key]
        except KeyError:
            row = self._genfast_row(e, key)
        if row is None:
            self._genfast_why(e, key)
            return super().step(model_output, timestep, sample, order, return_dict)
        outs = step(row, sample, model_output, tuple([past[k] for k in row.note]))
        past.append(outs[row.saves[0]])
        if kept > order:
            del past[0]
        self._step_index = i + 1
        found = outs[0], resolve(row.denoised, outs, sample, model_output)
        kind = scheduling_lms_discrete.LMSDiscreteSchedulerOutput
        return record(kind, PREV_X0, found) if return_dict else found


__all__ = [
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "LMSDiscreteScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
]
