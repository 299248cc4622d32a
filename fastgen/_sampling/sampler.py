"""The whole reverse chain: `sample`, and `Sampler`, which keeps what several chains have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, cast, overload

import torch

from .._core import checks
from ..schedule import LEARNED_VARIANCES, Prediction, Schedule, Spacing, Variance
from .arguments import OPTIONS, Method, Options, checked_seed, network_kwargs, progress_bar
from .chain import Chain
from .chain_graph import ChainGraphs
from .network import first_weight


@overload
def sample(
    model: Callable[..., Any],
    shape: Sequence[int],
    schedule: Schedule,
    *,
    method: Method = "ddpm",
    steps: int | Iterable[int] | None = None,
    spacing: Spacing | None = None,
    eta: float | None = None,
    prediction: Prediction = "epsilon",
    variance: Variance | None = None,
    clip: float | None = None,
    threshold: float | None = None,
    guidance_scale: float | None = None,
    model_kwargs: dict[str, Any] | None = None,
    unconditional_kwargs: dict[str, Any] | None = None,
    seed: int | torch.Tensor | None = None,
    sample_seeds: Sequence[int] | torch.Tensor | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
    callback: Callable[[int, int, torch.Tensor], Any] | None = None,
    return_trajectory: Literal[False] = False,
    cuda_graph: Literal["auto"] | bool = "auto",
) -> torch.Tensor: ...
@overload
def sample(
    model: Callable[..., Any],
    shape: Sequence[int],
    schedule: Schedule,
    *,
    method: Method = "ddpm",
    steps: int | Iterable[int] | None = None,
    spacing: Spacing | None = None,
    eta: float | None = None,
    prediction: Prediction = "epsilon",
    variance: Variance | None = None,
    clip: float | None = None,
    threshold: float | None = None,
    guidance_scale: float | None = None,
    model_kwargs: dict[str, Any] | None = None,
    unconditional_kwargs: dict[str, Any] | None = None,
    seed: int | torch.Tensor | None = None,
    sample_seeds: Sequence[int] | torch.Tensor | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
    callback: Callable[[int, int, torch.Tensor], Any] | None = None,
    return_trajectory: Literal[True],
    cuda_graph: Literal["auto"] | bool = "auto",
) -> tuple[torch.Tensor, torch.Tensor]: ...
def sample(
    model: Callable[..., Any],
    shape: Sequence[int],
    schedule: Schedule,
    *,
    method: Method = "ddpm",
    steps: int | Iterable[int] | None = None,
    spacing: Spacing | None = None,
    eta: float | None = None,
    prediction: Prediction = "epsilon",
    variance: Variance | None = None,
    clip: float | None = None,
    threshold: float | None = None,
    guidance_scale: float | None = None,
    model_kwargs: dict[str, Any] | None = None,
    unconditional_kwargs: dict[str, Any] | None = None,
    seed: int | torch.Tensor | None = None,
    sample_seeds: Sequence[int] | torch.Tensor | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
    callback: Callable[[int, int, torch.Tensor], Any] | None = None,
    return_trajectory: bool = False,
    cuda_graph: Literal["auto"] | bool = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
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
    of_the_call = locals()
    of_the_sampler = {name: of_the_call.pop(name) for name in ("model", "shape", "schedule", *OPTIONS)}
    return Sampler(**of_the_sampler)(**of_the_call)


class Sampler:
    """`sample` for several chains of one model, shape and schedule: what does not change is checked and made once.

        sampler = fastgen.Sampler(model, (8, 3, 64, 64), schedule, steps=50)
        images = sampler(seed=0)

    The arguments are those of `sample`, divided between the two calls. A sampler may be called by several threads at a time, on
    several streams, and from its own callback; an exception in the network or the callback leaves it as it was.

    A sampler can be copied and pickled as far as its model can. The copy is of the same options, draws the same samples and has
    recorded nothing; copy.deepcopy of a policy that has both gives a sampler of the policy's copy, as averaging of weights needs
    it. Without `device` or `dtype` a sampler goes where its model's first floating parameter is at each call.

    On CUDA the whole chain can be one graph, launched at once. With `cuda_graph` "auto" the first call of a form runs step by step,
    the second is recorded, and it and the following ones are replays; where the network cannot be recorded (it synchronises, or
    chooses by values), a warning of the logger "fastgen" says why, and all calls run step by step. True records the first call, and
    raises RuntimeError where that cannot be done. False never does. Calls with a callback, a progress bar or a trajectory run step
    by step; inside a capture of the caller's the chain becomes part of that graph, and `sample_seeds` are a tensor on the device.

    A replay gives the bits that the steps would, for its own seeds and its own values of the tensors in model_kwargs. What else
    the network reads is what was there when it was recorded, and what else it and its hooks do is not done again: so "auto"
    records no callable but an nn.Module without TorchScript, of which it sees the modules, their classes, weights, buffers and
    hooks, and attributes that are tensors, numbers, strings, or lists and dicts of them; not what changes inside other objects.
    Nor does it record a call with other arguments than such. Of another form is a call with tensors of other shapes, other
    values that are no tensors, one seed instead of many, another backend, or changes to what is seen of the module. A sampler
    keeps up to four graphs, each with the memory of one chain, fewer where there is no room for another; the next one takes the
    place of that whose form has not come for longest, and with "auto" is recorded if its form comes again before four others.

    Replays of one graph take turns, on whatever streams; keep the sampler until they are done, and as long as a graph of your own
    that has a chain in it. Of a model that is no nn.Module it is not seen that its weights were moved, and precision settings such
    as TF32 stay those of the recording. To record, the network is called for two steps more beforehand, of which one in training
    mode may keep count. While a chain is recorded other threads may use the GPU; but on torch 2.10 and 2.11, whose generators have
    one state for what is recorded and what is not, `torch.randn`, dropout and the like raise RuntimeError there ("Offset increment
    outside graph capture"), unless with a generator of their own: record before such threads start, by a call or, with "auto", two.
    """

    __module__ = "fastgen"  # what a pickle says, whatever module this becomes

    def __init__(
        self,
        model: Callable[..., Any],
        shape: Sequence[int],
        schedule: Schedule,
        *,
        method: Method = "ddpm",
        steps: int | Iterable[int] | None = None,
        spacing: Spacing | None = None,
        eta: float | None = None,
        prediction: Prediction = "epsilon",
        variance: Variance | None = None,
        clip: float | None = None,
        threshold: float | None = None,
        guidance_scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        cuda_graph: Literal["auto"] | bool = "auto",
    ):
        arguments = locals()  # `Options.checked` takes those that are options, by name
        checks.function("model", model)
        checks.schedule(schedule)
        self._model, self._shape = model, checks.shape(shape)
        options = Options.checked(arguments)
        if options.variance in LEARNED_VARIANCES and len(self._shape) < 2:
            raise ValueError(f"shape: expected (B, C, ...) for a learned variance, got {self._shape}")
        if options.steps is not None:
            schedule = schedule.respace(options.steps, options.spacing)
            options = options._replace(steps=None, spacing=None)  # the schedule is what they have made of it
        self._schedule, self._options = schedule, options
        self._begin()
        self._settled()

    def _begin(self) -> None:
        """Makes what no copy takes over: the chain is on no device yet, and no graph is recorded."""
        self._chain: Chain | None = None
        self._graphs = ChainGraphs(self._options.cuda_graph)

    def _settled(self) -> Chain:
        """The chain where it is to run now: since the last call the model may have been moved."""
        device, dtype = cast("torch.device | None", self._options.device), self._options.dtype  # as `Options.checked` has made it
        if device is None or dtype is None:
            weight = first_weight(self._model)
            if device is None:
                device = torch.device("cpu") if weight is None else weight.device
            if dtype is None:
                dtype = torch.float32 if weight is None else weight.dtype
        chain = self._chain
        if chain is None or device != chain.device or dtype is not chain.dtype:
            if self._graphs.mode is True and device.type != "cuda":
                raise ValueError(f"cuda_graph: expected a CUDA device with True, got {device}")
            chain = self._chain = Chain(self._model, self._shape, self._schedule, self._options, device, dtype)
        return chain

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: a copy makes what is on the device anew, records graphs of its own, and while another thread
        records it does not wait. What torch's graphs could not do for the network they cannot do for its copy. The options
        are a dict: a pickle names no class that is not public."""
        state = {**vars(self), "_options": self._options._replace(cuda_graph=self._graphs.mode)._asdict()}
        del state["_chain"], state["_graphs"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The model may be half made: a policy that has a sampler of itself. So the first call will look where it is.
        vars(self).update({**state, "_options": Options(**state["_options"])})
        self._begin()

    @overload
    def __call__(
        self,
        *,
        seed: int | torch.Tensor | None = None,
        sample_seeds: Sequence[int] | torch.Tensor | None = None,
        model_kwargs: dict[str, Any] | None = None,
        unconditional_kwargs: dict[str, Any] | None = None,
        callback: Callable[[int, int, torch.Tensor], Any] | None = None,
        progress: bool = False,
        return_trajectory: Literal[False] = False,
    ) -> torch.Tensor: ...
    @overload
    def __call__(
        self,
        *,
        seed: int | torch.Tensor | None = None,
        sample_seeds: Sequence[int] | torch.Tensor | None = None,
        model_kwargs: dict[str, Any] | None = None,
        unconditional_kwargs: dict[str, Any] | None = None,
        callback: Callable[[int, int, torch.Tensor], Any] | None = None,
        progress: bool = False,
        return_trajectory: Literal[True],
    ) -> tuple[torch.Tensor, torch.Tensor]: ...
    @torch.no_grad()
    def __call__(
        self,
        *,
        seed: int | torch.Tensor | None = None,
        sample_seeds: Sequence[int] | torch.Tensor | None = None,
        model_kwargs: dict[str, Any] | None = None,
        unconditional_kwargs: dict[str, Any] | None = None,
        callback: Callable[[int, int, torch.Tensor], Any] | None = None,
        progress: bool = False,
        return_trajectory: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """One chain. The arguments are those of `sample`. Returns x_0, or (x_0, trajectory)."""
        chain, batch = self._settled(), self._shape[0]
        if callback is not None:
            checks.function("callback", callback)
        bar = progress_bar() if checks.boolean("progress", progress) else None
        trajectory = [] if checks.boolean("return_trajectory", return_trajectory) else None
        kwargs = network_kwargs(model_kwargs, unconditional_kwargs, batch, chain.guided)
        seed = checked_seed(seed, sample_seeds, batch, chain.device)
        if callback is None and bar is None and trajectory is None:
            x = self._graphs.replayed(chain, seed, kwargs)
            return chain.run(seed, kwargs) if x is None else x
        if bar is None:
            x = chain.run(seed, kwargs, callback, trajectory)
        else:
            with bar(total=len(self._schedule), desc="sampling", unit="step") as shown:
                x = chain.run(seed, kwargs, callback, trajectory, shown.update)
        return x if trajectory is None else (x, torch.stack(trajectory))

    @property
    def dtype(self) -> torch.dtype:
        """Of the samples."""
        return self._settled().dtype

    @property
    def device(self) -> torch.device:
        """Of the samples, with its index."""
        return self._settled().device
