"""One library in a process of its own: it prepares a case, shows its results, and times blocks of calls on request.

Requests and answers are lines of JSON on standard input and output.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from deformconv.bench.cases import CASES, Case, make

Call = Callable[..., torch.Tensor]


def _deformconv(case: Case) -> Call:
    import deformconv
    from deformconv.torch import deform_conv2d

    deformconv.set_num_threads(torch.get_num_threads())

    def call(input: Any, offset: Any, weight: Any, bias: Any, mask: Any) -> torch.Tensor:
        return deform_conv2d(
            input, offset, weight, bias, case.stride, case.padding, mask=mask,
            groups=case.groups, offset_groups=case.offset_groups,
        )  # fmt: skip

    return call


def _torchvision(case: Case) -> Call:
    from torchvision.ops import deform_conv2d

    def call(input: Any, offset: Any, weight: Any, bias: Any, mask: Any) -> torch.Tensor:
        result: torch.Tensor = deform_conv2d(input, offset, weight, bias, case.stride, case.padding, mask=mask)
        return result

    return call


def _dense(case: Case) -> Call:
    def call(input: Any, offset: Any, weight: Any, bias: Any, mask: Any) -> torch.Tensor:
        return torch.conv2d(input, weight, bias, case.stride, case.padding, groups=case.groups)

    return call


LIBRARIES = {"deformconv": _deformconv, "torchvision": _torchvision, "dense": _dense}


class Worker:
    """What this process can be asked."""

    def __init__(self, library: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.library = library

    def prepare(self, case: str) -> None:
        """Make the case's tensors."""
        chosen = next(one for one in CASES if one.name == case)
        _, arrays = make(chosen)
        self.tensors = {name: torch.from_numpy(a) for name, a in arrays.items() if a is not None}
        self.grad_output = self.tensors.pop("grad_output")
        self.tensors.setdefault("mask", None)  # type: ignore[arg-type]
        self.call = LIBRARIES[self.library](chosen)

    def results(self, file: str) -> None:
        """Save the output and every gradient."""
        output = self.train()
        found: dict[str, Any] = {"output": output.detach().numpy()}
        for name, tensor in self.tensors.items():
            if tensor is not None and tensor.grad is not None:
                found[name] = tensor.grad.numpy()
        np.savez(file, **found)

    def time(self, direction: str, calls: int) -> list[float]:
        """The seconds that each of some calls took, one after the other."""
        run = self.infer if direction == "forward" else self.train
        seconds = []
        for _ in range(calls):
            began = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - began)
        return seconds

    def infer(self) -> torch.Tensor:
        with torch.inference_mode():
            return self.call(**self.tensors)

    def train(self) -> torch.Tensor:
        for tensor in self.tensors.values():
            if tensor is not None:
                tensor.requires_grad_().grad = None
        output = self.call(**self.tensors)
        output.backward(self.grad_output)
        return output


def main() -> None:
    worker = Worker(sys.argv[1], int(sys.argv[2]))
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(worker, request.pop("do"))(**request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
