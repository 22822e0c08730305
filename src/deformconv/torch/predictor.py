"""What predictors of offsets and masks have in common: they begin as zeros."""

from __future__ import annotations

from torch import nn

__all__ = ["Predictor"]


class Predictor(nn.Module):
    """The last layer before offsets and masks."""

    def reset_parameters(self) -> None:
        """Begin again with offsets 0 and masks halfway."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
