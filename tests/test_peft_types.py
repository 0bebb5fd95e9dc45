"""PEFT's types that are no LoRA: each merges to what PEFT makes of it, whatever its layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

import lora_tools
from lora_tools.errors import (
    AdapterError,
    MismatchError,
    NonFiniteError,
    UnsupportedAdapter,
    UsageError,
)
from lora_tools.formats.adapters.changes import CHANGES
from lora_tools.linalg.changes.on import On

from . import models


class Net(torch.nn.Module):
    """Layers of each kind that some type acts on; the model never runs as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = torch.nn.Linear(12, 18)
        self.tall = torch.nn.Linear(18, 12)
        self.bare = torch.nn.Linear(12, 12, bias=False)
        self.image = torch.nn.Conv2d(6, 8, 3)
        self.audio = torch.nn.Conv1d(6, 8, 3)
        self.turned = Conv1D(18, 12)
        self.wte = torch.nn.Embedding(10, 6)


LINEAR = ("wide", "tall", "bare")
# Configurations by the name of PEFT's class, with the modules they act on.
CASES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "loha": ("LoHa", {"r": 4, "alpha": 6}, (*LINEAR, "image", "audio")),
    "loha-patterns": (
        "LoHa",
        {"r": 4, "alpha": 6, "rank_pattern": {"tall": 2}, "alpha_pattern": {"wide": 3}},
        LINEAR,
    ),
    "loha-effective": ("LoHa", {"r": 2, "use_effective_conv2d": True}, ("image", "audio")),
    "lokr": ("LoKr", {"r": 4, "alpha": 6}, (*LINEAR, "image", "audio")),
    "lokr-both": (
        "LoKr",
        {"r": 1, "alpha": 2, "decompose_both": True, "use_effective_conv2d": True},
        (*LINEAR, "image"),
    ),
    "adalora": ("AdaLora", {"init_r": 5, "lora_alpha": 7, "total_step": 1}, (*LINEAR, "image")),
    "vera": ("Vera", {"r": 7}, LINEAR),
    "vera-turned": ("Vera", {"r": 7, "fan_in_fan_out": True}, ("turned",)),
    "pvera": ("Pvera", {"r": 7}, LINEAR),
    "randlora": ("RandLora", {"r": 5, "randlora_alpha": 3}, LINEAR),
    "randlora-sparse": ("RandLora", {"r": 5, "randlora_alpha": 3, "sparse": True}, LINEAR),
    "vblora": ("VBLoRA", {"r": 3, "vector_length": 3, "num_vectors": 8}, LINEAR),
    "vblora-topk": (
        "VBLoRA",
        {"r": 3, "vector_length": 3, "num_vectors": 8, "save_only_topk_weights": True},
        LINEAR,
    ),
    "unilora": ("UniLora", {"r": 3, "theta_d_length": 40, "save_indices": True}, LINEAR),
    "gralora": ("Gralora", {"r": 4, "gralora_k": 2, "alpha": 6}, LINEAR),
    "gralora-hybrid": ("Gralora", {"r": 6, "gralora_k": 3, "alpha": 6, "hybrid_r": 2}, LINEAR),
    "tinylora": ("TinyLora", {"r": 2, "u": 5}, (*LINEAR, "wte")),
    "tinylora-tied": ("TinyLora", {"r": 2, "u": 5, "weight_tying": 0.4}, LINEAR),
    "delora": ("Delora", {"r": 4, "delora_lambda": 9}, LINEAR),
    "fourierft": ("FourierFT", {"n_frequency": 30, "scaling": 90.0}, LINEAR),
    "fourierft-turned": ("FourierFT", {"n_frequency": 30, "fan_in_fan_out": True}, ("turned",)),
    "waveft": ("WaveFT", {"n_frequency": 30}, LINEAR),
    "waveft-wide": ("WaveFT", {"n_frequency": 60, "wavelet_family": "db3"}, LINEAR),
    "waveft-sparse": ("WaveFT", {"n_frequency": 30, "use_idwt": False}, LINEAR),
    "c3a": ("C3A", {"block_size": 6}, LINEAR),
    "shira": ("Shira", {"r": 2}, LINEAR),
    "super": ("Supertuning", {"sparsity": 0.7}, LINEAR),
    "supra": ("Supertuning", {"sparsity": 0.7, "r": 3}, LINEAR),
    "miss": ("Miss", {"r": 5}, LINEAR),
    "miss-mini": ("Miss", {"r": 4, "init_weights": "mini", "mini_r": 3}, LINEAR),
    "bat": ("Miss", {"r": 3, "init_weights": "bat"}, LINEAR),
    "beft": ("Beft", {}, ("wide", "tall")),
    "oft": ("OFT", {"oft_block_size": 3}, (*LINEAR, "image")),
    "oft-exact": ("OFT", {"oft_block_size": 3, "use_cayley_neumann": False}, LINEAR),
    "oft-terms": ("OFT", {"oft_block_size": 3, "num_cayley_neumann_terms": 2}, LINEAR),
    "oft-shared": ("OFT", {"oft_block_size": 3, "block_share": True}, LINEAR),
    "oft-embedding": ("OFT", {"oft_block_size": 3}, ("wte",)),
    "coft": ("OFT", {"oft_block_size": 3, "coft": True, "eps": 0.01}, LINEAR),
    "boft": ("BOFT", {"boft_block_size": 3}, (*LINEAR, "image")),
    "hra": ("HRA", {"r": 4}, (*LINEAR, "image")),
    "hra-gs": ("HRA", {"r": 4, "apply_GS": True}, LINEAR),
    "road-1": ("Road", {"group_size": 6}, LINEAR),
    "road-2": ("Road", {"group_size": 6, "variant": "road_2"}, LINEAR),
    "road-4": ("Road", {"group_size": 6, "variant": "road_4"}, LINEAR),
    "hira": ("Hira", {"r": 4}, (*LINEAR, "image", "audio", "wte")),
    "hira-turned": ("Hira", {"r": 4, "fan_in_fan_out": True}, ("turned",)),
    "glora": ("Glora", {"r": 3}, LINEAR),
    "glora-vectors": (
        "Glora",
        {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"},
        LINEAR,
    ),
    "deft": ("Deft", {"r": 3, "alpha": 6}, LINEAR),
    "deft-qr": ("Deft", {"r": 3, "decomposition_method": "qr"}, LINEAR),
    "para": ("Deft", {"r": 3, "decomposition_method": "qr", "para": True}, LINEAR),
    "deft-turned": ("Deft", {"r": 3, "fan_in_fan_out": True}, ("turned",)),
    "frod": ("Frod", {}, LINEAR),
    "peanut": ("Peanut", {"r": 3, "depth": 2, "act_fn": "gelu", "scaling": 0.5}, LINEAR),
}


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    model = Net()
    models.perturb(model, 0.1, seed)
    return model.eval()


