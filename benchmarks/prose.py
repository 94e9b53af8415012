"""Real English that every installation has: the documentation strings of torch and of the standard library."""

from __future__ import annotations

import argparse
import inspect
import subprocess
import typing

import torch


def prose() -> str:
    modules = (torch.nn, torch.optim, torch, argparse, subprocess, typing, inspect)
    texts = (inspect.getdoc(thing) for module in modules for thing in (module, *vars(module).values()))
    return "\n\n".join(dict.fromkeys(text for text in texts if text and len(text) > 400))
