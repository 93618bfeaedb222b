"""One-step solvers found by the step index: Euler, ancestral Euler, EDM Euler, consistency models,
LCM, TCD, and flow-match Euler and LCM."""

from __future__ import annotations

import numpy as np
import torch
from diffusers.schedulers import (
    scheduling_consistency_models,
    scheduling_edm_euler,
    scheduling_euler_ancestral_discrete,
    scheduling_euler_discrete,
    scheduling_flow_match_euler_discrete,
    scheduling_flow_match_lcm,
    scheduling_lcm,
    scheduling_tcd,
)

from genfast.schedulers import consistency, euler
from genfast.schedulers.plan import symbolic
from genfast.schedulers.schedules import AlphaGrid, NoiseSchedule, SigmaGrid

from .base import (
    PREV,
    PREV_X0,
    AlphaVelocity,
    Dropin,
    SigmaForward,
    compile_row,
    is_integer,
    mix,
    record,
    resolve,
    shape_of_sum,
    step,
)


class ByIndex(Dropin):
    """Rows of a plan, one per step index."""

    def _genfast_source(self, e, options):
        """The plan's forms for these options of `step`."""
        return self._genfast_forms(e, **dict(options))

    def _genfast_make(self, e, key):
        i, options = (key, ()) if key.__class__ is int else (key[0], key[1:])
        if options not in e.source:
            e.source[options] = self._genfast_source(e, options)
        plan = e.source[options]
        if i < 0:
            raise IndexError("step index below 0")
        row = plan.rows[i]
        return compile_row(
            row["x0"],
            row["prev"],
            denoised=row["denoised"] if self._genfast_second else None,
            clip=plan.clip,
            threshold=plan.threshold,
            draws=row["draws"],
            merge=self._genfast_merge,
        )

    _genfast_second = True
    _genfast_merge = True

    def _genfast_single(
        self, model_output, timestep, sample, generator, seed, options=(), upcast=False, dtype=None,
        shape=None,
    ):  # fmt: skip
        """(row, outputs) of one step, the step index moved on; (None, None): diffusers' own code
        must run. dtype, shape: of the noise, by default the model output's."""
        e = self._genfast_now()
        if not self._genfast_takes(sample, model_output):
            return None, None
        i = self._step_index
        if i is None:
            self._init_step_index(timestep)
            i = self._step_index
        key = (i, *options) if options else i
        try:
            row = e.rows[key]
        except KeyError:
            row = self._genfast_row(e, key)
        if row is None:
            self._genfast_why(e, key)
            return None, None
        z = None
        if row.draws:
            dtype = dtype or model_output.dtype
            shape = model_output.shape if shape is None else shape
            z, seed = self._genfast_noise(row, sample, shape, dtype, generator, seed)
        outs = step(row, sample, model_output, (), z, upcast, seed, i)
        self._step_index = i + 1
        return row, outs


class UpcastByIndex(ByIndex):
    """The sample is taken to float32: x0 stays so, the next sample is as the model output."""

    _genfast_merge = False


class ScaledInput(SigmaForward):
    """scale_model_input of the variance-exploding classes: x / sqrt(sigma^2 + data^2)."""

    def _genfast_engine(self):
        e = super()._genfast_engine()
        data = e.config.get("sigma_data", 1.0)
        e.scale = np.sqrt(e.data["sigmas"] ** 2 + data**2).tolist()
        return e

    def scale_model_input(self, sample, timestep):
        e = self._genfast_now()
        if self._step_index is None:
            self._init_step_index(timestep)
        self.is_scale_input_called = True
        return sample / e.scale[self._step_index]


def _churn(s_churn, s_tmin, s_tmax, s_noise):
    """The options of a row, none when there is no churn."""
    if not s_churn:
        return ()
    return (
        ("s_churn", float(s_churn)),
        ("s_noise", float(s_noise)),
        ("s_tmax", float(s_tmax)),
        ("s_tmin", float(s_tmin)),
    )


