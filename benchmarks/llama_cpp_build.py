"""How llama-cpp-python is compiled from source where it is a peer."""

from __future__ import annotations

from pathlib import Path


def cmake_arguments() -> list[str]:
    """Return how llama.cpp is compiled: for this processor, without pictures (a third less), and without AMX.

    A build for the native processor takes AMX where the processor names it, and dies at its first matrix (ldtilecfg) on
    a virtual machine whose kernel does not allow it.
    """
    known = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").is_file() else []
    more = {"AVX512": "avx512f", "AVX512_VBMI": "avx512vbmi", "AVX512_VNNI": "avx512_vnni",
            "AVX512_BF16": "avx512_bf16", "AVX_VNNI": "avx_vnni"}  # fmt: skip
    own = [f"-DGGML_{name}=ON" for name, flag in more.items() if flag in known]
    return ["-DLLAVA_BUILD=OFF", *(["-DGGML_NATIVE=OFF", *own] if "amx_tile" in known else [])]
