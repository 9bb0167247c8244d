"""Variational inference on batches that stream from a Dataset: the whole run of a fit.

Batches come in the order of :mod:`xr_aimz.batches`, each step is one of
:mod:`xr_aimz.infer.training`. What a run needs to go on is a mapping of named arrays, so a
checkpoint, a Fit's ``state`` and ``init=fit`` are one thing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
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

from xr_aimz.batches import Visit, batch_sizes, epoch
from xr_aimz.checkpoint import Checkpoint
from xr_aimz.errors import OptionError
from xr_aimz.further import Origin
from xr_aimz.infer.batchable import check_guide, check_model, check_start, local_sites
from xr_aimz.infer.entry_draws import draw_entries
from xr_aimz.infer.iterates import AverageOptimizer, SpreadOptimizer
from xr_aimz.infer.losses import History
from xr_aimz.infer.noise import noise_concerns
from xr_aimz.infer.problem import Draws, Problem
from xr_aimz.infer.reflection import is_normal
from xr_aimz.infer.scaled import scales
from xr_aimz.infer.svi import check_params, sample_guide
from xr_aimz.infer.training import Training, training
from xr_aimz.labelling import result_name
from xr_aimz.model import tracing
from xr_aimz.options import get_options
from xr_aimz.stream import ahead, stream

__all__ = ["LAST_RATE", "Settings", "reopened", "run"]

# A batch's gradient is noise many times over: what is left of it in the guide shrinks with
# the last steps, so these are smaller than those of a full-batch fit.
LAST_RATE = 1e-4
_UNSETTLED = -1
# Of a checkpoint's arrays. 1 had no averages, and a single draw of the guide a step.
_LAYOUT = 2


@dataclass(frozen=True)
class Settings:
    """What was asked of a minibatch fit.

    ``full_rate`` is the share of the steps before an optimizer of our own shrinks its steps,
    None for an optimizer of the caller's. ``previous`` is the state of the fit to go on from,
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
class Place:
    """Where a run is: steps taken, the epoch, and how many of the steps were in it.

    ``settled`` is the step at which the loss was found to have settled, if it was.
    """

    step: int = 0
    epoch: int = 0
    within: int = 0
    settled: int = _UNSETTLED


def run(
    problem: Problem,
    make: Callable[[int], SVI],
    settings: Settings,
    *,
    draws: int,
    seed: int,
    progress: bool,
) -> Draws:
    """Train a guide on batches, then draw from it: one chain of independent draws.

    Parameters
    ----------
    problem : Problem
        With ``binding`` and ``inputs``; its arrays are read from those.
    make : callable
        The inference for that many steps.
    settings : Settings
    draws, seed, progress
        As in :func:`xr_aimz.fit`.
    """
    binding, inputs = problem.binding, problem.inputs
    assert inputs is not None
    assert binding is not None
    sizes = batch_sizes(settings.batch, binding, inputs)
    per_epoch = prod(inputs.sizes[d] / n for d, n in sizes.items())
    steps = settings.steps or ceil((settings.epochs or 0) * per_epoch)
    made = _with_record(make(steps))
    check_guide(problem, made.guide, sizes)
    check_start(problem, settings.started, sizes)
    check_model(problem, sizes)
    file = Checkpoint(settings.checkpoint)
    stored = file.read()
    budget = get_options()["block_bytes"]
    data = stream(binding, inputs, sizes, budget, seed, problem.requirements)
    # The keys of a full-batch fit: its draws and this one's are of the same kind.
    start, sample = jax.random.split(jax.random.key(seed))
    ready = training(problem, made, data, start)
    state = _State.of(ready, settings, steps, seed, stored)
    with tqdm(total=steps, initial=state.place.step, desc="SVI", disable=not progress) as bar:
        state = _train(ready, state, settings, steps, seed, file, bar)
    file.write(state.packed())
    return _drawn(ready, state, settings, steps, draws, sample)


def _with_record(svi: SVI) -> SVI:
    """The inference, with a record of the iterates of a normal guide."""
    if not is_normal(svi.guide) or isinstance(svi.optim, AverageOptimizer):
        return svi
    return SVI(svi.model, svi.guide, SpreadOptimizer(svi.optim), svi.loss, **svi.static_kwargs)