def _visited(e, kind):
    """The grid of the live timesteps and sigmas (log_linear has one sigma more than it visits)."""
    t = e.data["timesteps"]
    return SigmaGrid(t, e.data["sigmas"][: len(t) + 1], kind)


class EulerDiscreteScheduler(
    ScaledInput, UpcastByIndex, scheduling_euler_discrete.EulerDiscreteScheduler
):
    __doc__ = scheduling_euler_discrete.EulerDiscreteScheduler.__doc__

    def _genfast_source(self, e, options):
        with symbolic():
            return euler.euler_plan(
                _visited(e, "vp"),
                prediction=e.config["prediction_type"],
                churn_steps=len(e.data["sigmas"]) - 1,
                **dict(options),
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
        if self.is_scale_input_called and not is_integer(timestep):
            row, outs = self._genfast_single(
                model_output,
                timestep,
                sample,
                generator,
                seed,
                _churn(s_churn, s_tmin, s_tmax, s_noise) if s_churn else (),
                True,
            )
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
        found = outs[0], resolve(row.denoised, outs, sample, model_output)
        kind = scheduling_euler_discrete.EulerDiscreteSchedulerOutput
        return record(kind, PREV_X0, found) if return_dict else found

    def get_velocity(self, sample, noise, timesteps):
        if is_integer(timesteps):
            return super().get_velocity(sample, noise, timesteps)
        at = torch.tensor(self._genfast_indices(timesteps))
        table = self.alphas_cumprod.to(device=sample.device)
        a = (table.double() if sample.dtype == torch.float64 else table)[at]
        return mix(noise, sample, a.sqrt(), -((1 - a).sqrt()))


class EulerAncestralDiscreteScheduler(
    ScaledInput, UpcastByIndex, scheduling_euler_ancestral_discrete.EulerAncestralDiscreteScheduler
):
    __doc__ = scheduling_euler_ancestral_discrete.EulerAncestralDiscreteScheduler.__doc__

    def _genfast_source(self, e, options):
        if e.config["prediction_type"] == "sample":
            raise ValueError("diffusers refuses this prediction type here")
        with symbolic():
            return euler.euler_ancestral_plan(
                _visited(e, "vp"), prediction=e.config["prediction_type"]
            )

    def step(self, model_output, timestep, sample, generator=None, return_dict=True, *, seed=None):
        row = None
        if self.is_scale_input_called and not is_integer(timestep):
            row, outs = self._genfast_single(
                model_output, timestep, sample, generator, seed, (), True
            )
        if row is None:
            return super().step(model_output, timestep, sample, generator, return_dict)
        found = outs[0], resolve(row.denoised, outs, sample, model_output)
        kind = scheduling_euler_ancestral_discrete.EulerAncestralDiscreteSchedulerOutput
        return record(kind, PREV_X0, found) if return_dict else found


class EDMEulerScheduler(ScaledInput, UpcastByIndex, scheduling_edm_euler.EDMEulerScheduler):
    __doc__ = scheduling_edm_euler.EDMEulerScheduler.__doc__

    def _genfast_source(self, e, options):
        with symbolic():
            return euler.edm_euler_plan(
                _visited(e, "edm"),
                prediction=e.config["prediction_type"],
                sigma_data=e.config["sigma_data"],
                **dict(options),
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
        pred_original_sample=None,
        *,
        seed=None,
    ):
        row = None
        if self.is_scale_input_called and pred_original_sample is None and not is_integer(timestep):
            row, outs = self._genfast_single(
                model_output,
                timestep,
                sample,
                generator,
                seed,
                _churn(s_churn, s_tmin, s_tmax, s_noise) if s_churn else (),
                True,
            )
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
                pred_original_sample,
            )
        found = outs[0], resolve(row.denoised, outs, sample, model_output)
        kind = scheduling_edm_euler.EDMEulerSchedulerOutput
        return record(kind, PREV_X0, found) if return_dict else found


