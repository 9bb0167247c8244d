"""Rules that propagate, through each operation, the axes whose lengths differ between two traces.

An operation appears in both traces, that of the whole and that of a block. A rule takes the
tags of its operands' axes and returns those of its results' axes, or raises NotProvenError: the
operation may combine entries along a tagged axis, or has no rule that is certain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import isnan, prod
from typing import Any, NamedTuple

# The tag of an axis is None where it is as long in both traces; else the dim that it belongs to,
# CONSTANT where all entries along it are the same, or the axes that it was flattened from.
CONSTANT = "\0constant"


class FlattenedAxes(NamedTuple):
    """Axes that were flattened to one: for each its tag, and its length in both traces."""

    axes: tuple[tuple[Any, int, int], ...]


AxisTag = str | FlattenedAxes | None
Tags = tuple[AxisTag, ...]


class NotProvenError(Exception):
    """Operation that may combine cells; the message continues a sentence after its name."""


class Pair(NamedTuple):
    """One operation as it appears in both traces."""

    full: Any
    block: Any

    def same(self, *names: str) -> None:
        """Raise NotProvenError if parameters of those names differ between the traces."""
        full, block = self.full.params, self.block.params
        differ = [n for n in names if not _equal(full.get(n), block.get(n))]
        if differ:
            raise NotProvenError(f"has another {', '.join(differ)} for another number of cells")

    def same_but(self, *names: str) -> None:
        self.same(*(name for name in self.full.params if name not in names))

    def param(self, name: str) -> tuple[Any, Any]:
        return self.full.params[name], self.block.params[name]

    def shapes(self, side: str, index: int = 0) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes in both traces of an argument (``invars``) or result (``outvars``)."""
        full, block = (getattr(e, side)[index].aval.shape for e in self)
        return full, block

    def rank(self, side: str = "outvars", index: int = 0) -> int:
        return len(self.shapes(side, index)[0])

    def new_axis(self, axis: int, index: int = 0) -> AxisTag:
        """Return the tag of an axis of a result along which all entries are the same."""
        n, m = (shape[axis] for shape in self.shapes("outvars", index))
        return None if n == m else CONSTANT


Rule = Callable[[Pair, Sequence[Tags]], Sequence[Tags]]


def _equal(a: Any, b: Any) -> bool:
    # A gather may fill with NaN, which is not equal to itself.
    nan = isinstance(a, float) and isinstance(b, float) and isnan(a) and isnan(b)
    return a is b or bool(a == b) or nan


def join_tags(a: AxisTag, b: AxisTag) -> AxisTag:
    """Join the tags of an axis that two arrays share, entry by entry."""
    if b in (a, CONSTANT):
        return a
    if a == CONSTANT:
        return b
    if isinstance(a, FlattenedAxes) and isinstance(b, FlattenedAxes) and _same_lengths(a, b):
        pairs = zip(a.axes, b.axes, strict=True)
        return FlattenedAxes(tuple((join_tags(x, y), n, m) for (x, n, m), (y, _, _) in pairs))
    raise NotProvenError(f"matches cells along {tag_name(a)} with those along {tag_name(b)}")


def join_all_tags(a: Tags, b: Tags) -> Tags:
    """Join the tags of all axes that two arrays share, entry by entry."""
    return tuple(join_tags(x, y) for x, y in zip(a, b, strict=True))


def _same_lengths(a: FlattenedAxes, b: FlattenedAxes) -> bool:
    return [axis[1:] for axis in a.axes] == [axis[1:] for axis in b.axes]


def tag_name(tag: AxisTag) -> str:
    """Format the dims that an axis belongs to, for a message."""
    if isinstance(tag, FlattenedAxes):
        return ", ".join(tag_name(t) for t, _, _ in tag.axes if t is not None)
    return "all cells" if tag == CONSTANT else repr(tag)


def check_untagged(tags: Tags, axes: Iterable[int], does: str = "combines") -> None:
    """Raise NotProvenError for an operation along tagged axes."""
    for axis in axes:
        if tags[axis] == CONSTANT:
            raise NotProvenError("depends on the number of cells")
        if tags[axis] is not None:
            raise NotProvenError(f"{does} cells along {tag_name(tags[axis])}")


