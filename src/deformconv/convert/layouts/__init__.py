"""The layouts of other libraries' state_dicts that are known here."""

from deformconv.convert.layouts.layout import Layout
from deformconv.convert.layouts.mxnet import MXNET, MXNET_SYMBOL
from deformconv.convert.layouts.paddle import PADDLE
from deformconv.convert.layouts.pytorch import BASICSR, DCNV2, DEFORMCONV, DETECTRON2, MMCV, MMDET1, TORCHVISION

__all__ = ["LAYOUTS"]

LAYOUTS: dict[str, Layout] = {
    layout.source: layout
    for layout in (MMCV, MMDET1, DETECTRON2, DCNV2, BASICSR, PADDLE, MXNET, MXNET_SYMBOL, TORCHVISION, DEFORMCONV)
}
