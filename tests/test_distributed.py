"""Several processes compute what one does: gradients, descriptors, whole runs; and they leave together."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_resume import MODEL, ROOT, SHORT, differences

import train
from augmentations.year_wise import Augmentation
from losses.multi_similarity import MultiSimilarityLoss
from models.earthloc import EarthLoc, ModelConfig
from utils import distributed
from utils.checkpoint import load_checkpoint
from utils.preemption import EXIT_CODE
from utils.retrieval import describe

REGIONS, YEARS, SIZE = 8, 4, 16


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def spawn(function, world, *rest):
    """function(rank, *rest) in `world` processes that know each other -> what each returned."""
    results = mp.get_context("fork").SimpleQueue()
    port = free_port()

    def body(rank):
        torch.set_num_threads(1)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with distributed.processes(torch.device("cpu"), 60):
            results.put((rank, function(rank, *rest)))
    children = [mp.get_context("fork").Process(target=body, args=(rank,)) for rank in range(world)]
    for child in children:
        child.start()
    found = dict(results.get() for _ in children)
    for child in children:
        child.join(30)
        assert child.exitcode == 0
    return [found[rank] for rank in range(world)]


# Gradients

def problem():
    """A small real model in float64, its views (B, Y, 3, S, S), labels, and a neutral mask with some pairs."""
    torch.manual_seed(0)
    model = EarthLoc(ModelConfig("resnet18", "layer1", "none", "gem", 8, SIZE)).double()
    views = torch.rand(REGIONS, YEARS, 3, SIZE, SIZE, dtype=torch.float64)
    labels = torch.arange(REGIONS).repeat_interleave(YEARS)
    shared = torch.zeros(REGIONS, REGIONS, dtype=torch.bool)
    shared[0, 5] = shared[5, 0] = shared[2, 3] = shared[3, 2] = True  # within a rank's part, and across
    return model, views, labels, shared[labels][:, labels]


def one_update(variant="right"):
    """The gradients, loss and BatchNorm averages after one update by train.update -> plain lists (they cross processes)."""
    model, views, labels, neutral = problem()
    distributed.use_global_batchnorm(model)
    mine = distributed.part(REGIONS)
    if variant == "detached":
        distributed.gather = lambda values, original=distributed.gather: original(values.detach()) if values.dim() == 2 \
            and values.shape[1] == 8 and not _with_own(values) else original(values)
    if variant == "no average":
        distributed.average_gradients = lambda parameters: _scaled(parameters, original=original_average)
    if variant == "local negatives":
        labels, neutral = labels[mine.start * YEARS:mine.stop * YEARS], None
        whole = distributed.gather
        distributed.gather = lambda values: values if values.dim() == 2 and values.shape[1] == 8 else whole(values)
    if variant == "local batchnorm":
        for module in model.modules():
            if isinstance(module, distributed.GlobalBatchNorm):
                module.__class__ = torch.nn.BatchNorm2d
    run = train.Run(model, train.make_optimizer(model, 1e-3))
    loss, _ = train.update(run, views[mine].flatten(0, 1), labels, neutral, MultiSimilarityLoss(base=0.5), 1e-3,
                           torch.device("cpu"), "fp32")
    gradients = torch.cat([each.grad.flatten() for each in model.parameters()])
    averages = torch.cat([each.double().flatten() for each in model.buffers()])
    return gradients.numpy(), float(loss), averages.numpy()
