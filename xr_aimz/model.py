"""What a model is made of, found by tracing it once on shapes alone.

A model is run under :func:`jax.eval_shape`, so nothing is computed, and every site it
visits is written down: its kind, shape, dtype, distribution and plates. NumPyro keeps
one global stack of handlers, so two threads must never trace at once: every trace in
this package happens inside :func:`tracing`, which holds one lock and says which block
of the Dataset is being traced, for :func:`xr_aimz.plate` to read.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro import handlers

from xr_aimz.dataflow import dependencies
from xr_aimz.errors import AimzError, ModelError
from xr_aimz.scans import Forwards

__all__ = [
    "Block",
    "Parameter",
    "Plate",
    "Site",
    "current_block",
    "factor_inputs",
    "locate",
    "location_of",
    "observed_through",
    "observed_values",
    "parameters",
    "read_by",
    "trace_sites",
    "tracing",
]

_lock = threading.RLock()
_RAISED = "xr_aimz: the model raised this "
_block: ContextVar[Block | None] = ContextVar("xr_aimz_block", default=None)


@dataclass(frozen=True)
class Block:
    """The piece of a Dataset that a model is being traced for.

    ``sizes`` has every dimension of the piece; ``places`` the (negative) batch axis of
    each observation dimension; ``table`` is whether those were flattened to one. ``per`` are
    the dimensions of which the model sees one label at a time; ``stacked`` has the number of
    variables of each argument that is a stack.
    """

    sizes: Mapping[str, int]
    places: Mapping[str, int]
    table: bool = False
    per: tuple[str, ...] = ()
    stacked: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Parameter:
    """One argument of a model, as its signature has it."""

    name: str
    required: bool
    default: Any = None


@dataclass(frozen=True)
class Plate:
    """A plate around a site: its name, its (negative) batch axis and its size."""

    name: str
    dim: int
    size: int


@dataclass(frozen=True)
class Site:
    """A site of a model: what one trace on shapes tells of it.

    ``trained`` params have values to optimize. ``dims`` names each axis of the value once
    the axes have been matched with the Dataset (see :mod:`xr_aimz.axes`); ``None`` marks
    an axis of size 1 that only broadcasts. ``lengths`` are the observation dimensions from whose
    sizes the model makes the length of an axis of the site's own. ``reads`` are the arguments
    that its density is made from, ``seen`` those that its observed value is.
    """

    name: str
    kind: str  # "latent", "observed", "deterministic" or "param"
    shape: tuple[int, ...]
    event_ndim: int
    dtype: Any
    plates: tuple[Plate, ...] = ()
    event_dims: tuple[str, ...] | None = None
    distribution: str = ""
    obs_argument: str | None = None
    scanned: bool = False
    trained: bool = False
    dims: tuple[str | None, ...] = field(default=())
    lengths: frozenset[str] = frozenset()
    reads: frozenset[str] = frozenset()
    seen: frozenset[str] = frozenset()

    @property
    def batch_ndim(self) -> int:
        return len(self.shape) - self.event_ndim


@contextmanager
def tracing(block: Block | None) -> Iterator[None]:
    """Hold the lock under which models are traced, for one block of a Dataset."""
    # NumPyro's handler stack is a module-level list: tracing from two threads mixes
    # their sites, https://github.com/pyro-ppl/numpyro/issues/1155 among others.
    with _lock:
        token = _block.set(block)
        try:
            yield
        finally:
            _block.reset(token)


def current_block() -> Block | None:
    """The block that is being traced in this thread."""
    return _block.get()


def parameters(model: Callable) -> tuple[Parameter, ...]:
    """The arguments of a model, in order, from its signature."""
    if not callable(model):
        raise ModelError(f"a model is a NumPyro callable; found {model!r}")
    found = []
    for name, parameter in inspect.signature(model).parameters.items():
        if (
            parameter.kind is parameter.POSITIONAL_ONLY
            or parameter.kind is parameter.VAR_POSITIONAL
        ):
            raise ModelError(
                f"argument {str(parameter)!r} of {_name(model)} cannot be passed by name; "
                "arguments are bound to variables by name, so give it one"
            )
        if parameter.kind is parameter.VAR_KEYWORD:
            continue
        required = parameter.default is parameter.empty
        found.append(Parameter(name, required, None if required else parameter.default))
    return tuple(found)


def trace_sites(
    model: Callable, arrange: Callable[[Any], dict[str, Any]], arrays: Any, block: Block
) -> tuple[Site, ...]:
    """The sites of a model, from one abstract trace.

    Parameters
    ----------
    model : callable
    arrange : callable
        Turns ``arrays`` into the model's keyword arguments.
    arrays : pytree of jax.ShapeDtypeStruct
        What to trace on. Nothing is computed.
    block : Block
        What :func:`xr_aimz.plate` is to see.

    Raises
    ------
    Exception
        Whatever the model raises, with the site and the shapes added as a note.
    """
    found: list[Site] = []
    tracer = handlers.trace()
    passed: dict[str, Any] = {}

    def run(inputs: Any) -> None:
        passed.update(arrange(inputs))
        with tracer as sites:
            forwards = Forwards(lambda: model(**passed))
            _unsampled(handlers.seed(forwards, jax.random.key(0)))()
        _check_state(sites)
        found.extend(_site(message, passed) for message in sites.values() if _is_site(message))

    with tracing(block), _quiet():
        try:
            jax.eval_shape(run, arrays)
        except Exception as error:
            # The model's own, of any class: raised as it is, with where it came from.
            if not isinstance(error, AimzError):
                error.add_note(
                    f"{_RAISED}{locate(tracer.trace, passed)}. A plate whose size is written into "
                    "the model fits one block only: xr_aimz.plate(dim) asks the block for it."
                )
            raise
    return tuple(found)


def observed_through(
    model: Callable,
    arrange: Callable[[Any], dict[str, Any]],
    arrays: Mapping[str, Any],
    block: Block,
) -> dict[str, frozenset[str]]:
    """Which of the named arrays reach the observed value of each observed site."""

    def observations(**inputs: Any) -> dict[str, Any]:
        seeded = handlers.seed(lambda: model(**arrange(inputs)), jax.random.key(0))
        sites = handlers.trace(_unsampled(seeded)).get_trace()
        return {n: m["value"] for n, m in sites.items() if m["type"] == "sample" and _seen(m)}

    with tracing(block), _quiet():
        return dependencies(observations, arrays)


def read_by(
    model: Callable,
    arrange: Callable[[Any], dict[str, Any]],
    arrays: Mapping[str, Any],
    block: Block,
) -> dict[str, frozenset[str]]:
    """Which of the named arrays the density of each site is made from, latents given."""

    def densities(**inputs: Any) -> dict[str, Any]:
        seeded = handlers.seed(lambda: model(**arrange(inputs)), jax.random.key(0))
        sites = handlers.trace(_unsampled(seeded)).get_trace()
        return {n: _density(m, inputs) for n, m in sites.items() if m["type"] == "sample"}

    with tracing(block), _quiet():
        found = dependencies(densities, arrays)
    return {n: frozenset().union(*jax.tree.leaves(p, is_leaf=_is_set)) for n, p in found.items()}


def factor_inputs(
    model: Callable,
    arrange: Callable[[Any], dict[str, Any]],
    arrays: Mapping[str, Any],
    latents: Mapping[str, Any],
    block: Block,
) -> dict[str, frozenset[str]]:
    """Names of the arrays and of the latent sites that each ``numpyro.factor`` is computed from.

    Parameters
    ----------
    model : callable
    arrange : callable
        Turns ``arrays`` into the model's keyword arguments.
    arrays, latents : mapping of name to jax.ShapeDtypeStruct
    block : Block
    """

    def factors(**inputs: Any) -> dict[str, Any]:
        passed = arrange({key: inputs[f"array {key}"] for key in arrays})
        drawn = {name: inputs[f"site {name}"] for name in latents}
        seeded = handlers.seed(lambda: model(**passed), jax.random.key(0))
        sites = handlers.trace(_unsampled(handlers.substitute(seeded, data=drawn))).get_trace()
        return {n: m["fn"].log_factor for n, m in sites.items() if _is_factor(m)}

    inputs = {f"array {key}": array for key, array in arrays.items()}
    inputs |= {f"site {name}": latent for name, latent in latents.items()}
    with tracing(block), _quiet():
        found = dependencies(factors, inputs)
    return {name: frozenset(n.partition(" ")[2] for n in names) for name, names in found.items()}


def _is_factor(message: Mapping[str, Any]) -> bool:
    return message["type"] == "sample" and isinstance(message["fn"], dist.Unit)


def _density(message: Mapping[str, Any], inputs: Mapping[str, Any]) -> Any:
    try:
        return message["fn"].log_prob(message["value"])
    except Exception:
        # A distribution that is only drawn from: it may be made from anything.
        return [x.ravel()[:1] for x in inputs.values()]


def _is_set(found: Any) -> bool:
    return isinstance(found, frozenset)


def observed_values(model: Callable, passed: Mapping[str, Any]) -> dict[str, Any]:
    """What each site observes, given those arguments; hidden from handlers around it.

    Raises
    ------
    ModelError
        What is observed is a random part of an array (a plate with ``subsample_size``).
    """
    with handlers.block(), _quiet():
        seeded = handlers.seed(lambda: model(**passed), jax.random.key(0))
        sites = handlers.trace(_unsampled(seeded)).get_trace()
    for name, message in sites.items():
        if message["type"] == "plate" and message["args"][1] not in (None, message["args"][0]):
            raise ModelError(
                f"plate {name!r} takes a random part of its {message['args'][0]} entries: which "
                "of them are missing cannot be told. Take the whole plate, or fill them"
            )
    return {n: m["value"] for n, m in sites.items() if m["type"] == "sample" and _seen(m)}


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # NumPyro warns of things that depend on values; a trace has only shapes.
        warnings.filterwarnings("ignore", category=UserWarning, module="numpyro")
        yield


def _seen(message: Mapping[str, Any]) -> bool:
    return bool(message["is_observed"]) and not message["infer"].get("is_auxiliary", False)


def _name(model: Callable) -> str:
    return getattr(model, "__name__", repr(model))


def _unsampled(fn: Callable) -> Callable:
    """The model with blank values: a trace needs shapes, and not all sites can be sampled."""
    return handlers.substitute(fn, substitute_fn=_blank)


def _blank(message: Mapping[str, Any]) -> Any:
    if message["type"] != "sample" or message["value"] is not None:
        return None
    fn = message["fn"]
    shape = fn.batch_shape + fn.event_shape
    try:
        drawn = jax.eval_shape(fn.sample, jax.random.key(0))
    except NotImplementedError:
        # ImproperUniform and its like: a density, but nothing to draw from.
        return jnp.zeros(shape, jnp.int32 if fn.support.is_discrete else jnp.result_type(float))
    return jnp.zeros(drawn.shape, drawn.dtype)


def _check_state(sites: Mapping[str, Any]) -> None:
    for name, message in sites.items():
        leaves = jax.tree.leaves(message["value"]) if message["type"] == "mutable" else ()
        if any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves):
            raise ModelError(
                f"{name!r} holds a random key, as a network with dropout does: what is drawn with "
                "it has no label, and would be the same in every block. Build the network without "
                "dropout, or give its weights priors: random_nnx_module(...)"
            )


def _is_site(message: Mapping[str, Any]) -> bool:
    if message["type"] == "sample":
        return not message["infer"].get("is_auxiliary", False)
    return message["type"] in ("deterministic", "param")


def _site(message: Mapping[str, Any], passed: Mapping[str, Any]) -> Site:
    value = message["value"]
    if message["type"] == "param":
        # A network whose weights all have priors leaves an empty param behind.
        return Site(message["name"], "param", (), 0, None, trained=bool(jax.tree.leaves(value)))
    plates = tuple(
        Plate(frame.name, frame.dim, frame.size) for frame in message.get("cond_indep_stack", ())
    )
    shape, dtype = jnp.shape(value), jnp.result_type(value)
    if message["type"] == "deterministic":
        return Site(message["name"], "deterministic", shape, 0, dtype, plates)
    fn, infer = message["fn"], message["infer"]
    event_dims = infer.get("event_dims")
    return Site(
        name=message["name"],
        kind="observed" if message["is_observed"] else "latent",
        shape=jax.lax.broadcast_shapes(shape, fn.batch_shape + fn.event_shape),
        event_ndim=fn.event_dim,
        dtype=dtype,
        plates=plates,
        event_dims=None if event_dims is None else tuple(event_dims),
        distribution=_distribution(fn),
        obs_argument=next((n for n, v in passed.items() if v is not None and v is value), None),
        scanned=bool(message.get("_control_flow_done", False)),
    )


def _distribution(fn: Any) -> str:
    while type(fn).__name__ in ("ExpandedDistribution", "MaskedDistribution", "Independent"):
        fn = fn.base_dist
    return type(fn).__name__


def locate(sites: Mapping[str, Any], passed: Mapping[str, Any]) -> str:
    """Say how far a model came: the last site that it visited, and the shapes of its arrays."""
    shapes = {name: jnp.shape(v) for name, v in passed.items() if hasattr(v, "shape")}
    visited = [name for name, message in sites.items() if message["type"] != "plate"]
    last = visited[-1] if visited else None
    after = "before its first site" if last is None else f"after site {last!r}"
    return f"{after}, given arrays of shape {shapes!r}"


def location_of(error: Exception) -> str:
    """What :func:`locate` said of an error that :func:`trace_sites` let through."""
    notes = [n for n in getattr(error, "__notes__", ()) if n.startswith(_RAISED)]
    return notes[-1].removeprefix(_RAISED).partition(". A plate")[0] if notes else ""
