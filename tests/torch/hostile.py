"""A program: one kind of hostile input, forward and backward, for every rank, boundary, backend and dtype.

`test_hostile.py` runs it once for each kind, so that a crash is a failure and not the end of the tests.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from tests.ops.conv.cases import Case, make
from tests.ops.conv.suite import reference_backward
from tests.tolerances import assert_close

import deformconv
from deformconv import BackendError
from deformconv.ops.conv import reference
from deformconv.ops.conv.spec import GRADIENTS
from deformconv.torch import deform_conv2d
from deformconv.torch.conv.functional import deform_conv

CASES = {
    1: Case("1-D", (9,), (3,), padding=1, in_channels=2, offset_groups=2),
    2: Case("2-D", (6, 5), (2, 3), padding=1, groups=2, offset_groups=2),
    3: Case("3-D", (3, 4, 3), (1, 2, 2), padding=1, in_channels=2, out_channels=2),
}
# Positions that are not numbers, far away, or where the interpolation has a kink.
OFFSETS = {
    "nan": [np.nan],
    "infinity": [np.inf, -np.inf],
    "nan and infinity": [np.nan, np.inf, -np.inf, 0.5],
    "huge": [1e30, -1e30, 3e38, -3e38],
    "around 2**31": [2.0**31, -(2.0**31), 2.0**31 - 128, -(2.0**31) - 256],
    "around 2**40": [2.0**40, -(2.0**40), 2.0**40 - 2.0**17, 2.0**63, -(2.0**63), 2.0**64],
    "around 2**24": [2.0**24, 2.0**24 + 2, -(2.0**24) - 2, 2.0**29, -(2.0**29)],
    "denormal": [1e-40, -1e-40, 1e-45, -1e-45, 0.0, -0.0],
    "integers": [-2.0, -1.0, 0.0, 1.0, 2.0, 5.0, 7.0],
    "beside integers": [-1 - 2.0**-23, 1 - 2.0**-24, 1 + 2.0**-23, -(2.0**-24), 2.0**-24],
}
NUMBERS = {
    "nan": [np.nan],
    "infinity": [np.inf, -np.inf],
    "large": [1e30, -1e30],
    "denormal": [1e-40, -1e-45, 0.0, -0.0],
}
ARGUMENTS = ("input", "weight", "bias", "mask", "grad_output")
KINDS = [f"offset {kind}" for kind in OFFSETS] + [f"{name} {kind}" for name in ARGUMENTS for kind in NUMBERS]
KINDS += ["everything nan", "exactly at the borders", "indices beyond int32", "more pixels than int32", "extreme windows"]


def spoiled(array, values, everywhere=False):
    """A copy with some of its numbers replaced, or all."""
    random = np.random.default_rng(1)
    where = random.random(array.shape) < (1 if everywhere else 0.25)
    with np.errstate(over="ignore", under="ignore"):
        return np.where(where, random.choice(values, array.shape), array).astype(array.dtype)


def calls():
    for case in CASES.values():
        for boundary in ("zeros", "inside"):
            for masked in (True, False):
                yield make(case.but(boundary=boundary, masked=masked))


def run(call, dtype, backend):
    """The output and the gradients, by torch."""
    parameters = {"groups": call.spec.groups, "offset_groups": call.spec.offset_groups, "boundary": call.spec.boundary}
    tensors = [None if array is None else torch.from_numpy(array).to(dtype).requires_grad_() for array in call.arrays]
    input, offset, weight, bias, mask = tensors
    window = call.spec.stride, call.spec.padding, call.spec.dilation
    y = deform_conv(input, offset, weight, bias, *window, mask, **parameters, backend=backend)
    given = [tensor for tensor in tensors if tensor is not None]
    gradients = torch.autograd.grad(y, given, torch.from_numpy(call.grad_output).to(dtype))
    return [y.detach(), *gradients]


def check(call, strict):
    """float64 against the definition; the narrower dtypes finish.

    Not strict: where the definition's gradient is no finite number, which of the others it is depends on the order of
    a sum (inf - inf), and on whether an absent corner counts as 0 or as 0 * NaN.
    """
    with np.errstate(all="ignore"):
        expected = [reference.forward(call.spec, *call.arrays)]
        expected += [gradient for gradient in reference_backward(call) if gradient is not None]
    names = ["output", *(name for name, array in zip(GRADIENTS, call.arrays, strict=True) if array is not None)]
    for backend in ("cpu", "portable"):
        for name, found, wanted in zip(names, run(call, torch.float64, backend), expected, strict=True):
            if not strict and name != "output":
                finite = np.isfinite(wanted)
                found, wanted = found.numpy()[finite], wanted[finite]
            assert_close(found, wanted, "float64", f"{backend}, {name}")
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            run(call, dtype, backend)


def at_the_borders():
    """Every position exactly at -1, at size - 1 and at size of some axis: linear interpolation's kinks."""
    for boundary in ("zeros", "inside"):
        x = torch.rand(1, 2, 5, 4, dtype=torch.float64)
        weight = torch.rand(3, 2, 1, 1, dtype=torch.float64)
        for dy in (-1.0, 0.0, 4.0, 5.0, 6.0, -2.0):
            for dx in (-1.0, 0.0, 3.0, 4.0, 5.0, -2.0):
                grid = torch.meshgrid(torch.arange(5.0), torch.arange(4.0), indexing="ij")
                offset = torch.stack([dy - grid[0], dx - grid[1]])[None].double()
                results = []
                for backend in ("cpu", "portable"):
                    leaves = [t.clone().requires_grad_() for t in (x, offset, weight)]
                    y = deform_conv2d(*leaves, boundary=boundary, backend=backend)
                    results.append([y.detach(), *torch.autograd.grad(y.sum(), leaves)])
                inside = 0 <= dy < 5 and 0 <= dx < 4
                value = weight[:, :, 0, 0] @ x[0, :, int(dy), int(dx)] if inside else torch.zeros(3).double()
                assert_close(results[0][0], value[None, :, None, None].expand(1, 3, 5, 4), "float64")
                for ours, theirs in zip(*results, strict=True):
                    assert_close(ours, theirs, "float64")


