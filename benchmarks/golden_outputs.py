"""What a fixed set of runs over all verbs writes, says and returns: recorded, or compared.

    PYTHONPATH=TREE python benchmarks/golden_outputs.py OUT.json [--against EARLIER.json]

For work that must not change a byte: record before, compare after; exit 1 where they differ. TREE
is the checkout whose ``lora_tools`` runs, and must be given. The inputs are made from seeds in a
temporary folder. Their hashes are recorded, too: other versions of torch, transformers or PEFT may
make others. ``--quick`` leaves out the exports that trace another model than the first, which take
most of the time. ``--keep FOLDER`` runs in FOLDER/runs, a new folder, and leaves every file there.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import io
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # as the command line does
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "agg"

import gguf
import onnx
import peft
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import lora_tools
import lora_tools.cli
import lora_tools.nn

# ------------------------------------------------------------------------------------ the inputs

# Name, class, and what its config has beside SIZES. Each model also gets a NAME-tuned.
VOCAB = 96
SIZES = json.loads("""{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}""")
MODELS = """
llama       LlamaForCausalLM   {"num_key_value_heads": 2, "attention_bias": true}
tied        LlamaForCausalLM   {"num_key_value_heads": 2, "tie_word_embeddings": true}
deep        Qwen3ForCausalLM   {"num_key_value_heads": 2, "num_hidden_layers": 6, "head_dim": 8}
gpt2        GPT2LMHeadModel    {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
bert        BertModel          {}
classifier  BertForSequenceClassification  {}
mixtral     MixtralForCausalLM             {"num_key_value_heads": 2, "num_local_experts": 3}
vit         ViTForImageClassification      {"image_size": 16, "patch_size": 4, "num_labels": 3}
t5          T5ForConditionalGeneration     {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2,
    "num_heads": 4, "decoder_start_token_id": 0}
"""
# Name, model, and PEFT's config.
ADAPTERS = """
even     llama  {"target_modules": ["q_proj", "k_proj", "down_proj"], "r": 4, "lora_alpha": 6}
uneven   llama  {"target_modules": ["q_proj", "k_proj", "o_proj", "down_proj"], "r": 4,
    "lora_alpha": 6, "rank_pattern": {"down_proj": 3}, "alpha_pattern": {"1.self_attn.q_proj": 5}}
rslora   llama  {"target_modules": ["k_proj", "up_proj"], "r": 3, "lora_alpha": 5,
    "use_rslora": true}
dora     llama  {"target_modules": ["q_proj", "v_proj"], "r": 4, "use_dora": true}
bias     llama  {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_bias": true}
ends     llama  {"target_modules": ["embed_tokens", "lm_head", "v_proj"], "r": 4}
saved    llama  {"target_modules": ["v_proj"], "r": 4, "modules_to_save": ["norm"], "bias": "all"}
tokens   llama  {"target_modules": ["v_proj"], "r": 4, "trainable_token_indices": [3, 9]}
ia3      llama  {"peft_type": "IA3", "target_modules": ["k_proj", "v_proj", "down_proj"],
    "feedforward_modules": ["down_proj"]}
head     tied   {"target_modules": ["lm_head"], "r": 3}
one      tied   {"target_modules": ["embed_tokens", "up_proj"], "r": 3, "ensure_weight_tying": true}
conv1d   gpt2   {"target_modules": ["c_attn", "c_proj"], "r": 4, "fan_in_fan_out": true}
conv1d-dora  gpt2  {"target_modules": ["c_attn", "c_fc"], "use_dora": true, "fan_in_fan_out": true}
query    bert   {"target_modules": ["query", "dense"], "r": 4, "lora_alpha": 4, "lora_bias": true}
experts  mixtral  {"target_modules": ["q_proj"], "r": 2, "target_parameters":
    ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
nets     net    {"target_modules": ["image", "audio", "video", "wte", "head"], "r": 4}
nets-dora  net  {"target_modules": ["image", "audio", "head"], "r": 4, "use_dora": true}
"""
# The adapter "even" with this in its config, which no command takes.
SPOILT = """
odd      {"r": 7}
pissa    {"init_lora_weights": "pissa"}
adalora  {"peft_type": "ADALORA"}
prompt   {"peft_type": "PROMPT_TUNING"}
"""


def make_inputs() -> None:
    """Tiny models, fine-tunes and adapters, and some files by hand, in the current folder."""
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    for name, kind, config in rows(MODELS, 3):
        torch.manual_seed(0)
        made = getattr(hf, kind)(getattr(hf, kind).config_class(**SIZES | config)).eval()
        perturb(made, 0.1, 0)
        (made.bfloat16() if name == "tied" else made).save_pretrained(name)
        if name == "llama":
            made.save_pretrained("shards", max_shard_size="20kB")
        if name == "mixtral":
            made.save_pretrained("fused", save_original_format=False)
    net = torch.nn.ModuleDict()
    net["audio"], net["image"] = torch.nn.Conv1d(6, 8, 5), torch.nn.Conv2d(4, 8, 3, padding=1)
    net["video"], net["grouped"] = torch.nn.Conv3d(3, 6, 2), torch.nn.Conv2d(8, 12, 3, groups=4)
    net["wte"], net["head"] = torch.nn.Embedding(11, 6), torch.nn.Linear(6, 9)
    save("net/model.safetensors", net.state_dict())
    save("pipe/unet/diffusion_pytorch_model.safetensors", net.state_dict())
    Path("pipe/model_index.json").write_text('{"unet": ["diffusers", "UNet2DConditionModel"]}')
    noise = torch.Generator().manual_seed(1)
    shapes = {"qkv": (48, 16), "wide": (160, 256), "tall": (300, 200), "norm": (16,)}
    bare = {f"net.{k}.weight": torch.randn(s, generator=noise) for k, s in shapes.items()}
    bare["net.tall.weight"] = bare["net.tall.weight"].bfloat16()
    save("bare.safetensors", bare | {"net.long.weight": bare["net.qkv.weight"].double() / 3})
    for name in [*(row[0] for row in rows(MODELS, 3)), "net", "shards", "bare.safetensors"]:
        tune(Path(name))
    tuned = load_file("llama-tuned/model.safetensors")
    grown = {k: torch.cat([v, v[:4]]) if len(v) == VOCAB else v for k, v in tuned.items()}
    save("grown/model.safetensors", grown)
    save("nan/model.safetensors", {k: v / 0 if "1.mlp.up" in k else v for k, v in tuned.items()})
    Path("pickled").mkdir()
    torch.save(tuned, "pickled/pytorch_model.bin")
    for name in ("pickled", "grown", "nan"):
        shutil.copy("llama/config.json", name)
    Path("broken.safetensors").write_bytes(b"\xff" * 64)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    for name in ("llama", "gpt2"):
        hf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(name)
    Path("words.txt").write_text(" ".join(f"w{i * i % VOCAB}" for i in range(200)))
    for name, base, config in rows(ADAPTERS, 3):
        train(copy.deepcopy(net) if base == "net" else load(base), Path(name), config)
    make_adapters()


def make_adapters() -> None:
    """Those that PEFT does not write: LyCORIS's kinds, loralib's own, and some to be refused."""
    noise = torch.Generator().manual_seed(2)

    def keys(module: str, **shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
        made = {f"{module}.{k}": torch.randn(s, generator=noise) for k, s in shapes.items()}
        return made | ({f"{module}.alpha": torch.tensor(2.0)} if "lycoris" in module else {})

    loha = {f"hada_w{i}_{x}": s for i in (1, 2) for x, s in (("a", (160, 3)), ("b", (3, 256)))}
    save("loha.safetensors", keys("lycoris_net_wide", **loha))
    lokr = keys("lycoris_net_wide", lokr_w1=(10, 16), lokr_w2_a=(16, 2), lokr_w2_b=(2, 16))
    save("lokr.safetensors", lokr | keys("lycoris_net_qkv", diff=(48, 16)))
    blocks = keys("net.qkv", lora_A=(4, 16), lora_B=(32, 2))
    torch.save(blocks, "blocks.pt")
    save("blocks.safetensors", blocks)
    for name, config in rows(SPOILT, 2):
        shutil.copytree("even", name)
        edit(Path(name), config)


def rows(table: str, columns: int = 1) -> Iterator[list[Any]]:
    """The rows of a table; what is indented goes on with the row above. A last column of several
    is JSON."""
    for row in filter(None, re.sub(r"\n +", " ", table).splitlines()):
        cells: list[Any] = row.split(maxsplit=columns - 1) if columns > 1 else [row]
        yield [*cells[:-1], json.loads(cells[-1])] if columns > 1 else cells


def save(path: str, tensors: dict[str, torch.Tensor]) -> None:
    """A safetensors file, in a new folder if need be."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, {"format": "pt"})


def load(name: str) -> Any:
    """The model in a folder, by the class that its config names."""
    config = hf.AutoConfig.from_pretrained(name)
    return getattr(hf, config.architectures[0]).from_pretrained(name).eval()


def perturb(model: torch.nn.Module, size: float, seed: int, only: str = "") -> None:
    """Noise on every parameter; magnitudes stay positive."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                new = parameter + size * torch.randn(parameter.shape, generator=noise)
                parameter.copy_(new.abs() if "magnitude" in name else new)


def tune(base: Path) -> None:
    """A copy named -tuned: most tensors changed by a little noise, matrices by a rank of 3, too."""
    tuned = base.with_name(f"{base.stem}-tuned{base.suffix}")
    shutil.copytree(base, tuned) if base.is_dir() else shutil.copy(base, tuned)
    noise = torch.Generator().manual_seed(4)
    for file in sorted(tuned.glob("*.safetensors")) if base.is_dir() else [tuned]:
        tensors = load_file(file)
        for name, old in sorted(tensors.items()):
            change = 0.01 * torch.randn(old.shape, generator=noise)
            if old.ndim > 1:
                left = torch.randn(len(old), 3, generator=noise)
                right = torch.randn(3, old[0].numel(), generator=noise)
                change += 0.1 * (left @ right).reshape(old.shape)
            if "1.mlp.gate" not in name:
                tensors[name] = (old + change).to(old.dtype)
        save_file(tensors, file, {"format": "pt"})


def train(model: Any, out: Path, config: dict[str, Any]) -> None:
    """An adapter by PEFT itself, every trained number of it random."""
    torch.manual_seed(7)
    kind = peft.IA3Config if config.pop("peft_type", "") == "IA3" else peft.LoraConfig
    model = peft.get_peft_model(model, kind(**config))
    perturb(model, 0.2, 7)
    model.save_pretrained(out, save_embedding_layers=False)
    edit(out, {})


def edit(adapter: Path, change: dict[str, Any]) -> None:
    """Its config with these entries, and its lists sorted: PEFT writes sets in any order."""
    file = adapter / "adapter_config.json"
    text = json.loads(file.read_text()) | change
    lists = {k: sorted(v) for k, v in text.items() if isinstance(v, list)}
    file.write_text(json.dumps(text | lists, indent=2, sort_keys=True))


# -------------------------------------------------------------------------------------- the runs

# A word in braces stands for each of its words here, and the row for as many runs.
EACH = {
    "{sum}": "cat linear svd",
    "{prune}": "ties dare_linear dare_ties magnitude_prune",
    "{format}": "peft kohya lycoris diffusers torchtune mlx loralib gguf onnxruntime",
    "{verb}": "extract merge unmerge rescale combine convert quantize dequantize export inspect "
    "diff verify collect-stats",
}
RUNS = """
collect-stats llama words.txt -o stats.safetensors --length 32
collect-stats llama words.txt -o stats-diagonal.safetensors --kind diagonal --length 16
    --max-tokens 64
collect-stats gpt2 words.txt -o stats-gpt2.safetensors --length 50 -v
collect-stats llama words.txt -o stats-plan.safetensors --length 32 --dry-run
collect-stats llama words.txt -o stats-refused.safetensors
collect-stats bert words.txt -o stats-bert.safetensors --length 32

extract llama llama-tuned -o x
extract llama llama-tuned -o x --rank 2
extract llama llama-tuned -o x --rank 1 --force
extract llama llama-tuned -o x-rank --rank 4 -j 1
extract llama llama-tuned -o x-energy --energy 0.6 -v
extract llama llama-tuned -o x-error --error 0.5 --max-rank 12
extract llama llama-tuned -o x-ratio --ratio 0.3 --svd exact
extract llama llama-tuned -o x-cumulative --cumulative 0.5 -j 3
extract llama llama-tuned -o x-threshold --threshold 0.4
extract llama llama-tuned -o x-floor --noise-floor
extract llama llama-tuned -o x-gavish --gavish-donoho
extract llama llama-tuned -o x-budget --budget 20kB --embeddings skip --rest skip
extract llama llama-tuned -o x-budget-count --budget 3000 --max-rank 6
extract llama llama-tuned -o x-cache --rank 3 --spectrum-cache cache.safetensors
extract llama llama-tuned -o x-cached --energy 0.5 --spectrum-cache cache.safetensors
extract llama llama-tuned -o x-cached-budget --budget 4k --spectrum-cache cache.safetensors
extract llama llama-tuned -o x-inputs --rank 3 --activations stats.safetensors
extract llama llama-tuned -o x-inputs-budget --budget 3k --activations stats-diagonal.safetensors
extract llama llama-tuned -o x-vllm --rank 4 --for vllm --embeddings skip --rest skip
extract llama llama-tuned -o x-cpp --rank 3 --for llama.cpp --rest skip --dtype float16
extract llama llama-tuned -o x-save --rank 2 --embeddings save --names stored
extract llama llama-tuned -o x-some --rank 2 -i q_proj -i mlp -e layers.1 --rslora --alpha 16
    --dtype bfloat16
extract llama llama-tuned -o x-attention --rank 3 -i self_attn --rest skip --json -q
extract llama llama-tuned -o x-plan --dry-run -v
extract llama llama-tuned -o x-gate --rank 1 --max-error 0.01
extract llama llama-tuned -o x-refused --rest error
extract llama llama-tuned -o x-refused --for vllm --rank 4
extract llama llama-tuned -o x-refused --rank 4 --energy 0.5
extract llama llama-tuned -o x-refused --energy 1.5
extract tied tied-tuned -o x-tied --rank 4
extract tied tied-tuned -o x-tied-save --rank 4 --embeddings save --dtype float32
extract gpt2 gpt2-tuned -o x-gpt2 --rank 4
extract gpt2 gpt2-tuned -o x-gpt2-inputs --rank 4 --activations stats-gpt2.safetensors
extract gpt2 gpt2-tuned -o x-gpt2-layout --rank 2 --layout c_attn=merged-conv1d:3 --rest skip
extract bert classifier-tuned -o x-new-head --rank 4
extract classifier classifier-tuned -o x-classifier --energy 0.9 --names stored
extract shards llama-tuned -o x-shards --rank 4
extract llama shards-tuned -o x-shards-tuned --rank 4
extract mixtral mixtral-tuned -o x-mixtral --rank 2
extract mixtral mixtral-tuned -o x-mixtral-stored --rank 2 --names stored
extract fused mixtral-tuned -o x-mixtral-fused --rank 2
extract vit vit-tuned -o x-vit --rank 2
extract vit vit-tuned -o x-vit-stored --rank 2 --names stored
extract net net-tuned -o x-net --rank 3 --layout grouped=conv:4 --layout video=none
extract bare.safetensors bare-tuned.safetensors -o x-bare --rank 4 --layout qkv=merged:3/101
extract bare.safetensors bare-tuned.safetensors -o x-bare-deep --rank 40 --seed 3 --tolerance 0.01
extract bare.safetensors bare-tuned.safetensors -o x-bare-budget --budget 9kB --svd exact
extract bare.safetensors bare-tuned.safetensors -o x-bare-energy --energy 0.8 -i wide -i tall
extract bare.safetensors bare-tuned.safetensors -o x-bare-floor --noise-floor --seed 1
extract bare.safetensors bare-tuned.safetensors -o x-bare-cache --rank 3 --max-rank 8
    --spectrum-cache cache-bare.safetensors
extract llama grown -o x-grown --rank 2 --embeddings save
extract llama grown -o x-grown-refused --rank 2
extract llama pickled -o x-pickled --rank 2 --allow-pickle
extract llama pickled -o x-refused --rank 2
extract llama nan -o x-refused --rank 2
extract llama gpt2 -o x-refused
extract llama broken.safetensors -o x-refused

merge llama even=0.5 uneven -o m --reversible
merge llama rslora=-1.5 bias -o m-bf16 --dtype bfloat16
merge llama dora=0.7 ends saved -o m-dora --reversible -v
merge llama tokens -o m-tokens
merge llama ia3 -o m-ia3
merge llama x-energy -o m-back
merge shards even -o m-shards --reversible
merge shards even -o m-shards-anew --shard-size 30kB -j 1
merge tied head -o m-untied --reversible
merge tied one -o m-tied --reversible
merge gpt2 conv1d=0.5 -o m-gpt2 --reversible
merge gpt2 conv1d-dora -o m-gpt2-dora
merge bert query -o m-bert --dtype float16
merge mixtral experts -o m-experts --reversible
merge mixtral x-mixtral -o m-experts-back
merge fused experts -o m-experts-fused
merge net nets nets-dora=0.5 -o m-net --reversible
merge bare.safetensors x-bare -o m-bare.safetensors --reversible
merge bare.safetensors loha.safetensors lokr.safetensors=0.3 -o m-lycoris.safetensors
merge tied ends -o m-unmatched --allow-unmatched
merge llama even -o m-plan --dry-run -v
merge llama conv1d -o m-refused
merge shards-tuned x-attention -o m-refused
merge shards-tuned x-attention -o m-other --allow-other-base
merge llama odd -o m-refused
merge llama pissa -o m-refused
merge llama adalora -o m-refused
merge llama prompt -o m-refused
merge llama missing -o m-refused
unmerge m even=0.5 uneven -o u
unmerge m even=0.5 uneven -o u-subtracted --no-sidecar
unmerge m-dora dora=0.7 ends saved -o u-dora
unmerge m-shards even -o u-shards
unmerge m-untied head -o u-untied
unmerge m-tied one -o u-tied --sidecar
unmerge m-gpt2 conv1d=0.5 -o u-gpt2
unmerge m-gpt2 conv1d=0.5 -o u-gpt2-subtracted --no-sidecar
unmerge m-experts experts -o u-experts
unmerge m-net nets nets-dora=0.5 -o u-net
unmerge m-bare.safetensors x-bare -o u-bare.safetensors
unmerge m-bf16 rslora=-1.5 bias -o u-bf16
unmerge m even=0.5 uneven -o u-plan --dry-run
unmerge m even=0.4 uneven -o u-refused
unmerge m even=0.4 uneven -o u-refused --no-sidecar
unmerge m-dora dora=0.7 ends saved -o u-refused --no-sidecar
unmerge m-bf16 rslora=-1.5 bias -o u-refused --sidecar

rescale uneven -o r-scale --scale 0.5
rescale uneven -o r-alpha --alpha 3
rescale uneven -o r-effect --alpha 3 --effect change --dtype bfloat16
rescale uneven -o r-all --rank 2 --scale 0.5 --alpha 3
rescale even -o r-rslora --rslora
rescale rslora -o r-plain --no-rslora
rescale ends -o r-rank --rank 2
rescale uneven -o r-energy --energy 0.8 --max-rank 3
rescale uneven -o r-budget --budget 800
rescale uneven -o r-fro --sv-fro 0.9
rescale uneven -o r-ratio --sv_ratio 2
rescale uneven -o r-vllm --for vllm
rescale uneven -o r-cpp --for llama.cpp --base llama
rescale dora -o r-dora --dtype float16
rescale saved -o r-saved --threshold 0.5
rescale nets -o r-nets --error 0.4
rescale loha.safetensors -o r-loha.safetensors --rank 4 --base bare.safetensors
rescale dora -o r-refused --scale 2
rescale saved -o r-refused --for vllm
rescale uneven -o r-refused

combine even=0.7 uneven=-0.3 rslora -o c-{sum} --method {sum}
combine even=0.7 uneven=-0.3 rslora -o c-{prune} --method {prune} --density 0.5
combine even uneven -o c-frequency --method ties --density 0.4 --majority-sign frequency --rank 3
combine even uneven=2 -o c-weighted --method dare_ties --density 0.5 --majority-sign weighted
    --seed 5 --normalize
combine even uneven -o c-energy --energy 0.7 --dtype bfloat16
combine nets nets=0.5 -o c-nets --method svd --rank 3
combine even saved -o c-saved
combine even uneven -o c-refused --method ties
combine even dora -o c-refused

convert uneven -o to-{format} --to {format} --base llama
convert to-{format} -o from-{format} --to peft --base llama
merge llama to-{format} -o m-{format}
rescale to-{format} -o r-{format} --rank 2 --base llama
convert dora -o to-kohya-dora --to kohya --base llama
convert dora -o to-mlx-dora --to mlx
convert ends -o to-gguf-ends --to gguf --base llama --dtype float16
convert saved -o to-onnxruntime-saved.onnx_adapter --to onnxruntime --base llama
convert nets -o to-loralib-nets.safetensors --to loralib
convert nets -o to-diffusers-nets --to diffusers --base net --drop embedding
convert to-diffusers-nets -o to-kohya-nets.safetensors --to kohya --base pipe
convert to-kohya-nets.safetensors -o from-kohya-nets --to peft --base pipe
convert conv1d -o to-loralib-blocks --to loralib --base gpt2 --layout c_attn=merged:3 --rank 2
convert uneven -o to-diffusers-cut --to diffusers --rank 2
convert bias -o to-mlx-dropped --to mlx --drop bias
convert blocks.safetensors -o from-blocks --to peft --base bare.safetensors --alpha 4
    --enable-lora 1,0,1
convert blocks.pt -o from-pickled --to peft --base bare.safetensors --alpha 4 --enable-lora 1,0,1
    --allow-pickle
convert loha.safetensors -o from-loha --to peft --base bare.safetensors
convert lokr.safetensors -o from-lokr --to kohya --base bare.safetensors --energy 0.9
convert even -o to-plan --to gguf --base llama --dry-run -v
convert dora -o to-refused --to gguf --base llama
convert even -o to-refused --to gguf
convert to-kohya -o to-refused --to peft
convert to-kohya -o to-refused --to peft --from mlx

quantize llama -o q
quantize llama -o q-adapter --adapter even=0.5 --adapter dora
quantize llama -o q-search --scale-search --include self_attn
quantize llama -o q-fp4 --quant-type fp4 --blocksize 32 --no-double-quant --lm-head
quantize tied -o q-tied --quant-storage bfloat16 --compute-dtype float16 --shard-size 20kB
quantize shards -o q-shards --quant-storage float32 --exclude down_proj --dtype bfloat16
quantize tied -o q-storage --quant-storage float16
quantize llama -o q-loftq --compensate 4
quantize llama -o q-loftq-adapter --compensate 2 --compensate-iterations 3 --adapter uneven=0.5
quantize gpt2 -o q-gpt2 --blocksize 128
quantize mixtral -o q-mixtral
quantize llama -o q-gate --max-error 0.01
quantize llama -o q-plan --dry-run -v
quantize nan -o q-refused
quantize q -o q-refused
quantize llama -o q-refused --blocksize 100
dequantize q -o d
dequantize q-fp4 -o d-fp4 --dtype float16
dequantize q-tied -o d-tied
dequantize q-gpt2 -o d-gpt2 --shard-size 20kB
dequantize q -o d-plan --dry-run -v
dequantize llama -o d-refused
merge q even -o m-nf4
merge q even dora -o m-nf4-again --requantize
merge q-fp4 uneven=0.5 -o m-fp4-again --requantize --dtype bfloat16
merge q-gpt2 conv1d -o m-nf4-gpt2 --requantize
merge q even -o m-nf4-refused --reversible

export llama -o e
export llama -o e-flat --no-cache --no-verify
export llama -o e-again --graph e --adapter even=0.5 --dtype bfloat16 --no-verify
export llama -o e-bundled --graph e/model.onnx --weights bundled --no-verify
export llama -o e-nf4 --graph e --nf4 --no-verify
export q -o e-nf4-made --graph e --nf4 --no-verify
export llama -o e-int8 --graph e --int8 --eval-text words.txt
export llama -o e-int4 --graph e --int4 --no-verify --weights shared
export llama -o e-runtime --graph e --runtime-adapters --adapter uneven --adapter ends=0.5
export m-back -o m-back --graph e --no-verify
export deep -o e-deep --no-verify
export bert -o e-bert
export classifier -o e-classifier --no-verify --int8
export gpt2 -o e-gpt2 --no-verify --opset 21
export mixtral -o e-mixtral --no-verify
export vit -o e-vit --no-verify
export t5 -o e-t5 --no-verify
export llama -o e-plan --nf4 --dry-run -v
export llama -o e-refused --graph e --adapter dora --runtime-adapters
export tied -o e-refused --graph e --no-verify
export net -o e-refused
export llama -o e-refused --nf4 --int8
export llama -o e-gate --graph e --no-verify --rtol 0 --nf4 --eval-text words.txt

inspect llama -v
inspect shards --json
inspect bare.safetensors
inspect uneven -v
inspect dora --json
inspect nets
inspect experts
inspect ia3
inspect to-{format} --json
inspect loha.safetensors
inspect q --json
inspect q-loftq/loftq_init
inspect m/loratools-unmerge.sidecar
inspect m-bare.safetensors.sidecar --json
inspect cache.safetensors
inspect stats.safetensors --json
inspect e --json
inspect e-int8/model.onnx
inspect e-runtime/uneven.onnx_adapter
inspect nan -q
inspect pickled --allow-pickle
inspect prompt
inspect broken.safetensors
inspect missing
diff llama llama-tuned
diff llama llama-tuned --sort name --json -i self_attn -e q_proj
diff tied tied-tuned --sort norm -v
diff bert classifier-tuned
diff gpt2 gpt2-tuned --json -q
diff mixtral mixtral-tuned
diff net net-tuned
diff bare.safetensors bare-tuned.safetensors --seed 2
diff q llama
diff llama grown
diff llama llama
verify m --base llama --adapter even=0.5 --adapter uneven
verify m --base llama --adapter even=0.6 --adapter uneven
verify m-bf16 --base llama --adapter rslora=-1.5 --adapter bias --json
verify m-untied --base tied --adapter head -v
verify m-experts --base mixtral --adapter experts
verify m-nf4 --base q --adapter even
verify llama-tuned --base llama --adapter even
verify x-rank --base llama --tuned llama-tuned --json
verify x-rank --base llama --tuned llama-tuned --max-error 0.01
verify x-gpt2 --base gpt2 --tuned gpt2-tuned
verify x-mixtral --base mixtral --tuned mixtral-tuned
verify q --against llama
verify q --against llama-tuned --json
verify q-adapter --against llama --adapter even=0.5 --adapter dora
verify q-search --against llama
verify q-loftq-adapter --against llama --max-error 0.2
verify m-nf4-again --against q --adapter even --adapter dora
verify e --against llama
verify e-again --against llama --adapter even=0.5 --weights-only
verify e-nf4 --against llama --weights-only --json
verify e-int4 --against llama --weights-only
verify e-int8 --against llama
verify e --against llama-tuned --weights-only
verify m
{verb}
{verb} --help
--help
--version
completion bash
frobnicate
"""
SLOW = re.compile(r"export \w+ -o e-(flat|deep|bert|classifier|gpt2|mixtral|vit|t5)\b")
CALLS = """
lora_tools.extract("llama", "llama-tuned", "py-x", rank=3, rslora=True, include=["mlp"])
lora_tools.extract(Path("tied"), Path("tied-tuned"), Path("py-tied"), energy=0.7, rest="skip")
lora_tools.extract("llama", "llama-tuned", "py-refused", rank=3, energy=0.5)
lora_tools.merge("llama", ["even=0.5", ("dora", -1.0)], "py-m", reversible=True)
lora_tools.merge("llama", [Path("even"), "uneven=-1.0"], Path("py-m-plain"), jobs=1)
lora_tools.unmerge("py-m-plain", ["even", "uneven=-1.0"], "py-u")
lora_tools.rescale("uneven", "py-r", rank=2, dtype="float64")
lora_tools.combine(["even", "uneven=0.5"], "py-c", method="dare_linear", density=0.5, seed=9)
lora_tools.convert("uneven", "py-gguf", to="gguf", base="llama")
lora_tools.quantize("llama", "py-q", adapters=["even"], blocksize=128, double_quant=False)
lora_tools.dequantize("py-q", "py-d", dtype="bfloat16")
lora_tools.export("llama", "py-e", graph="e", no_verify=True, dtype="float16")
lora_tools.inspect("py-e")
lora_tools.diff("llama", "py-m", sort="norm")
lora_tools.verify("py-q", against="llama", adapters=["even"])
lora_tools.verify("py-q", against="llama")
lora_tools.collect_stats("llama", "words.txt", "py-stats.safetensors", kind="diagonal", length=16)
live("uneven=0.5", "dora", "saved")
"""


def commands() -> Iterator[str]:
    """Every command line."""
    for [row] in rows(RUNS):
        word = next((word for word in EACH if word in row), "")
        yield from (row.replace(word, each) for each in EACH[word].split()) if word else [row]


def live(*adapters: str) -> dict[str, str]:
    """The hashes of a live model's logits with adapters attached, and merged."""
    found = {}
    for put in (lora_tools.nn.attach, lora_tools.nn.merge_):
        model = load("llama")
        put(model, list(adapters))
        with torch.no_grad():
            logits = model(torch.arange(22).reshape(2, 11) * 7 % VOCAB).logits
        found[put.__name__] = sha(logits.numpy().tobytes())
    return found


# ------------------------------------------------------------------------------------ the record


def record(quick: bool) -> dict[str, Any]:
    """Every run with what came of it, in the current folder."""
    make_inputs()
    old = seen()
    found: dict[str, Any] = {"inputs": {"files": written({}, old)}}
    for line in [*commands(), *(row for [row] in rows(CALLS))]:
        assert line not in found, line
        if quick and SLOW.match(line):
            continue
        found[line] = call(line) if line.endswith(")") else command(line)
        new = seen()
        found[line]["files"] = written(old, new)
        old = new
    return found


def command(line: str) -> dict[str, Any]:
    """One command: exit code, report, and text with the time masked."""
    args, file = line.split(), Path("../report.json")
    file.unlink(missing_ok=True)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        takes = len(args) > 2 and args[0] != "completion"
        code = lora_tools.cli.run([*args, *(["--report", str(file)] if takes else [])])
    text = re.sub(r" in \d+\.\d s\b", " in # s", err.getvalue())
    found = {"code": code, "stderr": text, "stdout": out.getvalue()}
    if "--json" in args and found["stdout"]:
        found["stdout"] = plain(json.loads(found["stdout"]))
    return found | ({"report": plain(json.loads(file.read_text()))} if file.exists() else {})


def call(line: str) -> dict[str, Any]:
    """One call from Python: what it returns, or raises."""
    try:
        result = eval(line, {"lora_tools": lora_tools, "Path": Path, "live": live})
    except lora_tools.LoraToolsError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"report": plain(result if isinstance(result, dict) else result.to_dict())}


def plain(report: dict[str, Any]) -> dict[str, Any]:
    """A report as JSON, without what differs from run to run or from version to version."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [clean(v) for v in value]
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    return {k: clean(v) for k, v in report.items() if k not in ("seconds", "version")}


def seen() -> dict[str, tuple[int, ...]]:
    """Every file below the current folder, with what changes when it is written."""
    found = {}
    for path in sorted(Path().rglob("*")):
        if path.is_file():
            facts = path.stat()
            found[str(path)] = facts.st_ino, facts.st_size, facts.st_mtime_ns
    return found


def written(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The files that a run wrote; None for those that it removed."""
    gone = {name: None for name in old if name not in new}
    return gone | {name: content(Path(name)) for name, at in new.items() if at != old.get(name)}


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def content(path: Path) -> dict[str, Any]:
    """A file's hash; where it has metadata, that and the hash of the rest; small JSON as it is."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    found: dict[str, Any] = {"sha256": sha(data)}
    if data[8:10] == b'{"' and size < len(data):  # safetensors, by whatever name
        header = json.loads(data[8 : 8 + size])
        found["metadata"] = header.pop("__metadata__", None)
        found["rest"] = sha(json.dumps(header).encode() + data[8 + size :])
    elif path.suffix == ".onnx":
        model = onnx.load(path, load_external_data=False)
        found["metadata"] = {p.key: p.value for p in model.metadata_props}
        del model.metadata_props[:]
        found["rest"] = sha(model.SerializeToString(deterministic=True))
    elif data[:4] == b"GGUF":
        reader = gguf.GGUFReader(path)
        fields = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
        found["metadata"] = {k: fields.pop(k) for k in [*fields] if k.startswith("loratools.")}
        tensors = [(t.name, t.tensor_type, sha(t.data.tobytes())) for t in reader.tensors]
        found["rest"] = sha(repr((fields, tensors)).encode())
    elif path.suffix == ".json" and len(data) < 4000:
        found["json"] = json.loads(data)
    return found


# --------------------------------------------------------------------------------- the comparison


def compare(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Print what differs, files first; whether anything does."""
    numbers, words = [], []
    for line in dict.fromkeys([*old, *new]):
        before, after = old.get(line, {}), new.get(line, {})
        if not before or not after:
            words.append(f"{line}: only in the {'earlier' if before else 'new'} record")
            continue
        for name in dict.fromkeys([*before["files"], *after["files"]]):
            one, two = (each["files"].get(name, "not written") for each in (before, after))
            kind = numbers
            alike = isinstance(one, dict) and isinstance(two, dict) and one.get("rest")
            if alike and alike == two.get("rest") and one["metadata"] != two["metadata"]:
                one, two, kind = one["metadata"], two["metadata"], words
            found = list(differences(one, two))
            kind.extend([f"{line}: {name}: {'; '.join(found)}"] if found else [])
        for part in ("code", "error", "report", "stdout", "stderr"):
            found = list(differences(before.get(part), after.get(part)))
            more = f"; and {len(found) - 4} more" if len(found) > 4 else ""
            words.extend([f"{line}: {part}: {'; '.join(found[:4])}{more}"] if found else [])
    for title, lines in (("tensors/files", numbers), ("only metadata / report / text", words)):
        print(f"== {title} differ: {len(lines)}", *lines, sep="\n")
    return bool(numbers or words)


def differences(old: Any, new: Any, at: str = "") -> Iterator[str]:
    """Where two JSON values differ; of texts, in which lines."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from differences(old.get(key), new.get(key), f"{at}.{key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (one, two) in enumerate(zip(old, new, strict=True)):
            yield from differences(one, two, f"{at}[{i}]")
    elif isinstance(old, str) and isinstance(new, str) and "\n" in old and "\n" in new:
        yield from differences(old.splitlines(), new.splitlines(), at)
    elif old != new:
        yield f"{at} {str(old)[:200]!r} -> {str(new)[:200]!r}".strip()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--against", type=Path, metavar="EARLIER.json")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--keep", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    tree = os.environ.get("PYTHONPATH", "").split(os.pathsep)[0]
    if not tree or not Path(lora_tools.__file__).is_relative_to(Path(tree).resolve()):
        parser.error(f"PYTHONPATH={tree}, and lora_tools is {lora_tools.__file__}")
    earlier = json.loads(args.against.read_text()) if args.against else None
    out, started = args.out.resolve(), time.perf_counter()
    warnings.simplefilter("ignore")  # of transformers and PEFT, with paths in them
    with tempfile.TemporaryDirectory() as scratch:
        here = (args.keep or Path(scratch)).resolve() / "runs"
        here.mkdir(parents=True)
        with contextlib.chdir(here):
            found = json.loads(json.dumps(record(args.quick)).replace(str(here), "."))
    out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    verbs = Counter(line.split("(")[0].split()[0] for line in found if line != "inputs")
    print(f"{verbs.total()} runs in {time.perf_counter() - started:.0f} s: {dict(verbs)}")
    if earlier is None:
        return 0
    if args.quick:
        earlier = {line: facts for line, facts in earlier.items() if not SLOW.match(line)}
    return int(compare(earlier, found))


if __name__ == "__main__":
    sys.exit(main())
