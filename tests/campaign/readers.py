"""What an output should be, by other libraries (safetensors, gguf, onnx, torch) and by formulas.

Each check takes the folder of all inputs, one file of which is damaged, and the output that a
command made of them all the same. It raises ``AssertionError`` where the output is not what those
inputs say, and ``Unsure`` where the other library reads the damage otherwise, so that nothing can
be said.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

from tests import distributed

Tensors = dict[str, torch.Tensor]
Check = Callable[[Path, Path], None]


class Unsure(Exception):
    """The other library cannot read the damaged input, or the formula here does not hold for it."""


def weights(path: Path) -> Tensors:
    """All tensors of a safetensors file, or of a folder by its index where it has one."""
    if path.is_file():
        return load_file(path)
    index = path / "model.safetensors.index.json"
    if not index.exists():
        files = sorted(path.glob("*.safetensors"))
        return {name: x for file in files for name, x in load_file(file).items()}
    where = json.loads(index.read_text())["weight_map"]
    files = {file: load_file(path / file) for file in set(where.values())}
    return {name: files[file][name] for name, file in where.items()}


def given(read: Callable[[], Any]) -> Any:
    """What another library reads of an input; Unsure where it does not."""
    try:
        return read()
    except BaseException as error:  # as torch's CheckpointException is
        raise Unsure(f"{type(error).__name__}: {error}") from error


def readable(top: Path, out: Path) -> None:
    """All of the output is read by the libraries of its files, and its numbers are numbers, but
    where the damage to a tensor that a command passes on has made others of them."""
    for file in [out] if out.is_file() else sorted(out.rglob("*")):
        if file.suffix == ".json":
            json.loads(file.read_text())
        elif file.suffix == ".safetensors":
            for name, tensor in load_file(file).items():
                assert _is_finite(tensor) or _was_not(name, top), name
    if out.is_dir():
        weights(out)


def _is_finite(tensor: torch.Tensor) -> bool:
    wide = tensor.is_floating_point() and tensor.element_size() > 1
    return not wide or bool(tensor.isfinite().all())


def _was_not(name: str, top: Path) -> bool:
    files = [load_file(file) for file in top.rglob("*.safetensors") if file.is_file()]
    return any(not _is_finite(tensors[name]) for tensors in files if name in tensors)


def gguf_readable(top: Path, out: Path) -> None:
    for tensor in gguf.GGUFReader(out).tensors:
        assert np.isfinite(tensor.data.astype(np.float64)).all(), tensor.name


def _same(made: Tensors, wanted: Tensors, tolerance: float = 0.0) -> None:
    assert made.keys() == wanted.keys(), made.keys() ^ wanted.keys()
    for name, tensor in wanted.items():
        found = made[name]
        assert found.shape == tensor.shape, name
        assert found.dtype == tensor.dtype, name
        if not tolerance:
            assert torch.equal(
                found.contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)
            ), name
            continue
        a, b = (x.double().nan_to_num(1e300).flatten() for x in (found, tensor))
        most = tolerance * max(b.abs().tolist(), default=0)
        assert max((a - b).abs().tolist(), default=0) <= most, name


# --------------------------------------------------------------------------------------- merging


def _scaling(config: dict[str, Any], module: str, r: int) -> float:
    """alpha / r as PEFT has it for a module."""

    def pattern(key: str, default: Any) -> Any:
        rows = (config.get(key) or {}).items()
        return next((v for k, v in rows if re.match(rf"(.*\.)?({k})$", module)), default)

    if pattern("rank_pattern", config["r"]) != r:
        raise Unsure("ranks that are not those of the config")
    alpha = pattern("alpha_pattern", config.get("lora_alpha", 8))
    return float(alpha / (math.sqrt(r) if config.get("use_rslora") else r))


_PLAIN = {  # what the formula has no place for
    "use_dora": False,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "peft_type": "LORA",
    "bias": "none",
    "init_lora_weights": True,
    "modules_to_save": None,
    "target_parameters": None,
}


def _peft(top: Path) -> Tensors:
    config = json.loads((top / "adapter/adapter_config.json").read_text())
    if any(config.get(key, value) != value for key, value in _PLAIN.items()):
        raise Unsure("a kind of adapter of which no more than the reading is checked")
    found = load_file(top / "adapter/adapter_model.safetensors")
    made = {}
    for name, a in found.items():
        if name.endswith(".lora_A.weight"):
            b, module = found[name.replace("lora_A", "lora_B")], name.removesuffix(".lora_A.weight")
            module = module.removeprefix("base_model.model.")
            made[f"{module}.weight"] = _scaling(config, module, len(a)) * (b.double() @ a.double())
    if 2 * len(made) != len(found):
        raise Unsure("tensors of other kinds")
    return made


def _kohya(file: str, zero_is_rank: bool = False) -> Callable[[Path], Tensors]:
    def read(top: Path) -> Tensors:
        found, made = load_file(top / file), {}
        for name in load_file(top / "tuned/model.safetensors"):
            stem = "_" + name.removesuffix(".weight").replace(".", "_")
            for key, a in found.items():
                if key.endswith(f"{stem}.lora_down.weight"):
                    b = found[key.replace("lora_down", "lora_up")]
                    alpha = found.get(
                        key.replace("lora_down.weight", "alpha"), torch.tensor(len(a))
                    )
                    scale = float(alpha) / len(a)
                    if zero_is_rank and not alpha:  # as LyCORIS itself has it
                        scale = 1
                    made[name] = scale * (b.double() @ a.double())
        if 3 * len(made) != len(found):
            raise Unsure("tensors of other kinds")
        return made

    return read


def _mlx(top: Path) -> Tensors:
    config = json.loads((top / "mlx/adapter_config.json").read_text())
    if config["fine_tune_type"] != "lora":
        raise Unsure("another kind")
    scale, found = (
        float(config["lora_parameters"]["scale"]),
        load_file(top / "mlx/adapters.safetensors"),
    )
    return {
        name.replace(".lora_a", ".weight"): scale
        * (a.double() @ found[name.replace("lora_a", "lora_b")].double()).T
        for name, a in found.items()
        if name.endswith(".lora_a")
    }


def _names(layers: int = 2) -> dict[str, str]:
    """Modules of a Llama by their names in GGUF."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    ends = [f"self_attn.{x}_proj" for x in "qkvo"] + [
        f"mlp.{x}_proj" for x in ("gate", "up", "down")
    ]
    modules = [
        f"model.layers.{i}.{end}"
        for i in range(layers)
        for end in [*ends, "input_layernorm", "post_attention_layernorm"]
    ]
    modules += ["model.embed_tokens", "model.norm", "lm_head"]
    return {str(table.get_name(module)): module for module in modules}


