"""Schedulers without state, whose row is found by the timestep: DDPM, DDIM, DDIM inversion."""

from __future__ import annotations

import numpy as np
import torch
from diffusers.schedulers import scheduling_ddim, scheduling_ddim_inverse, scheduling_ddpm

from genfast.schedulers.from_config import plan_from_config
from genfast.schedulers.plan import symbolic
from genfast.schedulers.schedules import AlphaGrid, NoiseSchedule

from .base import PREV_X0, AlphaVelocity, Dropin, compile_row, integer, record, resolve, step

_NO_INDEX = frozenset((float, torch.float32, torch.float64, torch.float16, torch.bfloat16))


class _ByTimestep(Dropin):
    _watched = ("alphas_cumprod", "timesteps", "_internal_dict", "num_inference_steps")
    _final: str  # attribute: alpha_bar beyond the first timestep

    def _genfast_data(self):
        return dict(
            alpha_bar=self._genfast_alphas(),
            timesteps=self.timesteps.detach().cpu().double().numpy(),
            steps=self.num_inference_steps,
            final=float(getattr(self, self._final)),
        )

    def _genfast_engine(self):
        e = super()._genfast_engine()
        times = e.data["timesteps"].tolist()  # noise stream of a timestep: its place, else itself
        e.extra = {int(t): i for i, t in reversed(list(enumerate(times)))}
        return e

    def _genfast_t(self, e, timestep):
        """timestep as an int; one of `timesteps` on another device is known by its address, without
        waiting for that device.
        """
        t = integer(timestep)
        if t is not None:
            return t
        if getattr(timestep, "dtype", float) in _NO_INDEX:
            return -1  # diffusers cannot index with it
        known = e.timesteps
        if timestep.__class__ is torch.Tensor and not timestep.is_cpu and known.is_contiguous():
            i, odd = divmod(timestep.data_ptr() - known.data_ptr(), known.element_size())
            if not odd and 0 <= i < known.numel() and timestep.dtype is known.dtype:
                return int(e.data["timesteps"][i])
        return int(timestep)

    def _genfast_next(self, e, t):
        """alpha_bar (at t, where the step goes) for timesteps t (n,)."""
        stride = e.config["num_train_timesteps"] // e.data["steps"]
        return self._genfast_at(e, t), self._genfast_at(e, t - stride)

    def _genfast_at(self, e, t):
        table = e.data["alpha_bar"]
        return np.where(t >= 0, table[np.clip(t, 0, len(table) - 1)], e.data["final"])

    def _genfast_forms(self, e, t, **options):
        """Form of the row at timestep t; those of all of `timesteps` are made together."""
        source = e.source.setdefault(tuple(options.items()), {})
        if t not in source:
            ts = e.data["timesteps"].astype(np.int64)
            ts = ts if t in ts else np.array([t])
            if not 0 <= t < len(e.data["alpha_bar"]):
                raise ValueError(f"timestep {t} is not one of training")
            ts = ts[(ts >= 0) & (ts < len(e.data["alpha_bar"]))]
            now, to = self._genfast_next(e, ts)
            grid = AlphaGrid(ts, now, to, NoiseSchedule(e.data["alpha_bar"]), e.data["final"])
            with symbolic():
                plan = plan_from_config(
                    type(self).__name__,
                    {**e.config, **self._genfast_config()},
                    grid=grid,
                    alphas_cumprod=e.data["alpha_bar"],
                    **options,
                )
            source.update((int(s), (plan, row)) for s, row in zip(ts, plan.rows, strict=True))
        return source[t]

    def _genfast_make(self, e, key):
        t, options = (key, ()) if key.__class__ is int else (key[0], key[1:])
        plan, row = self._genfast_forms(e, t, **dict(options))
        return compile_row(
            row["x0"],
            row["prev"],
            denoised=row["denoised"],
            clip=plan.clip,
            threshold=plan.threshold,
            variance=row["variance"],
            logvar=row["logvar"],
            draws=row["draws"],
        )


