from typing import TypedDict

class BuildInfo(TypedDict):
    version: str
    cxx_compiler: str
    with_cuda: bool
    cuda_compiler: str | None
    cuda_architectures: str | None

class LaunchPlan(TypedDict):
    threads: int
    rows_per_block: int
    vector_elements: int
    elements_per_thread: int
    blocks: int
    programmatic_launch: bool

def build_info() -> BuildInfo: ...
def cpu_isa() -> str: ...
def supported_isas() -> list[str]: ...
def set_cpu_isa(name: str) -> None: ...
def launch_plan(
    rows: int, dim: int, dtype: str, compute_capability: int, aligned: bool = True
) -> LaunchPlan: ...
