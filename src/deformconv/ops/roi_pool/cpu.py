"""Deformable RoI pooling on the CPU: a call's arrays, brought to the kernels of `cpu_kernels`, and how the work is cut.

The input is copied once with its channels last, in blocks. Forwards, threads share out boxes; backwards, blocks of channels of
images, each of which goes through the image's boxes in their order. How the work is cut depends on shapes alone, and partial
sums are added in a fixed order: a result is the same bit for bit whatever the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import cache, lru_cache, partial
from math import ceil, prod
from typing import Any, Literal, NamedTuple

import numpy as np

from deformconv.ops import cpu as on_cpu
from deformconv.ops.operator import Operand
from deformconv.ops.operator import half_in_float32 as computes_in
from deformconv.ops.roi_pool.spec import Gradients, RoiSpec, roi_spec
from deformconv.runtime import arrays, threads
from deformconv.runtime.memory import arena, room, up
from deformconv.runtime.openmp import team_for
from deformconv.runtime.work import COPY, Share, run, share

__all__ = ["DETERMINISTIC", "TAKES", "backward", "computes_in", "forward", "how", "reasons_against", "warmup"]

TAKES: Literal["numpy"] = "numpy"
DETERMINISTIC = True
_PIXELS = 2**29  # `sampling.corners` counts in int32
_BLOCK_BYTES = 256  # a row of a block of channels
_TILE = 256  # samples that are placed at once


def reasons_against(spec: RoiSpec, library: str, device: str, backward: bool) -> list[str]:
    """Why this backend cannot run a call, as sentences; none if it can."""
    reasons = on_cpu.reasons_against(spec.dtype, library, device)
    if spec.pixels >= _PIXELS:
        reasons.append(f"a map of {spec.pixels} pixels exceeds its 32-bit pixel numbers")
    return reasons


def how(spec: RoiSpec, library: str, device: str, backward: bool) -> list[str]:
    """What there is to say of how a call is computed, as sentences."""
    return on_cpu.how(_multiplications(spec), library)


@cache
def _kernels() -> Any:
    """The kernels' module; it loads Numba, so the first call does it and not the import of this file."""
    with threads.importing:
        from deformconv.ops.roi_pool import cpu_kernels
    return cpu_kernels


def _multiplications(spec: RoiSpec) -> int:
    """Multiply-adds of a forward pass, with four samples for a bin where its box decides; to sample a corner counts as four."""
    samples = (spec.sampling_ratio or 2) ** 2
    return spec.boxes * spec.bins * samples * spec.out_channels * 16


class Plan(NamedTuple):
    """How a call is cut, in both directions."""

    arguments: tuple[Any, ...]  # the kernels' `plan`
    x_size: int  # numbers of the input's copy
    slots: int  # blocks of a class
    blocks: int  # of all classes
    forward: Share
    backward: Share


@lru_cache(maxsize=256)
def _plan(spec: RoiSpec, number: int) -> Plan:
    with threads.importing:
        from deformconv.runtime.blocks import Layout
        from deformconv.runtime.simd import VECTOR_BYTES
        from deformconv.sampling.corners import table_sizes

    kernels, item = _kernels(), np.dtype(spec.dtype).itemsize
    vector, span, groups = VECTOR_BYTES // item, spec.class_channels, prod(spec.group_size)
    width = min(span, up(ceil(span / ceil(span * item / _BLOCK_BYTES)), vector))
    slots = ceil(span / width)
    blocks = slots * spec.classes
    layout = Layout(span, width, groups * blocks, spec.pixels, spec.pixels + 1)
    shape = kernels.Shape(
        images=spec.batch,
        boxes=spec.boxes,
        bins_y=spec.output_size[0],
        bins_x=spec.output_size[1],
        groups_y=spec.group_size[0],
        groups_x=spec.group_size[1],
        parts_y=spec.part_size[0],
        parts_x=spec.part_size[1],
        classes=spec.classes,
        class_channels=span,
        sampling=spec.sampling_ratio,
        rounded=spec.convention == "rounded",
        aligned=spec.convention == "aligned",
        deformed=spec.deformed,
        tile=_TILE,
    )
    integers, reals = table_sizes(2, _TILE)
    reals = up(reals, vector) + 8 * _TILE + up(spec.bins, vector)
    scratch = integers, reals + (spec.bins + 1) * width
    multiplications = _multiplications(spec)
    return Plan(
        arguments=(
            spec.input_size, np.array(shape, np.int64), np.array(layout, np.int64),
            (spec.spatial_scale, spec.gamma),
        ),
        x_size=layout.blocks * spec.batch * layout.pitch * width,
        slots=slots,
        blocks=blocks,
        forward=share(spec.boxes * spec.classes, number, multiplications, spec.dtype, scratch),
        backward=share(spec.batch * blocks, number, 3 * multiplications, spec.dtype, scratch),
    )  # fmt: skip


def forward(spec: RoiSpec, input: Any, boxes: Any, offset: Any, mask: Any, library: str = "numpy") -> np.ndarray:
    """The output (R, C_out, PH, PW) for arrays that `spec` describes, whose boxes have been checked."""
    output = arrays.aligned_empty(spec.output_shape, spec.dtype)
    if output.size == 0:
        return output
    team = team_for(library)
    plan, none = _plan(spec, team.threads), arrays.none_of(spec.dtype)
    with arena(room(plan.x_size, spec.dtype) + plan.forward.bytes) as memory:
        given = _kernels().ForwardArrays(
            input=arrays.flat(_by_group(spec, input)),
            x=memory.empty(plan.x_size, spec.dtype),
            boxes=arrays.flat(boxes),
            offset=none if offset is None else arrays.flat(offset),
            mask=none if mask is None else arrays.flat(mask),
            output=output.reshape(-1),
            empty=none,
        )
        arguments = plan.arguments, tuple(given), *plan.forward.scratch(memory, spec.dtype)
        run(_kernels().forward, arguments, plan.forward, team, (spec.dtype,))
    return output


