"""Trace a model on shapes to find its sites, and make plates for dimensions of a Dataset."""

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
import numpyro
import numpyro.distributions as dist
from numpyro import handlers

from xr_aimz.errors import AimzError, DimensionError, ModelError, list_names
from xr_aimz.tracing.dataflow import ForwardScans, dependencies

_lock = threading.RLock()
_NOTE_PREFIX = "xr_aimz: the model raised this "
_current_block: ContextVar[Block | None] = ContextVar("xr_aimz_block", default=None)


@dataclass(frozen=True)
class Block:
    """Block of a Dataset for which a model is traced.

    ``sizes`` has every dimension of the block; ``places`` the (negative) batch axis of
    each observation dimension; ``table`` is whether those were flattened to one. ``per`` are
    the dimensions of which the model has one label at a time; ``stacked`` has the number of
    variables of each argument that is a stack.
    """

    sizes: Mapping[str, int]
    places: Mapping[str, int]
    table: bool = False
    per: tuple[str, ...] = ()
    stacked: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Parameter:
    """Argument of a model: its name, whether it is required, and its default."""

    name: str
    required: bool
    default: Any = None


@dataclass(frozen=True)
class Plate:
    """Plate around a site: its name, its (negative) batch axis and its size."""

    name: str
    dim: int
    size: int


