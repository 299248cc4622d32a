"""The whole reverse chain: `sample`, and `Sampler`, which keeps what several chains have in common."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Set
from functools import partial

import numpy as np
import torch
from torch.utils import _pytree as pytree

from .._core import backends, checks, rng
from .._core.tables import DDPM_STEP_COLUMNS, Coefficients, step_columns
from .._ops.ddpm_step import ddim_step, ddpm_step, dynamic_bound, step_with, steps_alike
from .._ops.randn import randn
from ..schedule import LEARNED_VARIANCES, PREDICTIONS, VARIANCES
from . import cuda_graph as graphs
from .network import COMPARED_BY_VALUE, can_be_seen_into, fingerprint, first_weight, location

logger = logging.getLogger("fastgen")


def sample(
    model,
    shape,
    schedule,
    *,
    method="ddpm",
    steps=None,
    spacing=None,
    eta=None,
    prediction="epsilon",
    variance=None,
    clip=None,
    threshold=None,
    guidance_scale=None,
    model_kwargs=None,
    unconditional_kwargs=None,
    seed=None,
    sample_seeds=None,
    device=None,
    dtype=None,
    progress=False,
    callback=None,
    return_trajectory=False,
    cuda_graph="auto",
):
    """Samples from a diffusion model: x_T ~ N(0, I), then x_{t−1} from x_t and model(x_t, t) for t = T−1 … 0.

        x_T     = randn(shape, seed=seed, offset=T)
        m       = model(x_t, timesteps[t], **model_kwargs)
        x_{t−1} = ddpm_step(x_t, m, t, schedule, seed=seed)            or ddim_step, by `method`

    A step launches the network and one kernel; timesteps and coefficients stay on the device. Sample i is a function of its seed
    and the network: with `sample_seeds`, never of the batch that it came in or of the number of processes.

    Args:
        model: a callable (x, timesteps, **model_kwargs) → m, with x (B, *event) in `dtype` and timesteps int64 (B,), neither to be
            written to. It returns m, or a tuple that begins with it, or an object that has it as `.sample` (diffusers' networks);
            m is (B, *event), or (B, 2C, ...) with a learned variance, in a dtype that promotes with `dtype` to `dtype`. Whether it
            is in training mode is left as it is.
        shape: (B, *event), a sequence of ints.
        schedule: a `Schedule`.
        method: "ddpm" or "ddim".
        steps: how many of the schedule's steps to visit, or which, as `Schedule.respace` takes them; all if None. T counts these.
        spacing: with `steps` an int only, which ones: "leading", "trailing" or "linspace", as of `Schedule.respace`; "leading" if
            None.
        eta: of "ddim" only, a number within 0 … 1; 0 if None.
        prediction: "epsilon", "sample" or "v_prediction", what m is.
        variance: of "ddpm" only, "posterior", "beta", "learned" or "learned_range"; "posterior" if None.
        clip: a number c > 0, the bound of the data; the predicted x0 is clamped to ±c.
        threshold: a number p within (0, 1], for dynamic thresholding: with s the p-quantile of the sample's |x0|, or c where that
            is more, x0 becomes clamp(x0, ±s)·c/s. c is `clip`, or 1 without: where no more than the share 1−p of a sample is
            beyond ±c, it is clipped there. The quantile is linear between elements, and is taken on the device, of x0 after
            guidance, in some 6 launches more for each step.
        guidance_scale: a number g, for classifier-free guidance: m = u + g·(m − u) with u the network's output for
            `unconditional_kwargs`. The network is called once, on 2B samples: B without the condition, then B with it.
        model_kwargs: a dict of what else the network is given; dicts, lists and tuples of tensors may be in it.
        unconditional_kwargs: with a guidance_scale only, what stands for "no condition", a dict like model_kwargs. Tensors with B
            as their first dimension are put before those of model_kwargs, once; all else has to be the same in both: equal
            values, but on a GPU, where to compare them would be to wait, the very tensor.
        seed: int or int64 tensor of 1 element; sample b then has noise of its own by its place in the batch.
        sample_seeds: a sequence of B ints or an int64 tensor (B,), a seed for each sample. At most one of the two; with neither,
            a seed is drawn from torch's default CPU generator.
        device, dtype: of the chain. If None, those of the model's first floating parameter; cpu and float32 where it has none.
        progress: show a progress bar; needs tqdm.
        callback: called as callback(step, t, x) after each step, with step = 0, 1, …, t the int that the network was given and x
            what the next step reads: writing to it steers the chain. What it raises ends the chain.
        return_trajectory: return (x, trajectory), trajectory being (T + 1, B, *event): x_T … x_0.
        cuda_graph: "auto", True or False; see `Sampler`. A single chain gains nothing from one.

    Returns x_0 (B, *event) in `dtype`, in the memory layout that the network gives its output. Gradients are not recorded.

    Raises TypeError or ValueError naming the argument, before anything runs; ImportError for progress without tqdm.

    Sources: Ho et al. 2020, algorithm 2; Song et al. 2021 (DDIM); Ho & Salimans 2022 (guidance); Saharia et al. 2022 (Imagen),
    section 2.3 (threshold).
    """
    sampler = Sampler(
        model,
        shape,
        schedule,
        method=method,
        steps=steps,
        spacing=spacing,
        eta=eta,
        prediction=prediction,
        variance=variance,
        clip=clip,
        threshold=threshold,
        guidance_scale=guidance_scale,
        device=device,
        dtype=dtype,
        cuda_graph=cuda_graph,
    )
    return sampler(
        seed=seed,
        sample_seeds=sample_seeds,
        model_kwargs=model_kwargs,
        unconditional_kwargs=unconditional_kwargs,
        callback=callback,
        progress=progress,
        return_trajectory=return_trajectory,
    )


class Sampler:
    """`sample` for several chains of one model, shape and schedule: what does not change is checked and made once.

        sampler = fastgen.Sampler(model, (8, 3, 64, 64), schedule, steps=50)
        images = sampler(seed=0)

    The arguments are those of `sample`, divided between the two calls. A sampler may be called by several threads at a time, on
    several streams, and from its own callback; an exception in the network or the callback leaves it as it was.

    A sampler can be copied and pickled as far as its model can. The copy is of the same options, draws the same samples and has
    recorded nothing; copy.deepcopy of a policy that has both gives a sampler of the policy's copy, as averaging of weights needs
    it. Without `device` or `dtype` a sampler goes where its model's first floating parameter is at each call.

    On CUDA the whole chain can be one graph, launched at once. With `cuda_graph` "auto" the first call of a kind runs step by step,
    the second is recorded, and it and the following ones are replays; where the network cannot be recorded (it synchronises, or
    chooses by values), a warning of the logger "fastgen" says why, and all calls run step by step. True records the first call, and
    raises RuntimeError where that cannot be done. False never does. Calls with a callback, a progress bar or a trajectory run step
    by step; inside a capture of the caller's the chain becomes part of that graph, and `sample_seeds` are a tensor on the device.

    A replay gives the bits that the steps would, for its own seeds and its own values of the tensors in model_kwargs. What else
    the network reads is what was there when it was recorded, and what else it and its hooks do is not done again: so "auto"
    records no callable but an nn.Module without TorchScript, of which it sees the modules, their classes, weights, buffers and
    hooks, and attributes that are tensors, numbers, strings, or lists and dicts of them; not what changes inside other objects.
    Nor does it record a call with other arguments than such. Of another kind is a call with tensors of other shapes, other
    values that are no tensors, one seed instead of many, another backend, or changes to what is seen of the module. A sampler
    keeps up to four graphs, each with the memory of one chain, fewer where there is no room for another; the next one takes the
    place of that whose kind has not come for longest, and with "auto" is recorded if its kind comes again before four others.

    Replays of one graph take turns, on whatever streams; keep the sampler until they are done, and as long as a graph of your own
    that has a chain in it. Of a model that is no nn.Module it is not seen that its weights were moved, and precision settings such
    as TF32 stay those of the recording. To record, the network is called for two steps more beforehand, of which one in training
    mode may keep count. While a chain is recorded other threads may use the GPU; but on torch 2.10 and 2.11, whose generators have
    one state for what is recorded and what is not, `torch.randn`, dropout and the like raise RuntimeError there ("Offset increment
    outside graph capture"), unless with a generator of their own: record before such threads start, by a call or, with "auto", two.
    """

    def __init__(
        self,
        model,
        shape,
        schedule,
        *,
        method="ddpm",
        steps=None,
        spacing=None,
        eta=None,
        prediction="epsilon",
        variance=None,
        clip=None,
        threshold=None,
        guidance_scale=None,
        device=None,
        dtype=None,
        cuda_graph="auto",
    ):
        checks.function("model", model)
        checks.schedule(schedule)
        self._model, self._shape = model, checks.shape(shape)
        if steps is not None:
            schedule = schedule.respace(steps, spacing)
        elif spacing is not None:
            raise ValueError(f"spacing: expected None without steps, got {spacing!r}")
        self._schedule, self._method = schedule, method
        checks.option("method", method, ("ddpm", "ddim"))
        checks.option("prediction", prediction, PREDICTIONS)
        options = {"prediction": prediction, "clip": None if clip is None else checks.number("clip", clip, low=0.0, strict=True)}
        if threshold is not None:
            threshold = checks.number("threshold", threshold, low=0.0, strict=True)
            if threshold > 1.0:
                raise ValueError(f"threshold: expected a number within (0, 1], got {threshold!r}")
        self._threshold = threshold
        if guidance_scale is not None:
            options["guidance_scale"] = checks.number("guidance_scale", guidance_scale, low=float("-inf"), strict=True)
        self._guided = guidance_scale is not None
        self._given = (
            None if device is None else checks.device(device),
            None if dtype is None else checks.floating_dtype(dtype),
        )
        if method == "ddpm":
            if eta is not None:
                raise ValueError(f"eta: expected None with method='ddpm', which has none, got {eta!r}")
            options["variance"] = variance = "posterior" if variance is None else variance
            checks.option("variance", variance, VARIANCES)
            if variance in LEARNED_VARIANCES and len(self._shape) < 2:
                raise ValueError(f"shape: expected (B, C, ...) for a learned variance, got {self._shape}")
        else:
            if variance is not None:
                raise ValueError(f"variance: expected None with method='ddim', whose variance is eta's, got {variance!r}")
            options["eta"] = eta = 0.0 if eta is None else checks.number("eta", eta, low=0.0)
            if eta > 1.0:
                raise ValueError(f"eta: expected a number within 0 … 1, got {eta!r}")
        self._options = options
        if cuda_graph is not True and cuda_graph is not False and not (isinstance(cuda_graph, str) and cuda_graph == "auto"):
            raise ValueError(f"cuda_graph: expected 'auto', True or False, got {cuda_graph!r}")
        self._cuda_graph = cuda_graph
        self._begin()
        self._settle()

    def _begin(self):
        """What no copy takes over: that the chain has been nowhere and nothing is recorded."""
        self._device = self._dtype = None
        # All that a call may change, by whoever holds the lock; of the kinds of calls, the last comes last
        self._lock, self._kinds, self._room = threading.Lock(), [], _GRAPHS

    def _settle(self):
        """Makes what a chain reads on its device, unless it is there: since the last call the model may have been moved."""
        device, dtype = self._given
        if device is None or dtype is None:
            weight = first_weight(self._model)
            if device is None:
                device = torch.device("cpu") if weight is None else weight.device
            if dtype is None:
                dtype = torch.float32 if weight is None else weight.dtype
        if device == self._device and dtype is self._dtype:
            return
        if self._cuda_graph is True and device.type != "cuda":
            raise ValueError(f"cuda_graph: expected a CUDA device with True, got {device}")
        schedule, options, ddpm = self._schedule, self._options, self._method == "ddpm"
        # the key of the step's table, of `Schedule.ddpm_step_table` or `Schedule.ddim_step_table`
        key = self._method + "_step", options["prediction"], options["variance" if ddpm else "eta"]
        table = schedule._table(key, device, dtype)
        if table.rows.size(0) < len(schedule):
            raise ValueError(f"schedule: expected coefficients for each of its {len(schedule)} steps{table.note}")
        # a tensor for each step, made here: no step has to make one, none comes from the host, and none is the schedule's own
        samples = self._shape[0] * (2 if self._guided else 1)
        # made on the host, whose copies are there when they return: a call may come on another stream than this one
        made_on = device if rng.capturing(device) else "cpu"
        all_timesteps = schedule.timestep_tensor(made_on).unsqueeze(1).repeat(1, samples).to(device)
        if self._threshold is None:
            step, tables = partial(ddpm_step if ddpm else ddim_step, schedule=schedule, **options), (table,)
        else:
            step = _ThresholdedStep(schedule._rows(key)[0], self._threshold, **options)
            tables = step.tables(device, dtype)
        self._read, self._timesteps = (all_timesteps, *(each.rows for each in tables)), all_timesteps.unbind()
        self._step, self._noisy = step, table.noisy
        self._dtype, self._device = dtype, device  # last: to another thread they say that the rest is there

    def __getstate__(self):
        """For copies and pickles: a copy makes what is on the device anew, records graphs of its own, and while another thread
        has the lock it does not wait. What torch's graphs could not do for the network they cannot do for its copy."""
        return {name: value for name, value in vars(self).items() if name not in _OF_ITS_OWN}

    def __setstate__(self, state):
        # The model may be half made: a policy that has a sampler of itself. So where it is, the first call will see.
        vars(self).update(state)
        self._begin()

    @torch.no_grad()
    def __call__(
        self,
        *,
        seed=None,
        sample_seeds=None,
        model_kwargs=None,
        unconditional_kwargs=None,
        callback=None,
        progress=False,
        return_trajectory=False,
    ):
        """One chain. The arguments are those of `sample`. Returns x_0, or (x_0, trajectory)."""
        self._settle()
        if callback is not None:
            checks.function("callback", callback)
        bar = _progress_bar() if checks.boolean("progress", progress) else None
        trajectory = [] if checks.boolean("return_trajectory", return_trajectory) else None
        kwargs = self._checked_kwargs(model_kwargs, unconditional_kwargs)
        seed = self._checked_seed(seed, sample_seeds)
        if callback is None and bar is None and trajectory is None:
            x = self._replayed(seed, kwargs)
            return self._chain(seed, kwargs) if x is None else x
        if bar is None:
            x = self._chain(seed, kwargs, callback, trajectory)
        else:
            with bar(total=len(self._schedule), desc="sampling", unit="step") as shown:
                x = self._chain(seed, kwargs, callback, trajectory, shown.update)
        return x if trajectory is None else (x, torch.stack(trajectory))

    def _chain(self, seed, kwargs, callback=None, trajectory=None, update=None, steps=None):
        """x_0, step by step; with `steps`, no more than those."""
        total = len(self._schedule)
        if self._device.type == "cuda" and not rng.capturing(self._device):
            # the sampler, and with it a schedule that `steps` has made, may be dropped while the chain still runs
            stream = torch.cuda.current_stream(self._device)
            for constant in self._read:
                constant.record_stream(stream)
        x = randn(self._shape, seed=seed, offset=total, dtype=self._dtype, device=self._device)
        step = first_step = partial(self._step, seed=seed if self._noisy else None)
        if trajectory is not None:
            trajectory.append(x)
        for index, t in enumerate(range(total - 1, -1, -1)[:steps]):
            # A buffer of 2B samples, of which the step writes one half, would take 0.4 to 0.7 of cat's time and as many launches,
            # but be the same tensor in every step, also for a network or a callback that keeps what it is given.
            m = self._model(torch.cat([x, x]) if self._guided else x, self._timesteps[t], **kwargs)
            if self._guided or type(m) is not torch.Tensor or m.dtype is not self._dtype:
                m = self._output(m)
            guidance = {}
            if self._guided:
                guidance["unconditional_output"], m = m.chunk(2)
            if index == 0:
                x = first_step(_laid_out_like(x, m), m, t, **guidance)
                if self._threshold is None:
                    # What is called once a step is found in no near cache after a network of some 0.5 MB: beside the robot policy's
                    # a step takes three times as long as beside one that does nothing, so the less of us is run the better: 23 µs
                    # between two calls of that network, and 31 by `first_step` each time.
                    step = steps_alike(self._method, self._schedule, x, m, self._options, seed) or first_step
            else:
                try:
                    x = step(x, m, t, **guidance)
                except (RuntimeError, TypeError):
                    x = first_step(x, m, t, **guidance)  # whose checks have the words
            if trajectory is not None:
                trajectory.append(x)
            if update is not None:
                update()
            if callback is not None:
                callback(index, int(self._schedule.timesteps[t]), x)
        return x

    def _output(self, returned):
        m = returned
        if not isinstance(m, torch.Tensor):
            m = m[0] if isinstance(m, tuple) and m else getattr(m, "sample", None)
        if not isinstance(m, torch.Tensor):
            expected = "a tensor, a tuple that begins with one, or an object with one as .sample"
            raise TypeError(f"model: expected it to return {expected}, got {type(returned).__name__}")
        if m.dtype is not self._dtype and torch.promote_types(m.dtype, self._dtype) is not self._dtype:
            raise TypeError(f"model: expected an output no wider than the chain's {self._dtype}, got {m.dtype}; give it as dtype=")
        if self._guided and (m.dim() == 0 or m.shape[0] != 2 * self._shape[0]):
            raise ValueError(f"model: expected an output for {2 * self._shape[0]} samples under guidance, got {tuple(m.shape)}")
        return m

    # ---- arguments ----------------------------------------------------------------------------------------------------

    def _checked_seed(self, seed, sample_seeds):
        """An int, or a tensor on the device of 1 or B elements."""
        batch, device = self._shape[0], self._device
        if sample_seeds is not None:
            if seed is not None:
                raise ValueError("seed, sample_seeds: expected at most one, got both")
            return _sample_seeds(sample_seeds, batch, device)
        if seed is None:
            return rng.drawn_seed(device)
        if not isinstance(seed, torch.Tensor):
            return rng.check_seed(seed, 1, device)[1]
        if seed.numel() != 1:
            raise ValueError(f"seed: expected 1 element, got {tuple(seed.shape)}; seeds of the samples are sample_seeds=")
        seeds, _ = rng.check_seed(seed, 1, device)
        return seeds.item() if seeds.is_cpu and device.type != "cpu" else seeds.reshape(1)

    def _checked_kwargs(self, conditional, unconditional):
        """What the network is called with, for 2B samples under guidance."""
        conditional = _keywords("model_kwargs", {} if conditional is None else conditional)
        if not self._guided:
            if unconditional is not None:
                raise ValueError("unconditional_kwargs: expected None without a guidance_scale, got a dict")
            return conditional
        if unconditional is None:
            raise ValueError("unconditional_kwargs: expected a dict like model_kwargs with a guidance_scale, got None")
        unconditional = _keywords("unconditional_kwargs", unconditional)
        if unconditional.keys() != conditional.keys():
            raise ValueError(
                f"unconditional_kwargs: expected the keys of model_kwargs, {sorted(conditional)}, got {sorted(unconditional)}"
            )
        leaves, spec = pytree.tree_flatten_with_path(conditional)
        try:
            others = spec.flatten_up_to(unconditional)  # its dicts may be in another order
        except ValueError:
            others = None
        if others is None or not all(pytree.tree_structure(u).is_leaf() for u in others):
            raise ValueError("unconditional_kwargs: expected values nested like those of model_kwargs, got others")
        batch = self._shape[0]
        joined = [_joined(pytree.keystr(path), u, c, batch) for (path, c), u in zip(leaves, others, strict=True)]
        return pytree.tree_unflatten(joined, spec)

    # ---- the chain as a graph -------------------------------------------------------------------------------------------

    def _replayed(self, seed, kwargs):
        """x_0 by the graph; None where this call is to run step by step."""
        if self._cuda_graph is False or not graphs.usable(self._device):
            return None
        if self._cuda_graph == "auto" and not can_be_seen_into(self._model):
            return None
        leaves, spec = pytree.tree_flatten(kwargs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if elsewhere := [x for x in tensors if x.device != self._device]:
            if self._cuda_graph is True:
                raise ValueError(
                    f"model_kwargs: expected tensors on {self._device} with cuda_graph=True, got {elsewhere[0].device}"
                )
            return None
        recordable = (torch.Tensor, *COMPARED_BY_VALUE)
        if opaque := [x for x in leaves if not isinstance(x, recordable)]:  # an object of another type may change inside, unseen
            if self._cuda_graph is True:
                raise ValueError(
                    f"model_kwargs: expected tensors, numbers and strings with cuda_graph=True, got {type(opaque[0]).__name__}"
                )
            return None
        given = _Kind(seed, leaves, spec, self._model)
        with self._lock:
            if self._cuda_graph is False:  # since another thread found out
                return None
            # what was long ago is forgotten, but for its graph: of more kinds in turn than there is room for some stay step by step
            self._kinds = [kind for kind in self._kinds[: -self._room] if kind.graph is not None] + self._kinds[-self._room :]
            known = next((kind for kind in self._kinds if kind == given), None)
            if known is not None:
                self._kinds.remove(known)
            kind = known or given
            self._kinds.append(kind)
            if kind.graph is None:
                if known is None and self._cuda_graph == "auto":
                    logger.debug("the first call of its kind: the chain runs step by step")
                    return None
                logger.debug("the chain is recorded as a CUDA graph")
                try:
                    kind.graph = self._recorded(seed, leaves, spec)
                except Exception as error:
                    if self._cuda_graph is True:
                        raise RuntimeError(f"cuda_graph: the chain could not be recorded: {error}") from error
                    self._cuda_graph = False
                    self._drop_graphs(0)
                    self._kinds.clear()
                    logger.warning("the chain cannot be one CUDA graph and runs step by step from now on: %s", error)
                    return None
            return kind.graph(seed, tensors)

    def _recorded(self, seed, leaves, spec):
        graphs = self._drop_graphs(self._room - 1)  # before more memory is asked for
        try:
            return _ChainGraph(self, seed, leaves, spec)
        except torch.OutOfMemoryError:
            if not graphs:
                raise
        self._room = graphs
        self._drop_graphs(0)
        return _ChainGraph(self, seed, leaves, spec)

    def _drop_graphs(self, left):
        """All but the `left` that were used last; how many there are then."""
        kinds = [kind for kind in self._kinds if kind.graph is not None]
        for kind in kinds[: max(len(kinds) - left, 0)]:
            kind.graph.finish()
            kind.graph = None
        return min(len(kinds), left)

    @property
    def dtype(self):
        """Of the samples."""
        self._settle()
        return self._dtype

    @property
    def device(self):
        """Of the samples, with its index."""
        self._settle()
        return self._device


# what `_begin` and `_settle` make, and no copy takes over
_OF_ITS_OWN = {"_device", "_dtype", "_lock", "_kinds", "_room", "_read", "_timesteps", "_step", "_noisy"}
_GRAPHS = 4  # that a sampler keeps: a robot's loop or a server has one or two kinds of calls


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
        """What it reads there."""
        return self._x0.table(device, dtype), self._bounded.table(device, dtype)

    def __call__(self, x, m, t, *, seed, unconditional_output=None):
        how = {"learned": self._learned, "unconditional_output": unconditional_output, **self._guidance}
        # a seed for no noise: without, each step would look whether one has to be drawn
        x0 = step_with(self._x0, x.to(checks.compute_dtype(x.dtype)), m, t, seed=0, **how)
        bound = dynamic_bound(x0, self._quantile, self._bound)
        return step_with(self._bounded, x, m, t, threshold=bound, seed=seed, **how)


class _ChainGraph:
    """A recorded chain and what it reads: the seeds, the sampler's timesteps and coefficients, and the tensors that the network is
    given besides x and t. They live as long as the graph does, of which they are no part."""

    def __init__(self, sampler, seed, leaves, spec):
        with torch.inference_mode(False), torch.no_grad():  # inference tensors could not be written to later
            count = seed.numel() if isinstance(seed, torch.Tensor) else 1
            self._seeds = torch.empty(count, dtype=torch.int64, device=sampler.device)
            self._write_seed(seed)
            static = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            self._tensors = [leaf for leaf in static if isinstance(leaf, torch.Tensor)]
            self._read = self._seeds, *sampler._read, *self._tensors
            chain = partial(sampler._chain, self._seeds, pytree.tree_unflatten(static, spec))
            # from the second step on, the layout is that of the network's output
            self._graph = graphs.Graph(chain, partial(chain, steps=2), sampler.device)

    def __call__(self, seed, tensors):
        with self._graph.turn(self._read):
            self._write_seed(seed)
            for static, given in zip(self._tensors, tensors, strict=True):
                static.copy_(given)
            self._graph.replay()
            return self._graph.output.clone()

    def finish(self):
        """Waits for the replays under way, whose memory is free to go then."""
        self._graph.finish()

    def _write_seed(self, seed):
        # an int is part of the launch, where a copy from the host would wait for it
        self._seeds.copy_(seed) if isinstance(seed, torch.Tensor) else self._seeds.fill_(seed)


class _Kind:
    """What a graph takes for given: two calls of one kind differ in the values of tensors only. With the graph, if there is one."""

    def __init__(self, seed, leaves, spec, model):
        self.graph = None
        self.facts = (
            seed.numel() if isinstance(seed, torch.Tensor) else 1,
            spec,
            backends._choice.get(),
            torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
            tuple((leaf.shape, leaf.dtype) for leaf in leaves if isinstance(leaf, torch.Tensor)),
            fingerprint(model),
        )
        self.values = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]

    def __eq__(self, other):
        if not isinstance(other, _Kind) or self.facts != other.facts:
            return False
        return all(_equal(a, b) for a, b in zip(self.values, other.values, strict=True))


# ---- arguments and results ------------------------------------------------------------------------------------------------


def _progress_bar():
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("progress: expected tqdm to be installed for True (pip install tqdm), and it is not") from error
    return tqdm


def _sample_seeds(seeds, batch, device):
    if isinstance(seeds, torch.Tensor):
        if seeds.dtype != torch.int64:
            raise TypeError(f"sample_seeds: expected a sequence of ints or an int64 tensor, got {seeds.dtype}")
        if tuple(seeds.shape) != (batch,):
            raise ValueError(f"sample_seeds: expected shape ({batch},), one seed per sample, got {tuple(seeds.shape)}")
        if seeds.device != device and not seeds.is_cpu:
            raise ValueError(f"sample_seeds: expected a tensor on {device} or on the CPU, got one on {seeds.device}")
        got = "one on the CPU"
    else:
        got = type(seeds).__name__
        if isinstance(seeds, (str, bytes, Mapping, Set)) or not hasattr(seeds, "__iter__"):  # a set has an order of its own
            raise TypeError(f"sample_seeds: expected a sequence of ints or an int64 tensor, got {got}")
        seeds = [rng.check_seed_int("sample_seeds", seed, "ints") for seed in seeds]
        if len(seeds) != batch:
            raise ValueError(f"sample_seeds: expected {batch} ints, one per sample, got {len(seeds)}")
        seeds = torch.tensor(seeds, dtype=torch.int64, device="cpu")
    if seeds.device != device and rng.capturing(device):
        raise ValueError(
            f"sample_seeds: expected a tensor on {device} during CUDA-graph capture, which copies nothing from the host, got {got}"
        )
    return seeds.to(device).contiguous()


def _keywords(name, value):
    if not isinstance(value, dict):
        raise TypeError(f"{name}: expected a dict, got {type(value).__name__}")
    for key in value:
        if not isinstance(key, str):
            raise TypeError(f"{name}: expected strings as keys, got {key!r}")
    return value


def _joined(name, unconditional, conditional, batch):
    """One value of the network's arguments for both halves of its batch."""
    u, c = unconditional, conditional
    if not isinstance(u, torch.Tensor) or not isinstance(c, torch.Tensor):
        if not _equal(u, c):
            raise ValueError(f"unconditional_kwargs{name}: expected tensors, or what model_kwargs has there ({c!r}), got {u!r}")
        return c
    if u is not c and not (u.layout is c.layout is torch.strided):
        raise ValueError(
            f"unconditional_kwargs{name}: expected dense tensors, or the very tensor of model_kwargs, got {u.layout} and {c.layout}"
        )
    if (u.shape, u.dtype, u.device) != (c.shape, c.dtype, c.device):
        raise ValueError(
            f"unconditional_kwargs{name}: expected {tuple(c.shape)}, {c.dtype}, {c.device} as in model_kwargs, "
            f"got {tuple(u.shape)}, {u.dtype}, {u.device}"
        )
    if c.dim() and c.shape[0] == batch:
        return torch.cat([u, c])
    if u is c or location(u) == location(c):
        return c
    if c.device.type != "cpu":
        raise ValueError(
            f"unconditional_kwargs{name}: expected {batch} as first dimension, or the very tensor of model_kwargs (to compare two "
            f"would be to wait for {c.device}), got another"
        )
    if not torch.equal(u, c):
        raise ValueError(
            f"unconditional_kwargs{name}: expected {batch} as first dimension, or the values of model_kwargs, got others"
        )
    return c


def _equal(a, b):
    """Whether two values that are no tensors are the same, as far as they can tell."""
    if a is b or type(a) is not type(b):
        return a is b
    try:
        return np.array_equal(a, b) if isinstance(a, np.ndarray) else bool(a == b or (a != a and b != b))  # NaN and NaN
    except Exception:  # whatever a comparison of theirs may raise
        return False


def _laid_out_like(x, m):
    """`x`, channels-last where the network's output is: then no step has to rearrange either."""
    for dim, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if m.dim() == dim and m.is_contiguous(memory_format=layout) and not m.is_contiguous():
            return x.contiguous(memory_format=layout)
    return x