@dataclass(frozen=True)
class _State:
    """All that a run has come to."""

    leaves: list[Any]
    place: Place
    history: History
    names: Mapping[str, Any]

    @classmethod
    def of(cls, ready: Training, settings: Settings, steps: int, seed: int, stored: Any) -> _State:
        """The state that was stored, of the checkpoint or the fit before; else the start."""
        fit, call = ready.digest()
        names = {
            "fit": fit,
            "call": f"{call} steps={steps} patience={settings.patience}",
            "seed": seed,
        }
        found = settings.previous if stored is None else stored
        if found is None:
            return cls(ready.start, Place(), History(), names)
        what = "init=" if stored is None else f"checkpoint={str(settings.checkpoint)!r}"
        _check_same(what, found, names, ("fit",) if stored is None else ("fit", "call"))
        leaves = _restarted(ready, _unpacked(found, ready.start))
        place = Place(*(int(found[n]) for n in ("step", "epoch", "within", "settled")))
        if stored is None and place.step > steps:
            raise OptionError(
                f"steps={steps!r} are those of the whole fit, and init= has taken {place.step} "
                "already; ask for more"
            )
        history = History(int(found["every"]), found["losses"], found["rest"])
        return cls(leaves, place, history, names)

    def packed(self) -> dict[str, np.ndarray]:
        arrays = {f"leaf {i}": _bare(a) for i, a in enumerate(self.leaves)}
        place = {n: getattr(self.place, n) for n in ("step", "epoch", "within", "settled")}
        kept = self.history
        losses = {"every": kept.every, "losses": kept.means, "rest": kept.rest}
        named = {**arrays, **place, **losses, **self.names, "layout": _LAYOUT}
        return {n: np.array(a) for n, a in named.items()}