class CMStochasticIterativeScheduler(
    ScaledInput, ByIndex, scheduling_consistency_models.CMStochasticIterativeScheduler
):
    __doc__ = scheduling_consistency_models.CMStochasticIterativeScheduler.__doc__
    _genfast_second = False

    def _genfast_source(self, e, options):
        c = e.config
        with symbolic():
            return consistency.consistency_plan(
                _visited(e, "edm"),
                sigma_min=c["sigma_min"],
                sigma_max=c["sigma_max"],
                sigma_data=c["sigma_data"],
                s_noise=c["s_noise"],
                clip=1.0 if c["clip_denoised"] else None,
            )

    def step(self, model_output, timestep, sample, generator=None, return_dict=True, *, seed=None):
        row = None
        if self.is_scale_input_called and not is_integer(timestep):
            row, outs = self._genfast_single(model_output, timestep, sample, generator, seed)
        if row is None:
            return super().step(model_output, timestep, sample, generator, return_dict)
        kind = scheduling_consistency_models.CMStochasticIterativeSchedulerOutput
        return record(kind, PREV, outs[:1]) if return_dict else outs[:1]


class _Distilled(AlphaVelocity, ByIndex):
    """LCM and TCD: integer timesteps, found by the step index, each going to the next one."""

    _watched = (
        "alphas_cumprod",
        "timesteps",
        "_internal_dict",
        "num_inference_steps",
        "final_alpha_cumprod",
    )
    _tail = "repeat"

    def _genfast_engine(self):
        e = super()._genfast_engine()
        e.extra = e.data["timesteps"].astype(np.int64).tolist()
        self.sigma_data = 0.5  # LCM sets it at its first step
        return e

    def _genfast_data(self):
        return dict(
            alpha_bar=self._genfast_alphas(),
            timesteps=self.timesteps.detach().cpu().double().numpy(),
            steps=self.num_inference_steps,
            final=float(self.final_alpha_cumprod),
        )

    def _genfast_grid(self, e):
        t = e.data["timesteps"].astype(np.int64)
        if e.data["steps"] != len(t):
            raise ValueError("num_inference_steps is not the number of timesteps")
        to = np.append(t[1:], t[-1] if self._tail == "repeat" else 0)
        table = e.data["alpha_bar"]
        return AlphaGrid(t, table[t], table[to], NoiseSchedule(table), e.data["final"])

    def _genfast_known(self, timestep):
        """timestep is the one of this step index, as in an ordinary run."""
        if self.num_inference_steps is None:
            return False
        e = self._genfast_now()
        if self._step_index is None:
            self._init_step_index(timestep)
        i = self._step_index
        if 0 <= i < len(e.extra) and e.extra[i] == int(timestep):
            return True
        self._genfast_why(None, None, "the timestep is not that of the step index")
        return False


class LCMScheduler(_Distilled, scheduling_lcm.LCMScheduler):
    __doc__ = scheduling_lcm.LCMScheduler.__doc__

    def step(self, model_output, timestep, sample, generator=None, return_dict=True, *, seed=None):
        row = None
        if self._genfast_known(timestep):
            dtype = torch.promote_types(sample.dtype, model_output.dtype)
            row, outs = self._genfast_single(
                model_output, timestep, sample, generator, seed, (), False, dtype
            )
        if row is None:
            return super().step(model_output, timestep, sample, generator, return_dict)
        found = outs[0], resolve(row.denoised, outs, sample, model_output)
        kind, names = scheduling_lcm.LCMSchedulerOutput, ("prev_sample", "denoised")
        return record(kind, names, found) if return_dict else found


