"""Weights and layers of other libraries, with their words and conventions. Frameworks are loaded where they are needed."""

from deformconv.convert.checkpoint import CheckpointError, load_checkpoint
from deformconv.convert.layers import replace_layers
from deformconv.convert.mmcv import accelerate_mmcv
from deformconv.convert.mxnet import layer_from_mxnet, layer_to_mxnet, load_mxnet, mxnet_layers
from deformconv.convert.openvino import openvino_extensions
from deformconv.convert.params_file import read_params, write_params
from deformconv.convert.prepacked_copy import prepack
from deformconv.convert.state_dicts import convert_state_dict
from deformconv.convert.torchvision import accelerate_torchvision
from deformconv.convert.torchvision_copy import to_torchvision
from deformconv.convert.transformers_attention import accelerate_transformers
from deformconv.convert.weights import from_torch, to_torch

__all__ = [
    "CheckpointError",
    "accelerate_mmcv",
    "accelerate_torchvision",
    "accelerate_transformers",
    "convert_state_dict",
    "from_torch",
    "layer_from_mxnet",
    "layer_to_mxnet",
    "load_checkpoint",
    "load_mxnet",
    "mxnet_layers",
    "openvino_extensions",
    "prepack",
    "read_params",
    "replace_layers",
    "to_torch",
    "to_torchvision",
    "write_params",
]
