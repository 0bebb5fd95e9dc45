"""The verbs: one file and one row each.

Out of a row are made the command with its options, the signature and the docstring of the public
function, and the list of paths that nothing may be written over.
"""

from __future__ import annotations

from lora_tools.options import (
    AdapterForm,
    Adding,
    Audience,
    Check,
    Combining,
    Comparison,
    Evaluation,
    Formats,
    Graphs,
    Matching,
    Merging,
    NumberFormat,
    Origin,
    Quantized,
    Ranks,
    Running,
    Sampling,
    Search,
    Storage,
    Strength,
    Tensors,
    Undoing,
    View,
    Writing,
)
from lora_tools.options.tables import AGAINST, METHOD
from lora_tools.verbs.row import Argument, Verb, take

_BASE, _TUNED, _ADAPTER, _CHECKPOINT = map(Argument, ("base", "tuned", "adapter", "checkpoint"))
_ADAPTERS, _OUT, _PATH = map(Argument, ("adapters", "out", "path"))
_POLICIES = ("rank", "energy", "error", "ratio", "cumulative", "threshold")
_WRITING = take(Writing, "force", "dry_run", "no_card")
_RESUMING = (*_WRITING, *take(Writing, "resume", "clean", "shard", "finish"))
_RUNNING = take(Running, "jobs", "allow_pickle", "variant", "digest", "progress")
_SPREAD = take(Running)
_ONNX = {"group": "Running an ONNX model"}


def _gate(of: str) -> dict[str, str]:
    return {
        "help": "Quality gate: exit 3 and write nothing but the report if the relative error of "
        f"{of}, or of all together, exceeds X."
    }


def _draw(what: str) -> dict[str, str]:
    return {"help": f"Draw {what}, as .png, .svg or .html (needs loratools[plot])."}