class DDPMScheduler(AlphaVelocity, _ByTimestep, scheduling_ddpm.DDPMScheduler):
    __doc__ = scheduling_ddpm.DDPMScheduler.__doc__
    _final = "one"
    _watched = (*_ByTimestep._watched, _final, "custom_timesteps", "variance_type")

    def _genfast_data(self):
        return dict(super()._genfast_data(), custom=self.custom_timesteps, kind=self.variance_type)

    def _genfast_config(self):
        return dict(variance_type=self.variance_type)

    def _genfast_next(self, e, t):
        if not (e.data["custom"] or e.data["steps"]):
            return self._genfast_at(e, t), self._genfast_at(e, t - 1)
        known = e.data["timesteps"].astype(np.int64)
        following = np.append(known[1:], -1)
        to = []
        for one in t:
            at = np.flatnonzero(known == one)
            if not len(at):
                raise ValueError(f"timestep {one} is not in the schedule")
            to.append(following[at[0]])
        return self._genfast_at(e, t), self._genfast_at(e, np.array(to))

    def step(self, model_output, timestep, sample, generator=None, return_dict=True, *, seed=None):
        e = self._genfast_now()
        if not self._genfast_takes(sample, model_output):
            return super().step(model_output, timestep, sample, generator, return_dict)
        t = self._genfast_t(e, timestep)
        try:
            row = e.rows[t]
        except KeyError:
            row = self._genfast_row(e, t)
        m_channels = sample.shape[1] * 2 if row is not None and row.variance else sample.shape[1]
        if row is None or model_output.shape[1] != m_channels:
            self._genfast_why(e, t, "the model output has not the channels the variance type needs")
            return super().step(model_output, timestep, sample, generator, return_dict)
        z = None
        if row.draws or seed is not None:
            shape, dtype = model_output.shape, model_output.dtype
            shape = (shape[0], sample.shape[1], *shape[2:])  # without the variance's channels
            z, seed = self._genfast_noise(row, sample, shape, dtype, generator, seed)
        outs = step(row, sample, model_output, (), z, False, seed, e.extra.get(t, t))
        found = outs[0], resolve(row.denoised, outs, sample, model_output)
        kind = scheduling_ddpm.DDPMSchedulerOutput
        return record(kind, PREV_X0, found) if return_dict else found


class DDIMScheduler(AlphaVelocity, _ByTimestep, scheduling_ddim.DDIMScheduler):
    __doc__ = scheduling_ddim.DDIMScheduler.__doc__
    _final = "final_alpha_cumprod"
    _watched = (*_ByTimestep._watched, _final)

    def step(
        self,
        model_output,
        timestep,
        sample,
        eta=0.0,
        use_clipped_model_output=False,
        generator=None,
        variance_noise=None,
        return_dict=True,
        *,
        seed=None,
    ):
        # without set_timesteps diffusers has its own message
        e = None if self.num_inference_steps is None else self._genfast_now()
        takes = e is None or self._genfast_takes(sample, model_output)
        two = eta > 0 and generator is not None and variance_noise is not None
        row = key = None
        if e is not None and takes and not two:
            key = t = self._genfast_t(e, timestep)
            if eta or use_clipped_model_output:
                clipped = bool(use_clipped_model_output)
                key = (t, ("eta", float(eta)), ("use_clipped_model_output", clipped))
            try:
                row = e.rows[key]
            except KeyError:
                row = self._genfast_row(e, key)
        if row is None:
            if takes:
                self._genfast_why(e, key, "set_timesteps was not called, or two noises were given")
            return super().step(
                model_output,
                timestep,
                sample,
                eta,
                use_clipped_model_output,
                generator,
                variance_noise,
                return_dict,
            )
        z = None
        if row.draws:
            if variance_noise is None:
                shape, dtype = model_output.shape, model_output.dtype
                z, seed = self._genfast_noise(row, sample, shape, dtype, generator, seed)
            else:
                z, seed = variance_noise if row.noisy else None, None
        outs = step(row, sample, model_output, (), z, False, seed, e.extra.get(t, t))
        found = outs[0], resolve(row.denoised, outs, sample, model_output)
        kind = scheduling_ddim.DDIMSchedulerOutput
        return record(kind, PREV_X0, found) if return_dict else found


class DDIMInverseScheduler(_ByTimestep, scheduling_ddim_inverse.DDIMInverseScheduler):
    __doc__ = scheduling_ddim_inverse.DDIMInverseScheduler.__doc__
    _final = "initial_alpha_cumprod"
    _watched = (*_ByTimestep._watched, _final)

    def _genfast_next(self, e, t):
        T = e.config["num_train_timesteps"]
        came = np.minimum(t - T // e.data["steps"], T - 1)
        return self._genfast_at(e, came), self._genfast_at(e, t)

    def step(self, model_output, timestep, sample, return_dict=True):
        e = None if self.num_inference_steps is None else self._genfast_now()
        takes = e is None or self._genfast_takes(sample, model_output)
        row = t = None
        if e is not None and takes:
            t = self._genfast_t(e, timestep)
            try:
                row = e.rows[t]
            except KeyError:
                row = self._genfast_row(e, t)
        if row is None:
            if takes:
                self._genfast_why(e, t, "set_timesteps was not called")
            return super().step(model_output, timestep, sample, return_dict)
        outs = step(row, sample, model_output)
        found = outs[0], resolve(row.denoised, outs, sample, model_output)
        kind = scheduling_ddim_inverse.DDIMSchedulerOutput
        return record(kind, PREV_X0, found) if return_dict else found
