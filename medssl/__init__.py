"""medssl: self-supervised pretraining, few-label segmentation and site-robust brain age for MRI."""

from typing import Any, Final

__version__: Final = "0.1.0"

# Imported on first use: `import medssl` and `medssl --help` must not pay for torch and MONAI.
_LAZY: Final = {
    "METHODS": "medssl.methods",
    "TASKS": "medssl.methods",
    "ENCODERS": "medssl.models",
    "SAMPLERS": "medssl.samplers",
    "COHORTS": "medssl.data.cohorts",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'medssl' has no attribute {name!r}")
