"""Two layers in Keras, plain and deformable, on each of its backends: what predicting and a step of training take.

The deformable layers predict their offsets and masks, so their times hold those of the predictors.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np

from deformconv.bench.peers import DIRECTIONS, Arrays, Peer

__all__ = ["KERAS_BACKENDS", "KERAS_CASE", "KERAS_PEERS", "KerasCase", "keras_case_of"]

FORWARD, TRAINING = DIRECTIONS
KERAS_BACKENDS = ("jax", "tensorflow", "torch")
KERNEL, TAPS = (3, 3), 9


class KerasCase(NamedTuple):
    """Layers with as many channels at both ends, one after the other, and the images that they see, channels last."""

    name: str
    batch: int
    size: tuple[int, int]
    channels: int
    layers: int = 2

    @property
    def what(self) -> str:
        sizes = "x".join(map(str, (self.batch, *self.size)))
        return f"{self.layers} layers of {self.channels} channels, 3x3, on {sizes}"

    @property
    def tolerance(self) -> float:
        """How far a right net may be from the truth: in float32, through layers whose offsets hold each other's rounding."""
        return 1e-3

    @property
    def checked(self) -> KerasCase:
        """The net for which it is compared with the truth."""
        return self._replace(size=(11, 13), channels=min(self.channels, 8))


KERAS_CASE = KerasCase("keras-c64-56", 2, (56, 56), 64)


def keras_case_of(fields: dict[str, Any]) -> KerasCase:
    """A case from its fields as JSON keeps them."""
    return KerasCase(**{**fields, "size": tuple(fields["size"])})


def _arrays(case: KerasCase) -> Arrays:
    """Images, what they should become, and each layer's weights by name; the same in every process, in Keras' shapes."""
    random = np.random.default_rng(0)
    channels, predicted = case.channels, 3 * TAPS
    fan = TAPS * channels
    found = {
        "images": random.standard_normal((case.batch, *case.size, channels)),
        "wanted": random.standard_normal((case.batch, *case.size, channels)),
    }
    for number in range(case.layers):
        found |= {
            f"{number}.kernel": random.standard_normal((*KERNEL, channels, channels)) * (2 / fan) ** 0.5,
            f"{number}.bias": 0.1 * random.standard_normal(channels),
            # Offsets of about a pixel, as a trained net has them.
            f"{number}.offset_conv.kernel": random.standard_normal((*KERNEL, channels, predicted)) / fan**0.5,
            f"{number}.offset_conv.bias": 0.1 * random.standard_normal(predicted),
        }
    return {name: array.astype(np.float32) for name, array in found.items()}


class _KerasPeer(Peer):
    """What a net of such layers is made of."""

    backend: ClassVar[str]

    @classmethod
    def reason_against(cls, case: Any, direction: str) -> str | None:
        return None

    @classmethod
    def embeds(cls, case: Any) -> bool:
        return False

    @staticmethod
    def read(fields: dict[str, Any]) -> KerasCase:
        return keras_case_of(fields)


class _Net(_KerasPeer):
    """A Keras model."""

    def __init__(self, threads: int) -> None:
        os.environ |= {"KERAS_BACKEND": self.backend, "TF_CPP_MIN_LOG_LEVEL": "3"}  # which Keras reads when it is imported
        import keras

        import deformconv

        deformconv.set_num_threads(threads)
        if self.backend == "torch":
            import torch

            torch.set_num_threads(threads)
        self.keras = keras

    def layer(self, channels: int) -> Any:
        """A layer with as many channels at both ends."""
        return self.keras.layers.Conv2D(channels, KERNEL, padding="same")

    def prepare(self, case: KerasCase) -> None:
        self.case = case
        self.made: Any = None

    def make(self, case: KerasCase, rate: float) -> tuple[Any, Any, Any]:
        """The compiled model with the case's weights, its images and what they should become."""
        arrays, keras = _arrays(case), self.keras
        layers = [self.layer(case.channels) for _ in range(case.layers)]
        model = keras.Sequential([keras.Input((*case.size, case.channels)), *layers])
        for name, variable in self.variables(model).items():
            variable.assign(arrays[name])
        model.compile(optimizer=keras.optimizers.SGD(rate), loss="mse")
        return model, arrays["images"], arrays["wanted"]

    def variables(self, model: Any) -> dict[str, Any]:
        """The model's weights by the names of `_arrays`."""
        found = {}
        for number, layer in enumerate(model.layers):
            found |= {f"{number}.kernel": layer.kernel, f"{number}.bias": layer.bias}
            predictor = getattr(layer, "offset_conv", None)
            if predictor is not None:
                found |= {f"{number}.offset_conv.kernel": predictor.kernel, f"{number}.offset_conv.bias": predictor.bias}
        return found

    def context(self, direction: str) -> AbstractContextManager[Any]:
        if self.made is None:
            self.made = self.make(self.case, rate=1e-12)  # the net stays as it is; the step takes as long as any other
        return nullcontext()

    def call_of(self, direction: str) -> Callable[[], Any]:
        model, images, wanted = self.made
        return (
            partial(model.predict_on_batch, images) if direction == FORWARD else partial(model.train_on_batch, images, wanted)
        )

    def results(self, direction: str) -> Arrays:
        """The output and, by how a step moves them, the gradients of the weights."""
        with self.context(direction):
            self.call_of(direction)()  # compiled before it is timed
        case = self.case.checked
        rate = case.batch * case.size[0] * case.size[1] * case.channels / 2  # the step is the gradient of half the squares' sum
        model, images, wanted = self.make(case, rate)
        found = {"output": np.asarray(model.predict_on_batch(images))}
        if direction == FORWARD:
            return found
        before = {name: np.array(variable) for name, variable in _numpy(self.variables(model)).items()}
        model.train_on_batch(images, wanted)
        after = _numpy(self.variables(model))
        return found | {name: before[name] - after[name] for name in before}