def _broadcast_tags(pair: Pair, operands: Sequence[Tags]) -> Tags:
    """Tags of the result of an elementwise operation on arrays of one shape, or scalars."""
    shape = pair.shapes("outvars")[0]
    tags = [pair.new_axis(axis) for axis in range(len(shape))]
    for index, operand in enumerate(operands):
        if operand and len(operand) != len(tags):
            raise NotProvenError("takes arrays of different ranks")
        for axis, (n, tag) in enumerate(
            zip(pair.shapes("invars", index)[0], operand, strict=True)
        ):
            stretched = tag is None and n == 1 and shape[axis] != 1
            tags[axis] = tags[axis] if stretched else join_tags(tags[axis], tag)
    return tuple(tags)


def _elementwise(pair: Pair, operands: Sequence[Tags]) -> Sequence[Tags]:
    # The shape of a result is that of the operands; some operations have it as a parameter.
    pair.same_but("shape", "sharding")
    return [_broadcast_tags(pair, operands)] * len(pair.full.outvars)


def _pass_through(pair: Pair, operands: Sequence[Tags]) -> Sequence[Tags]:
    return operands


def _broadcast(pair: Pair, operands: Sequence[Tags]) -> Sequence[Tags]:
    pair.same("broadcast_dimensions")
    tags = [pair.new_axis(axis) for axis in range(pair.rank())]
    axes = pair.full.params["broadcast_dimensions"]
    for tag, axis in zip(operands[0], axes, strict=True):
        tags[axis] = tags[axis] if tag is None else tag
    return [tuple(tags)]


def _reshape(pair: Pair, operands: Sequence[Tags]) -> Sequence[Tags]:
    """Tags of a reshape: tagged axes stay, are flattened together, or are unflattened again."""
    if any(order is not None for order in pair.param("dimensions")):
        raise NotProvenError("reorders entries")
    (old, old_block), (new, new_block) = pair.shapes("invars"), pair.shapes("outvars")
    tags: list[AxisTag] = [None] * len(new)
    for before, after in _group_axes(pair):
        axes = [a for i in before for a in _unflatten(operands[0][i], old[i], old_block[i])]
        lengths = [(new[axis], new_block[axis]) for axis in after]
        if all(tag is None for tag, _, _ in axes):
            continue
        if all(tag == CONSTANT for tag, _, _ in axes):
            regrouped = [pair.new_axis(axis) for axis in after]
        else:
            regrouped = _regroup(axes, lengths)
        for axis, tag in zip(after, regrouped, strict=True):
            tags[axis] = tag
    return [tuple(tags)]


def _unflatten(tag: AxisTag, n: int, m: int) -> tuple[tuple[Any, int, int], ...]:
    return tag.axes if isinstance(tag, FlattenedAxes) else ((tag, n, m),)


def _regroup(
    axes: Sequence[tuple[Any, int, int]], lengths: Sequence[tuple[int, int]]
) -> list[AxisTag]:
    """Group axes to those of the given lengths in both traces, without splitting any of them."""
    remaining, tags = list(axes), []
    for n, m in lengths:
        group: list[tuple[Any, int, int]] = []
        while not group or (prod(a[1] for a in group), prod(a[2] for a in group)) != (n, m):
            if not remaining:
                raise NotProvenError("splits an axis of cells")
            group.append(remaining.pop(0))
        if len(group) == 1 or all(tag is None for tag, _, _ in group):
            tags.append(group[0][0])
        else:
            tags.append(FlattenedAxes(tuple(group)))
    if remaining:
        raise NotProvenError("splits an axis of cells")
    return tags


def _group_axes(pair: Pair) -> list[tuple[list[int], list[int]]]:
    """Find the smallest groups of axes, before and after, with as many entries in both traces."""
    sides = pair.shapes("invars"), pair.shapes("outvars")
    if any(0 in shape for side in sides for shape in side):
        raise NotProvenError("takes arrays without entries")
    # An axis of length 1 in both traces belongs to no group.
    left, right = (
        [axis for axis, lengths in enumerate(zip(*side, strict=True)) if lengths != (1, 1)]
        for side in sides
    )

    def entries(side: tuple[Any, Any], axes: list[int]) -> tuple[int, int]:
        return prod(side[0][a] for a in axes), prod(side[1][a] for a in axes)

    groups = []
    while left or right:
        before, after = left[:1], right[:1]
        del left[:1], right[:1]
        while (counts := entries(sides[0], before)) != (others := entries(sides[1], after)):
            remaining, group = (left, before) if counts < others else (right, after)
            if not remaining:
                raise NotProvenError("has another layout of entries for another number of cells")
            group.append(remaining.pop(0))
        groups.append((before, after))
    return groups