@dataclass(frozen=True)
class Site:
    """Site of a model, as found by one trace on shapes.

    ``has_initial_value``: params with values to optimize. ``dims`` names each axis of the value
    once the axes have been matched with the Dataset (see :mod:`xr_aimz.binding.layout`);
    ``None`` marks an axis of size 1 that only broadcasts. ``lengths`` are the observation
    dimensions from whose sizes the model computes the length of an axis of the site that is no
    dimension. ``density_inputs`` are the arguments that its density is computed from,
    ``observed_inputs`` those that its observed value is computed from. ``variable`` and
    ``dataset_dims`` are its name and its dims in a Dataset, once the model is bound.
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
    has_initial_value: bool = False
    dims: tuple[str | None, ...] = field(default=())
    lengths: frozenset[str] = frozenset()
    density_inputs: frozenset[str] = frozenset()
    observed_inputs: frozenset[str] = frozenset()
    variable: str = ""
    dataset_dims: tuple[str, ...] = ()

    @property
    def batch_ndim(self) -> int:
        return len(self.shape) - self.event_ndim


@contextmanager
def trace_lock(block: Block | None) -> Iterator[None]:
    """Hold the lock under which models are traced, and set the block that they are traced for."""
    # NumPyro's handler stack is a module-level list: tracing from two threads mixes
    # their sites, https://github.com/pyro-ppl/numpyro/issues/1155 among others.
    with _lock:
        token = _current_block.set(block)
        try:
            yield
        finally:
            _current_block.reset(token)


def current_block() -> Block | None:
    """Return the block that is being traced in this thread, or None."""
    return _current_block.get()


def model_parameters(model: Callable) -> tuple[Parameter, ...]:
    """List the arguments of a model, in the order of its signature."""
    if not callable(model):
        raise ModelError(f"a model is a NumPyro callable; found {model!r}")
    parameters = []
    for name, parameter in inspect.signature(model).parameters.items():
        if (
            parameter.kind is parameter.POSITIONAL_ONLY
            or parameter.kind is parameter.VAR_POSITIONAL
        ):
            raise ModelError(
                f"argument {str(parameter)!r} of {model_name(model)} cannot be passed by name; "
                "arguments are bound to variables by name, so make it a keyword argument"
            )
        if parameter.kind is parameter.VAR_KEYWORD:
            continue
        required = parameter.default is parameter.empty
        parameters.append(Parameter(name, required, None if required else parameter.default))
    return tuple(parameters)


def trace_sites(
    model: Callable, arrange: Callable[[Any], dict[str, Any]], arrays: Any, block: Block
) -> tuple[Site, ...]:
    """Find the sites of a model, with shapes and dtypes, by one abstract trace.

    Parameters
    ----------
    model : callable
    arrange : callable
        Turns ``arrays`` into the model's keyword arguments.
    arrays : pytree of jax.ShapeDtypeStruct
        Shapes and dtypes to trace on. Nothing is computed.
    block : Block
        The block whose sizes :func:`xr_aimz.plate` uses.

    Raises
    ------
    Exception
        Any exception of the model, with the last site and the shapes added as a note.
    """
    result: list[Site] = []
    tracer = handlers.trace()
    passed: dict[str, Any] = {}

    def run(inputs: Any) -> None:
        passed.update(arrange(inputs))
        with tracer as sites:
            forwards = ForwardScans(lambda: model(**passed))
            _with_zeros(handlers.seed(forwards, jax.random.key(0)))()
        _check_state(sites)
        result.extend(_make_site(m, passed) for m in sites.values() if _is_site(m))

    with trace_lock(block), _ignore_warnings():
        try:
            jax.eval_shape(run, arrays)
        except Exception as error:
            # An exception of the model, of any class: raised unchanged, with a note that says
            # where it was raised.
            if not isinstance(error, AimzError):
                error.add_note(
                    f"{_NOTE_PREFIX}{note_location(tracer.trace, passed)}. A plate whose size is "
                    "written into the model fits one block only: xr_aimz.plate(dim) takes the "
                    "size of the block."
                )
            raise
    return tuple(result)


def observed_inputs(
    model: Callable,
    arrange: Callable[[Any], dict[str, Any]],
    arrays: Mapping[str, Any],
    block: Block,
) -> dict[str, frozenset[str]]:
    """Find the named arrays that the observed value of each observed site is computed from."""

    def observations(array: Mapping[str, Any]) -> dict[str, Any]:
        seeded = handlers.seed(lambda: model(**arrange(array)), jax.random.key(0))
        sites = handlers.trace(_with_zeros(seeded)).get_trace()
        return {
            n: m["value"] for n, m in sites.items() if m["type"] == "sample" and _is_observed(m)
        }

    with trace_lock(block), _ignore_warnings():
        nodes = dependencies(observations, array=arrays)
    return {site: _names(reached) for site, reached in nodes.items()}


def density_inputs(
    model: Callable,
    arrange: Callable[[Any], dict[str, Any]],
    arrays: Mapping[str, Any],
    block: Block,
) -> dict[str, frozenset[str]]:
    """Find the named arrays that the density of each site is computed from, with latents fixed."""

    def densities(array: Mapping[str, Any]) -> dict[str, Any]:
        seeded = handlers.seed(lambda: model(**arrange(array)), jax.random.key(0))
        sites = handlers.trace(_with_zeros(seeded)).get_trace()
        return {n: _log_density(m, array) for n, m in sites.items() if m["type"] == "sample"}

    with trace_lock(block), _ignore_warnings():
        nodes = dependencies(densities, array=arrays)
    return {site: _names(reached) for site, reached in nodes.items()}


def _names(nodes: Any) -> frozenset[str]:
    """Return the names of the nodes in a pytree of sets of nodes."""
    return frozenset(
        node.name for nodes in jax.tree.leaves(nodes, is_leaf=_is_set) for node in nodes
    )


def factor_inputs(
    model: Callable,
    arrange: Callable[[Any], dict[str, Any]],
    arrays: Mapping[str, Any],
    latents: Mapping[str, Any],
    block: Block,
) -> dict[str, frozenset[str]]:
    """Find the arrays and the latent sites that each ``numpyro.factor`` is computed from.

    Parameters
    ----------
    model : callable
    arrange : callable
        Turns ``arrays`` into the model's keyword arguments.
    arrays, latents : mapping of name to jax.ShapeDtypeStruct
    block : Block
    """

    def factors(array: Mapping[str, Any], site: Mapping[str, Any]) -> dict[str, Any]:
        passed = arrange(array)
        seeded = handlers.seed(lambda: model(**passed), jax.random.key(0))
        sites = handlers.trace(_with_zeros(handlers.substitute(seeded, data=site))).get_trace()
        return {n: m["fn"].log_factor for n, m in sites.items() if _is_factor(m)}

    with trace_lock(block), _ignore_warnings():
        nodes = dependencies(factors, array=arrays, site=latents)
    return {name: _names(reached) for name, reached in nodes.items()}


def _is_factor(message: Mapping[str, Any]) -> bool:
    return message["type"] == "sample" and isinstance(message["fn"], dist.Unit)


def _log_density(message: Mapping[str, Any], inputs: Mapping[str, Any]) -> Any:
    try:
        return message["fn"].log_prob(message["value"])
    except Exception:
        # A distribution without a density may depend on any of the inputs.
        return [x.ravel()[:1] for x in inputs.values()]


def _is_set(value: Any) -> bool:
    return isinstance(value, frozenset)


def observed_values(model: Callable, passed: Mapping[str, Any]) -> dict[str, Any]:
    """Compute the observed value of each observed site; handlers around the call are blocked.

    Raises
    ------
    ModelError
        A site observes a random part of an array (a plate with ``subsample_size``).
    """
    with handlers.block(), _ignore_warnings():
        seeded = handlers.seed(lambda: model(**passed), jax.random.key(0))
        sites = handlers.trace(_with_zeros(seeded)).get_trace()
    for name, message in sites.items():
        if message["type"] == "plate" and message["args"][1] not in (None, message["args"][0]):
            raise ModelError(
                f"plate {name!r} takes a random part of its {message['args'][0]} entries, so it "
                "is unknown which are missing. Use the whole plate, or fill the missing values"
            )
    return {n: m["value"] for n, m in sites.items() if m["type"] == "sample" and _is_observed(m)}


@contextmanager
def _ignore_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        # NumPyro's warnings depend on values; a trace has only shapes.
        warnings.filterwarnings("ignore", category=UserWarning, module="numpyro")
        yield


def _is_observed(message: Mapping[str, Any]) -> bool:
    return bool(message["is_observed"]) and not message["infer"].get("is_auxiliary", False)


def model_name(model: Callable) -> str:
    """Return the name of a model, or its repr where it has none."""
    return getattr(model, "__name__", repr(model))


def _with_zeros(fn: Callable) -> Callable:
    """Substitute zeros for all samples: a trace needs shapes, and some sites cannot be sampled."""
    return handlers.substitute(fn, substitute_fn=_zeros_for)


def _zeros_for(message: Mapping[str, Any]) -> Any:
    if message["type"] != "sample" or message["value"] is not None:
        return None
    fn = message["fn"]
    shape = fn.batch_shape + fn.event_shape
    try:
        struct = jax.eval_shape(fn.sample, jax.random.key(0))
    except NotImplementedError:
        # ImproperUniform and the like have a density, and cannot be sampled.
        return jnp.zeros(shape, jnp.int32 if fn.support.is_discrete else jnp.result_type(float))
    return jnp.zeros(struct.shape, struct.dtype)


def _check_state(sites: Mapping[str, Any]) -> None:
    for name, message in sites.items():
        leaves = jax.tree.leaves(message["value"]) if message["type"] == "mutable" else ()
        if any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves):
            raise ModelError(
                f"{name!r} holds a random key, as a network with dropout does: draws with it are "
                "not addressed by label, and would be the same in every block. Build the network "
                "without dropout, or give its weights priors: random_nnx_module(...)"
            )


def _is_site(message: Mapping[str, Any]) -> bool:
    if message["type"] == "sample":
        return not message["infer"].get("is_auxiliary", False)
    return message["type"] in ("deterministic", "param")


def _make_site(message: Mapping[str, Any], passed: Mapping[str, Any]) -> Site:
    value = message["value"]
    if message["type"] == "param":
        # A network whose weights all have priors leaves an empty param behind.
        return Site(
            message["name"], "param", (), 0, None, has_initial_value=bool(jax.tree.leaves(value))
        )
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
        distribution=_distribution_name(fn),
        obs_argument=next((n for n, v in passed.items() if v is not None and v is value), None),
        scanned=bool(message.get("_control_flow_done", False)),
    )


def _distribution_name(fn: Any) -> str:
    while type(fn).__name__ in ("ExpandedDistribution", "MaskedDistribution", "Independent"):
        fn = fn.base_dist
    return type(fn).__name__


def note_location(sites: Mapping[str, Any], passed: Mapping[str, Any]) -> str:
    """Describe where a model failed: the last site it reached, and the shapes of its arrays."""
    shapes = {name: jnp.shape(v) for name, v in passed.items() if hasattr(v, "shape")}
    reached = [name for name, message in sites.items() if message["type"] != "plate"]
    last = reached[-1] if reached else None
    after = "before its first site" if last is None else f"after site {last!r}"
    return f"{after}, given arrays of shape {shapes!r}"


def location_note(error: Exception) -> str:
    """Return the text of :func:`note_location` in the notes of an error, or an empty string."""
    notes = [n for n in getattr(error, "__notes__", ()) if n.startswith(_NOTE_PREFIX)]
    return notes[-1].removeprefix(_NOTE_PREFIX).partition(". A plate")[0] if notes else ""


# Name of the last axis of an argument that is a stack of variables.
FEATURE = "feature"


def plate(dim: str) -> numpyro.plate:
    """Make a plate for a dimension of the Dataset, with the size and axis of the current block.

    A prediction runs the model on one block of the Dataset at a time, so a size written
    into the model is right for one block only. This plate has the size of the block.

    Parameters
    ----------
    dim : str
        A dimension of the Dataset, or ``"feature"``, the axis of an argument that is a stack
        of variables. An observation dimension gets the batch axis that it has in the arrays
        of ``layout="grid"``; any other dimension the first free axis.

    Returns
    -------
    numpyro.plate
        Named after the dimension.

    Raises
    ------
    DimensionError
        Outside of a fit or a prediction, for a dimension that the Dataset does not
        have or that is in ``per``, for an observation dimension that ``layout="table"`` has
        flattened, or for ``"feature"`` where stacks have different numbers of variables.

    Examples
    --------
    >>> import numpyro, numpyro.distributions as dist, xr_aimz
    >>> def trend(year, tas=None):
    ...     with xr_aimz.plate("lat"), xr_aimz.plate("lon"):
    ...         slope = numpyro.sample("slope", dist.Normal(0, 1))
    ...     with xr_aimz.plate("time"), xr_aimz.plate("lat"), xr_aimz.plate("lon"):
    ...         numpyro.sample("tas", dist.Normal(slope * year, 1), obs=tas)
    """
    block = current_block()
    if block is None:
        raise DimensionError(
            f"xr_aimz.plate({dim!r}) has a size only while xr_aimz runs the model; "
            "call the model through ds.aimz, or use numpyro.plate here"
        )
    if block.table and dim in block.places:
        raise DimensionError(
            f"xr_aimz.plate({dim!r}): layout='table' flattens {sorted(block.places)!r} to one "
            "axis; use numpyro.plate('data', X.shape[0]), or layout='grid'"
        )
    return numpyro.plate(dim, _plate_size(dim, block), dim=block.places.get(dim))


def _plate_size(dim: str, block: Block) -> int:
    lengths = set(block.stacked.values()) if dim == FEATURE else set()
    if dim in block.sizes and not lengths - {block.sizes[dim]}:
        return block.sizes[dim]
    if dim in block.sizes:
        raise DimensionError(
            f"xr_aimz.plate({dim!r}) may mean the dimension of the Dataset, of size "
            f"{block.sizes[dim]}, or the axis of the stacked arguments {dict(block.stacked)!r}; "
            "rename the dimension, or use numpyro.plate"
        )
    if len(lengths) == 1:
        return lengths.pop()
    if lengths:
        raise DimensionError(
            f"xr_aimz.plate({dim!r}): the stacked arguments have different numbers of variables, "
            f"{dict(block.stacked)!r}; use numpyro.plate with a name of its own for each, "
            f"numpyro.plate({next(iter(block.stacked))!r}, X.shape[-1])"
        )
    if dim in block.per:
        raise DimensionError(
            f"xr_aimz.plate({dim!r}): {dim!r} is in per={block.per!r}, so the model is fitted for "
            "each of its labels alone and its arrays have no such dimension; leave the plate out, "
            f"or {dim!r} out of per="
        )
    stacks = [FEATURE] if block.stacked else []
    raise DimensionError(
        f"xr_aimz.plate({dim!r}): no dimension {dim!r} in the Dataset; "
        f"it has {list_names(sorted([*block.sizes, *stacks]), dim)}"
    )
