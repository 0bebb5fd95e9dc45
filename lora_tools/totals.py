"""What a report's ``totals`` hold, verb by verb: the types of their keys.

Which keys are there depends on the options, and on whether it is a plan, so none must be.
docs/report.md says what each of them means; a test keeps the two together.
"""

from __future__ import annotations

from typing import Any, TypedDict


class PlanTotals(TypedDict, total=False):
    """Of a dry run of a verb that writes: what it would take."""

    input_bytes: int
    disk_needed: int
    disk_free: int


class WorkTotals(PlanTotals, total=False):
    """The same, where the work on tensors is known beforehand."""

    output_bytes: int
    peak_memory: int


class TimedTotals(WorkTotals, total=False):
    """The same, where it is known how long it takes."""

    expected_seconds: float


class LeftOutTotals(TypedDict, total=False):
    """Of what changed and is left out."""

    left_out: int
    left_out_energy: float
    left_out_most: str


class ErrorTotals(TypedDict, total=False):
    """How far the factors of an adapter are from the change that they stand for."""

    relative_error: float
    energy: float
    rank_min: int
    rank_max: int


class ResizedTotals(ErrorTotals, LeftOutTotals, total=False):
    """Of factors whose ranks were chosen anew."""


class SurvivalTotals(TypedDict, total=False):
    """How much of the adapters' change outlasted the rounding to a number format."""

    delta_kept: float
    delta_error: float


class FourBitTotals(TypedDict, total=False):
    """Of a quantized checkpoint."""

    tensors_quantized: int
    tensors_kept: int
    quantization_error: float
    parameters: int
    parameters_quantized: int
    bits_per_quantized_parameter: float
    bits_per_parameter: float
    bytes: int


class OutputsTotals(TypedDict, total=False):
    """Of a graph's outputs against torch's."""

    verified: bool
    outputs_compared: int
    worst_output: str
    max_difference: float
    max_relative_difference: float
    allowed_relative_difference: float
    conditioning: float
    tokens_generated: int
    tokens_same: int
    base_exact: bool
    half_relative_difference: float
    half_allowed_relative_difference: float
    half_conditioning: float
    half_worst_output: str
    half_tokens_same: int


class TextTotals(TypedDict, total=False):
    """What quantizing cost a model on a text."""

    eval_tokens: int
    perplexity: float
    perplexity_unquantized: float
    loss_increase: float
    kl_divergence: float


class LossTotals(TextTotals, total=False):
    """What quantizing cost an exported model."""

    loss_max_difference: float
    loss_max_relative_difference: float
    loss_tokens_same: int


class AgreementTotals(TypedDict, total=False):
    """Of merged weights against what the merge makes of the base's."""

    tensors_acted_on: int
    bit_for_bit_once: int
    bit_for_bit_twice: int
    share_once: float
    share_twice: float


class RuntimeAdapterTotals(OutputsTotals, total=False):
    """Of one file of ``export``'s runtime adapters."""

    bytes: int
    modules: int


class ExtractTotals(ErrorTotals, LeftOutTotals, TimedTotals, total=False):
    """Of ``extract``."""

    modules: int
    gain_bound: float
    saved_whole_energy: float
    parameters: int
    parameters_replaced: int
    bytes: int
    expected_bytes_at_most: int
    quantization_noise: float


class MergeTotals(SurvivalTotals, TimedTotals, total=False):
    """Of ``merge``."""

    tensors_merged: int
    tensors_copied: int
    output_digest: str
    sidecar_bytes: int
    sidecar_share: float
    bytes: int
    output_delta_kept: float
    output_delta_kept_unfed: float
    output_delta_error: float
    output_delta_error_unfed: float


class UnmergeTotals(TimedTotals, total=False):
    """Of ``unmerge``."""

    exact: bool
    base_digest: str
    error_bound: float
    bytes: int


class RescaleTotals(ErrorTotals, WorkTotals, total=False):
    """Of ``rescale``."""

    modules: int
    bytes: int


class CombineTotals(ErrorTotals, WorkTotals, total=False):
    """Of ``combine``."""

    modules: int
    bytes: int


class ConvertTotals(ResizedTotals, WorkTotals, total=False):
    """Of ``convert``."""

    modules: int
    bytes: int


class QuantizeTotals(FourBitTotals, TextTotals, TimedTotals, total=False):
    """Of ``quantize``."""

    compensated_error: float
    output_error: float
    output_error_unfed: float
    compensated_output_error: float
    tensors_fed: int
    expected_bytes_at_most: int


class DequantizeTotals(TimedTotals, total=False):
    """Of ``dequantize``."""

    tensors_dequantized: int
    tensors_copied: int
    output_digest: str
    bytes: int


class ExportTotals(FourBitTotals, OutputsTotals, LossTotals, PlanTotals, total=False):
    """Of ``export``."""

    tensors_merged: int
    tensors_copied: int
    output_digest: str
    graph_bytes: int
    graph_nodes: int
    fused: dict[str, int]
    output_error: float
    output_error_unfed: float
    tensors_fed: int
    runtime_adapters: dict[str, RuntimeAdapterTotals]
    expected_bytes_at_most: int


# "with" is a word of Python's own, which a class cannot have as a field.
_With = TypedDict("_With", {"with": list[str]}, total=False)


class HubTotals(TypedDict):
    """What the Hub will make of a folder."""

    library_name: str | None
    pipeline_tag: str | None
    base_model: list[str]
    base_model_relation: str | None
    license: str | None
    missing: list[str]


class InspectTotals(_With, total=False):
    """Of ``inspect``."""

    kind: str
    tensors: int
    numbers: int
    tensor_bytes: int
    dtypes: dict[str, int]
    metadata: dict[str, dict[str, str]]
    hub: HubTotals
    # of a checkpoint
    architectures: list[str] | None
    model_type: str | None
    files: list[str]
    quantized: dict[str, Any]
    # of an adapter
    modules: int
    format: str
    ranks: list[int]
    alphas: list[float]
    saved_whole: int
    targets: list[str]
    target_modules: Any
    base_model_name_or_path: str | None
    # of a sidecar, and of an ONNX model
    adapters: int
    base_digest: str
    graphs: dict[str, dict[str, Any]]


class DiffTotals(LeftOutTotals, total=False):
    """Of ``diff``."""

    relative_change: float
    changed: int
    unchanged: int
    one_sided: int
    models: list[str]


class VerifyTotals(
    ErrorTotals, LeftOutTotals, AgreementTotals, OutputsTotals, FourBitTotals, total=False
):
    """Of ``verify``."""

    verdict: str
    same: bool
    # of an adapter
    modules: int
    relative_error_acted_on: float
    relative_error_of_all: float
    one_sided: int
    # of quantized weights
    expected_error: float
    bit_for_bit: int
    # of an ONNX model
    weights_compared: int
    weights_unnamed: int
    dtypes: dict[str, int]


class CheckKeys(TypedDict):
    """Of a finding of ``check``: how many keys, and some of them."""

    count: int
    examples: list[str]


class CheckFinding(TypedDict):
    """One thing that ``check`` found."""

    what: str
    keys: CheckKeys
    verdict: str
    next: str


class CheckTotals(TypedDict, total=False):
    """Of ``check``."""

    consumer: str
    as_of: str
    fits: bool
    verdict: str
    findings: list[CheckFinding]
    next: str
    not_checked: list[str]
    modules: int


class CollectStatsTotals(PlanTotals, total=False):
    """Of ``collect_stats``."""

    modules: int
    tokens: int
    sequences: int
    bytes: int
    expected_bytes: int
