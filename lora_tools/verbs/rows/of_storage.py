"""A checkpoint in another number format, or as ONNX."""

from __future__ import annotations

from lora_tools.options import (
    Adding,
    Check,
    Evaluation,
    Graphs,
    Matching,
    NumberFormat,
    Quantized,
    Storage,
    Tensors,
    Writing,
)
from lora_tools.verbs.row import Verb, take
from lora_tools.verbs.rows.common import CHECKPOINT, OUT, RESUMING, RUNNING, SPREAD, WRITING, gate

OF_STORAGE = (
    Verb(
        "quantize",
        (CHECKPOINT, OUT),
        (
            *take(
                Adding,
                "adapters",
                adapters={
                    "help": "Merge this adapter, times its WEIGHT (1), before quantizing; "
                    "repeatable."
                },
            ),
            *take(Matching),
            *take(Tensors, "include", "exclude", "lm_head"),
            *take(NumberFormat),
            *take(Evaluation),
            *take(Storage),
            *take(Writing, max_error=gate("a tensor")),
            *SPREAD,
        ),
        "Store CHECKPOINT in four or eight bits (NF4, FP8, NVFP4, …).",
        """Write CHECKPOINT with its linear layers in fewer bits. The default is four bits, as in
        bitsandbytes and transformers. --scheme selects other formats, which vLLM and transformers
        load.

        CHECKPOINT is a Hugging Face folder, a .safetensors file, a hub id
        (org/name[@revision]) or an address (s3://…, https://…, hf://…). from_pretrained loads
        the output. Embeddings, norms and heads are not quantized.""",
        "loratools quantize base --adapter style=0.7 -o base-nf4",
        "scheme adapters calibrate eval_text dtype dry_run",
        "adapters scheme quant_type blocksize double_quant compute_dtype quant_storage "
        "scale_search activations calibrate calibration_tokens calibration_seed budget "
        "compensate compensate_iterations eval_text max_loss_increase include exclude lm_head "
        "dtype shard_size max_error allow_unmatched allow_other_base",
    ),
    Verb(
        "dequantize",
        (CHECKPOINT, OUT),
        (
            *take(Storage, dtype={"unset": "the dtype that each weight had before quantization"}),
            *RESUMING,
            *SPREAD,
        ),
        "Turn a quantized CHECKPOINT into a plain one.",
        """Write CHECKPOINT as a plain checkpoint. It can have any of the number formats that are
        read (docs/inspect.md).

        Each weight is computed in float32, in the same way as by the library of its format, and
        rounded once. With --allow-pickle, pickles and checkpoints of distributed training are
        also converted to safetensors.""",
        "loratools dequantize base-nf4 -o base --dtype bfloat16",
        "dtype shard_size dry_run",
    ),
    Verb(
        "export",
        (CHECKPOINT, OUT),
        (
            *take(Adding),
            *take(Matching),
            *take(Graphs),
            *take(
                Storage, "dtype", dtype={"unset": "each tensor keeps its own; see --compute-dtype"}
            ),
            *take(Quantized),
            *take(Check),
            *WRITING,
            *RUNNING,
        ),
        "Write CHECKPOINT as ONNX, checked against torch.",
        """Write the files of CHECKPOINT with ONNX graphs, and check the graphs against torch.

        CHECKPOINT is a Hugging Face folder or a hub id (org/name[@revision]). If --out is the
        same folder, only graphs are added to it. Needs: pip install 'loratools[onnx]'.""",
        "loratools export base --adapter style=0.7 -o onnx",
        "adapters task weights int8 int4 nf4 dry_run",
        "adapters runtime_adapters task no_cache dtype weights nf4 int8 int4 activations "
        "eval_text graph "
        "no_fuse compute_dtype half_io opset atol rtol no_verify keep_failed "
        "trust_remote_code allow_unmatched allow_other_base",
        adds_to="checkpoint",
    ),
)