def _bare(leaf: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _unpacked(found: Mapping[str, Any], start: list[Any]) -> list[Any]:
    # Copies: the first window consumes what it is given.
    leaves = [jnp.array(found[f"leaf {i}"]) for i in range(len(start))]
    return [
        jax.random.wrap_key_data(leaf) if _is_key(like) else leaf
        for leaf, like in zip(leaves, start, strict=True)
    ]


def _restarted(ready: Training, leaves: list[Any]) -> list[Any]:
    """Without the averages of an earlier fit of fewer steps, which ended before these begin."""
    if not isinstance(ready.svi.optim, AverageOptimizer):
        return leaves
    found = jax.tree.unflatten(ready.structure, leaves)
    again = ready.svi.optim.restarted(found.optim_state)
    return jax.tree.leaves(found._replace(optim_state=again))


def _check_same(
    what: str, found: Mapping[str, Any], names: Mapping[str, Any], told: tuple[str, ...]
) -> None:
    if int(found.get("layout", 1)) != _LAYOUT:
        raise OptionError(
            f"{what} was written by another version of xr_aimz, whose fits in batches cannot be "
            "continued by this one; fit anew, or continue it with that version"
        )
    if "seed" in found and int(found["seed"]) != names["seed"]:
        raise OptionError(
            f"{what} is of a fit with seed={int(found['seed'])!r}, and this one has "
            f"seed={names['seed']!r}; to continue it, give it the same"
        )
    differ = [name for name in told if str(found.get(name)) != str(names[name])]
    if "fit" in differ:
        raise OptionError(
            f"{what} is of another fit: the model, its guide, the kind of optimizer, the labels, "
            "the batches, the chunks or the first batch of the data differ. Use the same, or "
            "drop it"
        )
    if differ:
        raise OptionError(
            f"{what} is of a fit with other steps, patience or optimizer; repeat the call that "
            "wrote it, or continue its Fit with init="
        )


def _train(
    ready: Training,
    state: _State,
    settings: Settings,
    steps: int,
    seed: int,
    file: Checkpoint,
    bar: Any,
) -> _State:
    full = None if settings.full_rate is None else int(settings.full_rate * steps)
    windows = ahead(ready.data, _visits(ready, state.place, steps, seed))
    with closing(windows):
        while state.place.step < _end(state.place, steps, full):
            visit, arrays = next(windows)
            before = state.place.step
            state = _through(ready, state, visit, arrays, _end(state.place, steps, full))
            if _is_settled(state, visit, settings.patience, full):
                state = _descending(ready, state, full)
            if file.due:
                file.write(state.packed())
            bar.update(state.place.step - before)
    return state


def _visits(ready: Training, place: Place, steps: int, seed: int) -> Iterator[Visit]:
    """The windows from here on, as many as the steps that are left."""
    made = ready.data.batches
    left = place.within + steps - place.step
    for number in count(place.epoch):
        for visit in epoch(made, seed, number):
            if left <= 0:
                return
            left -= len(visit.starts)
            done = place.within if number == place.epoch else 0
            if visit.before + len(visit.starts) > done:
                yield visit


def _through(
    ready: Training, state: _State, visit: Visit, arrays: Mapping[str, Any], end: int
) -> _State:
    """The steps of one window, or what is left of them."""
    place = state.place
    first = max(0, place.within - visit.before) if place.epoch == visit.epoch else 0
    stop = min(len(visit.starts), first + end - place.step)
    leaves, losses = ready.advance(state.leaves, visit, arrays, (first, stop))
    step = place.step + stop - first
    place = Place(step, visit.epoch, visit.before + stop, place.settled)
    return replace(state, leaves=leaves, place=place, history=state.history.add(losses))


def _end(place: Place, steps: int, full: int | None) -> int:
    """The last step: where a loss has settled, only the smaller steps are left to take."""
    if place.settled == _UNSETTLED:
        return steps
    return place.settled + (0 if full is None else steps - full)


def _is_settled(state: _State, visit: Visit, patience: int | None, full: int | None) -> bool:
    """Looked for at the end of a window, once in so many steps."""
    place = state.place
    if patience is None or place.settled != _UNSETTLED or (full and place.step >= full):
        return False
    if place.within < visit.before + len(visit.starts):
        return False
    due = place.step // patience > (place.step - len(visit.starts)) // patience
    return due and state.history.settled(patience)


def _descending(ready: Training, state: _State, full: int | None) -> _State:
    """As if the steps at the full rate were done: an optimizer of our own counts from there."""
    place = replace(state.place, settled=state.place.step)
    if full is None:
        return replace(state, place=place)
    found = jax.tree.unflatten(ready.structure, state.leaves)
    counted, moments = found.optim_state
    found = found._replace(optim_state=(jnp.full_like(counted, full), moments))
    return replace(state, place=place, leaves=jax.tree.leaves(found))


def _drawn(
    ready: Training, state: _State, settings: Settings, steps: int, draws: int, key: Any
) -> Draws:
    problem, made = ready.problem, ready.data.batches
    leaves = ready.result(state.leaves)

    def more(draws: int, seed: int) -> dict[str, np.ndarray]:
        return _samples(ready, leaves, jax.random.key(seed), draws)

    named = {*problem.named("param")}
    kept = {n: v for n, v in ready.params(leaves).items() if n in named} | ready.mutable(leaves)
    place = state.place
    full = steps if settings.full_rate is None else int(settings.full_rate * steps)
    sizes = ", ".join(f"{d}={n}" for d, n in made.sizes.items())
    return Draws(
        samples=_samples(ready, leaves, key, draws),
        shape=(1, draws),
        method=f"SVI, {type(ready.guide).__name__}, {place.step} steps, batches of {sizes}",
        params=jax.tree.map(np.asarray, kept),
        losses=state.history.means,
        full_rate_steps=full if place.settled == _UNSETTLED else place.settled,
        loss_every=state.history.every,
        epoch_steps=made.per_epoch,
        state=state.packed(),
        more=more,
        origin=None if ready.svi.static_kwargs else _origin(ready, leaves),
        concerns=_concerns(ready, state),
    )


def _concerns(ready: Training, state: _State) -> tuple[str, ...]:
    """What the record of the iterates speaks against, where there is one."""
    optim, problem = ready.svi.optim, ready.problem
    if not isinstance(optim, (AverageOptimizer, SpreadOptimizer)):
        return ()
    assert problem.binding is not None
    return noise_concerns(
        ready.guide,
        optim,
        jax.tree.unflatten(ready.structure, state.leaves).optim_state,
        ready.svi.constrain_fn,
        {n: result_name(problem.binding, problem.sites[n]) for n in problem.named("latent")},
        scales(problem.sites, problem.binding, ready.data.batches),
    )


def _origin(ready: Training, leaves: list[Any]) -> Origin:
    """The params as they are trained, unconstrained and with entries as rows; no optimizer."""
    state = jax.tree.unflatten(ready.structure, leaves)
    params = ready.svi.optim.get_params(state.optim_state)
    return Origin("batches", {"sizes": dict(ready.data.batches.sizes)}, params, ready.guide)


def reopened(
    problem: Problem, guide: Any, sizes: Mapping[str, int], params: Mapping[str, Any]
) -> Callable[[int, int], dict[str, np.ndarray]]:
    """Further draws of a guide that was trained before, with those params of :func:`_origin`."""
    binding, inputs = problem.binding, problem.inputs
    assert inputs is not None
    assert binding is not None
    # Whichever optimizer: its state is the params.
    made = SVI(problem.model, guide, SGD(0.0), Trace_ELBO())
    data = stream(binding, inputs, sizes, get_options()["block_bytes"], 0)
    ready = training(problem, made, data, jax.random.key(0))
    start = jax.tree.unflatten(ready.structure, ready.start)
    check_params(ready.svi.optim.get_params(start.optim_state), params)
    leaves = jax.tree.leaves(start._replace(optim_state=ready.svi.optim.init(params)))

    def more(draws: int, seed: int) -> dict[str, np.ndarray]:
        return _samples(ready, leaves, jax.random.key(seed), draws)

    return more


def _samples(ready: Training, leaves: list[Any], key: Any, draws: int) -> dict[str, np.ndarray]:
    """Draws of the trained guide, as one chain."""
    if local_sites(ready.problem, ready.data.batches.sizes):
        return draw_entries(ready, leaves, key, draws)
    first = replace(ready.problem, arguments=ready.arguments(ready.data.first))
    with tracing(ready.block):
        return sample_guide(ready.guide, first, ready.params(leaves), key, draws)
