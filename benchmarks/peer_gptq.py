"""llm-compressor's GPTQ, four bits in groups of 64, on the calibration text of quantize_loss.py.

    python benchmarks/peer_gptq.py MODEL TEXT OUT

In an environment of its own (llmcompressor, datasets, transformers); the result goes through
``loratools dequantize`` to the losses of quantize_loss.py. TEXT is cut into 64 sequences of 128
tokens.
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SEQUENCES, LENGTH = 64, 128


def main() -> None:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier

    folder, text, out = sys.argv[1:]
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = tokenizer(Path(text).read_text(encoding="utf-8"), return_tensors="pt")["input_ids"]
    rows = tokens[0, : SEQUENCES * LENGTH].view(-1, LENGTH)
    sample = Dataset.from_dict(
        {"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()}
    )
    weights = QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=64
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    started = time.process_time()
    oneshot(
        model=model,
        dataset=sample,
        recipe=GPTQModifier(config_groups={"all": scheme}, ignore=["lm_head"]),
        tokenizer=tokenizer,
        max_seq_length=LENGTH,
        num_calibration_samples=SEQUENCES,
        shuffle_calibration_samples=False,
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{time.process_time() - started:.1f} CPU seconds, peak {peak:.0f} MiB")
    model.save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