def _numpy(variables: dict[str, Any]) -> Arrays:
    from keras import ops

    return {name: ops.convert_to_numpy(variable) for name, variable in variables.items()}


class _DeformNet(_Net):
    """The net with deformable layers in the places of its convolutions."""

    def layer(self, channels: int) -> Any:
        from deformconv.keras import DeformConv2D

        return DeformConv2D(channels, KERNEL, padding="same")


class _DenseNet(_Net):
    """The net as it was."""

    deforms = False


class KerasTruth(_KerasPeer):
    """What the results are compared with: array operations of PyTorch in float64, with predictors of its own."""

    name, title = "keras-truth", "truth"
    packages = ("torch",)

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.torch = torch

    def prepare(self, case: KerasCase) -> None:
        self.case = case.checked

    def call_of(self, direction: str) -> Callable[[], Any]:
        return partial(self.results, direction)

    def results(self, direction: str) -> Arrays:
        torch = self.torch
        given = {name: torch.from_numpy(array).double() for name, array in _arrays(self.case).items()}
        images, wanted = (given.pop(name).movedim(-1, 1) for name in ("images", "wanted"))
        for tensor in given.values():
            tensor.requires_grad_()
        output = images
        for number in range(self.case.layers):
            layer = {name.partition(".")[2]: tensor for name, tensor in given.items() if name.startswith(f"{number}.")}
            output = self.layer(output, layer)
        found = {"output": output.movedim(1, -1).detach().numpy()}
        if direction == FORWARD:
            return found
        gradients = torch.autograd.grad((output - wanted).square().sum() / 2, list(given.values()))
        return found | {name: gradient.numpy() for name, gradient in zip(given, gradients, strict=True)}

    def layer(self, input: Any, weights: Arrays) -> Any:
        from deformconv.torch import deform_conv2d

        kernel, predictor = (weights[name].permute(3, 2, 0, 1) for name in ("kernel", "offset_conv.kernel"))
        predicted = self.torch.conv2d(input, predictor, weights["offset_conv.bias"], padding=1)
        offset, mask = predicted[:, : 2 * TAPS], 2 * predicted[:, 2 * TAPS :].sigmoid()
        return deform_conv2d(input, offset, kernel, weights["bias"], padding=1, mask=mask, backend="portable")


def _on(backend: str) -> list[type[Peer]]:
    """The two nets on a backend of Keras."""
    packages = ("keras", "numba", backend)
    titles = {_DeformNet: (f"keras-{backend}", "DeformConv2D"), _DenseNet: (f"keras-{backend}-dense", "Conv2D")}
    return [
        type(
            f"{base.__name__}_{backend}",
            (base,),
            {"name": name, "title": f"{title} on {backend}", "packages": packages, "backend": backend},
        )
        for base, (name, title) in titles.items()
    ]


KERAS_PEERS: dict[str, type[Peer]] = {peer.name: peer for backend in KERAS_BACKENDS for peer in _on(backend)}
KERAS_PEERS[KerasTruth.name] = KerasTruth
