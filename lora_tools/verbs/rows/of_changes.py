"""What a fine-tune changed, taken out of a model, put into one, and taken away again."""

from __future__ import annotations

from lora_tools.options import (
    AdapterForm,
    Matching,
    Merging,
    Ranks,
    Search,
    Storage,
    Tensors,
    Undoing,
    Writing,
)
from lora_tools.verbs.row import Argument, Verb, take
from lora_tools.verbs.rows.common import (
    ADAPTERS,
    BASE,
    OUT,
    POLICIES,
    RESUMING,
    SPREAD,
    TUNED,
    gate,
)

OF_CHANGES = (
    Verb(
        "extract",
        (BASE, TUNED, OUT),
        (
            *take(Ranks, *POLICIES, "noise_floor", "gavish_donoho", "budget", "max_rank"),
            *take(Search, "activations", "spectrum_cache"),
            *take(Tensors, "include", "exclude", "embeddings", "rest", "layout"),
            *take(AdapterForm, dtype={"unset": "for each module, the dtype of its base tensor"}),
            *take(Search, "svd", "tolerance", "seed", "device"),
            *take(Writing, max_error=gate("a module")),
            *SPREAD,
        ),
        "Make the LoRA adapter that turns BASE into TUNED.",
        """Write the LoRA adapter that turns BASE into TUNED, a full fine-tune of BASE.

        BASE and TUNED are Hugging Face folders, .safetensors files, hub ids
        (org/name[@revision]) or addresses (s3://…, https://…, hf://…). The output is a folder
        that PEFT loads; --to selects another format. Without an option for the rank, it is 32.""",
        "loratools extract org/base ./tuned -o adapter --rank 32",
        "rank energy dtype to consumer max_error dry_run",
        "rank energy error ratio cumulative threshold noise_floor gavish_donoho budget "
        "max_rank activations spectrum_cache include exclude layout alpha rslora dtype "
        "embeddings rest consumer names svd tolerance seed device",
    ),
    Verb(
        "merge",
        (BASE, Argument("adapters", needed=False), OUT),
        (*take(Matching), *take(Storage), *take(Merging), *RESUMING, *SPREAD),
        "Add adapters to the weights of BASE.",
        """Write BASE with the ADAPTERs added to its weights, each times its WEIGHT (1).

        BASE is a Hugging Face folder, a .safetensors file, a hub id (org/name[@revision]) or an
        address (s3://…, https://…, hf://…). The output is a folder or a file, like BASE. The sum
        is computed in float32 or better and rounded once.""",
        "loratools merge base style=0.7 facts -o merged",
        "dtype reversible requantize shard_size dry_run",
        "dtype shard_size reversible requantize activations allow_unmatched allow_other_base",
    ),
    Verb(
        "unmerge",
        (Argument("merged"), ADAPTERS, OUT),
        (
            *take(Undoing),
            *take(
                Matching,
                allow_other_base={
                    "help": "Without a sidecar: also subtract an adapter that is not named in the "
                    "metadata of MERGED."
                },
            ),
            *take(Writing, "force", "dry_run", "plan", "resume", "clean", "shard", "finish"),
            *SPREAD,
        ),
        "Get the base back from a merged checkpoint.",
        """Write the base that MERGED was made from by merging the ADAPTERs.

        With the sidecar of merge --reversible, the result is the base bit for bit, and its digest
        is checked. Without a sidecar, the adapters are subtracted, and a bound on the rounding
        error is printed.""",
        "loratools unmerge merged style=0.7 facts -o base",
        "sidecar dry_run",
    ),
)