def _squeeze(pair: Pair, operands: Sequence[Tags]) -> Sequence[Tags]:
    pair.same("dimensions")
    removed = pair.full.params["dimensions"]
    check_untagged(operands[0], removed)
    return [tuple(tag for axis, tag in enumerate(operands[0]) if axis not in removed)]


def _transpose(pair: Pair, operands: Sequence[Tags]) -> Sequence[Tags]:
    pair.same("permutation")
    return [tuple(operands[0][axis] for axis in pair.full.params["permutation"])]


def _reduce(pair: Pair, operands: Sequence[Tags]) -> Sequence[Tags]:
    pair.same_but("out_sharding")
    reduced = pair.full.params["axes"]
    check_untagged(operands[0], reduced)
    remaining = tuple(tag for axis, tag in enumerate(operands[0]) if axis not in reduced)
    return [remaining] * len(pair.full.outvars)


def _along(*names: str) -> Rule:
    """Make the rule of an operation along the axes that its parameters name; all axes stay."""

    def rule(pair: Pair, operands: Sequence[Tags]) -> Sequence[Tags]:
        pair.same_but("sizes")
        tags = _broadcast_tags(pair, operands)
        for name in names:
            axes = pair.full.params[name]
            check_untagged(tags, axes if isinstance(axes, tuple) else (axes,))
        return [tags] * len(pair.full.outvars)

    return rule


def _concatenate(pair: Pair, operands: Sequence[Tags]) -> Sequence[Tags]:
    pair.same("dimension")
    axis, tags = pair.full.params["dimension"], operands[0]
    for operand in operands[1:]:
        tags = join_all_tags((*tags[:axis], None, *tags[axis + 1 :]), operand)
    for operand in operands:
        check_untagged(operand, (axis,), "appends")
    return [tags]


def _split(pair: Pair, operands: Sequence[Tags]) -> Sequence[Tags]:
    pair.same("sizes", "axis")
    check_untagged(operands[0], (pair.full.params["axis"],), "splits")
    return [operands[0]] * len(pair.full.outvars)


def _iota(pair: Pair, operands: Sequence[Tags]) -> Sequence[Tags]:
    pair.same("dimension", "dtype")
    tags = tuple(pair.new_axis(axis) for axis in range(pair.rank()))
    if tags[pair.full.params["dimension"]] is not None:
        raise NotProvenError("counts the positions of cells")
    return [tags]


def _fill(pair: Pair, operands: Sequence[Tags]) -> Sequence[Tags]:
    return [tuple(pair.new_axis(axis) for axis in range(pair.rank()))]


def _stack(pair: Pair, operands: Sequence[Tags]) -> Sequence[Tags]:
    pair.same("axis")
    axis, tags = pair.full.params["axis"], operands[0]
    for operand in operands[1:]:
        tags = join_all_tags(tags, operand)
    return [(*tags[:axis], None, *tags[axis:])]


def _unstack(pair: Pair, operands: Sequence[Tags]) -> Sequence[Tags]:
    pair.same("axis")
    axis = pair.full.params["axis"]
    check_untagged(operands[0], (axis,), "takes apart")
    return [(*operands[0][:axis], *operands[0][axis + 1 :])] * len(pair.full.outvars)


def _dot(pair: Pair, operands: Sequence[Tags]) -> Sequence[Tags]:
    pair.same("dimension_numbers", "precision", "preferred_element_type")
    (left, right), (left_batch, right_batch) = pair.full.params["dimension_numbers"]
    check_untagged(operands[0], left, "sums over")
    check_untagged(operands[1], right, "sums over")
    batch = [
        join_tags(operands[0][a], operands[1][b])
        for a, b in zip(left_batch, right_batch, strict=True)
    ]
    used = (*left, *left_batch), (*right, *right_batch)
    rest = [
        tag
        for tags, axes in zip(operands, used, strict=True)
        for axis, tag in enumerate(tags)
        if axis not in axes
    ]
    return [(*batch, *rest)]


