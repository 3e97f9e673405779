"""What this machine has, and what is wrong with it."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from medssl.core.errors import MedsslError
from medssl.core.files import atomic_write
from medssl.runs.folder import environment

MIN_FREE_GB = 5.0
MIN_SHARED_MEMORY_GB = 0.5


@dataclass
class Diagnosis:
    """Facts by name, and every problem with its remedy."""

    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def text(self) -> str:
        """A table of facts and the list of problems."""
        width = max(len(name) for name in self.facts)
        lines = [f"{name:<{width}}  {value}" for name, value in self.facts.items()]
        lines += (
            ["", *(f"PROBLEM: {problem}" for problem in self.problems)] if self.problems else ["", "Nothing wrong."]
        )
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The same for machines."""
        return asdict(self)


def examine(folder: Path) -> Diagnosis:
    """Look at versions, devices, memory and disk, and try to write into ``folder``."""
    found = environment()
    diagnosis = Diagnosis()
    facts, problems = diagnosis.facts, diagnosis.problems
    facts |= {"medssl": found["medssl"], "Python": found["python"], "platform": found["platform"], **found["versions"]}
    facts["CPU cores"] = os.cpu_count()
    facts["torch threads"] = torch.get_num_threads()
    _devices(facts, problems)
    _versions(found["versions"], problems)
    _disk(folder, facts, problems)
    return diagnosis


def _devices(facts: dict[str, Any], problems: list[str]) -> None:
    if not torch.cuda.is_available():
        built = torch.version.cuda
        facts["GPU"] = "none (training runs on the CPU)"
        if built and shutil.which("nvidia-smi"):
            problems.append(f"torch was built for CUDA {built} and a driver is there, but no GPU can be used: check it")
        elif shutil.which("nvidia-smi"):
            problems.append("there is an NVIDIA driver, but torch is a CPU build: install a CUDA build of torch")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        facts[f"GPU {index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    facts["bf16 on GPU"] = torch.cuda.is_bf16_supported(including_emulation=False)
    cudnn = torch.backends.cudnn.version()
    facts["cuDNN"] = cudnn
    if cudnn and 90800 <= cudnn < 91500:
        problems.append(
            f"cuDNN {cudnn} computes 3D convolutions in half precision slowly and, for large shapes, wrongly: "
            "use 9.15 or newer, or --precision 32"
        )


def _versions(versions: dict[str, str], problems: list[str]) -> None:
    for package, version in versions.items():
        if version == "not installed":
            problems.append(f"{package} is not installed: run pip install medssl again")
    numbers = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if numbers < (2, 10):
        problems.append(f"torch {torch.__version__} reads foreign weights unsafely (CVE-2026-24747): use 2.10 or newer")
    if versions["lightning-fabric"] in ("2.6.2", "2.6.3"):
        problems.append("lightning-fabric 2.6.2 and 2.6.3 were malicious uploads: replace it and rotate your secrets")


def _disk(folder: Path, facts: dict[str, Any], problems: list[str]) -> None:
    try:
        probe = atomic_write(folder / ".medssl-doctor", os.urandom(1 << 20))
        probe.unlink()
        free = shutil.disk_usage(folder).free / 1e9
        facts[f"free disk ({folder})"] = f"{free:.1f} GB"
        facts["write test"] = "ok"
        if free < MIN_FREE_GB:
            problems.append(f"only {free:.1f} GB free in {folder}: caches and checkpoints need more")
    except (MedsslError, OSError) as error:
        facts["write test"] = "failed"
        problems.append(f"cannot write into {folder}: {str(error).splitlines()[0]}")
    shared = Path("/dev/shm")  # noqa: S108 - looked at, not written to
    if shared.is_dir():
        size = shutil.disk_usage(shared).total / 1e9
        facts["shared memory"] = f"{size:.1f} GB"
        if size < MIN_SHARED_MEMORY_GB:
            problems.append(f"shared memory is only {size:.2f} GB: in a container, start it with --shm-size=2g or more")
