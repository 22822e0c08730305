"""Which way a call takes under each mode of PyTorch, as a table; and the results are the same on all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.torch.tensors import call_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from deformconv.ops.conv.spec import GRADIENTS
from deformconv.torch import deform_conv2d, modes
from deformconv.torch.conv.functional import DEFORM_CONV

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning"),  # PyTorch's own scripts, used by its forward-mode rules
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
]

Call = Callable[..., torch.Tensor]
Tensors = list[torch.Tensor]


def _eager(call: Call, tensors: Tensors) -> Any:
    return call(*tensors)


def _grad(call: Call, tensors: Tensors) -> Any:
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    output = call(*leaves)
    output.sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)
    return output.detach()


def _compile(call: Call, tensors: Tensors) -> Any:
    nodes: list[Any] = []

    def backend(graph: torch.fx.GraphModule, given: Any) -> Any:
        nodes.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    result = torch.compile(call, backend=backend, fullgraph=True)(*tensors)
    torch._dynamo.reset()
    assert DEFORM_CONV.forward_op in nodes
    return result


def _export(call: Call, tensors: Tensors) -> Any:
    class Net(torch.nn.Module):
        def forward(self, *given: torch.Tensor) -> torch.Tensor:
            return call(*given)

    program = torch.export.export(Net(), tuple(tensors))
    assert DEFORM_CONV.forward_op in [node.target for node in program.graph.nodes]
    return program.module()(*tensors)


def _trace(call: Call, tensors: Tensors) -> Any:
    return torch.jit.trace(call, tuple(tensors))(*tensors)


def _fx(call: Call, tensors: Tensors) -> Any:
    class Net(torch.nn.Module):
        def forward(self, input: Any, offset: Any, weight: Any) -> Any:
            return call(input, offset, weight, *tensors[3:])

    graph = torch.fx.symbolic_trace(Net())
    assert deform_conv2d in [node.target for node in graph.graph.nodes]
    return graph(*tensors[:3])


def _vmap(call: Call, tensors: Tensors) -> Any:
    return torch.func.vmap(call)(*(torch.stack([tensor] * 2) for tensor in tensors))[1]


def _func_grad(call: Call, tensors: Tensors) -> Any:
    gradient, output = torch.func.grad_and_value(lambda *t: call(*t).sum())(*tensors)
    assert gradient.shape == tensors[0].shape
    return output


def _jvp(call: Call, tensors: Tensors) -> Any:
    return torch.func.jvp(lambda x: call(x, *tensors[1:]), (tensors[0],), (torch.ones_like(tensors[0]),))[0]


def _autocast(call: Call, tensors: Tensors) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return call(*tensors)  # double precision is not cast


def _dispatch_mode(call: Call, tensors: Tensors) -> Any:
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Mode():
        output = call(*tensors)
    assert seen == [DEFORM_CONV.forward_op]
    return output


def _fake(call: Call, tensors: Tensors) -> Any:
    with FakeTensorMode() as mode:
        return call(*map(mode.from_tensor, tensors))


def _meta(call: Call, tensors: Tensors) -> Any:
    return call(*(tensor.to("meta") for tensor in tensors))


def _subclass(call: Call, tensors: Tensors) -> Any:
    class Kept(torch.Tensor):
        pass

    output = call(tensors[0].as_subclass(Kept), *tensors[1:])
    assert type(output) is Kept
    return output.as_subclass(torch.Tensor)


# How a call is made, and the doors that it is seen to take: none where it goes past the question or a compiler reads it.
TABLE: dict[str, tuple[Callable[[Call, Tensors], Any], list[str]]] = {
    "eager": (_eager, []),
    "grad": (_grad, []),
    "compile": (_compile, ["compiled"]),
    "export": (_export, ["compiled"]),
    "trace": (_trace, ["registered"]),
    "fx": (_fx, []),
    "vmap": (_vmap, ["transformed"]),
    "func.grad": (_func_grad, ["transformed"]),
    "jvp": (_jvp, ["decomposed"]),
    "autocast": (_autocast, ["memory"]),
    "dispatch mode": (_dispatch_mode, ["registered"]),
    "fake": (_fake, ["registered"]),
    "meta": (_meta, []),
    "subclass": (_subclass, ["registered"]),
}


@pytest.mark.parametrize("masked", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("mode", TABLE)
def test_the_door_and_the_result(mode: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case_call, arrays, keywords, _ = call_of()
    names = [name for name in GRADIENTS if name != "mask" or masked]
    tensors = [arrays[name] for name in names]

    def call(*given: torch.Tensor) -> torch.Tensor:
        return case_call(**dict(zip(names, given, strict=True)), **keywords)

    expected = call(*tensors)
    run, doors = TABLE[mode]
    seen: list[str] = []
    if doors != ["compiled"]:  # a compiler would read the stand-in as well
        real = modes.door
        monkeypatch.setattr(modes, "door", lambda *given: seen.append(real(*given)) or seen[-1])
    found = run(call, tensors)
    assert set(seen) == set(doors) - {"compiled"}
    if found.device.type == "meta" or type(found) is not torch.Tensor:
        assert found.shape == expected.shape
    elif found.dim() == 0:
        assert torch.allclose(found, expected.sum())
    elif mode == "jvp":
        assert torch.allclose(found, expected)
    else:
        assert torch.equal(found, expected)


def test_the_door_of_each_mode() -> None:
    plain = torch.ones(2, 3)
    assert modes.door(plain, None) == modes.door(torch.nn.Parameter(plain)) == "memory"
    assert modes.door(plain.as_subclass(type("Other", (torch.Tensor,), {}))) == "registered"
    asked = []
    torch.func.vmap(lambda x: asked.append(modes.door(x)) or x)(plain)
    torch.func.jvp(lambda x: asked.append(modes.door(x)) or x, (plain,), (plain,))
    torch.jit.trace(lambda x: asked.append(modes.door(x)) or x * 2, plain, check_trace=False)
    assert asked == ["transformed", "decomposed", "registered"]


def test_an_export_to_onnx_leaves_by_its_door(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modes, "exporting", lambda: True)
    plain = torch.ones(2, 3)
    asked = []
    torch.func.vmap(lambda x: asked.append(modes.door(x)) or x)(plain)
    assert asked == ["onnx"] and modes.door(plain) == "memory"