def store(model: torch.nn.Module, path: Path) -> Path:
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    return path


def trained(out: Path, case: str, seed: int = 3, **more: Any) -> dict[str, torch.Tensor]:
    """An adapter of a case whose every number is random, saved to ``out``; what PEFT merges it to,
    as it is read back from there."""
    name, numbers, targets = CASES[case]
    made = getattr(peft, f"{name}Config")
    config = models.quietly(lambda: made(target_modules=list(targets), **numbers, **more))
    torch.manual_seed(seed)
    wrapped = models.quietly(lambda: peft.get_peft_model(net(), config))
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=noise))
    models.quietly(lambda: wrapped.save_pretrained(out))
    read = models.quietly(lambda: peft.PeftModel.from_pretrained(net(), out)).eval()
    merged: dict[str, torch.Tensor] = models.quietly(read.merge_and_unload).state_dict()
    return merged


@pytest.mark.sweep(6)
@pytest.mark.parametrize("case", CASES)
def test_a_type_merges_as_in_peft(case: str, tmp_path: Path) -> None:
    """… and with its sidecar unmerges to the last bit."""
    base = store(net(), tmp_path / "base.safetensors")
    wanted = trained(tmp_path / "a", case)
    out = tmp_path / "m.safetensors"
    report = lora_tools.merge(base, [tmp_path / "a"], out, reversible=True)
    moved = {f.tensor for f in report.plan if f.action == "merge"}
    assert {name.rpartition(".")[0] for name in moved} == set(CASES[case][2])
    found, before = load_file(out), load_file(base)
    models.assert_same(found, wanted, 2e-6)
    assert all(not found[name].equal(before[name]) for name in moved)
    lora_tools.unmerge(out, [tmp_path / "a"], tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == base.read_bytes()


def test_every_row_has_a_case() -> None:
    tried = {name.upper() for name, _, _ in CASES.values()}
    assert tried == {row.peft_type for row in CHANGES}


@pytest.mark.sweep(3)
@pytest.mark.parametrize("case", ["loha", "lokr", "oft", "hira-turned", "shira"])
def test_a_type_becomes_a_lora_of_the_certified_error(case: str, tmp_path: Path) -> None:
    """What the LoRA makes of the base is as far from what the type makes of it as is said, and no
    rank that is as low comes nearer (Eckart and Young)."""
    base = store(net(), tmp_path / "base.safetensors")
    wanted = trained(tmp_path / "a", case)
    report = lora_tools.convert(tmp_path / "a", tmp_path / "l", to="peft", base=base, rank=2)
    read = models.quietly(lambda: peft.PeftModel.from_pretrained(net(), tmp_path / "l"))
    found = models.quietly(read.merge_and_unload).state_dict()
    before = load_file(base)
    assert {r.module for r in report.modules} == set(CASES[case][2])
    for result in report.modules:
        name = f"{result.module}.weight"
        exact = (wanted[name] - before[name]).double()
        error = float((found[name].double() - before[name].double() - exact).norm() / exact.norm())
        assert error == pytest.approx(result.relative_error, abs=1e-5)
        S = torch.linalg.svdvals(exact.flatten(1))
        best = float((S[2:].square().sum() / S.square().sum()).sqrt())
        assert best - 1e-6 <= error <= best + 2e-3


FACTORED = ("loha", "lokr", "adalora", "vera", "pvera", "randlora", "vblora", "unilora")


@pytest.mark.sweep(6)
@pytest.mark.parametrize(
    "case", [*FACTORED, "tinylora", "delora", "loha-effective", "lokr-both", "vera-turned"]
)
def test_small_factors_give_the_lora_that_the_matrix_gives(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change that is a product of small factors is decomposed by them."""
    base = store(net(), tmp_path / "base.safetensors")
    trained(tmp_path / "a", case)
    reports = {}
    for small in (False, True):
        monkeypatch.setattr(On, "is_small", lambda on, rank, small=small: small)
        reports[small] = lora_tools.convert(
            tmp_path / "a", tmp_path / f"{small}", to="peft", base=base, rank=2
        )
    methods = {r.method for r in reports[True].modules if r.module != "audio"}
    assert (methods, {r.method for r in reports[False].modules}) == ({"resize"}, {"dense"})
    for one, other in zip(reports[False].modules, reports[True].modules, strict=True):
        assert (other.rank, other.module) == (one.rank, one.module)
        assert other.relative_error == pytest.approx(one.relative_error, abs=2e-6)
        assert other.delta_norm == pytest.approx(one.delta_norm, rel=1e-5)
    for out in ("False", "True"):
        lora_tools.merge(base, [tmp_path / out], tmp_path / f"m{out}.safetensors")
    found, wanted = (load_file(tmp_path / f"m{out}.safetensors") for out in ("True", "False"))
    models.assert_same(found, wanted, 1e-5)


def test_a_change_by_factors_that_is_nothing(tmp_path: Path) -> None:
    """LoHa of zeros, and one with a NaN."""
    base = store(net(), tmp_path / "base.safetensors")
    trained(tmp_path / "a", "loha")
    file = load_file(tmp_path / "a" / "adapter_model.safetensors")
    for value in (0.0, float("nan")):
        for x in file.values():
            x.fill_(value)
        save_file(file, tmp_path / "a" / "adapter_model.safetensors")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(On, "is_small", lambda on, rank: True)
            if value:
                with pytest.raises(NonFiniteError, match=r"weight: its change holds an inf"):
                    lora_tools.convert(tmp_path / "a", tmp_path / "n", to="peft", base=base, rank=2)
            else:
                lora_tools.convert(tmp_path / "a", tmp_path / "l", to="peft", base=base, rank=2)
    assert not any(x.any() for k, x in load_file(tmp_path / "l/adapter_model.safetensors").items())


@pytest.mark.sweep(4)
@pytest.mark.parametrize("case", ["oft", "boft", "hra", "bat", "road-1", "hira", "glora", "frod"])
def test_several_act_one_after_the_other_as_in_peft(case: str, tmp_path: Path) -> None:
    """Rotations on what the one before made; the others on the base."""
    base = store(net(), tmp_path / "base.safetensors")
    for i, name in enumerate("ab"):
        trained(tmp_path / name, case, seed=3 + i)
    both = models.quietly(lambda: peft.PeftModel.from_pretrained(net(), tmp_path / "a"))
    models.quietly(lambda: both.load_adapter(tmp_path / "b", "b"))
    wanted = models.quietly(
        lambda: both.merge_and_unload(adapter_names=["default", "b"])
    ).state_dict()
    out = tmp_path / "m.safetensors"
    lora_tools.merge(base, [tmp_path / "a", tmp_path / "b"], out)
    models.assert_same(load_file(out), wanted, 3e-6)


def test_what_comes_first_is_asked_where_it_matters(tmp_path: Path) -> None:
    base = store(net(), tmp_path / "base.safetensors")
    trained(tmp_path / "a", "hra")
    trained(tmp_path / "b", "loha")
    with pytest.raises(UnsupportedAdapter, match=r"merge one of.*and the other into the res"):
        lora_tools.merge(base, [tmp_path / "a", tmp_path / "b"], tmp_path / "m.safetensors")


@pytest.mark.parametrize("case", ["hira", "oft", "glora"])
def test_a_layer_that_is_saved_is_what_is_changed(case: str, tmp_path: Path) -> None:
    """PEFT saves embeddings and output heads that an adapter acts on, and reads them back."""
    base = store(net(), tmp_path / "base.safetensors")
    trained(tmp_path / "a", case)
    path, key = tmp_path / "a" / "adapter_model.safetensors", "base_model.model.wide.base_layer"
    save_file({**load_file(path), f"{key}.weight": net(1).wide.weight.detach()}, path)
    read = models.quietly(lambda: peft.PeftModel.from_pretrained(net(), tmp_path / "a")).eval()
    wanted = models.quietly(read.merge_and_unload).state_dict()
    lora_tools.merge(base, [tmp_path / "a"], tmp_path / "m.safetensors")
    models.assert_same(load_file(tmp_path / "m.safetensors"), wanted, 2e-6)
    if case == "glora":  # whose change of a bias is made of that weight, too, and is no LoRA's
        return
    lora_tools.convert(tmp_path / "a", tmp_path / "l", to="peft", base=base, rank=12)
    lora_tools.merge(base, [tmp_path / "l"], tmp_path / "n.safetensors")
    models.assert_same(load_file(tmp_path / "n.safetensors"), wanted, 1e-5)
    trained(tmp_path / "b", "loha")
    with pytest.raises(UnsupportedAdapter, match="merge one of them"):
        lora_tools.merge(base, [tmp_path / "a", tmp_path / "b"], tmp_path / "x.safetensors")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_several_vectors_of_tinylora_in_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    """Which of them a module has, the seed of its projection says, rounded as it is."""
    base = store(net(), tmp_path / "base.safetensors")
    trained(tmp_path / "a", "tinylora-tied")
    path = tmp_path / "a" / "adapter_model.safetensors"
    save_file({k: v.to(dtype) for k, v in load_file(path).items()}, path)
    read = models.quietly(lambda: peft.PeftModel.from_pretrained(net(), tmp_path / "a")).eval()
    wanted = models.quietly(read.merge_and_unload).state_dict()
    lora_tools.merge(base, [tmp_path / "a"], tmp_path / "m.safetensors")
    models.assert_same(load_file(tmp_path / "m.safetensors"), wanted, 2e-6)


def test_the_weight_of_an_adapter_scales_its_change(tmp_path: Path) -> None:
    base = store(net(), tmp_path / "base.safetensors")
    before = load_file(base)
    for case in ("loha", "oft"):
        wanted = trained(tmp_path / case, case)
        lora_tools.merge(base, [(tmp_path / case, 0.5)], out := tmp_path / f"{case}.safetensors")
        half = {name: (before[name] + tensor) / 2 for name, tensor in wanted.items()}
        models.assert_same(load_file(out), half, 2e-6)


def test_butterflies_are_those_of_peft(tmp_path: Path) -> None:
    """Without CUDA PEFT makes BOFT of one factor only: its own matrices are multiplied here."""
    from peft.tuners.boft.layer import BOFTLayer

    from lora_tools.linalg.changes.on import On
    from lora_tools.linalg.changes.table import change

    torch.manual_seed(0)
    R, s, W = torch.randn(3, 8, 4, 4) * 0.3, torch.rand(6, 1) + 0.5, torch.randn(6, 32)
    layer = BOFTLayer.__new__(BOFTLayer)
    G = torch.eye(32)
    for i in range(3):
        P = layer.perm2mat(layer.block_butterfly_perm(32, 8 // 2**i, 2, 2))
        G = P @ torch.block_diag(*layer.cayley_batch(R[i])) @ P.T @ G
    found = change("boft", {"boft_R": R, "boft_s": s}, {}, On((6, 32), W))
    torch.testing.assert_close(found, W @ G.T * s - W, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["plain", "patterns"])
def test_an_attention_of_torch(kind: str, tmp_path: Path) -> None:
    """PEFT's LoRA of nn.MultiheadAttention: one pair for in_proj_weight, one for out_proj."""

    class Attending(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.mha = torch.nn.MultiheadAttention(12, 2)
            self.lin = torch.nn.Linear(12, 5)

    more: dict[str, Any] = {"rank_pattern": {"mha": 2}, "alpha_pattern": {"mha": 9}}
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["mha", "lin"],
        init_lora_weights=False,
        **(more if kind == "patterns" else {}),
    )
    base = store(Attending(), tmp_path / "base.safetensors")
    tuned = models.quietly(lambda: peft.get_peft_model(Attending(), config))
    tuned.save_pretrained(tmp_path / "a")
    lora_tools.merge(base, [tmp_path / "a"], tmp_path / "m.safetensors", reversible=True)
    wanted = models.quietly(tuned.merge_and_unload).state_dict()
    models.assert_same(load_file(tmp_path / "m.safetensors"), wanted, 1e-6)


@pytest.mark.parametrize("kind", ["velora", "monteclora"])
def test_loras_that_differ_in_training_only(kind: str, tmp_path: Path) -> None:
    configs = {
        "velora": {"velora_config": peft.VeloraConfig(num_groups=2, init_type="random")},
        "monteclora": {"monteclora_config": peft.MontecloraConfig(num_samples=2)},
    }
    config = peft.LoraConfig(
        target_modules=list(LINEAR), init_lora_weights=False, r=4, **configs[kind]
    )
    tuned = models.quietly(lambda: peft.get_peft_model(net(), config)).eval()
    models.quietly(lambda: tuned.save_pretrained(tmp_path / "a"))
    base = store(net(), tmp_path / "base.safetensors")
    report = lora_tools.merge(base, [tmp_path / "a"], tmp_path / "m.safetensors")
    assert any("for training" in note for note in report.notes)
    wanted = models.quietly(tuned.merge_and_unload).state_dict()
    models.assert_same(load_file(tmp_path / "m.safetensors"), wanted, 1e-6)


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_block_diagonal_factors(blocks: int, tmp_path: Path) -> None:
    """BD-LoRA: of one side the file holds the blocks only; a module without any is a plain LoRA."""
    said = {"target_modules_bd_a": ["wide"], "target_modules_bd_b": ["tall"], "nblocks": blocks}
    kind = peft.tuners.lora.config.BdLoraConfig(**said, match_strict=False)
    config = peft.LoraConfig(
        target_modules=list(LINEAR), init_lora_weights=False, r=6, lora_alpha=9, use_bdlora=kind
    )
    tuned = models.quietly(lambda: peft.get_peft_model(net(), config)).eval()
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    models.quietly(lambda: tuned.save_pretrained(tmp_path / "a"))
    base = store(net(), tmp_path / "base.safetensors")
    lora_tools.merge(base, [tmp_path / "a"], tmp_path / "m.safetensors")
    wanted = models.quietly(tuned.merge_and_unload).state_dict()
    models.assert_same(load_file(tmp_path / "m.safetensors"), wanted, 1e-6)
    strict = {**json.loads((tmp_path / "a" / "adapter_config.json").read_text())["use_bdlora"]}
    spoiled(tmp_path / "a", use_bdlora=strict | {"match_strict": True})
    with pytest.raises(UnsupportedAdapter, match="does not say which"):
        lora_tools.merge(base, [tmp_path / "a"], tmp_path / "n.safetensors")


def spoiled(folder: Path, **config: Any) -> Path:
    """The adapter with other numbers in its config; None: without one."""
    said = json.loads((folder / "adapter_config.json").read_text()) | config
    kept = {key: value for key, value in said.items() if value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(kept))
    return folder


HOSTILE: dict[str, tuple[str, dict[str, Any], str]] = {
    "no alpha": ("loha", {"alpha": None}, "alpha is None"),
    "alpha a word": ("loha", {"alpha": "six"}, "alpha is 'six'"),
    "alpha NaN": ("loha", {"alpha": float("nan")}, "adapter_config.json"),
    "rank a fraction": ("lokr", {"r": 1.5}, "a whole number"),
    "rank zero": ("lokr", {"r": 0}, "make no lokr"),
    "a flag": ("oft", {"coft": "no"}, "but must be true or false"),
    "an older OFT": ("oft", {"use_cayley_neumann": None}, "use_cayley_neumann is None"),
    "top of more": ("vblora", {"topk": 10**9}, "make no vblora"),
    "a wavelet": ("waveft", {"wavelet_family": "nothing"}, "make no waveft"),
    "groups": ("road-1", {"group_size": 5}, "make no road"),
    "activation": ("peanut", {"act_fn": "exec"}, "make no peanut"),
    "depth": ("peanut", {"depth": 10**9}, "make no peanut"),
    "seed": ("tinylora", {"projection_seed": 7}, "make no tinylora"),
    "another type": ("hra", {"peft_type": "LOHA", "alpha": 1, "r": 1}, "hra_u matches no tensor"),
    "a list": ("hra", {"peft_type": ["HRA"]}, "cannot be merged here"),
}


@pytest.mark.sweep(4)
@pytest.mark.parametrize("case", HOSTILE)
def test_what_does_not_go_together_is_refused_by_name(case: str, tmp_path: Path) -> None:
    kind, config, said = HOSTILE[case]
    base = store(net(), tmp_path / "base.safetensors")
    trained(tmp_path / "a", kind)
    out = tmp_path / "m.safetensors"
    with pytest.raises((AdapterError, MismatchError, UnsupportedAdapter), match=said):
        lora_tools.merge(base, [spoiled(tmp_path / "a", **config)], out)
    assert not out.exists()


@pytest.mark.sweep(7)
@pytest.mark.parametrize("case", ["loha", "vera", "shira", "oft", "frod", "fourierft", "gralora"])
def test_tensors_of_another_layer_are_refused_by_name(case: str, tmp_path: Path) -> None:
    """Each tensor of the file, longer by one in each of its dimensions in turn."""
    base = store(net(), tmp_path / "base.safetensors")
    trained(tmp_path / "a", case)
    path = tmp_path / "a" / "adapter_model.safetensors"
    whole = load_file(path)
    before = load_file(base)
    for key, tensor in whole.items():
        if key.endswith(("frod_s_size.wide", "frod_s_size.tall", "frod_s_size.bare")):
            continue
        for dim in range(tensor.dim()):
            longer = torch.cat((tensor, tensor.narrow(dim, 0, 1)), dim)
            save_file({**whole, key: longer}, path)
            out = tmp_path / "m.safetensors"
            try:
                lora_tools.merge(base, [tmp_path / "a"], out)
            except (AdapterError, MismatchError):
                assert not out.exists()
            else:  # what is shared is cut to what a layer needs
                found = load_file(out)
                assert {k: v.shape for k, v in found.items()} == {
                    k: v.shape for k, v in before.items()
                }
                assert case in ("vera", "fourierft") or "frod_V" in key, key
                out.unlink()


@pytest.mark.sweep(3)
@pytest.mark.parametrize(
    ("case", "more", "said"),
    [
        ("vera", {"save_projection": False}, "save_projection=True"),
        ("randlora", {"save_projection": False}, "save_projection=True"),
        ("super", {"save_precomputed_indices": False}, "save_precomputed_indices=True"),
    ],
)
def test_what_is_made_anew_from_a_seed_is_asked_for(
    case: str, more: dict[str, Any], said: str, tmp_path: Path
) -> None:
    base = store(net(), tmp_path / "base.safetensors")
    trained(tmp_path / "a", case, **more)
    with pytest.raises(AdapterError, match=said):
        lora_tools.merge(base, [tmp_path / "a"], tmp_path / "m.safetensors")


def test_what_no_lora_is_said(tmp_path: Path) -> None:
    """By verbs that need factors, and by a conversion that is not told enough."""
    base = store(net(), tmp_path / "base.safetensors")
    trained(tmp_path / "a", "loha")
    trained(tmp_path / "b", "beft")
    with pytest.raises(UnsupportedAdapter, match=r"convert .* --to peft --rank 16 --base BASE"):
        lora_tools.rescale(tmp_path / "a", tmp_path / "r", rank=2)
    with pytest.raises(UsageError, match="rank or energy"):
        lora_tools.convert(tmp_path / "a", tmp_path / "l", to="peft", base=base)
    with pytest.raises(UsageError, match="trained on with base"):
        lora_tools.convert(tmp_path / "a", tmp_path / "l", to="peft", rank=2)
    with pytest.raises(UsageError, match="make it a LoRA of PEFT first"):
        lora_tools.convert(tmp_path / "a", tmp_path / "l", to="kohya", base=base, rank=2)
    with pytest.raises(UnsupportedAdapter, match="a LoRA cannot hold such a change"):
        lora_tools.convert(tmp_path / "b", tmp_path / "l", to="peft", base=base, rank=2)
    out = tmp_path / "m.safetensors"
    trained(tmp_path / "c", "oft")
    lora_tools.merge(base, [tmp_path / "c"], out)
    with pytest.raises(UnsupportedAdapter, match="OFT depends on the old weight"):
        lora_tools.unmerge(out, [tmp_path / "c"], tmp_path / "u.safetensors")
