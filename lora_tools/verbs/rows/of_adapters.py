"""One adapter made out of others."""

from __future__ import annotations

from lora_tools.options import AdapterForm, Combining, Formats, Matching, Origin, Ranks, Strength
from lora_tools.options.tables import METHOD
from lora_tools.verbs.row import Verb, take
from lora_tools.verbs.rows.common import ADAPTER, ADAPTERS, OUT, POLICIES, RESUMING, SPREAD

OF_ADAPTERS = (
    Verb(
        "rescale",
        (ADAPTER, OUT),
        (
            *take(Strength),
            *take(Ranks, *POLICIES, "budget", "sv_fro", "sv_ratio", "sv_cumulative", "max_rank"),
            *take(AdapterForm, "dtype", "base_name", "consumer"),
            *take(Origin),
            *RESUMING,
            *SPREAD,
        ),
        "Give an adapter another strength, alpha, rank or form.",
        """Write ADAPTER with another strength, alpha or rank, or in the form that a program needs.

        The format stays the same. Resizing is exact: it uses a QR of both factors and an SVD of
        the small core, never a dense product.""",
        "loratools rescale adapter -o small --energy 0.95 --max-rank 16",
        "scale rank energy alpha dtype dry_run",
        "scale alpha effect rank energy error ratio cumulative threshold budget sv_fro "
        "sv_ratio sv_cumulative max_rank rslora dtype consumer base",
    ),
    Verb(
        "combine",
        (ADAPTERS, OUT),
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
                    "unset": "cat and linear keep everything; the others cut to the largest rank "
                    "of the adapters",
                },
            ),
            *take(Origin),
            *take(
                AdapterForm,
                "to",
                "dtype",
                "base_name",
                to={"unset": "the format of the ADAPTERS, if it is the same for all; else peft"},
                dtype={"unset": "for each factor, the widest dtype of the inputs"},
            ),
            *RESUMING,
            *SPREAD,
        ),
        "Make one adapter from several.",
        """Write one adapter with the effect of all ADAPTERs together, each times its WEIGHT (1), in
        the same format.

        All methods work on the true changes of the weights, with scaling, rsLoRA and patterns
        applied. The ranks may differ. The default, cat, is exact.""",
        "loratools combine style=0.7 facts=0.3 -o both --method ties --density 0.2",
        "method density rank dtype to dry_run",
        "method rank energy max_rank density seed majority_sign normalize base "
        "allow_other_base dtype",
    ),
    Verb(
        "convert",
        (ADAPTER, OUT),
        (
            *take(Formats, "to", "source"),
            *take(Origin),
            *take(Formats, "drop", "alpha", "enable_lora", "layout"),
            *take(AdapterForm, "dtype", "base_name"),
            *take(Ranks, "rank", "energy", "max_rank"),
            *RESUMING,
            *SPREAD,
        ),
        "Write an adapter in another format.",
        """Write ADAPTER in another format. Its effect on the weights does not change.

        Tensors are renamed, transposed and reordered, but their numbers are not changed. If the
        format stores no alpha for each module, the scale goes into lora_B. Parts that the format
        cannot hold are refused, unless --drop leaves them out.""",
        "loratools convert adapter -o adapter.gguf --to gguf --base base",
        "to base rank dtype dry_run",
        "to base source drop alpha enable_lora layout rank energy max_rank dtype",
        usage="-o OUT --to FORMAT",
    ),
)
