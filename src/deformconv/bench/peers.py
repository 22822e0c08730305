"""The libraries that are compared, each used in the fastest ordinary way: what it can run, and how.

A peer is made in a process of its own (see `worker`); what it can run is asked in the process that compares.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np

from deformconv.bench.cases import Case, case_of, make

__all__ = ["DIRECTIONS", "PEERS", "RECORDED", "OperatorPeer", "Peer", "TorchPeer", "Truth", "embedded", "missing"]

DIRECTIONS = ("forward", "forward+backward")
RECORDED = "forward, gradient recorded"
Arrays = dict[str, Any]


def missing(packages: tuple[str, ...]) -> list[str]:
    return [package for package in packages if find_spec(package) is None]


def embedded(case: Case, arrays: Arrays) -> tuple[Case, Arrays]:
    """A 1-D case as a 2-D one of height 1, for libraries that have no 1-D: every dy is 0."""
    if case.rank != 1:
        return case, arrays
    wide = case._replace(
        size=(1, *case.size), kernel=(1, *case.kernel), stride=(1, *case.stride), padding=(0, *case.padding),
        dilation=(1, *case.dilation),
    )  # fmt: skip
    found = {name: a if a is None or a.ndim < 3 else np.expand_dims(a, 2) for name, a in arrays.items()}
    dx = arrays["offset"]  # (N, offset_groups*K, positions)
    both = np.stack([np.zeros_like(dx), dx], axis=2)  # (N, offset_groups*K, 2, positions)
    found["offset"] = both.reshape(len(dx), 2 * dx.shape[1], 1, dx.shape[2])
    return wide, found


def _unembedded(case: Case, results: Arrays) -> Arrays:
    if case.rank != 1:
        return results
    found = {name: a if a.ndim < 4 else a[:, :, 0] for name, a in results.items()}
    if "offset" in found:
        found["offset"] = found["offset"][:, 1::2]
    return found


class Peer(ABC):
    """A library that runs cases."""

    name: ClassVar[str]
    title: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]
    installs: ClassVar[str | None] = None  # what to ask pip for, where that is not the packages' names
    ranks: ClassVar[tuple[int, ...]] = (1, 2, 3)
    trains: ClassVar[bool] = True
    deforms: ClassVar[bool] = True  # whether its results are those of deformable convolution
    no_gradients: ClassVar[str] = "has no gradients"
    remark: ClassVar[str] = ""  # what its times must not be read without, as the rest of a sentence that its title begins

    @abstractmethod
    def __init__(self, threads: int) -> None:
        """Import the library and tell it its number of threads."""

    @classmethod
    def reason_against(cls, case: Any, direction: str) -> str | None:
        """Why it cannot run this, if it cannot."""
        if direction != "forward" and not cls.trains:
            return cls.no_gradients
        return None if case.rank in cls.ranks else f"has no {case.rank}-D"

    @classmethod
    def embeds(cls, case: Any) -> bool:
        """Whether it runs this 1-D case as a 2-D one of height 1."""
        return case.rank == 1 and cls.deforms and issubclass(cls, _Planar)

    @staticmethod
    def read(fields: dict[str, Any]) -> Any:
        """A case from its fields as JSON keeps them."""
        return case_of(fields)

    @abstractmethod
    def prepare(self, case: Any) -> None:
        """Make the case's arrays and whatever is made once."""

    @abstractmethod
    def call_of(self, direction: str) -> Callable[[], Any]:
        """What to call, in the context of that direction."""

    def context(self, direction: str) -> AbstractContextManager[Any]:
        """What surrounds the calls, so that it costs nothing within them."""
        return nullcontext()

    @abstractmethod
    def results(self, direction: str) -> Arrays:
        """The output, and after a backward call the gradients by name."""


class _Planar(Peer):
    """A library of 2-D operators."""

    ranks = (1, 2)