def _heads(module: str) -> int:
    """Of a module whose rows llama.cpp puts in another order, by head; 0 for the others."""
    return {"q_proj": 4, "k_proj": 2}.get(module.rpartition(".")[2], 0)


def _gguf(top: Path) -> Tensors:
    reader = gguf.GGUFReader(top / "adapter.gguf")
    alpha = float(reader.fields["adapter.lora.alpha"].parts[-1][0])
    found = {t.name: torch.from_numpy(np.array(t.data, dtype=np.float64)) for t in reader.tensors}
    made = {}
    for name, a in found.items():
        if name.endswith(".lora_a"):
            stem = name.removesuffix(".weight.lora_a")
            b, module = found[f"{stem}.weight.lora_b"], _names()[stem]
            if heads := _heads(module):
                b = b.reshape(heads, len(b) // heads // 2, 2, -1).swapaxes(1, 2).reshape(b.shape)
            made[f"{module}.weight"] = alpha / len(a) * (b @ a)
    return made


def _plus(base: Callable[[Path], Tensors], delta: Callable[[Path], Tensors]) -> Check:
    def check(top: Path, out: Path) -> None:
        wanted, added = given(lambda: base(top)), given(lambda: delta(top))
        if added.keys() - wanted.keys():
            raise Unsure("names that the verb matched otherwise")
        sums = {}
        for name, tensor in wanted.items():
            if name in added and added[name].shape != tensor.shape:
                raise Unsure(f"{name}: another shape")
            sums[name] = (
                (tensor.double() + added[name]).to(tensor.dtype) if name in added else tensor
            )
        _same(weights(out), sums, 1e-5 if _float32(wanted) else 1e-2)

    return check


def _float32(tensors: Tensors) -> bool:
    return all(x.dtype in (torch.float32, torch.float64) for x in tensors.values())


def _base(name: str) -> Callable[[Path], Tensors]:
    return lambda top: weights(top / name)


def _pickles(top: Path) -> Tensors:
    where = json.loads((top / "pickles/pytorch_model.bin.index.json").read_text())["weight_map"]
    files = {f: torch.load(top / "pickles" / f, weights_only=True) for f in set(where.values())}
    return {name: files[file][name] for name, file in where.items()}


def _dcp(top: Path) -> Tensors:
    sound = load_file(top / "tuned/model.safetensors")
    return distributed.load({name: torch.zeros_like(x) for name, x in sound.items()}, top / "dcp")


merged_base = _plus(_base("base"), _peft)
merged_tuned = _plus(_base("tuned"), _peft)
merged_pickles = _plus(_pickles, _peft)
merged_dcp = _plus(_dcp, _peft)
_READ: dict[str, Callable[[Path], Tensors]] = {
    "adapter": _peft,
    "kohya.safetensors": _kohya("kohya.safetensors"),
    "lycoris.safetensors": _kohya("lycoris.safetensors", zero_is_rank=True),
    "mlx": _mlx,
    "adapter.gguf": _gguf,
}


def merged_of(name: str) -> Check:
    """The base and an adapter of that format."""
    return _plus(_base("base"), _READ[name]) if name in _READ else readable


# ---------------------------------------------------------------------------------------- others


def unmerged(top: Path, out: Path) -> None:
    """The base, bit for bit."""
    if not (top / "merged/loratools-unmerge.sidecar").exists():
        raise Unsure("without a sidecar the adapter is subtracted, which rounds")
    _same(weights(out), weights(top / "base"))


def same_as(*names: str) -> Check:
    """One of the adapters that were made before."""

    def check(top: Path, out: Path) -> None:
        made = weights(out)
        sound = [weights(top / name) for name in names]
        near = (all(torch.equal(made[k], x) for k, x in each.items()) for each in sound)
        assert all(made.keys() == each.keys() for each in sound)
        assert any(near)

    return check


def extracted(top: Path, out: Path) -> None:
    """Each module's product is as near to the change as its rank allows (Eckart and Young)."""
    base, tuned = given(lambda: weights(top / "base")), given(lambda: weights(top / "tuned"))
    found = weights(out)
    for side in ("base", "tuned"):
        config = top / side / "config.json"  # which need not be there
        if config.exists() and json.loads(config.read_text()).get("tie_word_embeddings"):
            raise Unsure("of what is tied, one tensor is loaded for the other")
    for name, a in found.items():
        if not name.endswith(".lora_A.weight"):
            continue
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        if module + ".weight" not in base.keys() & tuned.keys():
            raise Unsure("names that the verb matched otherwise")
        change = tuned[f"{module}.weight"].double() - base[f"{module}.weight"].double()
        left = change - found[name.replace("lora_A", "lora_B")].double() @ a.double()
        best = torch.linalg.svdvals(change)[len(a) :].square().sum()
        whole = change.square().sum()
        assert left.square().sum() - best <= 2e-3 * whole, name


def decoded(found: Tensors, name: str) -> torch.Tensor:
    """A weight in four bits, as bitsandbytes stores it (docs of its ``QuantState``)."""
    state = next(k for k in found if k.startswith(f"{name}.quant_state.bitsandbytes__"))
    said = json.loads(bytes(found[state].tolist()))
    absmax = found[f"{name}.absmax"]
    if f"{name}.nested_absmax" in found:
        codes, book = absmax.long(), found[f"{name}.nested_quant_map"]
        scales = found[f"{name}.nested_absmax"].repeat_interleave(said["nested_blocksize"])[
            : len(codes)
        ]
        absmax = book[codes] * scales + np.float32(said["nested_offset"])
    packed = found[name].view(torch.uint8).reshape(-1).long()
    codes = torch.stack([packed >> 4, packed & 15], 1).reshape(-1)[: math.prod(said["shape"])]
    scales = absmax.repeat_interleave(said["blocksize"])[: len(codes)]
    plain = found[f"{name}.quant_map"][codes] * scales
    return plain.reshape(said["shape"]).to(getattr(torch, said["dtype"]))


def of_four_bits(name: str) -> Check:
    def check(top: Path, out: Path) -> None:
        stored = given(lambda: weights(top / name))
        heads = [k.partition(".quant_state.")[0] for k in stored if ".quant_state." in k]
        wanted = {k: given(lambda k=k: decoded(stored, k)) for k in heads}
        parts = tuple(f"{head}." for head in heads)
        wanted |= {k: x for k, x in stored.items() if k not in heads and not k.startswith(parts)}
        made = weights(out)
        dtypes = {k: x.dtype for k, x in made.items()}
        _same(made, {k: x.to(dtypes.get(k, x.dtype)) for k, x in wanted.items()}, 1e-2)

    return check


def of_gguf(top: Path, out: Path) -> None:
    """All but the two whose rows llama.cpp has in another order."""

    def read() -> Iterator[tuple[str, torch.Tensor]]:
        for tensor in gguf.GGUFReader(top / "model.gguf").tensors:
            stem, _, end = tensor.name.rpartition(".")
            plain = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            yield f"{_names()[stem]}.{end}", torch.from_numpy(np.array(plain))

    wanted = dict(given(lambda: list(read())))
    made = weights(out)
    for name in list(wanted):
        if _heads(name.rpartition(".")[0]):
            assert made.pop(name).shape == wanted.pop(name).shape
    _same({k: x.float() for k, x in made.items()}, {k: x.float() for k, x in wanted.items()}, 1e-2)


def exported(top: Path, out: Path) -> None:
    """The graph's weights are those of the checkpoint."""
    import onnx

    path = str(out / "model.onnx")
    onnx.checker.check_model(path)
    wanted = weights(top / "tuned")
    for tensor in onnx.load(path).graph.initializer:
        if tensor.name in wanted:
            found = torch.from_numpy(np.array(onnx.numpy_helper.to_array(tensor)))
            assert torch.equal(found, wanted[tensor.name]), tensor.name
