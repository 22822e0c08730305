"""Half precision beside float32: the same numbers, which bfloat16 holds, in the arrays of either."""

from __future__ import annotations

from typing import Any, ClassVar

from deformconv.accuracy import TOLERANCE
from deformconv.bench.cases import Case, case_of, named
from deformconv.bench.peers import Deformconv, Dense, TorchPeer, Truth

__all__ = ["HALF_CASES", "HALF_PEERS", "HalfCase", "half_case_of"]


class HalfCase(Case):
    """A layer whose input, weight, bias and gradient of the output hold half precision; offsets and masks are float32."""

    __slots__ = ()

    @property
    def tolerance(self) -> float:
        """How far a right library may be from the truth."""
        return TOLERANCE["bfloat16"]


def half_case_of(fields: dict[str, Any]) -> HalfCase:
    """A case from its fields as JSON keeps them."""
    return HalfCase(*case_of(fields))


# Layers whose products are most of their work, a narrow one, and one that has next to no products.
HALF_CASES = tuple(HalfCase(*named(name)) for name in ("c64-56", "c128-28", "c256-56", "c512-14", "resnet-c4-v2", "depthwise"))


class _Half(TorchPeer):
    """A library with numbers that bfloat16 holds, in tensors of `dtype`, or of its own."""

    dtype: ClassVar[str | None] = None
    read = staticmethod(half_case_of)

    def prepare(self, case: Case) -> None:
        super().prepare(case)
        for name in ("input", "weight", "bias"):
            self.tensors[name] = self._rounded(self.tensors[name])
        self.grad_output = self._rounded(self.grad_output)

    def _rounded(self, tensor: Any) -> Any:
        return tensor.bfloat16().to(tensor.dtype if self.dtype is None else getattr(self.torch, self.dtype))

    def array(self, tensor: Any) -> Any:
        return super().array(tensor.double())


class _Ours32(_Half, Deformconv):
    name, title, dtype = "deformconv-float32", "float32", "float32"


class _Ours16(_Half, Deformconv):
    name, title, dtype = "deformconv-float16", "float16", "float16"


class _OursBrain(_Half, Deformconv):
    name, title, dtype = "deformconv-bfloat16", "bfloat16", "bfloat16"


class _Dense32(_Half, Dense):
    name, title, dtype = "dense-float32", "plain convolution, float32", "float32"


class _DenseBrain(_Half, Dense):
    name, title, dtype = "dense-bfloat16", "plain convolution, bfloat16", "bfloat16"


class _Truth(_Half, Truth):
    name, title = "truth-half", "truth"


HALF_PEERS: dict[str, type[TorchPeer]] = {
    peer.name: peer for peer in (_Ours32, _OursBrain, _Ours16, _Dense32, _DenseBrain, _Truth)
}
