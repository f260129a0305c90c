"""Stands in for torchaudio, which newer ComfyUI imports at the top of files that have nothing to do with pictures: importing works, and
using any of it says what is missing.
"""
import importlib
import importlib.abc
import importlib.machinery
import sys


class Missing:
    def __init__(self, *args, **kwargs):
        raise RuntimeError("torchaudio is not installed; a stub stands in for it, which makes no sound")


class Modules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Any `torchaudio.x.y`, each with any name in it."""

    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.startswith("torchaudio.") else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        module.__getattr__ = lambda name: Missing


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return importlib.import_module(f"{__name__}.{name}")


sys.meta_path.append(Modules())
