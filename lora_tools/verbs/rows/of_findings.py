"""What is measured and said, and not changed."""

from __future__ import annotations

from lora_tools.options import (
    Audience,
    Check,
    Comparison,
    Graphs,
    Origin,
    Running,
    Sampling,
    Search,
    Tensors,
    View,
    Writing,
)
from lora_tools.options.tables import AGAINST
from lora_tools.verbs.row import Argument, Verb, take
from lora_tools.verbs.rows.common import ADAPTER, BASE, OUT, PATH, RUNNING, TUNED

_ONNX = {"group": "Running an ONNX model"}


def _draw(what: str) -> dict[str, str]:
    return {"help": f"Draw {what}, as .png, .svg or .html (needs loratools[plot])."}


OF_FINDINGS = (
    Verb(
        "inspect",
        (PATH,),
        (*take(View, "plot", plot=_draw("an adapter's own spectrum")), *RUNNING),
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
        (BASE, TUNED),
        (
            *take(Tensors, "include", "exclude"),
            *take(View, plot=_draw("where it changed, spectra, and error against size")),
            *take(Search, "seed", "device"),
            *RUNNING,
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
        (PATH,),
        (
            *take(Comparison),
            *take(
                Graphs, "task", task={"help": "What it was exported for, as for export.", **_ONNX}
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
            *RUNNING,
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
        (ADAPTER,),
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
        (Argument("model"), Argument("text"), OUT),
        (*take(Sampling), *take(Search, "device"), *take(Writing, "force", "dry_run"), *RUNNING),
        "Measure what a model's layers are given, on text.",
        """Run MODEL over TEXT and write the second moment of each layer's input to --out, for
        extract --activations.

        MODEL is a folder that transformers loads, with its tokenizer; TEXT is UTF-8, as the
        model will see. Needs loratools[stats]; one block of the model is in memory.""",
        "loratools collect-stats org/base sample.txt -o stats.safetensors",
        "kind max_tokens length dry_run",
    ),
)