class TorchPeer(Peer):
    """Whatever runs on PyTorch tensors."""

    packages: ClassVar[tuple[str, ...]] = ("torch",)

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.torch = torch

    @abstractmethod
    def operator(self, case: Case) -> Callable[..., Any]:
        """A function of input, offset, weight, bias, mask (by name)."""

    def prepare(self, case: Case) -> None:
        self.asked, self.case, arrays = case, case, make(case)[1]
        if self.embeds(case):
            self.case, arrays = embedded(case, arrays)
        self.grad_output = self.torch.from_numpy(arrays.pop("grad_output"))
        self.tensors = {name: None if a is None else self.torch.from_numpy(a) for name, a in arrays.items()}
        self.operate = self.operator(self.case)

    def context(self, direction: str) -> AbstractContextManager[Any]:
        for tensor in self.tensors.values():
            if tensor is not None:
                tensor.requires_grad_(direction != "forward")
        return self.torch.inference_mode() if direction == "forward" else nullcontext()

    def call_of(self, direction: str) -> Callable[[], Any]:
        return self.train if direction == "forward+backward" else self.forward

    def forward(self) -> Any:
        return self.operate(**self.tensors)

    def train(self) -> Any:
        for tensor in self.tensors.values():
            if tensor is not None:
                tensor.grad = None
        output = self.operate(**self.tensors)
        output.backward(self.grad_output)
        return output

    def results(self, direction: str) -> Arrays:
        with self.context(direction):
            found: Arrays = {"output": self.array(self.call_of(direction)())}
        if direction == "forward+backward":
            gradients = {name: None if tensor is None else tensor.grad for name, tensor in self.tensors.items()}
            found |= {name: self.array(tensor) for name, tensor in gradients.items() if tensor is not None}
        return _unembedded(self.asked, found) if self.embeds(self.asked) else found

    def array(self, tensor: Any) -> Any:
        """A result as NumPy has it."""
        return tensor.detach().numpy()


class OperatorPeer(TorchPeer):
    """A library that runs another operator than convolution on PyTorch's tensors."""

    given: ClassVar[tuple[str, ...]]  # what has a gradient
    dtype: ClassVar[str] = "float32"

    @classmethod
    def reason_against(cls, case: Any, direction: str) -> str | None:
        return None

    @classmethod
    def embeds(cls, case: Any) -> bool:
        return False

    @staticmethod
    @abstractmethod
    def arrays(case: Any) -> Arrays:
        """The operator's arrays and `grad_output`, in float32."""

    def prepare(self, case: Any) -> None:
        self.asked = self.case = case
        tensors = {name: self.torch.from_numpy(array.astype(self.dtype)) for name, array in self.arrays(case).items()}
        self.grad_output = tensors.pop("grad_output")
        self.tensors = {name: tensors.pop(name) for name in self.given}
        self.others = tensors
        self.operate = self.operator(case)


class Ours(TorchPeer):
    """This library, which has a number of threads of its own; before another peer's class among the bases."""

    packages = ("torch", "numba")
    backend: ClassVar[str | None] = None

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        import deformconv

        deformconv.set_num_threads(threads)


class Deformconv(Ours):
    name = title = "deformconv"

    def operator(self, case: Case) -> Callable[..., Any]:
        from deformconv import torch as front

        function = (front.deform_conv1d, front.deform_conv2d, front.deform_conv3d)[case.rank - 1]

        def call(input: Any, offset: Any, weight: Any, bias: Any, mask: Any) -> Any:
            return function(
                input, offset, weight, bias, case.stride, case.padding, case.dilation, mask,
                groups=case.groups, offset_groups=case.offset_groups, backend=self.backend,
            )  # fmt: skip

        return call


class Prepacked(Ours):
    """A layer that has packed its weight beforehand, as the runtimes for trained nets may."""

    name, title = "prepacked", "deformconv, prepacked"
    trains = False

    @classmethod
    def reason_against(cls, case: Any, direction: str) -> str | None:
        return None if direction == "forward" else cls.no_gradients

    def operator(self, case: Case) -> Callable[..., Any]:
        from deformconv import torch as front

        kind = (front.DeformConv1d, front.DeformConv2d, front.DeformConv3d)[case.rank - 1]
        layer = kind(
            case.in_channels, case.out_channels, case.kernel, case.stride, case.padding, case.dilation, case.groups,
            modulated=case.masked, offset_groups=case.offset_groups, predict_offsets=False,
        )  # fmt: skip
        layer.load_state_dict({name: self.tensors[name] for name in ("weight", "bias")})
        packed = layer.prepack()

        def call(input: Any, offset: Any, weight: Any, bias: Any, mask: Any) -> Any:
            return packed(input, offset, mask)

        return call


class Truth(Deformconv):
    """What the results are compared with: array operations in float64, which share nothing with the kernels.

    One image at a time, since they need much memory.
    """

    name = title = "truth"
    backend = "portable"

    def prepare(self, case: Case) -> None:
        super().prepare(case)
        self.tensors = {name: None if t is None else t.double() for name, t in self.tensors.items()}
        self.grad_output = self.grad_output.double()

    def results(self, direction: str) -> Arrays:
        torch, per_image = self.torch, ("input", "offset", "mask")
        whole, images = dict(self.tensors), []
        for n in range(self.case.batch):
            one = {name: t[n : n + 1] if name in per_image and t is not None else t for name, t in whole.items()}
            given = {name: t for name, t in one.items() if t is not None}
            if direction != "forward+backward":
                with torch.inference_mode():
                    images.append({"output": self.operate(**one)})
                continue
            for tensor in given.values():
                tensor.requires_grad_()
            output = self.operate(**one)
            gradients = torch.autograd.grad(output, list(given.values()), self.grad_output[n : n + 1])
            images.append({"output": output.detach(), **dict(zip(given, gradients, strict=True))})
        joined = {}
        for name in images[0]:
            parts = [image[name] for image in images]
            joined[name] = torch.cat(parts) if name in (*per_image, "output") else torch.stack(parts).sum(0)
        return {name: tensor.numpy() for name, tensor in joined.items()}


