"""A net with deformable layers behind HTTP: POST an image as 3*64*64 float32 numbers, get ten scores as JSON.

gunicorn app:application
"""

import json

import numpy as np
import torch
from torch import nn

from deformconv.torch import DeformConv2d

SHAPE = (1, 3, 64, 64)

torch.manual_seed(0)
net = nn.Sequential(  # stands for a trained one, which load_state_dict would fill
    nn.Conv2d(3, 16, 3, stride=2, padding=1),
    nn.ReLU(),
    DeformConv2d(16, 32, 3, padding=1),
    nn.ReLU(),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(32, 10),
).eval()


@torch.inference_mode()
def scores(image):
    return net(torch.from_numpy(image))[0].tolist()


scores(np.zeros(SHAPE, np.float32))  # the kernels are loaded now: a process that cannot serve ends here, before any request


def application(environ, start_response):
    body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    if len(body) != 4 * np.prod(SHAPE):
        start_response("400 Bad Request", [("Content-Type", "text/plain")])
        return [f"{len(body)} bytes; expected {4 * np.prod(SHAPE)}, the float32 numbers of 3x64x64\n".encode()]
    start_response("200 OK", [("Content-Type", "application/json")])
    image = np.frombuffer(body, "<f4").reshape(SHAPE).copy()  # a tensor's memory can be written
    return [json.dumps(scores(image)).encode()]
