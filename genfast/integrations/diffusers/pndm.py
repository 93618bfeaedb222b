"""Pseudo numerical methods: PNDM (history `ets`, `cur_sample`, `cur_model_output`, `counter`) and
IPNDM (`ets`)."""

from __future__ import annotations

from diffusers.schedulers import scheduling_ipndm, scheduling_pndm

from genfast.schedulers.plan import M, X, sym
from genfast.schedulers.pndm import adams_bashforth, transfer

from .base import PREV, AlphaForward, Dropin, compile_row, record, step


class PNDMScheduler(AlphaForward, Dropin, scheduling_pndm.PNDMScheduler):
    __doc__ = scheduling_pndm.PNDMScheduler.__doc__
    _watched = (
        "alphas_cumprod",
        "timesteps",
        "_internal_dict",
        "num_inference_steps",
        "final_alpha_cumprod",
    )

    def _genfast_data(self):
        return dict(
            alpha_bar=self._genfast_alphas(),
            timesteps=self.timesteps.detach().cpu().double().numpy(),
            steps=self.num_inference_steps,
            final=float(self.final_alpha_cumprod),
        )

    def _genfast_engine(self):
        e = super()._genfast_engine()
        e.extra = e.config["num_train_timesteps"] // e.data["steps"]
        return e

    def _genfast_make(self, e, key):
        stage, start, to = key
        table = e.data["alpha_bar"]
        if not 0 <= start < len(table) or to >= len(table):
            raise ValueError(f"a step from timestep {start} to {to} leaves the training schedule")
        a_t, a_p = table[start], table[to] if to >= 0 else e.data["final"]
        x, saves = sym("x'"), ()
        if stage == "mean":
            out = (M + sym("-1")) * 0.5
        elif stage == "k1":  # Runge-Kutta: m/6 + m/3 + m/3 + m/6
            x, out, saves = X, M, (M / 6,)
        elif stage == "k2":
            out, saves = M, (sym("acc") + M / 3,)
        elif stage == "k4":
            out = sym("acc") + M / 6
        else:
            x, out = X, adams_bashforth([M, *(sym(f"-{k}") for k in range(1, stage))])
        row = compile_row(X, transfer(x, out, a_t, a_p, e.config["prediction_type"]), saves)
        row.note = tuple([int(n) if n[0] == "-" else n for n in row.reads])
        return row

    def _genfast_pndm(self, stage, start, to, sample, model_output):
        """(row, outputs) of one evaluation, or None."""
        e = self._genfast
        if not self._genfast_takes(sample, model_output):
            return None
        key = (stage, start, to)
        try:
            row = e.rows[key]
        except KeyError:
            row = self._genfast_row(e, key)
        if row is None:
            self._genfast_why(e, key)
            return None
        ets = self.ets
        held = []
        for k in row.note:
            if k.__class__ is int:
                held.append(ets[k])
            else:
                held.append(self.cur_sample if k == "x'" else self.cur_model_output)
        return row, step(row, sample, model_output, tuple(held))

    def _genfast_ready(self):
        if self.num_inference_steps is None:
            return False
        self._genfast_now()
        return True

    def step_prk(self, model_output, timestep, sample, return_dict=True):
        found = None
        if self._genfast_ready():
            k, acc = self.counter % 4, self.cur_model_output
            half = 0 if k % 2 else self._genfast.extra // 2
            start = int(self.prk_timesteps[self.counter // 4 * 4])
            stage = ("k1", "k2", "k2", "k4")[k]
            real = acc.__class__ is not int and self.cur_sample is not None
            if real if k else acc.__class__ is int:  # as a run leaves them
                found = self._genfast_pndm(stage, start, int(timestep) - half, sample, model_output)
        if found is None:
            return super().step_prk(model_output, timestep, sample, return_dict)
        row, outs = found
        if k == 0:
            self.ets.append(model_output)
            self.cur_sample = sample
        self.cur_model_output = outs[row.saves[0]] if k < 3 else 0
        self.counter += 1
        return record(scheduling_pndm.SchedulerOutput, PREV, outs[:1]) if return_dict else outs[:1]

    def step_plms(self, model_output, timestep, sample, return_dict=True):
        found = None
        if self._genfast_ready():
            ets, counter, stride = self.ets, self.counter, self._genfast.extra
            t, known = int(timestep), len(ets)
            if counter != 1:
                known = known + 1 if known < 3 else 4
                # the Runge-Kutta start leaves three outputs; one alone is only right at first
                if self.config.skip_prk_steps or known == 4:
                    if known > 1 or counter == 0:
                        found = self._genfast_pndm(known, t, t - stride, sample, model_output)
            elif known == 1 and self.cur_sample is not None:
                found = self._genfast_pndm("mean", t + stride, t, sample, model_output)
        if found is None:
            return super().step_plms(model_output, timestep, sample, return_dict)
        outs = found[1]
        if counter != 1:
            self.ets = ets[-3:]
            self.ets.append(model_output)
            if known == 1:
                self.cur_sample = sample
        else:
            self.cur_sample = None
        self.counter += 1
        return record(scheduling_pndm.SchedulerOutput, PREV, outs[:1]) if return_dict else outs[:1]


class IPNDMScheduler(Dropin, scheduling_ipndm.IPNDMScheduler):
    __doc__ = scheduling_ipndm.IPNDMScheduler.__doc__
    _watched = ("betas", "alphas", "_internal_dict")

    def _genfast_data(self):
        return {n: getattr(self, n).detach().cpu().double().numpy() for n in ("betas", "alphas")}

    def _genfast_make(self, e, key):
        i, kept = key
        a, b = e.data["alphas"], e.data["betas"]
        out = b[i] * X + a[i] * M
        combined = adams_bashforth([out, *(sym(f"-{k}") for k in range(1, kept))])
        prev = a[i + 1] / max(a[i], 1e-8) * (X - b[i] * combined) + b[i + 1] * combined
        row = compile_row(a[i] * X - b[i] * M, prev, (out,), refer="")
        row.note = tuple([int(n) for n in row.reads])
        return row

    def step(self, model_output, timestep, sample, return_dict=True):
        e = self._genfast_now()
        if not self._genfast_takes(sample, model_output):
            return super().step(model_output, timestep, sample, return_dict)
        i = self._step_index
        if i is None:
            self._init_step_index(timestep)
            i = self._step_index
        ets = self.ets
        kept = len(ets) + 1 if len(ets) < 3 else 4
        key = (i, kept)
        try:
            row = e.rows[key]
        except KeyError:
            row = self._genfast_row(e, key)
        if row is None:
            self._genfast_why(e, key)
            return super().step(model_output, timestep, sample, return_dict)
        outs = step(row, sample, model_output, tuple([ets[k] for k in row.note]))
        if kept == 4:
            del ets[:-3]  # diffusers keeps every step's tensor alive
        ets.append(outs[row.saves[0]])
        self._step_index = i + 1
        return record(scheduling_ipndm.SchedulerOutput, PREV, outs[:1]) if return_dict else outs[:1]


__all__ = ["IPNDMScheduler", "PNDMScheduler"]
