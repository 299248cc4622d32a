"""A chain where it runs: the loop over the steps, what they read on the device, and the step with dynamic thresholding."""

from __future__ import annotations

from functools import partial

import torch

from .._core import checks, rng
from .._core.tables import DDPM_STEP_COLUMNS, Coefficients, step_columns
from .._ops.ddpm_step import ddim_step, ddpm_step, dynamic_bound, step_with, steps_alike
from .._ops.randn import randn
from ..schedule import LEARNED_VARIANCES, Schedule
from .arguments import Options
from .network import output_of


class Chain:
    """All steps from x_T to x_0 on one device and in one dtype. Nothing in it changes once it is made."""

    def __init__(self, model, shape: tuple, schedule: Schedule, options: Options, device: torch.device, dtype: torch.dtype):
        self.model, self.device, self.dtype, self.guided = model, device, dtype, options.guidance_scale is not None
        self._shape, self._schedule, self._thresholded = shape, schedule, options.threshold is not None
        self._method, self._step_options, table_key = options.method, options.of_a_step(), options.table_key()
        table = schedule._table(table_key, device, dtype)
        if table.rows.size(0) < len(schedule):
            raise ValueError(f"schedule: expected coefficients for each of its {len(schedule)} steps{table.note}")
        self._noisy = table.noisy
        # The network gets a tensor of timesteps at each step. All are made here: no step has to make one, none comes from the
        # host, and none is the schedule's own. They are made on the host, whose copies have arrived when they return: a call may
        # come on another stream than this one.
        made_on = device if rng.capturing(device) else "cpu"
        samples = shape[0] * (2 if self.guided else 1)
        all_timesteps = schedule.timestep_tensor(made_on).unsqueeze(1).repeat(1, samples).to(device)
        self._timesteps = all_timesteps.unbind()
        if self._thresholded:
            self._step = _ThresholdedStep(schedule._rows(table_key)[0], options.threshold, **self._step_options)
            tables = self._step.tables(device, dtype)
        else:
            self._step = partial(ddpm_step if self._method == "ddpm" else ddim_step, schedule=schedule, **self._step_options)
            tables = (table,)
        self.constants = all_timesteps, *(each.rows for each in tables)  # what the steps read, besides what they are given

    def run(self, seed, kwargs, callback=None, trajectory=None, update=None, steps=None):
        """x_0, step by step; with `steps`, no more than those. `trajectory` is a list that gets x_T … x_0."""
        total = len(self._schedule)
        if self.device.type == "cuda" and not rng.capturing(self.device):
            # the sampler, and with it a schedule that its `steps` have made, may be dropped while the chain still runs
            stream = torch.cuda.current_stream(self.device)
            for constant in self.constants:
                constant.record_stream(stream)
        x = randn(self._shape, seed=seed, offset=total, dtype=self.dtype, device=self.device)
        step = first_step = partial(self._step, seed=seed if self._noisy else None)
        if trajectory is not None:
            trajectory.append(x)
        # What every step looks up is a variable of this function: up to 4% off a step, beside a network that does nothing.
        model, timesteps, guided, dtype, guidance = self.model, self._timesteps, self.guided, self.dtype, {}
        for index, t in enumerate(range(total - 1, -1, -1)[:steps]):
            # A buffer of 2B samples, of which the step writes one half, would take 0.4 to 0.7 of cat's time and as many launches,
            # but be the same tensor in every step, also for a network or a callback that keeps what it is given.
            m = model(torch.cat([x, x]) if guided else x, timesteps[t], **kwargs)
            if guided or type(m) is not torch.Tensor or m.dtype is not dtype:
                m = self._output(m)
            if guided:
                guidance["unconditional_output"], m = m.chunk(2)
            if index == 0:
                x = first_step(_laid_out_like(x, m), m, t, **guidance)
                if not self._thresholded:
                    # Code that is run once a step is found in no near cache after a network of some 0.5 MB: beside the robot
                    # policy's a step takes three times as long as beside one that does nothing, so the less of ours is run the
                    # better: 23 µs between two calls of that network, and 31 by `first_step` each time.
                    step = steps_alike(self._method, self._schedule, x, m, self._step_options, seed) or first_step
            else:
                try:
                    x = step(x, m, t, **guidance)
                except (RuntimeError, TypeError):
                    x = first_step(x, m, t, **guidance)  # the checks in it have the words
            if trajectory is not None:
                trajectory.append(x)
            if update is not None:
                update()
            if callback is not None:
                callback(index, int(self._schedule.timesteps[t]), x)
        return x

    def _output(self, returned):
        """The tensor in what the network has returned, checked as far as no step does it."""
        m = output_of(returned)
        if m.dtype is not self.dtype and torch.promote_types(m.dtype, self.dtype) is not self.dtype:
            raise TypeError(f"model: expected an output no wider than the chain's {self.dtype}, got {m.dtype}; give it as dtype=")
        if self.guided and (m.dim() == 0 or m.shape[0] != 2 * self._shape[0]):
            raise ValueError(f"model: expected an output for {2 * self._shape[0]} samples under guidance, got {tuple(m.shape)}")
        return m


class _ThresholdedStep:
    """A step with x0 = clamp(P·x + Q·m, ±s)·c/s, s being of each sample the `quantile` of |P·x + Q·m|, and at least c: the step's
    kernel is launched for P·x + Q·m first, and again when s is known.

    Under guidance both launches put u and m together as they read them: once for both would be another launch, which writes what
    they then read. Where the variance is learned, both are given it too: the first has no noise, so it leaves v alone, and to take
    v off would be a copy. c is in the table of the second, as U·c. The other launches are the |x0|, and of `dynamic_bound` the
    search for the largest and three of B elements; with half precision also x in float32, so that x0 is not rounded.
    """

    def __init__(self, rows, quantile, *, clip=None, guidance_scale=None, variance=None, **_):
        """rows: (T, 10) float64, those of the step without a bound."""
        self._quantile, self._bound = quantile, 1.0 if clip is None else clip
        self._learned = variance in LEARNED_VARIANCES
        self._guidance = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
        column = DDPM_STEP_COLUMNS.index
        x0_from_x, x0_from_m = rows[:, column("x0_from_x")], rows[:, column("x0_from_m")]
        self._x0 = Coefficients("ddpm_step", step_columns(x0_from_x, x0_from_m, 1.0, 0.0, 0.0))
        rows = rows.copy()
        rows[:, column("y_from_x0")] *= self._bound
        self._bounded = Coefficients("ddpm_step", rows)

    def tables(self, device, dtype):
        """The tables that both launches read there."""
        return self._x0.table(device, dtype), self._bounded.table(device, dtype)

    def __call__(self, x, m, t, *, seed, unconditional_output=None):
        how = {"learned": self._learned, "unconditional_output": unconditional_output, **self._guidance}
        # The first launch is given a seed for no noise: without one, each step would look whether one has to be drawn.
        x0 = step_with(self._x0, x.to(checks.compute_dtype(x.dtype)), m, t, seed=0, **how)
        bound = dynamic_bound(x0, self._quantile, self._bound)
        return step_with(self._bounded, x, m, t, threshold=bound, seed=seed, **how)


def _laid_out_like(x, m):
    """`x`, channels-last where the network's output is: then no step has to rearrange either."""
    for dim, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if m.dim() == dim and m.is_contiguous(memory_format=layout) and not m.is_contiguous():
            return x.contiguous(memory_format=layout)
    return x
