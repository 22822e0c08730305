"""What a library's state_dict is like, in a few words and templates of names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["Change", "Layout", "Place", "same_name"]


class Place(NamedTuple):
    """A parameter or buffer of our model: the name of its module, the module, and its own name there."""

    name: str
    module: Any
    parameter: str

    @property
    def key(self) -> str:
        return f"{self.name}.{self.parameter}" if self.name else self.parameter


class Change(NamedTuple):
    """What a tensor goes through on its way from the other library to here, and on its way back."""

    here: Callable[[Any], Any]
    back: Callable[[Any], Any]


def same_name(place: Place) -> str:
    """The other library's name for what is in no deformable layer, if the two have one name for it."""
    return place.key


class Layout(NamedTuple):
    """How a library stores a deformable layer and what it computes with it.

    Templates of keys have places for {layer}, our layer's name in the model, the same in one {word}, with _ for its points, and
    {parameter}, "weight" or "bias".
    """

    source: str  # as `convert_state_dict` takes it
    library: str  # as a sentence names it
    weight: str = "{layer}.{parameter}"  # of a layer that predicts its offsets
    alone: str = "{layer}.{parameter}"  # of one that is passed them
    predictor: str = "{layer}.conv_offset.{parameter}"
    others: Callable[[Place], str | None] = same_name  # None for what the library does not keep
    mask_scale: float | None = 1.0  # what multiplies the masks' sigmoid; None: layers compute what ours do
    boundaries: tuple[str, str] = ("zeros", "zeros")  # of v1 and of v2
    biases: tuple[bool | None, bool | None] = (None, None)  # whether layers of v1 and of v2 have a bias; None: either
    # Whether the predictor's window is the layer's; if not, it is as large as the kernel, around a pixel, without dilation.
    # None if the layer has no dilation either.
    dilated: bool | None = True
    guided: bool = False  # whether a layer may predict from another feature than it convolves
    pools: tuple[str, str] | None = None  # trunk and convention of its predicting RoI pooling
    grouped: bool = False  # whether the predictor has the layer's groups
    transposed: bool = False  # whether the weight of a fully connected layer is (inputs, outputs)