def backward(
    spec: RoiSpec,
    grad_output: Any,
    input: Any,
    boxes: Any,
    offset: Any,
    mask: Any,
    wanted: Collection[str],
    library: str = "numpy",
) -> Gradients:
    """The wanted gradients; None for the others."""
    shapes = {name: shape for name, shape in spec.shapes.items() if name in wanted and name != "boxes"}
    if not shapes:
        return Gradients()
    if spec.boxes * spec.batch == 0:
        return Gradients(**{name: np.zeros(shape, spec.dtype) for name, shape in shapes.items()})
    by_group = shapes | ({"input": _shape_by_group(spec)} if "input" in shapes else {})
    results = {name: arrays.aligned_empty(shape, spec.dtype) for name, shape in by_group.items()}
    team = team_for(library)
    plan, none = _plan(spec, team.threads), arrays.none_of(spec.dtype)
    images = np.asarray(boxes)[:, 0].astype(np.int64)
    sizes = {
        "x": plan.x_size,
        "d_x": plan.x_size if "input" in results else 0,
        "d_offset": plan.slots * prod(spec.offset_shape) if "offset" in results else 0,
        "d_mask": plan.blocks * prod(spec.mask_shape) if "mask" in results else 0,
    }
    with arena(sum(room(size, spec.dtype) for size in sizes.values()) + plan.backward.bytes) as memory:
        own = {name: memory.empty(size, spec.dtype) for name, size in sizes.items()}
        own["d_offset"][...] = own["d_mask"][...] = 0
        given = _kernels().BackwardArrays(
            grad_output=arrays.flat(grad_output),
            input=arrays.flat(_by_group(spec, input)),
            x=own["x"],
            boxes=arrays.flat(boxes),
            offset=none if offset is None else arrays.flat(offset),
            mask=none if mask is None else arrays.flat(mask),
            order=np.argsort(images, kind="stable"),
            starts=np.searchsorted(np.sort(images), np.arange(spec.batch + 1)),
            d_x=own["d_x"],
            d_offset=own["d_offset"],
            d_mask=own["d_mask"],
            empty=none,
        )
        arguments = plan.arguments, tuple(given), *plan.backward.scratch(memory, spec.dtype)
        run(_kernels().backward, arguments, plan.backward, team, (spec.dtype,))
        _collect(spec, plan, own, results, team)
    if "input" in results:
        results["input"] = _as_channels(spec, results["input"])
    return Gradients(**results)


def _collect(spec: RoiSpec, plan: Plan, own: dict[str, np.ndarray], results: dict[str, np.ndarray], team: Any) -> None:
    """Bring what a backward pass has left in its own arrays into the results."""
    from deformconv.runtime.blocks import RUN, SUMS

    none = arrays.none_of(spec.dtype)
    flat = {name: results[name].reshape(-1) if name in results else none for name in ("input", "offset", "mask")}
    given = _kernels().CollectArrays(
        d_x=own["d_x"],
        d_input=flat["input"],
        offset_slots=own["d_offset"],
        d_offset=flat["offset"],
        mask_slots=own["d_mask"],
        d_mask=flat["mask"],
        empty=none,
    )
    items = spec.batch * ceil(spec.pixels / RUN) if flat["input"].size else 0
    items += ceil(flat["offset"].size / SUMS) + ceil(flat["mask"].size / SUMS)
    moved = given.d_x.size + given.offset_slots.size + given.mask_slots.size
    shared = share(items, team.threads, moved * COPY, spec.dtype)
    run(_kernels().collect, (plan.arguments[1:3], tuple(given)), shared, team, (spec.dtype,))


def _by_group(spec: RoiSpec, input: Any) -> Any:
    """The input with the channels of a group side by side; a copy if there are several groups."""
    groups = prod(spec.group_size)
    if groups == 1:
        return input
    return input.reshape(spec.batch, spec.out_channels, groups, *spec.input_size).swapaxes(1, 2)


def _shape_by_group(spec: RoiSpec) -> tuple[int, ...]:
    return (spec.batch, prod(spec.group_size), spec.out_channels, *spec.input_size)


def _as_channels(spec: RoiSpec, d_input: np.ndarray) -> np.ndarray:
    """The input's gradient in the order of its channels."""
    return d_input.swapaxes(1, 2).reshape(spec.input_shape)


def warmup(dtypes: Iterable[str] = ("float32",), notify: Callable[[str], None] | None = None) -> None:
    """Compile, or load, every kernel that calls take, for the given dtypes; `notify` gets a line before each of them."""
    kernels = _kernels()
    calls = ((f"{dtype}, RoI pooling", partial(_warm, dtype)) for dtype in dtypes)
    on_cpu.warm(calls, (kernels.forward, kernels.backward, kernels.collect), notify)


def _warm(dtype: str) -> None:
    """A call in both directions."""
    x, boxes, offset, mask = (np.zeros(shape, dtype) for shape in ((1, 1, 1, 1), (1, 5), (1, 2, 1, 1), (1, 1, 1, 1)))
    operands = [Operand(array.shape, dtype) for array in (x, boxes, offset, mask)]
    spec = roi_spec(*operands, output_size=1)
    y = forward(spec, x, boxes, offset, mask)
    backward(spec, y, x, boxes, offset, mask, ("input", "offset", "mask"))
