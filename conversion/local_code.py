# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
The clone's own `*_aimv2_packing.py`, imported where they lie and once each, as modules of this one.

transformers' loader copies each file that it is asked for, with what that imports, into a package of its own: two files
loaded so do not share the class of their configuration.

    model_class = local_class("modeling_aimv2_packing.Aimv2PackingModel")
"""

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .code_files import REPO


# Ray puts these files into the working directory of a worker, and packages elsewhere.
CODE_FOLDER = str(REPO if (REPO / "modeling_aimv2_packing.py").exists() else Path.cwd())
# Where Python looks for the modules of this one.
__path__ = [CODE_FOLDER]


def hub_module(name: str) -> ModuleType:
    """A file of the clone that the Hub carries, as `"modeling"` for `modeling_aimv2_packing.py`."""
    return import_module(f"{__name__}.{name}_aimv2_packing")


def local_class(name: str) -> Any:
    """A class or function, as an `auto_map` names it: `"modeling_aimv2_packing.Aimv2PackingModel"`."""
    file, _, attribute = name.partition("_aimv2_packing.")
    return getattr(hub_module(file), attribute)


if TYPE_CHECKING:
    from configuration_aimv2_packing import Aimv2PackingConfig, Aimv2PackingImageTextConfig
else:
    Aimv2PackingConfig = local_class("configuration_aimv2_packing.Aimv2PackingConfig")
    Aimv2PackingImageTextConfig = local_class("configuration_aimv2_packing.Aimv2PackingImageTextConfig")