class TCDScheduler(_Distilled, scheduling_tcd.TCDScheduler):
    __doc__ = scheduling_tcd.TCDScheduler.__doc__
    _tail = "zero"

    def step(
        self,
        model_output,
        timestep,
        sample,
        eta=0.3,
        generator=None,
        return_dict=True,
        *,
        seed=None,
    ):
        row = None
        if 0 <= eta <= 1 and self._genfast_known(timestep):
            dtype = torch.promote_types(sample.dtype, model_output.dtype)
            row, outs = self._genfast_single(
                model_output,
                timestep,
                sample,
                generator,
                seed,
                (("eta", float(eta)),),
                False,
                dtype,
            )
        if row is None:
            return super().step(model_output, timestep, sample, eta, generator, return_dict)
        found = outs[0], resolve(row.denoised, outs, sample, model_output)
        kind, names = scheduling_tcd.TCDSchedulerOutput, ("prev_sample", "pred_noised_sample")
        return record(kind, names, found) if return_dict else found


class _Flow(ByIndex):
    _genfast_second = False
    _kind = "flow"

    def _genfast_engine(self):
        e = super()._genfast_engine()
        e.scale = np.diff(e.data["sigmas"]).tolist()
        return e

    def _genfast_grid(self, e):
        return _visited(e, "flow")

    def scale_noise(self, sample, timestep, noise=None):
        sigma = self.sigmas[self._genfast_step_indices(timestep)].flatten()
        return mix(sample, noise, 1.0 - sigma, sigma)


class FlowMatchEulerDiscreteScheduler(
    _Flow, scheduling_flow_match_euler_discrete.FlowMatchEulerDiscreteScheduler
):
    __doc__ = scheduling_flow_match_euler_discrete.FlowMatchEulerDiscreteScheduler.__doc__

    def _genfast_engine(self):
        e = super()._genfast_engine()
        if e.config["stochastic_sampling"]:
            e.scale = ()
        return e

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
        per_token_timesteps=None,
        return_dict=True,
        *,
        seed=None,
    ):
        kind = scheduling_flow_match_euler_discrete.FlowMatchEulerDiscreteSchedulerOutput
        outs = None
        if per_token_timesteps is None and not is_integer(timestep):
            e = self._genfast_now()
            i = self._step_index
            if i is None:
                self._init_step_index(timestep)
                i = self._step_index
            same = sample.dtype is model_output.dtype and sample.is_floating_point()
            if same and i < len(e.scale):
                # x + (sigma_next - sigma) m is one fused PyTorch op already
                outs = (torch.add(sample, model_output, alpha=e.scale[i]),)
                self._step_index = i + 1
            else:
                _, outs = self._genfast_single(
                    model_output,
                    timestep,
                    sample,
                    generator,
                    seed,
                    (),
                    True,
                    torch.float32,
                    sample.shape,
                )
        if outs is None:
            if per_token_timesteps is not None:
                self._genfast_why(None, None, "per-token timesteps")
            return super().step(
                model_output,
                timestep,
                sample,
                s_churn,
                s_tmin,
                s_tmax,
                s_noise,
                generator,
                per_token_timesteps,
                return_dict,
            )
        return record(kind, PREV, outs[:1]) if return_dict else outs[:1]


class FlowMatchLCMScheduler(_Flow, scheduling_flow_match_lcm.FlowMatchLCMScheduler):
    __doc__ = scheduling_flow_match_lcm.FlowMatchLCMScheduler.__doc__

    def step(self, model_output, timestep, sample, generator=None, return_dict=True, *, seed=None):
        row, resized = None, self._scale_factors and self._upscale_mode
        if not resized and not is_integer(timestep):
            if self._init_size is None or self._step_index is None:
                self._init_size = model_output.size()[2:]
            dtype = torch.promote_types(model_output.dtype, torch.float32)  # x0's
            shape = shape_of_sum(sample, model_output)
            row, outs = self._genfast_single(
                model_output, timestep, sample, generator, seed, (), True, dtype, shape
            )
        if row is None:
            if resized:
                self._genfast_why(None, None, "x0 is resized between steps")
            return super().step(model_output, timestep, sample, generator, return_dict)
        kind = scheduling_flow_match_lcm.FlowMatchLCMSchedulerOutput
        return record(kind, PREV, outs[:1]) if return_dict else outs[:1]


__all__ = [
    "CMStochasticIterativeScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "LCMScheduler",
    "TCDScheduler",
]