def _convolution(pair: Pair, operands: Sequence[Tags]) -> Sequence[Tags]:
    """Tags of a convolution: cells may be the batch of a network's layer, and no other axis."""
    pair.same_but("lhs_shape", "rhs_shape", "out_sharding")
    numbers, rank = pair.full.params["dimension_numbers"], pair.rank()
    batch, output = numbers.lhs_spec[0], numbers.out_spec[0]
    check_untagged(operands[0], (axis for axis in range(rank) if axis != batch), "convolves")
    check_untagged(operands[1], range(rank), "convolves with")
    if operands[0][batch] is not None and pair.full.params["batch_group_count"] != 1:
        raise NotProvenError("groups cells")
    return [tuple(operands[0][batch] if axis == output else None for axis in range(rank))]


def _on_last_axes(count: int) -> Rule:
    """Make the rule of an operation on the last axes, vectors or matrices, of each operand."""

    def rule(pair: Pair, operands: Sequence[Tags]) -> Sequence[Tags]:
        pair.same_but("shape")
        batch = operands[0][: len(operands[0]) - count]
        for operand in operands:
            check_untagged(operand, range(len(operand) - count, len(operand)))
        for operand in operands[1:]:
            batch = join_all_tags(batch, operand[: len(operand) - count])
        ranks = [pair.rank("outvars", i) for i in range(len(pair.full.outvars))]
        return [(*batch, *(None,) * (rank - len(batch))) for rank in ranks]

    return rule


def _fft(pair: Pair, operands: Sequence[Tags]) -> Sequence[Tags]:
    pair.same("fft_lengths")
    return _on_last_axes(len(pair.full.params["fft_lengths"]))(pair, operands)


def _triangular(pair: Pair, operands: Sequence[Tags]) -> Sequence[Tags]:
    """Tags of systems of equations, one for each column, or row, of the right-hand side."""
    pair.same_but()
    matrix, sides = operands
    check_untagged(matrix, (-2, -1))
    check_untagged(sides, (-2 if pair.full.params["left_side"] else -1,))
    return [(*join_all_tags(matrix[:-2], sides[:-2]), *sides[-2:])]


def _windows(pair: Pair, operands: Sequence[Tags]) -> Sequence[Tags]:
    """Tags of a window reduction: along a tagged axis each window must be a single entry."""
    pair.same_but()
    params, tags = pair.full.params, operands[0]
    for axis, tag in enumerate(tags):
        is_single_entry = (
            params["window_dimensions"][axis] == 1
            and params["window_strides"][axis] == 1
            and tuple(params["padding"][axis]) == (0, 0)
        )
        if tag is not None and not is_single_entry:
            raise NotProvenError(f"combines cells along {tag_name(tag)}")
    return [tags] * len(pair.full.outvars)


_ELEMENTWISE = """
abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e
bitcast_convert_type broadcast_to cbrt ceil clamp clz complex conj convert_element_type copy
copy_p cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma
igamma_grad_a igammac imag integer_pow is_finite le le_to lgamma log log1p log2 logistic lt lt_to
max min mul mulhi name ne neg nextafter not one_minus_square or polygamma polynomial
population_count pow random_gamma_grad real reduce_precision regularized_incomplete_beta rem round
rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square
stop_gradient sub tan tanh threefry2x32 xor zeta random_fold_in
""".split()  # noqa: SIM905 -- one word a line is three screens
RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min", "reduce_prod"), _reduce),
    **dict.fromkeys(("reduce_and", "reduce_or", "reduce_xor", "argmax", "argmin"), _reduce),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), _along("axis")),
    **dict.fromkeys(("reduce_window_max", "reduce_window_min", "reduce_window_sum"), _windows),
    **dict.fromkeys(("cholesky", "eigh", "svd", "qr", "lu", "eig", "schur"), _on_last_axes(2)),
    **dict.fromkeys(("hessenberg", "tridiagonal", "geqrf"), _on_last_axes(2)),
    **dict.fromkeys(("empty", "empty2", "zeros_like"), _fill),
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "conv_general_dilated": _convolution,
    "dot_general": _dot,
    "fft": _fft,
    "iota": _iota,
    "lu_pivots_to_permutation": _on_last_axes(1),
    "optimization_barrier": _pass_through,
    "reshape": _reshape,
    "rev": _along("dimensions"),
    "sort": _along("dimension"),
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "top_k": _along("axis"),
    "transpose": _transpose,
    "triangular_solve": _triangular,
    "unstack": _unstack,
}
