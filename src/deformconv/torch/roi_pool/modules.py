"""A layer that pools boxes into bins, and predicts where these lie and what they weigh."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NoReturn

from torch import Tensor, nn

from deformconv.errors import ShapeError
from deformconv.ops.conv.layer import MASK_SCALE, positive
from deformconv.ops.operator import Operand
from deformconv.ops.roi_pool.spec import roi_spec
from deformconv.ops.window import count, integers
from deformconv.ops.words import unexpected
from deformconv.torch import modes
from deformconv.torch.loading import Loading, Sentence
from deformconv.torch.predictor import VectorPredictor, check_dtype
from deformconv.torch.roi_pool.functional import deform_roi_pool, joined

__all__ = ["DeformRoIPool"]

TRUNKS = ("shared", "separate")


class DeformRoIPool(Loading):
    """Deformable RoI pooling that predicts its offsets and, if `modulated`, its masks from the boxes' plain pooling.

    A fresh layer computes `deform_roi_pool` without offset and mask: offsets begin at 0, masks at mask_scale*sigmoid(0) = 1.

    Args:
        channels: those of the input.
        output_size: the bins of a box, an int or (PH, PW).
        spatial_scale: pixels of the input for a pixel of the boxes.
        sampling_ratio: samples of a bin along either axis, or 0.
        convention: "aligned", "unaligned" or "rounded", as in `deform_roi_pool`.
        gamma: what offsets are multiplied by.
        modulated: whether masks are predicted, too (v2).
        hidden: the width of the predictor's two hidden layers. By far most of its parameters are in the first of them,
            channels*PH*PW x hidden: 12.8 million for 256 channels, 7x7 bins and 1024.
        trunk: "shared", one predictor of offsets and masks (the paper's), or "separate", one of each (mmcv's, with one hidden
            layer for the masks).
        mask_scale: the factor of the masks' sigmoid; 2 begins at masks of 1, 1 is the paper's and mmcv's. A state_dict
            notes the number, and one of other masks does not load.

    Shape:
        input (N, channels, H, W), boxes (R, 5) or a list of N tensors (r, 4); output (R, channels, PH, PW).

    Example:
        >>> import torch
        >>> from deformconv.torch import DeformRoIPool
        >>> layer = DeformRoIPool(256, spatial_scale=1 / 16, hidden=256)
        >>> features, boxes = torch.rand(1, 256, 50, 84), [torch.tensor([[40.0, 60.0, 400.0, 300.0]])]
        >>> layer(features, boxes).shape
        torch.Size([1, 256, 7, 7])

    Papers: v1, arXiv 1703.06211, section 2.2; v2, arXiv 1811.11168, section 3.2.
    """

    _predictors = ("offset_mask_fc", "mask_fc")

    def __init__(
        self,
        channels: int,
        output_size: int | tuple[int, int] = 7,
        spatial_scale: float = 1.0,
        sampling_ratio: int = 2,
        *,
        convention: str = "aligned",
        gamma: float = 0.1,
        modulated: bool = True,
        hidden: int = 1024,
        trunk: str = "shared",
        mask_scale: float = MASK_SCALE,
        **unknown: NoReturn,
    ) -> None:
        if unknown:
            raise unexpected(DeformRoIPool.__init__, unknown, "DeformRoIPool")
        if trunk not in TRUNKS:
            raise ValueError(f"`trunk` is {trunk!r}; expected {' or '.join(map(repr, TRUNKS))}.")
        super().__init__()
        sizes = integers("output_size", output_size, 2, 1)
        self.channels, self.output_size = count("channels", channels), (sizes[0], sizes[1])
        none = Operand((1, self.channels, 1, 1), "float32"), Operand((0, 5), "float32")
        spec = roi_spec(  # for its errors, where the layer is built
            *none, output_size=sizes, spatial_scale=spatial_scale, sampling_ratio=sampling_ratio, convention=convention,
            gamma=gamma,
        )  # fmt: skip
        self.spatial_scale, self.sampling_ratio = spec.spatial_scale, spec.sampling_ratio
        self.convention, self.gamma = convention, spec.gamma
        self.modulated, self.hidden, self.trunk = bool(modulated), count("hidden", hidden), trunk
        self.mask_scale = positive("mask_scale", mask_scale)
        bins, pooled = prod(sizes), self.channels * prod(sizes)
        if modulated and trunk == "shared":
            self.offset_mask_fc = _trunk(pooled, hidden, 2, 3 * bins)
        else:
            self.offset_fc = _trunk(pooled, hidden, 2, 2 * bins)
            if modulated:
                self.mask_fc = _trunk(pooled, hidden, 1, bins)

    def forward(
        self, input: Tensor, boxes: Tensor | Sequence[Tensor], offset: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Pool the boxes with predicted offsets and masks, or with exactly those that are passed."""
        rows: Tensor = joined(boxes, input)
        if offset is None and mask is None:
            offset, mask = self.predict(input, rows)
        return self._pool(input, rows, offset, mask)

    def predict(self, input: Tensor, boxes: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """The offsets (R, 2, PH, PW) and masks (R, 1, PH, PW) that the layer predicts; no masks in v1."""
        pooled = self._pool(input, joined(boxes, input), None, None).flatten(1)
        check_dtype(self, "input", input)
        if self.modulated and self.trunk == "shared":
            raw = self.offset_mask_fc(pooled).unflatten(1, (3, *self.output_size))
            offset, mask = raw[:, :2], raw[:, 2:]
        else:
            offset = self.offset_fc(pooled).unflatten(1, (2, *self.output_size))
            mask = self.mask_fc(pooled).unflatten(1, (1, *self.output_size)) if self.modulated else None
        return offset, None if mask is None else self.mask_scale * mask.sigmoid()

    def _foreign(self, layer: str, unexpected: list[str], has_own: bool) -> Sentence | None:
        """What to build where the predictor in a state_dict has the other trunk."""
        trunk, name = ("separate", "mask_fc") if self.trunk == "shared" else ("shared", "offset_mask_fc")
        key = f"{layer}.{name}.0.weight".lstrip(".")
        if has_own or key not in unexpected:
            return None
        return Sentence(
            (trunk,),
            f'"{key}" is of a predictor with trunk="{trunk}", and this layer has trunk="{self.trunk}"; neither can be made of '
            f'the other: build the layer with trunk="{trunk}".',
        )

    def __prepare_scriptable__(self) -> NoReturn:
        """torch.jit.script asks every module of a net for this before it compiles."""
        modes.refuse_script(self)

    def _pool(self, input: Any, boxes: Any, offset: Tensor | None, mask: Tensor | None) -> Tensor:
        is_known = isinstance(input, Tensor) and not modes.traced()  # else a shape is nothing to compare with
        if is_known and input.ndim == 4 and input.shape[1] != self.channels:
            raise ShapeError(
                f"`input` has {input.shape[1]} channels, shape {tuple(input.shape)}; this layer has channels={self.channels}: "
                f"build it with channels={input.shape[1]}."
            )
        return deform_roi_pool(
            input, boxes, offset, mask, self.output_size, self.spatial_scale, self.sampling_ratio,
            convention=self.convention, gamma=self.gamma,
        )  # fmt: skip

    def extra_repr(self) -> str:
        parts = [f"{self.channels}, output_size={self.output_size}, spatial_scale={self.spatial_scale:g}"]
        parts.append(f"sampling_ratio={self.sampling_ratio}, convention={self.convention!r}")
        for name, default in (("gamma", 0.1), ("modulated", True), ("trunk", "shared"), ("mask_scale", MASK_SCALE)):
            if getattr(self, name) != default:
                parts.append(f"{name}={getattr(self, name)!r}")
        return ", ".join(parts)


def _trunk(inputs: int, hidden: int, layers: int, outputs: int) -> nn.Sequential:
    """Hidden layers of N(0, 0.01), as the paper has them, and a last one of zeros."""
    modules: list[nn.Module] = []
    for number in range(layers):
        linear = nn.Linear(hidden if number else inputs, hidden)
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
        modules += [linear, nn.ReLU()]
    return nn.Sequential(*modules, VectorPredictor(hidden, outputs))