def beyond_int32():
    """Tensors whose elements are more than 2**31 places apart, in a sparse file."""
    with tempfile.TemporaryDirectory() as folder:
        far = 2**31 + 64
        base = torch.from_file(str(Path(folder) / "sparse"), shared=True, size=far + 4096, dtype=torch.float32)

        def apart(tensor):
            strides = (far, *tensor[0].contiguous().stride())
            result = base.as_strided(tensor.shape, strides, apart.start)
            apart.start += tensor[0].numel()
            return result.copy_(tensor)

        apart.start = 0
        x, offset, mask = torch.rand(2, 3, 5, 4), torch.randn(2, 18, 5, 4), torch.rand(2, 9, 5, 4)
        weight, g = torch.rand(2, 3, 3, 3), torch.rand(2, 2, 5, 4)
        for backend in ("cpu", "portable"):
            apart.start = 0
            results = []
            for place in (lambda t: t, apart):
                *leaves, grad_output = [place(t).detach() for t in (x, offset, weight, mask, g)]
                leaves = [t.requires_grad_() for t in leaves]
                y = deform_conv2d(*leaves[:3], padding=1, mask=leaves[3], backend=backend)
                results.append([y.detach(), *torch.autograd.grad(y, leaves, grad_output)])
            for near, distant in zip(*results, strict=True):
                if backend == "cpu":
                    assert torch.equal(near, distant)
                else:  # PyTorch's product may sum in another order where strides differ
                    assert_close(distant, near, "float32")


def more_pixels():
    """An image of more pixels than 32 bits count, all one number in memory: refused, not wrong."""
    size = 2**31 + 2
    x = torch.ones(1).expand(1, 1, size)
    offset, weight = torch.zeros(1).expand(1, 1, 2), torch.ones(1, 1, 1)
    try:
        deform_conv(x, offset, weight, stride=size // 2, backend="cpu")
    except BackendError as error:
        assert "pixel" in str(error), error
    else:
        raise AssertionError("no error")
    # As many in all, but not in an image.
    x = torch.ones(1).expand(2, 1, 3, 3)
    y = deform_conv(x, torch.zeros(1).expand(2, 2, 3, 3), torch.ones(1, 1, 1, 1))
    assert (y == 1).all()


def extreme_windows():
    x, weight = torch.rand(1, 1, 4, 4, dtype=torch.float64), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    offset = torch.zeros(1, 2, 1, 1, dtype=torch.float64)
    for stride in (2**20, 2**28, 2**35):
        y = deform_conv2d(x, offset, weight, stride=stride)
        assert torch.equal(y, x[..., :1, :1])
    for far in (2**20, 2**27, 2**33):  # a window of two taps that far apart over as much padding
        pair = torch.ones(1, 1, 1, 2, dtype=torch.float64)
        offset = torch.zeros(1, 4, 4, 4, dtype=torch.float64).requires_grad_()
        y = deform_conv2d(x, offset, pair, padding=((0, 0), (0, far)), dilation=(1, far))
        assert torch.equal(y.detach(), x)
        assert not torch.autograd.grad(y.sum(), offset)[0][:, 2:].any()
    for arguments in ({"stride": 2**40}, {"dilation": 2**40}, {"padding": 2**40}, {"stride": 2**70}):
        try:
            deform_conv2d(x, torch.zeros(1, 2, 1, 1, dtype=torch.float64), weight, **arguments)
        except deformconv.ShapeError as error:
            assert "2**40" in str(error), error
        else:
            raise AssertionError(f"no error for {arguments}")


def main(kind):
    warnings.simplefilter("error")
    special = {
        "exactly at the borders": at_the_borders,
        "indices beyond int32": beyond_int32,
        "more pixels than int32": more_pixels,
        "extreme windows": extreme_windows,
    }
    if kind in special:
        special[kind]()
        return
    name, _, values = kind.partition(" ")
    for call in calls():
        if kind == "everything nan":
            arrays = {name: spoiled(getattr(call, name), [np.nan], True) for name in ("input", "offset", "weight")}
            check(call.but(**arrays), strict=False)
        elif getattr(call, name) is not None:
            table = OFFSETS if name == "offset" else NUMBERS
            for everywhere in (False, True) if call.spec.masked else (False,):
                check(call.but(**{name: spoiled(getattr(call, name), table[values], everywhere)}), strict=name == "offset")


if __name__ == "__main__":
    for chosen in sys.argv[1:]:
        main(chosen)
        print("survived", chosen, flush=True)