VERBS = {
    verb.name: verb
    for verb in (
        Verb(
            "extract",
            (_BASE, _TUNED, _OUT),
            (
                *take(Ranks, *_POLICIES, "noise_floor", "gavish_donoho", "budget", "max_rank"),
                *take(Search, "activations", "spectrum_cache"),
                *take(Tensors, "include", "exclude", "embeddings", "rest", "layout"),
                *take(AdapterForm, dtype={"unset": "that of each base tensor, for its factors"}),
                *take(Search, "svd", "tolerance", "seed", "device"),
                *take(Writing, max_error=_gate("a module")),
                *_SPREAD,
            ),
            "Make the LoRA adapter that turns BASE into TUNED.",
            """Write the LoRA adapter that turns BASE into TUNED, a fully fine-tuned copy of it.

            BASE and TUNED are Hugging Face folders, .safetensors files or hub ids
            (org/name[@revision]). --out becomes a folder that PEFT loads, or with --to what other
            programs load. Without --rank and --energy the rank is 32.""",
            "loratools extract org/base ./tuned -o adapter --rank 32",
            "rank energy dtype to consumer max_error dry_run",
            "rank energy error ratio cumulative threshold noise_floor gavish_donoho budget "
            "max_rank activations spectrum_cache include exclude layout alpha rslora dtype "
            "embeddings rest consumer names svd tolerance seed device",
        ),
        Verb(
            "merge",
            (_BASE, Argument("adapters", needed=False), _OUT),
            (*take(Matching), *take(Storage), *take(Merging), *_RESUMING, *_SPREAD),
            "Add adapters to the weights of BASE.",
            """Write BASE with the PEFT adapters added to its weights, each times its WEIGHT (1).

            BASE is a Hugging Face folder, a .safetensors file or a hub id (org/name[@revision]);
            --out becomes the same kind of thing. The sum is formed in float32 and rounded once.""",
            "loratools merge base style=0.7 facts -o merged",
            "dtype reversible requantize shard_size dry_run",
            "dtype shard_size reversible requantize activations allow_unmatched allow_other_base",
        ),
        Verb(
            "unmerge",
            (Argument("merged"), _ADAPTERS, _OUT),
            (
                *take(Undoing),
                *take(
                    Matching,
                    allow_other_base={
                        "help": "Without a sidecar: also subtract an adapter that MERGED's "
                        "metadata does not name."
                    },
                ),
                *take(Writing, "force", "dry_run", "resume", "clean", "shard", "finish"),
                *_SPREAD,
            ),
            "Get the base back out of a merged checkpoint.",
            """Write the base that MERGED was made of by merging the adapters.

            With the sidecar of merge --reversible it is the base bit for bit, as its digest says.
            Without, the adapters are subtracted, and a bound on what rounding lost is printed.""",
            "loratools unmerge merged style=0.7 facts -o base",
            "sidecar dry_run",
        ),
        Verb(
            "rescale",
            (_ADAPTER, _OUT),
            (
                *take(Strength),
                *take(
                    Ranks, *_POLICIES, "budget", "sv_fro", "sv_ratio", "sv_cumulative", "max_rank"
                ),
                *take(AdapterForm, "dtype", "base_name", "consumer"),
                *take(Origin),
                *_RESUMING,
                *_SPREAD,
            ),
            "Give an adapter another strength, alpha, rank or form.",
            """Write ADAPTER with another strength, alpha or rank, or as one consumer reads it.

            It stays in its format. Resizing is exact: QR of both factors and an SVD of the small
            core, never a dense product.""",
            "loratools rescale adapter -o small --energy 0.95 --max-rank 16",
            "scale rank energy alpha dtype dry_run",
            "scale alpha effect rank energy error ratio cumulative threshold budget sv_fro "
            "sv_ratio sv_cumulative max_rank rslora dtype consumer base",
        ),
        Verb(
            "combine",
            (_ADAPTERS, _OUT),
            (
                *take(Combining),
                *take(
                    Matching,
                    "allow_other_base",
                    allow_other_base={
                        "group": METHOD,
                        "help": "Also combine adapters whose metadata names different bases.",
                    },
                ),
                *take(
                    Ranks,
                    "rank",
                    "energy",
                    "max_rank",
                    rank={
                        "help": "Cut each module to this rank.",
                        "unset": "cat and linear keep all; the others cut to the largest rank of "
                        "the adapters",
                    },
                ),
                *take(Origin),
                *take(
                    AdapterForm,
                    "to",
                    "dtype",
                    "base_name",
                    to={"unset": "the format of the ADAPTERS, where it is one; else peft"},
                    dtype={"unset": "each factor keeps the widest of the inputs"},
                ),
                *_RESUMING,
                *_SPREAD,
            ),
            "Make one adapter out of several.",
            """Write one adapter that does what the ADAPTERs do together, each times its WEIGHT (1),
            in their format.

            Every method acts on the true changes of the weights, with each adapter's scaling,
            rsLoRA and patterns applied; ranks may differ. The default, cat, is exact.""",
            "loratools combine style=0.7 facts=0.3 -o both --method ties --density 0.2",
            "method density rank dtype to dry_run",
            "method rank energy max_rank density seed majority_sign normalize base "
            "allow_other_base dtype",
        ),
        Verb(
            "convert",
            (_ADAPTER, _OUT),
            (
                *take(Formats, "to", "source"),
                *take(Origin),
                *take(Formats, "drop", "alpha", "enable_lora", "layout"),
                *take(AdapterForm, "dtype", "base_name"),
                *take(Ranks, "rank", "energy", "max_rank"),
                *_RESUMING,
                *_SPREAD,
            ),
            "Write an adapter in another format.",
            """Write ADAPTER in another format; its effect on the weights stays.

            Numbers are renamed, turned and reordered, not changed. Where the format keeps no alpha
            of each module, the scale goes into lora_B. What it cannot hold is refused unless --drop
            names it.""",
            "loratools convert adapter -o adapter.gguf --to gguf --base base",
            "to base rank dtype dry_run",
            "to base source drop alpha enable_lora layout rank energy max_rank dtype",
            usage="-o OUT --to FORMAT",
        ),
        Verb(
            "quantize",
            (_CHECKPOINT, _OUT),
            (
                *take(
                    Adding,
                    "adapters",
                    adapters={
                        "help": "Merge this PEFT adapter, times its WEIGHT (1), before "
                        "quantizing; repeatable."
                    },
                ),
                *take(Matching),
                *take(Tensors, "include", "exclude", "lm_head"),
                *take(NumberFormat),
                *take(Evaluation),
                *take(Storage),
                *take(Writing, max_error=_gate("a tensor")),
                *_SPREAD,
            ),
            "Store CHECKPOINT in four or eight bits (NF4, FP8, NVFP4, …).",
            """Write CHECKPOINT with its linear layers in fewer bits: in four, as bitsandbytes and
            transformers do, or in the number format that --scheme names, which vLLM and
            transformers load.

            CHECKPOINT is a Hugging Face folder, a .safetensors file or a hub id
            (org/name[@revision]); --out loads with from_pretrained as it is. Embeddings, norms and
            heads stay as they are.""",
            "loratools quantize base --adapter style=0.7 -o base-nf4",
            "scheme adapters calibrate eval_text dtype dry_run",
            "adapters scheme quant_type blocksize double_quant compute_dtype quant_storage "
            "scale_search activations calibrate calibration_tokens calibration_seed budget "
            "compensate compensate_iterations eval_text max_loss_increase include exclude lm_head "
            "dtype shard_size max_error allow_unmatched allow_other_base",
        ),
        Verb(
            "dequantize",
            (_CHECKPOINT, _OUT),
            (
                *take(Storage, dtype={"unset": "what each weight was quantized from"}),
                *_RESUMING,
                *_SPREAD,
            ),
            "Turn a quantized CHECKPOINT into a plain one.",
            """Write the plain checkpoint that CHECKPOINT stands for, in whatever number format that
            is read (docs/inspect.md).

            Each weight is computed in float32, as its format's library computes it, and rounded
            once. Plain numbers in pickles, or in parts as distributed training leaves them, become
            safetensors (--allow-pickle).""",
            "loratools dequantize base-nf4 -o base --dtype bfloat16",
            "dtype shard_size dry_run",
        ),
        Verb(
            "export",
            (_CHECKPOINT, _OUT),
            (
                *take(Adding),
                *take(Matching),
                *take(Graphs),
                *take(
                    Storage,
                    "dtype",
                    dtype={"unset": "each tensor keeps its own; see --compute-dtype"},
                ),
                *take(Quantized),
                *take(Check),
                *_WRITING,
                *_RUNNING,
            ),
            "Write CHECKPOINT as ONNX, checked against torch.",
            """Write CHECKPOINT's files and the ONNX graphs that run it, checked against torch.

            CHECKPOINT is a Hugging Face folder or a hub id (org/name[@revision]); with --out the
            same folder, only graphs are added to it. Needs: pip install 'loratools[onnx]'.""",
            "loratools export base --adapter style=0.7 -o onnx",
            "adapters task weights int8 int4 nf4 dry_run",
            "adapters runtime_adapters task no_cache dtype weights nf4 int8 int4 activations "
            "eval_text graph "
            "no_fuse compute_dtype half_io opset atol rtol no_verify keep_failed "
            "trust_remote_code allow_unmatched allow_other_base",
            adds_to="checkpoint",
        ),
        Verb(
            "inspect",
            (_PATH,),
            (*take(View, "plot", plot=_draw("an adapter's own spectrum")), *_RUNNING),
            "Say what a file or folder is.",
            """Say what PATH is: kind, tensors, dtypes, sizes, hashes, metadata, and what is odd
            about it.

            PATH is a checkpoint (quantized or not), an adapter, a sidecar, a spectrum cache, a file
            of activation statistics, or a hub id. For an adapter: ranks, scaling, and the spectrum
            of each module.""",
            "loratools inspect adapter --plot adapter.png",
            "plot",
        ),
        Verb(
            "diff",
            (_BASE, _TUNED),
            (
                *take(Tensors, "include", "exclude"),
                *take(View, plot=_draw("where it changed, spectra, and error against size")),
                *take(Search, "seed", "device"),
                *_RUNNING,
            ),
            "Say what a fine-tune changed, and how low-rank it is.",
            """Say what changed from BASE to TUNED, where, and how low-rank the change is.

            For each module: its relative change, its stable rank, the energy in the leading 8, 16,
            32 and 64 directions, the noise floor that the stored dtypes set, and a recommended
            rank.""",
            "loratools diff org/base ./tuned --plot change.png",
            "sort plot include exclude",
        ),
        Verb(
            "verify",
            (_PATH,),
            (
                *take(Comparison),
                *take(
                    Graphs,
                    "task",
                    task={"help": "What it was exported for, as for export.", **_ONNX},
                ),
                *take(
                    Check,
                    "atol",
                    "rtol",
                    atol={
                        "help": "An output may differ from torch's by this, and --rtol times its "
                        "largest element.",
                        **_ONNX,
                    },
                    rtol={"help": "See --atol.", **_ONNX},
                ),
                *take(
                    Graphs,
                    "trust_remote_code",
                    trust_remote_code={"help": "Run code that comes with the checkpoint.", **_ONNX},
                ),
                *_RUNNING,
            ),
            "Check a merged, quantized or exported model, or adapter.",
            """Check that PATH is what it is said to be: exit code 0 if so, 3 if not, with the worst
            tensor named.

            A merged checkpoint (--base, --adapter): base + adapter to rounding, and by which
            rounding; or the adapter applied twice, at another scale, to another base, tensors left
            out, tied ones apart. An adapter (--base, --tuned): its true error, from the merged
            weights and not from the factors. Quantized (--against): whether quantizing the
            checkpoint gives these bytes, else the error. ONNX (--against): every weight, bit for
            bit, and the outputs in ONNX Runtime against torch's.""",
            "loratools verify merged --base org/base --adapter style=0.7",
            "base adapters against tuned max_error",
            "base adapters tuned against max_error weights_only task atol rtol trust_remote_code",
        ),
        Verb(
            "check",
            (_ADAPTER,),
            (
                *take(Audience),
                *take(
                    Origin,
                    base={
                        "help": "The model it will be loaded on: a checkpoint, or a diffusers "
                        "pipeline's folder. Only names and shapes are read.",
                        "group": AGAINST,
                        "unset": "names and shapes are not looked up",
                    },
                ),
                *take(Running, "jobs", "allow_pickle", "progress"),
            ),
            "Say whether a program reads all of an adapter.",
            """Say what a program makes of ADAPTER before it is loaded there: exit code 0 if it
            reads all of it, 3 if it would refuse it, pass parts of it by or give it another
            strength, with the command that makes what it reads.

            Only headers are read. What is known of the program, and of which version, is a table
            (docs/check.md).""",
            "loratools check adapter --base org/base --for vllm",
            "consumer base",
            "consumer base",
            usage="--for PROGRAM",
        ),
        Verb(
            "collect_stats",
            (Argument("model"), Argument("text"), _OUT),
            (
                *take(Sampling),
                *take(Search, "device"),
                *take(Writing, "force", "dry_run"),
                *_RUNNING,
            ),
            "Measure what a model's layers are given, on text.",
            """Run MODEL over TEXT and write the second moment of each layer's input to --out, for
            extract --activations.

            MODEL is a folder that transformers loads, with its tokenizer; TEXT is UTF-8, as the
            model will see. Needs loratools[stats]; one block of the model is in memory.""",
            "loratools collect-stats org/base sample.txt -o stats.safetensors",
            "kind max_tokens length dry_run",
        ),
    )
}
