"""Run stochastic variational inference on batches that stream from a Dataset.

:func:`run_minibatch` trains a guide window by window, writes and reads checkpoints, detects a
plateau of the loss, and draws from the trained guide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import count
from math import ceil, prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import SVI, Trace_ELBO
from numpyro.optim import SGD
from tqdm.auto import tqdm

from xr_aimz.errors import OptionError
from xr_aimz.inference.checkpoint import Checkpoint
from xr_aimz.inference.iterates import AverageOptimizer, SpreadOptimizer, noise_concerns
from xr_aimz.inference.local_params import (
    check_batch_guide,
    check_batch_model,
    check_batch_start,
    likelihood_scales,
    local_sites,
)
from xr_aimz.inference.minibatch_data import (
    Window,
    batch_sizes,
    epoch_windows,
    make_reader,
    prefetch,
)
from xr_aimz.inference.minibatch_update import MinibatchUpdate, make_update, sample_local_guide
from xr_aimz.inference.problem import InferenceProblem, PosteriorDraws, SamplerState
from xr_aimz.inference.reflection import is_normal
from xr_aimz.inference.variational import check_params, sample_guide
from xr_aimz.options import get_options
from xr_aimz.tracing import trace_lock

MOST_LOSSES = 20_000


@dataclass(frozen=True)
class LossHistory:
    """Losses of steps, float32, averaged over runs of ``every`` steps.

    ``means`` are the averages; ``rest`` are the losses of the last steps, too few for a run.
    """

    every: int = 1
    means: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    rest: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))

    def add(self, losses: np.ndarray) -> LossHistory:
        """Return the history with these losses ``(step,)`` appended."""
        every, means = self.every, self.means
        rest = np.concatenate([self.rest, losses.astype(np.float32)])
        complete = len(rest) // every * every
        means = np.concatenate([means, _means(rest[:complete], every)])
        rest = rest[complete:]
        while len(means) > MOST_LOSSES:
            pairs = len(means) // 2 * 2
            # A run without a partner is turned back into steps, and joins a later, longer run.
            rest = np.concatenate([np.repeat(means[pairs:], every), rest])
            means, every = _means(means[:pairs], 2), 2 * every
        return LossHistory(every, means, rest)

    def settled(self, steps: int) -> bool:
        """Return whether the last ``steps`` steps lowered the loss no more than chance would."""
        count = steps // self.every
        if count < 2 or len(self.means) < 2 * count:
            return False
        before, after = self.means[-2 * count : -count], self.means[-count:]
        error = np.sqrt((before.var() + after.var()) / count)
        return bool(before.mean() - after.mean() < error)


def _means(values: np.ndarray, every: int) -> np.ndarray:
    return values.reshape(-1, every).mean(axis=1, dtype=np.float64).astype(np.float32)


# The gradient of a batch is many times as noisy as that of all data, and the noise that stays
# in the guide shrinks with the last steps, so these are smaller than those of a full-batch fit.
LAST_RATE = 1e-4
_UNSETTLED = -1
# Version of the arrays of a checkpoint. 1 had no averages, and one draw of the guide a step.
_LAYOUT = 2


@dataclass(frozen=True)
class MinibatchSettings:
    """Settings of a minibatch fit.

    ``full_rate`` is the share of the steps before the package's own optimizer shrinks its steps,
    None for an optimizer of the caller's. ``previous`` is the state of the fit to continue,
    ``started`` the sites that ``init=`` gave values.
    """

    batch: Any
    steps: int | None = None
    epochs: float | None = None
    patience: int | None = None
    checkpoint: str | Path | None = None
    previous: Mapping[str, Any] | None = None
    full_rate: float | None = None
    started: tuple[str, ...] = ()


@dataclass(frozen=True)
class Position:
    """Position of a run: steps taken, the epoch, and the number of steps within it.

    ``settled`` is the step at which the loss was found to have settled, -1 before that.
    """

    step: int = 0
    epoch: int = 0
    within: int = 0
    settled: int = _UNSETTLED


def run_minibatch(
    problem: InferenceProblem,
    make: Callable[[int], SVI],
    settings: MinibatchSettings,
    *,
    draws: int,
    seed: int,
    progress: bool,
) -> PosteriorDraws:
    """Train a guide on batches, then draw from it: one chain of independent draws.

    Parameters
    ----------
    problem : InferenceProblem
        With ``binding`` and ``inputs``, from which the arrays are read.
    make : callable
        Makes the SVI for a number of steps.
    settings : MinibatchSettings
    draws, seed, progress
        As in :func:`xr_aimz.fit`.
    """
    binding, inputs = problem.binding, problem.inputs
    assert inputs is not None
    assert binding is not None
    sizes = batch_sizes(settings.batch, binding, inputs)
    per_epoch = prod(inputs.sizes[d] / n for d, n in sizes.items())
    steps = settings.steps or ceil((settings.epochs or 0) * per_epoch)
    svi = _record_iterates(make(steps))
    check_batch_guide(problem, svi.guide, sizes)
    check_batch_start(problem, settings.started, sizes)
    check_batch_model(problem, sizes)
    file = Checkpoint(settings.checkpoint)
    stored = file.read()
    budget = get_options()["block_bytes"]
    reader = make_reader(binding, inputs, sizes, budget, seed, problem.requirements)
    # Keys as in a full-batch fit, so that both draw in the same way.
    start, sample = jax.random.split(jax.random.key(seed))
    update = make_update(problem, svi, reader, start)
    state = _State.of(update, settings, steps, seed, stored)
    with tqdm(total=steps, initial=state.place.step, desc="SVI", disable=not progress) as bar:
        state = _train(update, state, settings, steps, seed, file, bar)
    file.write(state.packed())
    return _draw_posterior(update, state, settings, steps, draws, sample)


def _record_iterates(svi: SVI) -> SVI:
    """Add a record of the iterates to the optimizer of an SVI whose guide is normal."""
    if not is_normal(svi.guide) or isinstance(svi.optim, AverageOptimizer):
        return svi
    return SVI(svi.model, svi.guide, SpreadOptimizer(svi.optim), svi.loss, **svi.static_kwargs)


@dataclass(frozen=True)
class _State:
    """State of a run: leaves of the SVI state, position, losses, and identifying names."""

    leaves: list[Any]
    place: Position
    history: LossHistory
    names: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        update: MinibatchUpdate,
        settings: MinibatchSettings,
        steps: int,
        seed: int,
        stored: Any,
    ) -> _State:
        """Return the state of the checkpoint or the previous fit, or else the initial state."""
        fit, call = update.digest()
        names = {
            "fit": fit,
            "call": f"{call} steps={steps} patience={settings.patience}",
            "seed": seed,
        }
        saved = settings.previous if stored is None else stored
        if saved is None:
            return cls(update.start, Position(), LossHistory(), names)
        source = "init=" if stored is None else f"checkpoint={str(settings.checkpoint)!r}"
        _check_same_fit(source, saved, names, ("fit",) if stored is None else ("fit", "call"))
        leaves = _restart_averages(update, _unpack_leaves(saved, update.start))
        place = Position(*(int(saved[n]) for n in ("step", "epoch", "within", "settled")))
        if stored is None and place.step > steps:
            raise OptionError(
                f"steps={steps!r} counts those of the previous fit too, and init= has taken "
                f"{place.step} already; give more steps"
            )
        history = LossHistory(int(saved["every"]), saved["losses"], saved["rest"])
        return cls(leaves, place, history, names)

    def packed(self) -> dict[str, np.ndarray]:
        arrays = {f"leaf {i}": _as_array(a) for i, a in enumerate(self.leaves)}
        place = {n: getattr(self.place, n) for n in ("step", "epoch", "within", "settled")}
        record = self.history
        losses = {"every": record.every, "losses": record.means, "rest": record.rest}
        named = {**arrays, **place, **losses, **self.names, "layout": _LAYOUT}
        return {n: np.array(a) for n, a in named.items()}


def _as_array(leaf: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _unpack_leaves(saved: Mapping[str, Any], start: list[Any]) -> list[Any]:
    # Copies, since the first window donates its buffers.
    leaves = [jnp.array(saved[f"leaf {i}"]) for i in range(len(start))]
    return [
        jax.random.wrap_key_data(leaf) if _is_key(like) else leaf
        for leaf, like in zip(leaves, start, strict=True)
    ]


def _restart_averages(update: MinibatchUpdate, leaves: list[Any]) -> list[Any]:
    """Restart the averages of a fit of fewer steps, which ended before the new steps begin."""
    if not isinstance(update.svi.optim, AverageOptimizer):
        return leaves
    state = jax.tree.unflatten(update.structure, leaves)
    restarted = update.svi.optim.restarted(state.optim_state)
    return jax.tree.leaves(state._replace(optim_state=restarted))


def _check_same_fit(
    source: str, saved: Mapping[str, Any], names: Mapping[str, Any], compared: tuple[str, ...]
) -> None:
    if int(saved.get("layout", 1)) != _LAYOUT:
        raise OptionError(
            f"{source} was written by another version of xr_aimz, whose fits in batches cannot be "
            "continued by this one; fit anew, or continue it with that version"
        )
    if "seed" in saved and int(saved["seed"]) != names["seed"]:
        raise OptionError(
            f"{source} is of a fit with seed={int(saved['seed'])!r}, and this one has "
            f"seed={names['seed']!r}; to continue it, give the same seed"
        )
    differ = [name for name in compared if str(saved.get(name)) != str(names[name])]
    if "fit" in differ:
        raise OptionError(
            f"{source} is of another fit: the model, its guide, the kind of optimizer, the "
            "labels, the batches, the chunks or the first batch of the data differ. Use the same, "
            "or leave it out"
        )
    if differ:
        raise OptionError(
            f"{source} is of a fit with other steps, patience or optimizer; repeat the call that "
            "wrote it, or continue its Fit with init="
        )


def _train(
    update: MinibatchUpdate,
    state: _State,
    settings: MinibatchSettings,
    steps: int,
    seed: int,
    file: Checkpoint,
    bar: Any,
) -> _State:
    full = None if settings.full_rate is None else int(settings.full_rate * steps)
    windows = prefetch(update.data, _iter_windows(update, state.place, steps, seed))
    with closing(windows):
        while state.place.step < _last_step(state.place, steps, full):
            window, arrays = next(windows)
            first_step = state.place.step
            state = _advance_window(
                update, state, window, arrays, _last_step(state.place, steps, full)
            )
            if _has_plateaued(state, window, settings.patience, full):
                state = _start_decay(update, state, full)
            if file.due:
                file.write(state.packed())
            bar.update(state.place.step - first_step)
    return state


def _iter_windows(
    update: MinibatchUpdate, position: Position, steps: int, seed: int
) -> Iterator[Window]:
    """Yield the remaining windows from a position, enough for the steps that are left."""
    batches = update.data.batches
    left = position.within + steps - position.step
    for epoch in count(position.epoch):
        for window in epoch_windows(batches, seed, epoch):
            if left <= 0:
                return
            left -= len(window.starts)
            done = position.within if epoch == position.epoch else 0
            if window.before + len(window.starts) > done:
                yield window


def _advance_window(
    update: MinibatchUpdate, state: _State, window: Window, arrays: Mapping[str, Any], end: int
) -> _State:
    """Take the remaining steps of one window, up to step ``end``."""
    position = state.place
    first = max(0, position.within - window.before) if position.epoch == window.epoch else 0
    stop = min(len(window.starts), first + end - position.step)
    leaves, losses = update.advance(state.leaves, window, arrays, (first, stop))
    step = position.step + stop - first
    position = Position(step, window.epoch, window.before + stop, position.settled)
    return replace(state, leaves=leaves, place=position, history=state.history.add(losses))


def _last_step(position: Position, steps: int, full: int | None) -> int:
    """Return the last step: after the loss has settled, only the smaller steps are left."""
    if position.settled == _UNSETTLED:
        return steps
    return position.settled + (0 if full is None else steps - full)


def _has_plateaued(state: _State, window: Window, patience: int | None, full: int | None) -> bool:
    """Return whether the loss has settled.

    Checked at the end of a window, once in every ``patience`` steps.
    """
    position = state.place
    if patience is None or position.settled != _UNSETTLED or (full and position.step >= full):
        return False
    if position.within < window.before + len(window.starts):
        return False
    due = position.step // patience > (position.step - len(window.starts)) // patience
    return due and state.history.settled(patience)


def _start_decay(update: MinibatchUpdate, state: _State, full: int | None) -> _State:
    """Record that the loss has settled, and start the decay of the learning rate.

    The step count of the package's own optimizer is set as if all steps at the full rate were
    done.
    """
    position = replace(state.place, settled=state.place.step)
    if full is None:
        return replace(state, place=position)
    svi_state = jax.tree.unflatten(update.structure, state.leaves)
    step_count, moments = svi_state.optim_state
    svi_state = svi_state._replace(optim_state=(jnp.full_like(step_count, full), moments))
    return replace(state, place=position, leaves=jax.tree.leaves(svi_state))


def _draw_posterior(
    update: MinibatchUpdate,
    state: _State,
    settings: MinibatchSettings,
    steps: int,
    draws: int,
    key: Any,
) -> PosteriorDraws:
    problem, batches = update.problem, update.data.batches
    leaves = update.result(state.leaves)

    def draw_more(draws: int, seed: int) -> dict[str, np.ndarray]:
        return _sample_guide(update, leaves, jax.random.key(seed), draws)

    param_names = {*problem.named("param")}
    params = {n: v for n, v in update.params(leaves).items() if n in param_names} | update.mutable(
        leaves
    )
    position = state.place
    full = steps if settings.full_rate is None else int(settings.full_rate * steps)
    sizes = ", ".join(f"{d}={n}" for d, n in batches.sizes.items())
    return PosteriorDraws(
        samples=_sample_guide(update, leaves, key, draws),
        shape=(1, draws),
        method=f"SVI, {type(update.guide).__name__}, {position.step} steps, batches of {sizes}",
        params=jax.tree.map(np.asarray, params),
        losses=state.history.means,
        full_rate_steps=full if position.settled == _UNSETTLED else position.settled,
        loss_every=state.history.every,
        epoch_steps=batches.per_epoch,
        state=state.packed(),
        continue_=draw_more,
        origin=None if update.svi.static_kwargs else _sampler_state(update, leaves),
        concerns=_concerns(update, state),
    )


def _concerns(update: MinibatchUpdate, state: _State) -> tuple[str, ...]:
    """Return concerns about the fit from the record of the iterates, if there is one."""
    optim, problem = update.svi.optim, update.problem
    if not isinstance(optim, (AverageOptimizer, SpreadOptimizer)):
        return ()
    assert problem.binding is not None
    return noise_concerns(
        update.guide,
        optim,
        jax.tree.unflatten(update.structure, state.leaves).optim_state,
        update.svi.constrain_fn,
        {n: problem.sites[n].variable for n in problem.named("latent")},
        likelihood_scales(problem.sites, problem.binding, update.data.batches),
    )


def _sampler_state(update: MinibatchUpdate, leaves: list[Any]) -> SamplerState:
    """Return the unconstrained params, entries as rows, without the optimizer state."""
    state = jax.tree.unflatten(update.structure, leaves)
    params = update.svi.optim.get_params(state.optim_state)
    return SamplerState(
        "batches", {"sizes": dict(update.data.batches.sizes)}, params, update.guide
    )


def restore_minibatch(
    problem: InferenceProblem, guide: Any, sizes: Mapping[str, int], params: Mapping[str, Any]
) -> Callable[[int, int], dict[str, np.ndarray]]:
    """Return a function that draws from a guide that was trained before.

    ``params`` are those of :func:`_sampler_state`.
    """
    binding, inputs = problem.binding, problem.inputs
    assert inputs is not None
    assert binding is not None
    # Any optimizer will do, since only the params of its state are used.
    svi = SVI(problem.model, guide, SGD(0.0), Trace_ELBO())
    reader = make_reader(binding, inputs, sizes, get_options()["block_bytes"], 0)
    update = make_update(problem, svi, reader, jax.random.key(0))
    start = jax.tree.unflatten(update.structure, update.start)
    check_params(update.svi.optim.get_params(start.optim_state), params)
    leaves = jax.tree.leaves(start._replace(optim_state=update.svi.optim.init(params)))

    def draw_more(draws: int, seed: int) -> dict[str, np.ndarray]:
        return _sample_guide(update, leaves, jax.random.key(seed), draws)

    return draw_more


def _sample_guide(
    update: MinibatchUpdate, leaves: list[Any], key: Any, draws: int
) -> dict[str, np.ndarray]:
    """Draw from the trained guide: one chain, ``(1, draw, *site axes)`` by site."""
    if local_sites(update.problem, update.data.batches.sizes):
        return sample_local_guide(update, leaves, key, draws)
    first_problem = replace(update.problem, arguments=update.arguments(update.data.first))
    with trace_lock(update.block):
        return sample_guide(update.guide, first_problem, update.params(leaves), key, draws)
