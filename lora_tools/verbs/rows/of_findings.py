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
        "Show what a file or folder is.",
        """Show what PATH is: its kind, tensors, dtypes, sizes, hashes and metadata, and anything
        unusual.

        PATH is a checkpoint (quantized or not), an adapter, an ONNX model, a sidecar, a spectrum
        cache, a file of activation statistics, or a hub id. For an adapter it shows ranks, scaling,
        and the spectrum of each module.""",
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
        "Show what a fine-tune changed, and recommend a rank.",
        """Show what changed from BASE to TUNED, where, and how close to low-rank the change is.

        For each module: its relative change, its stable rank, the energy in the leading 8, 16,
        32 and 64 directions, the noise floor of the stored dtypes, and a recommended rank.""",
        "loratools diff org/base ./tuned --plot change.png",
        "sort plot include exclude",
    ),
    Verb(
        "verify",
        (PATH,),
        (
            *take(Comparison),
            *take(
                Graphs,
                "task",
                task={"help": "The task that it was exported for, as in export.", **_ONNX},
            ),
            *take(
                Check,
                "atol",
                "rtol",
                atol={
                    "help": "An output may differ from torch's by this much, plus --rtol times "
                    "its largest element.",
                    **_ONNX,
                },
                rtol={"help": "See --atol.", **_ONNX},
            ),
            *take(
                Graphs,
                "trust_remote_code",
                trust_remote_code={
                    "help": "Run the Python code that comes with the checkpoint.",
                    **_ONNX,
                },
            ),
            *RUNNING,
        ),
        "Check a merged, quantized or exported model, or adapter.",
        """Check that PATH is what it should be. The exit code is 0 if it is, and 3 if not. The
        error names the worst tensor.

        A merged checkpoint (--base, --adapter): is it base + adapter, and how was it rounded? If
        not: was the adapter applied twice, at another scale or to another base, are tensors left
        out, do tied ones differ? An adapter (--base, --tuned): its true error, measured on the
        merged weights. A quantized checkpoint (--against): does quantizing give these bytes, and
        if not, how large is the error? ONNX (--against): every weight bit for bit, and the
        outputs of ONNX Runtime compared with torch's.""",
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
                    "help": "The model that it will be loaded on: a checkpoint, or the folder of a "
                    "diffusers pipeline. Only names and shapes are read.",
                    "group": AGAINST,
                    "unset": "names and shapes are not checked",
                },
            ),
            *take(Running, "jobs", "allow_pickle", "progress"),
        ),
        "Check whether a program will read all of an adapter.",
        """Show what a program will make of ADAPTER, before you load it there. The exit code is 0
        if it reads all of the adapter. It is 3 if the program refuses the adapter, ignores parts
        of it or gives it another strength. Then the command is printed that makes an adapter
        which the program can read.

        Only headers are read. docs/check.md lists what is known of each program.""",
        "loratools check adapter --base org/base --for vllm",
        "consumer base",
        "consumer base",
        usage="--for PROGRAM",
    ),
    Verb(
        "collect_stats",
        (Argument("model"), Argument("text"), OUT),
        (*take(Sampling), *take(Search, "device"), *take(Writing, "force", "dry_run"), *RUNNING),
        "Collect statistics of a model's activations on text.",
        """Run MODEL over TEXT, and write the second moment of each layer's input to --out. These
        statistics are for the option --activations of other commands.

        MODEL is a folder that transformers loads, with its tokenizer. TEXT is a UTF-8 file with
        text like that which the model will see. One block of the model is in memory at a time.
        Needs: pip install 'loratools[stats]'.""",
        "loratools collect-stats org/base sample.txt -o stats.safetensors",
        "kind max_tokens length dry_run",
    ),
)
