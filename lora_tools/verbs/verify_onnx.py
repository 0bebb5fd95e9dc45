import dataclasses
@dataclasses.dataclass(frozen=True)
class Run:
    """How an ONNX model is run."""
    task: str
    atol: float
    rtol: float
    trust_remote_code: bool
def graphs_at(path): return []
def verify_onnx(*a, **k): raise NotImplementedError