class Dense(TorchPeer):
    """The plain convolution of the same shape: it neither samples nor has gradients of offset and mask."""

    name, title = "dense", "plain convolution"
    deforms = False

    def operator(self, case: Case) -> Callable[..., Any]:
        function = (self.torch.conv1d, self.torch.conv2d, self.torch.conv3d)[case.rank - 1]

        def call(input: Any, offset: Any, weight: Any, bias: Any, mask: Any) -> Any:
            return function(input, weight, bias, case.stride, case.padding, case.dilation, case.groups)

        return call


class Torchvision(TorchPeer, _Planar):
    name = title = "torchvision"
    packages = ("torch", "torchvision")

    def operator(self, case: Case) -> Callable[..., Any]:
        from torchvision.ops import deform_conv2d

        def call(input: Any, offset: Any, weight: Any, bias: Any, mask: Any) -> Any:
            return deform_conv2d(input, offset, weight, bias, case.stride, case.padding, case.dilation, mask)

        return call


class Kornia(TorchPeer, _Planar):
    """PyTorch operations, from one of kornia's models."""

    name = title = "kornia"
    packages = ("torch", "kornia")

    def operator(self, case: Case) -> Callable[..., Any]:
        from kornia.feature.aliked.deform_conv2d import deform_conv2d

        def call(input: Any, offset: Any, weight: Any, bias: Any, mask: Any) -> Any:
            return deform_conv2d(input, offset, weight, bias, case.stride, case.padding, case.dilation, mask)

        return call


class _Inference(_Planar):
    """A runtime for trained nets: weight and bias are constants of a net of one layer, which it may prepare beforehand."""

    trains = False

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def prepare(self, case: Case) -> None:
        self.asked, (spec, arrays) = case, make(case)
        wide, arrays = embedded(case, arrays)
        self.inputs = {name: arrays[name] for name in ("input", "offset", "mask") if arrays[name] is not None}
        shape = spec.output_shape
        # Written to by every call: neither runtime is faster when it allocates its output itself.
        self.output = np.empty(shape if len(shape) == 4 else (*shape[:2], 1, *shape[2:]), np.float32)
        self.compile(wide, arrays["weight"], arrays["bias"])

    @abstractmethod
    def compile(self, case: Case, weight: Any, bias: Any) -> None:
        """Make the net and bind its inputs and its output."""

    @abstractmethod
    def forward(self) -> None:
        """Compute the output."""

    def call_of(self, direction: str) -> Callable[[], Any]:
        return self.forward

    def results(self, direction: str) -> Arrays:
        self.forward()
        return _unembedded(self.asked, {"output": self.output})


class OnnxRuntime(_Inference):
    name, title = "onnxruntime", "ONNX Runtime"
    packages = ("onnxruntime", "onnx")

    def compile(self, case: Case, weight: Any, bias: Any) -> None:
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper

        node = helper.make_node(
            "DeformConv", ["input", "weight", "offset", "bias", *(["mask"] if case.masked else [])], ["output"],
            kernel_shape=case.kernel, strides=case.stride, pads=(*case.padding, *case.padding), dilations=case.dilation,
            group=case.groups, offset_group=case.offset_groups,
        )  # fmt: skip
        inputs, outputs = (
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape) for name, array in arrays.items()]
            for arrays in (self.inputs, {"output": self.output})
        )
        constants = [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(bias, "bias")]
        graph = helper.make_graph([node], "layer", inputs, outputs, constants)
        # DeformConv of version 19 is that of 22; the older number is known to more versions of ONNX Runtime.
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        self.session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        self.bound = self.session.io_binding()
        for name, array in self.inputs.items():
            self.bound.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
        self.bound.bind_output("output", "cpu", 0, np.float32, self.output.shape, self.output.ctypes.data)

    def forward(self) -> None:
        self.session.run_with_iobinding(self.bound)


@cache
def _openvino() -> Any:
    """The one Core of the process, which never goes: the CPU plugin of one that does may leave signals without a stack."""
    import openvino

    return openvino.Core()


