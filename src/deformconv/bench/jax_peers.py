"""What runs on JAX's arrays, compiled by `jax.jit`, and NumPy's front end beside it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from deformconv.bench.cases import Case, make
from deformconv.bench.peers import DIRECTIONS, Arrays, Peer

__all__ = ["DENSE", "JAX_PEERS", "OURS"]


class _Arrays(Peer):
    """A function of input, offset, weight, bias and mask."""

    packages = ("numba",)
    read_by_it: ClassVar[tuple[str, ...]] = ("input", "offset", "weight", "bias", "mask")

    def __init__(self, threads: int) -> None:
        import deformconv

        deformconv.set_num_threads(threads)

    def prepare(self, case: Case) -> None:
        arrays = make(case)[1]
        self.case, self.grad_output = case, arrays.pop("grad_output")
        self.arrays = {name: arrays[name] for name in self.read_by_it if arrays[name] is not None}

    @property
    def window(self) -> dict[str, Any]:
        """What the operator is told beside its arrays."""
        case = self.case
        return {
            "stride": case.stride, "padding": case.padding, "dilation": case.dilation, "groups": case.groups,
            "offset_groups": case.offset_groups,
        }  # fmt: skip

    def call_of(self, direction: str) -> Callable[[], Any]:
        return self.forward if direction == DIRECTIONS[0] else self.train

    @abstractmethod
    def forward(self) -> Any:
        """The output."""

    @abstractmethod
    def train(self) -> tuple[Any, Arrays]:
        """The output, and the gradients by name."""

    def results(self, direction: str) -> Arrays:
        output, gradients = (self.forward(), {}) if direction == DIRECTIONS[0] else self.train()
        return {name: np.asarray(array) for name, array in {"output": output, **gradients}.items()}


class Numpy(_Arrays):
    """The root's functions, on NumPy's arrays."""

    name, title = "numpy", "NumPy's front end"

    def forward(self) -> Any:
        import deformconv

        return deformconv.deform_conv(**self.arrays, **self.window)

    def train(self) -> tuple[Any, Arrays]:
        import deformconv

        gradients = deformconv.deform_conv_backward(self.grad_output, **self.arrays, **self.window)
        return self.forward(), {name: getattr(gradients, name) for name in self.arrays}


class _Jax(_Arrays):
    """A function that is compiled, forward and with its gradients."""

    packages = ("jax", "numba")

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        import jax

        self.jax = jax  # XLA's own threads are as many as there are processors

    @abstractmethod
    def operator(self) -> Callable[..., Any]:
        """A function of the arrays, by name."""

    def prepare(self, case: Case) -> None:
        super().prepare(case)
        names, operate = list(self.arrays), self.operator()

        def forward(*arrays: Any) -> Any:
            return operate(**dict(zip(names, arrays, strict=True)))

        def train(grad_output: Any, *arrays: Any) -> Any:
            output, pull = self.jax.vjp(forward, *arrays)
            return output, pull(grad_output)

        self.operands = [self.given(name, array) for name, array in self.arrays.items()]
        self.grad = self.given("grad_output", self.grad_output)
        self.compiled = self.jax.jit(forward), self.jax.jit(train)

    def given(self, name: str, array: Any) -> Any:
        """The array as the function takes it."""
        return self.jax.numpy.asarray(array)

    def forward(self) -> Any:
        return self.jax.block_until_ready(self.compiled[0](*self.operands))

    def train(self) -> tuple[Any, Arrays]:
        output, gradients = self.jax.block_until_ready(self.compiled[1](self.grad, *self.operands))
        return output, dict(zip(self.arrays, gradients, strict=True))


class Jax(_Jax):
    name, title = "jax", "deformconv.jax"
    backend: ClassVar[str | None] = None

    def operator(self) -> Callable[..., Any]:
        from deformconv.jax import deform_conv

        return lambda **arrays: deform_conv(**arrays, **self.window, backend=self.backend)


class JaxPortable(Jax):
    """The same of JAX's own operations, which GPUs and TPUs run."""

    name, title = "jax-portable", "deformconv.jax, portable"
    backend = "portable"


class Dense(_Jax):
    """XLA's plain convolution of the same shape, channels first: no offsets, no mask, and no gradients of them."""

    name, title = "jax-dense", "XLA's convolution, NCHW"
    deforms = False
    last: ClassVar[bool] = False

    read_by_it: ClassVar[tuple[str, ...]] = ("input", "weight", "bias")

    def operator(self) -> Callable[..., Any]:
        letters = "DHW"[-self.case.rank :]
        image, kernel = (f"N{letters}C", f"{letters}IO") if self.last else (f"NC{letters}", f"OI{letters}")
        case, convolve = self.case, self.jax.lax.conv_general_dilated
        pairs = [(amount, amount) for amount in case.padding]

        def call(input: Any, weight: Any, bias: Any) -> Any:
            output = convolve(
                input, weight, case.stride, pairs, rhs_dilation=case.dilation, dimension_numbers=(image, kernel, image),
                feature_group_count=case.groups,
            )  # fmt: skip
            return output + (bias if self.last else bias.reshape(-1, *[1] * case.rank))

        return call


class DenseLast(Dense):
    """The same with channels last, as Flax and Keras have them."""

    name, title = "jax-dense-last", "XLA's convolution, NHWC"
    last = True

    def given(self, name: str, array: Any) -> Any:
        if name in ("input", "grad_output"):
            array = np.moveaxis(array, 1, -1)
        elif name == "weight":
            array = np.moveaxis(array, (0, 1), (-1, -2))
        return super().given(name, np.ascontiguousarray(array))


OURS = Jax.name
DENSE = (Dense.name, DenseLast.name)
JAX_PEERS: dict[str, type[Peer]] = {peer.name: peer for peer in (Jax, JaxPortable, Numpy, Dense, DenseLast)}
