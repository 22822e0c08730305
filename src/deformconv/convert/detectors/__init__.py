"""Whole detectors of torchvision: what mmdetection and detectron2 call their parts, and what their numbers mean."""

from deformconv.convert.detectors.detector import Detector, detector_of
from deformconv.convert.detectors.names import DIALECTS
from deformconv.convert.detectors.origin import Origin
from deformconv.convert.detectors.parts import is_rcnn

__all__ = ["DIALECTS", "Detector", "Origin", "detector_of", "is_rcnn"]