class OpenVino(_Inference):
    name, title = "openvino", "OpenVINO"
    packages = ("openvino",)

    def compile(self, case: Case, weight: Any, bias: Any) -> None:
        import openvino

        try:
            from openvino import opset8
        except ImportError:  # before OpenVINO 2025
            from openvino.runtime import opset8

        names = [opset8.parameter(array.shape, np.float32, name) for name, array in self.inputs.items()]
        input, offset, *mask = names
        # With the mode of padding "explicit" and interpolation beyond the edge, as zeros: the rule of the others.
        layer = opset8.deformable_convolution(
            input, offset, opset8.constant(weight), case.stride, case.padding, case.padding, case.dilation,
            mask[0] if mask else None, "EXPLICIT", case.groups, case.offset_groups, True,
        )  # fmt: skip
        output = opset8.add(layer, opset8.constant(bias.reshape(1, -1, 1, 1)))
        # Where the processor can, OpenVINO would compute in bfloat16 by itself.
        wishes = {
            "INFERENCE_NUM_THREADS": self.threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
        }
        self.compiled = _openvino().compile_model(openvino.Model([output], names, "layer"), "CPU", wishes)
        self.request = self.compiled.create_infer_request()
        for number, array in enumerate(self.inputs.values()):
            self.request.set_input_tensor(number, openvino.Tensor(array, shared_memory=True))
        self.request.set_output_tensor(0, openvino.Tensor(self.output, shared_memory=True))

    def forward(self) -> None:
        self.request.infer()


class Ncnn(_Inference):
    """A net as ncnn loads one: it packs the weights then, for its matrix product, and no call pays for that."""

    name, title = "ncnn", "ncnn (weights packed at load)"
    packages = ("ncnn",)
    remark = "computes the images of a batch one after the other, since its arrays have no batch"

    @classmethod
    def reason_against(cls, case: Any, direction: str) -> str | None:
        reason = super().reason_against(case, direction)
        if reason is None and case.groups > 1:
            return "has no groups"
        return "has no offset groups" if reason is None and case.offset_groups > 1 else reason

    def compile(self, case: Case, weight: Any, bias: Any) -> None:
        import ncnn

        self.net = ncnn.Net()
        # By itself it would compute in half precision where the processor can. Older versions have fewer of these options.
        for option in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_packed", "bf16_storage"):
            if hasattr(self.net.opt, f"use_{option}"):
                setattr(self.net.opt, f"use_{option}", False)
        self.net.opt.num_threads = self.threads
        if self.net.load_param_mem(self._described(case, weight.size)):
            raise RuntimeError("ncnn does not read the net's description")
        # Four zeros say that the weights that follow are of float32.
        self.net.load_model_mem(bytes(4) + weight.tobytes() + bias.tobytes())
        # Copies, whose channels begin where ncnn's own would.
        self.images = [
            {name: ncnn.Mat(np.ascontiguousarray(array[n])).clone() for name, array in self.inputs.items()}
            for n in range(case.batch)
        ]

    def _described(self, case: Case, weights: int) -> str:
        """The net's text: a number that every such text begins with, how many layers and arrays, and a line for each layer."""
        names = " ".join(self.inputs)
        (kh, kw), (dh, dw), (sh, sw), (ph, pw) = case.kernel, case.dilation, case.stride, case.padding
        # The numbers of the parameters are those of ncnn's convolution.
        window = f"1={kw} 11={kh} 2={dw} 12={dh} 3={sw} 13={sh} 4={pw} 15={pw} 14={ph} 16={ph}"
        layer = f"DeformableConv2D layer {len(self.inputs)} 1 {names} output 0={case.out_channels} {window} 5=1 6={weights}"
        count = len(self.inputs) + 1
        return "\n".join(["7767517", f"{count} {count}", *(f"Input {name} 0 1 {name}" for name in self.inputs), layer, ""])

    def forward(self) -> None:
        self.outputs = []
        for image in self.images:
            extractor = self.net.create_extractor()
            for name, array in image.items():
                extractor.input(name, array)
            failed, output = extractor.extract("output")
            if failed:
                raise RuntimeError(f"ncnn failed with {failed}")
            self.outputs.append(output)

    def results(self, direction: str) -> Arrays:
        self.forward()
        self.output[:] = [np.array(output) for output in self.outputs]
        return _unembedded(self.asked, {"output": self.output})


PEERS: dict[str, type[Peer]] = {
    peer.name: peer for peer in (Deformconv, Prepacked, OnnxRuntime, OpenVino, Ncnn, Torchvision, Kornia, Dense)
}
