"""Solvers that evaluate the model twice a step: Heun, KDPM2, ancestral KDPM2 and flow-match Heun.

Which stage a step is, and what it starts from, is read from the public attributes (`sample`,
`prev_derivative`, `dt`).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from diffusers.schedulers import (
    scheduling_flow_match_heun_discrete,
    scheduling_heun_discrete,
    scheduling_k_dpm_2_ancestral_discrete,
    scheduling_k_dpm_2_discrete,
)

from genfast.schedulers.convert import ve
from genfast.schedulers.euler import churn
from genfast.schedulers.plan import X0, M, X, Z, sym

from .base import (
    PREV,
    PREV_X0,
    Dropin,
    SigmaForward,
    compile_row,
    is_integer,
    mix,
    record,
    resolve,
    step,
)
from .sigma import ScaledInput, _churn

_NO_CHURN = dict(s_churn=0.0, s_tmin=0.0, s_tmax=math.inf, s_noise=1.0)


class _TwoStage(Dropin):
    _genfast_dt = (None, 0.0)  # the dt the first stage left, as the public tensor and as a number

    def _genfast_at(self, timestep):
        e = self._genfast_now()
        i = self._step_index
        if i is None:
            self._init_step_index(timestep)
            i = self._step_index
        return e, i

    def _genfast_get(self, e, key, sample, model_output):
        if not self._genfast_takes(sample, model_output):
            return None
        try:
            row = e.rows[key]
        except KeyError:
            row = self._genfast_row(e, key)
        if row is None:
            self._genfast_why(e, key)
        return row


def _clipped(c, form):
    """(x0 form to use, bound) for a config with clip_sample."""
    return (X0, c["clip_sample_range"]) if c.get("clip_sample") else (form, np.inf)


class HeunDiscreteScheduler(ScaledInput, _TwoStage, scheduling_heun_discrete.HeunDiscreteScheduler):
    __doc__ = scheduling_heun_discrete.HeunDiscreteScheduler.__doc__

    def _genfast_make(self, e, key):
        s, c = e.data["sigmas"], e.config
        if key.__class__ is int:
            i = key
            sigma, sigma_next = s[i], s[i + 1]
            form = ve(c["prediction_type"], sigma)
            D, clip = _clipped(c, form)
            d, dt = (X - D) / sigma, sigma_next - sigma
            prev, saves = X + d * dt, (d,)
            note = self.sigmas[i + 1] - self.sigmas[i], dt
        else:
            i, dt = key
            form = ve(c["prediction_type"], s[i])
            D, clip = _clipped(c, form)
            d = (X - D) / s[i]
            prev, saves, note = sym("sample") + (sym("d") + d) * (dt / 2), (), None
        return compile_row(form, prev, saves, denoised=D, clip=clip, refer="", note=note)

    def step(self, model_output, timestep, sample, return_dict=True):
        e, i = self._genfast_at(timestep)
        dt = self.dt
        if dt is None:
            row = self._genfast_get(e, i, sample, model_output)
            if row is None:
                return super().step(model_output, timestep, sample, return_dict)
            outs = step(row, sample, model_output)
            self.prev_derivative = outs[row.saves[0]]
            self._genfast_dt = row.note
            self.dt = row.note[0]
            self.sample = sample
        else:
            mine, number = self._genfast_dt
            row = self._genfast_get(e, (i, number), sample, model_output) if dt is mine else None
            if row is None:
                return super().step(model_output, timestep, sample, return_dict)
            named = {"sample": self.sample, "d": self.prev_derivative}
            outs = step(row, sample, model_output, tuple([named[n] for n in row.reads]))
            self.prev_derivative = self.dt = self.sample = None
        self._step_index = i + 1
        found = outs[0], resolve(row.denoised, outs, sample, model_output)
        kind = scheduling_heun_discrete.HeunDiscreteSchedulerOutput
        return record(kind, PREV_X0, found) if return_dict else found


class _KDPM2(SigmaForward, _TwoStage):
    _watched = (*_TwoStage._watched, "sigmas_interpol")
    _late = 0  # the second stage reads sigmas_interpol[step_index - _late]

    def _genfast_data(self):
        more = [n for n in self._watched if n.startswith("sigmas_")]
        more = {n: getattr(self, n).detach().cpu().double().numpy() for n in more}
        return dict(super()._genfast_data(), **more)

    def _genfast_engine(self):
        e = super()._genfast_engine()
        e.scale = (
            np.sqrt(e.data["sigmas"] ** 2 + 1).tolist(),
            np.sqrt(e.data["sigmas_interpol"] ** 2 + 1).tolist(),
        )
        return e

    def scale_model_input(self, sample, timestep):
        e, i = self._genfast_at(timestep)
        if self.sample is None:
            return sample / e.scale[0][i]
        return sample / e.scale[1][i - self._late]

    def _genfast_make(self, e, key):
        first, i = (True, key) if key >= 0 else (False, ~key)
        prediction = e.config["prediction_type"]
        if prediction == "sample":
            raise ValueError("diffusers refuses this prediction type here")
        sigma, middle, to, up = self._genfast_sigmas(e.data, first, i)
        form = ve(prediction, sigma if first else middle)
        if first:
            prev = X + (X - form) / sigma * (middle - sigma)
        else:
            prev = sym("sample") + (X - form) / middle * (to - sigma) + up * Z
        return compile_row(form, prev, denoised=form, draws=not first and self._draws)


class KDPM2DiscreteScheduler(_KDPM2, scheduling_k_dpm_2_discrete.KDPM2DiscreteScheduler):
    __doc__ = scheduling_k_dpm_2_discrete.KDPM2DiscreteScheduler.__doc__
    _draws = False

    def _genfast_sigmas(self, data, first, i):
        """sigma, the middle one, the one stepped to, the noise's."""
        s, middle = data["sigmas"], data["sigmas_interpol"]
        return (s[i], middle[i + 1], s[i + 1], 0) if first else (s[i - 1], middle[i], s[i], 0)

    def step(self, model_output, timestep, sample, return_dict=True):
        e, i = self._genfast_at(timestep)
        saved = self.sample
        row = self._genfast_get(e, i if saved is None else ~i, sample, model_output)
        if row is None:
            return super().step(model_output, timestep, sample, return_dict)
        if saved is None:
            outs = step(row, sample, model_output)
            self.sample = sample
        else:
            outs = step(row, sample, model_output, (saved,))
            self.sample = None
        self._step_index = i + 1
        found = outs[0], resolve(row.denoised, outs, sample, model_output)
        kind = scheduling_k_dpm_2_discrete.KDPM2DiscreteSchedulerOutput
        return record(kind, PREV_X0, found) if return_dict else found


class KDPM2AncestralDiscreteScheduler(
    _KDPM2, scheduling_k_dpm_2_ancestral_discrete.KDPM2AncestralDiscreteScheduler
):
    __doc__ = scheduling_k_dpm_2_ancestral_discrete.KDPM2AncestralDiscreteScheduler.__doc__
    _watched = (*_KDPM2._watched, "sigmas_up", "sigmas_down")
    _late = 1
    _draws = True

    def _genfast_sigmas(self, data, first, i):
        j = i if first else i - 1
        middle, down, up = (data[n][j] for n in ("sigmas_interpol", "sigmas_down", "sigmas_up"))
        return data["sigmas"][j], middle, down, up

    def step(self, model_output, timestep, sample, generator=None, return_dict=True, *, seed=None):
        e, i = self._genfast_at(timestep)
        saved = self.sample
        row = self._genfast_get(e, i if saved is None else ~i, sample, model_output)
        if row is None:
            return super().step(model_output, timestep, sample, generator, return_dict)
        if saved is None:
            outs = step(row, sample, model_output)
            self.sample = sample
            self.dt = self.sigmas_interpol[i] - self.sigmas[i]
        else:
            shape, dtype = model_output.shape, model_output.dtype
            z, seed = self._genfast_noise(row, sample, shape, dtype, generator, seed)
            outs = step(row, sample, model_output, (saved,), z, False, seed, i)
            self.sample = None
        self._step_index = i + 1
        found = outs[0], resolve(row.denoised, outs, sample, model_output)
        kind = scheduling_k_dpm_2_ancestral_discrete.KDPM2AncestralDiscreteSchedulerOutput
        return record(kind, PREV_X0, found) if return_dict else found


class FlowMatchHeunDiscreteScheduler(
    _TwoStage, scheduling_flow_match_heun_discrete.FlowMatchHeunDiscreteScheduler
):
    __doc__ = scheduling_flow_match_heun_discrete.FlowMatchHeunDiscreteScheduler.__doc__

    def _genfast_make(self, e, key):
        s = e.data["sigmas"]
        stage, i, dt, options = key
        options = dict(_NO_CHURN, **dict(options))
        sigma = s[i] if stage == 0 else s[i - 1]
        sigma_hat, sd = churn(sigma, len(s) - 1, **options)
        if stage == 0:
            x_hat, d, dt = X + sd * Z, sigma / sigma_hat * M, s[i + 1] - sigma_hat
            note = self.sigmas[i + 1] - torch.tensor(sigma_hat, dtype=self.sigmas.dtype), dt
            prev, saves = x_hat + dt * d, (d, x_hat)
        else:
            note, saves = None, ()
            prev = sym("sample") + dt / 2 * (sym("d") + M)
        return compile_row(
            X - sigma * M, prev, saves, draws=sigma_hat > sigma, refer="x", note=note
        )

    def step(
        self,
        model_output,
        timestep,
        sample,
        s_churn=0.0,
        s_tmin=0.0,
        s_tmax=float("inf"),
        s_noise=1.0,
        generator=None,
        return_dict=True,
        *,
        seed=None,
    ):
        row = None
        if not is_integer(timestep):
            e, i = self._genfast_at(timestep)
            options = _churn(s_churn, s_tmin, s_tmax, s_noise) if s_churn else ()
            dt, (mine, number) = self.dt, self._genfast_dt
            if dt is None or dt is mine:
                key = (0, i, 0.0, options) if dt is None else (1, i, number, options)
                row = self._genfast_get(e, key, sample, model_output)
        if row is None:
            return super().step(
                model_output,
                timestep,
                sample,
                s_churn,
                s_tmin,
                s_tmax,
                s_noise,
                generator,
                return_dict,
            )
        z = None
        if row.draws:
            shape, dtype = model_output.shape, model_output.dtype
            z, seed = self._genfast_noise(row, sample, shape, dtype, generator, seed)
        if dt is None:
            outs = step(row, sample, model_output, (), z, True, seed, i)
            derivative, kept = row.saves
            self.prev_derivative = outs[derivative]
            self._genfast_dt = row.note
            self.dt = row.note[0]
            self.sample = outs[kept] if kept >= 0 else sample.to(torch.float32)
        else:
            named = {"sample": self.sample, "d": self.prev_derivative}
            held = tuple([named[n] for n in row.reads])
            outs = step(row, sample, model_output, held, z, True, seed, i)
            self.prev_derivative = self.dt = self.sample = None
        self._step_index = i + 1
        kind = scheduling_flow_match_heun_discrete.FlowMatchHeunDiscreteSchedulerOutput
        return record(kind, PREV, outs[:1]) if return_dict else outs[:1]

    def scale_noise(self, sample, timestep, noise):
        if self._step_index is None:
            self._init_step_index(timestep)
        sigma = self.sigmas[self._step_index]
        return mix(sample, noise, 1.0 - sigma, sigma)
