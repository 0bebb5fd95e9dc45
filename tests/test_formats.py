"""Adapter formats: one contract that each keeps, and its own reader opening what was written.

The effect of an adapter is what PEFT says it adds to each weight; merging is compared besides.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import gguf
import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_tools
import lora_tools.nn
from lora_tools.errors import AdapterError, CheckpointError, UnsupportedAdapter, UsageError
from lora_tools.formats.adapters.format import FEATURES
from lora_tools.formats.adapters.table import FORMATS, title_of
from lora_tools.formats.digest import PROVENANCE
from lora_tools.formats.gguf_file import GgufFile
from lora_tools.sources.adapters import open_adapter
from lora_tools.sources.checkpoints import open_checkpoint

from . import iotools, models

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import loralib

CONFIGS: dict[str, dict[str, Any]] = {
    "even": {"target_modules": ["q_proj", "k_proj", "down_proj"], "r": 4, "lora_alpha": 6},
    "uneven": {
        "target_modules": ["q_proj", "k_proj", "o_proj", "down_proj"],
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {"down_proj": 3},
        "alpha_pattern": {"1.self_attn.q_proj": 5},
    },
    "rslora": {
        "target_modules": ["k_proj", "up_proj"],
        "r": 3,
        "lora_alpha": 5,
        "use_rslora": True,
    },
    "dora": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8, "use_dora": True},
    "bias": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 6, "lora_bias": True},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"], "r": 4, "lora_alpha": 4},
    "saved": {"target_modules": ["v_proj"], "r": 4, "lora_alpha": 4, "modules_to_save": ["norm"]},
    "tokens": {
        "target_modules": ["v_proj"],
        "r": 4,
        "lora_alpha": 4,
        "trainable_token_indices": [3, 9],
    },
}
PLAIN = ("even", "uneven", "rslora")


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and an adapter by PEFT for each config; what each adds to the weights."""
    folder = tmp_path_factory.mktemp("formats")
    base = models.save(models.make("llama"), folder / "base")
    for name, config in CONFIGS.items():
        models.train(base, folder / name, config, save_embedding_layers=False)
        lora_tools.merge(base, [folder / name], folder / f"{name}-merged")
    return folder


def merged(root: Path, adapter: Path, out: Path) -> dict[str, torch.Tensor]:
    lora_tools.merge(root / "base", [adapter], out)
    return models.tensors(out)


def unsigned(path: Path) -> Any:
    """A file, or those of a folder, without what says how it was made."""
    if path.is_dir():
        return {p.name: unsigned(p) for p in path.iterdir() if p.name != "README.md"}
    data = path.read_bytes()
    if data.startswith(b"GGUF"):
        file = GgufFile(path)
        fields = {k: v for k, v in file.fields.items() if not k.startswith(("loratools", "GGUF."))}
        return fields, {name: bytes(file.raw(name)) for name in file.specs}
    if data[8:9] != b"{":
        return data
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    said = header.pop("__metadata__")
    assert {"loratools", "command", "adapter_digests"} <= said.keys()
    return header, {k: v for k, v in said.items() if k not in PROVENANCE}, data[8 + size :]


class FormatContract:
    """What every format must keep. Subclasses name it and open it with its own reader."""

    name: ClassVar[str]

    @property
    def kinds(self) -> list[str]:
        """The adapters that it has a place for."""
        return [*PLAIN, *(k for k in CONFIGS if k in FORMATS[self.name].keeps)]

    def convert(self, root: Path, kind: str, out: Path) -> lora_tools.Report:
        return lora_tools.convert(root / kind, out, to=self.name, base=root / "base")

    def file(self, out: Path) -> Path:
        return next(iter(sorted(out.glob("*.safetensors")))) if out.is_dir() else out

    def add_key(self, out: Path, key: str) -> None:
        """Put a tensor into the file that the format does not know."""
        path = self.file(out)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tensors = {**load_file(path), key: torch.ones(2)}
        save_file(tensors, path)

    unknown = "model.layers.0.self_attn.q_proj.lora_C"

    def read(self, root: Path, kind: str, out: Path) -> None:
        """Open it with the format's own reader, and compare."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------- the contract

    def test_the_effect_on_the_weights_stays(self, root: Path, tmp_path: Path) -> None:
        for kind in self.kinds:
            self.convert(root, kind, tmp_path / kind)
            found = merged(root, tmp_path / kind, tmp_path / f"{kind}-merged")
            models.assert_same(found, models.tensors(root / f"{kind}-merged"), 3e-7)

    def test_there_and_back(self, root: Path, tmp_path: Path) -> None:
        """Written again it is the same bytes; PEFT reads what came back, and adds the same."""
        for kind in self.kinds:
            there, back = tmp_path / kind, tmp_path / f"{kind}-back"
            self.convert(root, kind, there)
            lora_tools.convert(there, back, to="peft", base=root / "base")
            lora_tools.convert(back, tmp_path / f"{kind}-again", to=self.name, base=root / "base")
            assert unsigned(there) == unsigned(tmp_path / f"{kind}-again")
            models.attach_strictly(models.load(root / "base"), back)
            found = merged(root, back, tmp_path / f"{kind}-merged")
            models.assert_same(found, models.tensors(root / f"{kind}-merged"), 3e-7)

    def test_factors_are_not_touched(self, root: Path, tmp_path: Path) -> None:
        """Nothing has to be folded into factors that have one rank and one alpha."""
        self.convert(root, "even", tmp_path / "a")
        lora_tools.convert(tmp_path / "a", tmp_path / "back", to="peft", base=root / "base")
        here, there = models.tensors(tmp_path / "back"), models.tensors(root / "even")
        assert sorted(here) == sorted(there)
        folds = FORMATS[self.name].alpha == "folded"
        for key, tensor in there.items():
            assert (folds and "lora_B" in key) or torch.equal(here[key], tensor), key

    def test_bfloat16_comes_back_as_it_was(self, root: Path, tmp_path: Path) -> None:
        given = root / "embedding" if "embedding" in self.kinds else root / "tokens"
        lora_tools.convert(given, tmp_path / "half", to="peft", dtype="bfloat16", drop=["tokens"])
        lora_tools.convert(tmp_path / "half", tmp_path / "a", to=self.name, base=root / "base")
        lora_tools.convert(tmp_path / "a", tmp_path / "back", to="peft", base=root / "base")
        here, there = models.tensors(tmp_path / "back"), models.tensors(tmp_path / "half")
        assert all(torch.equal(here[k].float(), there[k].float()) for k in there)

    def test_what_it_cannot_hold(self, root: Path, tmp_path: Path) -> None:
        for feature in set(FEATURES) & set(CONFIGS):
            out = tmp_path / feature
            if feature in FORMATS[self.name].keeps:
                continue
            with pytest.raises(UnsupportedAdapter, match=f"drop=.{feature}"):
                self.convert(root, feature, out)
            assert not out.exists()
            report = lora_tools.convert(
                root / feature, out, to=self.name, base=root / "base", drop=[feature]
            )
            assert any("left out" in note for note in report.notes)
            if feature in ("embedding", "saved", "tokens"):
                assert "drop" in {fate.action for fate in report.plan}

    def test_it_reopens_by_its_path(self, root: Path, tmp_path: Path) -> None:
        """Another process gets the path, no tensors, and refuses what is there by then instead."""
        for kind in self.kinds:
            self.convert(root, kind, tmp_path / kind)
            given = open_adapter(tmp_path / kind, base=root / "base")
            sent = pickle.dumps(given)
            again = pickle.loads(sent)
            for what in (
                "path",
                "format",
                "form",
                "config",
                "modules",
                "whole",
                "tokens",
                "blocks",
            ):
                assert getattr(again, what) == getattr(given, what), what
            assert again.file.specs == given.file.specs
            for key in given.file.specs:
                data = bytes(given.file.raw(key))
                assert bytes(again.file.raw(key)) == data
                assert data not in sent
            os.utime(given.stored.path, ns=(0, 0))
            with pytest.raises(CheckpointError, match="changed since it was opened"):
                pickle.loads(sent)

    def test_an_unknown_key(self, root: Path, tmp_path: Path) -> None:
        self.convert(root, "even", tmp_path / "a")
        self.add_key(tmp_path / "a", self.unknown)
        for use in (
            lambda: open_adapter(tmp_path / "a", base=root / "base", source_format=self.name),
            lambda: lora_tools.merge(root / "base", [tmp_path / "a"], tmp_path / "m"),
        ):
            with pytest.raises(AdapterError, match=re.escape(self.unknown)):
                use()

    def test_its_own_reader(self, root: Path, tmp_path: Path) -> None:
        for kind in self.kinds:
            self.convert(root, kind, tmp_path / kind)
            self.read(root, kind, tmp_path / kind)

    def test_on_a_live_model(self, root: Path, tmp_path: Path) -> None:
        self.convert(root, "uneven", tmp_path / "a")
        model = models.load(root / "base")
        before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
        wanted = models.outputs(models.load(root / "uneven-merged"))
        for put in (lora_tools.nn.attach, lora_tools.nn.merge_):
            put(model, tmp_path / "a")
            torch.testing.assert_close(models.outputs(model), wanted, rtol=1e-4, atol=1e-5)
            lora_tools.nn.detach(model)
            for name, p in model.named_parameters():
                assert before[name][0] == id(p)
                assert torch.equal(before[name][1], p)

    def test_every_command_takes_it(self, root: Path, tmp_path: Path) -> None:
        given, base = tmp_path / "a", root / "base"
        self.convert(root, "uneven", given)
        lora_tools.merge(base, [given], tmp_path / "r", reversible=True)
        lora_tools.unmerge(tmp_path / "r", [given], tmp_path / "u")
        assert iotools.tree(tmp_path / "u") == iotools.tree(base)
        assert lora_tools.verify(tmp_path / "r", base=base, adapters=[given]).totals["same"]
        tuned = root / "uneven-merged"
        found = lora_tools.verify(given, base=base, tuned=tuned, max_error=1e-5)
        assert found.totals["modules"] == len(models.tensors(root / "uneven")) / 2
        lora_tools.combine([(given, 0.5), (given, 0.5)], tmp_path / "c", base=base)
        models.assert_same(
            merged(root, tmp_path / "c", tmp_path / "cm"), models.tensors(tuned), 3e-7
        )
        lora_tools.quantize(base, tmp_path / "q", adapters=[given])
        lora_tools.quantize(tuned, tmp_path / "qm")
        found, wanted = models.tensors(tmp_path / "q"), models.tensors(tmp_path / "qm")
        numbers = [k for k in wanted if ".quant_state." not in k]  # which has a mean, in digits
        differing = sum((found[k] != wanted[k]).sum() for k in numbers)
        assert differing <= 4, "but for a rounding that falls the other way"
        report = lora_tools.export(base, tmp_path / "o", adapters=[given], dry_run=True)
        assert any(fate.action == "merge" for fate in report.plan)

    def test_rescale_keeps_the_format(self, root: Path, tmp_path: Path) -> None:
        given, base, form = tmp_path / "a", root / "base", FORMATS[self.name]
        self.convert(root, "uneven", given)
        lora_tools.rescale(given, tmp_path / "half", scale=0.5, base=base)
        assert open_adapter(tmp_path / "half", base=base).format == self.name
        assert (tmp_path / "half").is_dir() == form.is_folder
        lora_tools.merge(base, [(tmp_path / "half", 2.0)], tmp_path / "m")
        wanted = models.tensors(root / "uneven-merged")
        models.assert_same(models.tensors(tmp_path / "m"), wanted, 3e-7)
        report = lora_tools.rescale(given, tmp_path / "small", rank=2, base=base)
        ranks = {m.r for m in open_adapter(tmp_path / "small", base=base).modules.values()}
        assert ranks == {2}
        error = lora_tools.verify(tmp_path / "small", base=base, tuned=root / "uneven-merged")
        assert error.totals["relative_error"] == pytest.approx(
            report.totals["relative_error"], abs=1e-4
        )
        lora_tools.rescale(given, tmp_path / "vllm", consumer="vllm", base=base)
        assert open_adapter(tmp_path / "vllm").format == "peft"
        models.assert_same(merged(root, tmp_path / "vllm", tmp_path / "vm"), wanted, 3e-7)
        if not form.base or form.keeps_names:
            lora_tools.rescale(given, tmp_path / "alone", scale=0.5)
            same = unsigned(tmp_path / "alone") == unsigned(tmp_path / "half")
            assert same or self.name == "peft"
        else:
            with pytest.raises(AdapterError, match=r"with base$"):
                lora_tools.rescale(given, tmp_path / "alone", scale=0.5)

    def test_inspect_says_what_it_is(self, root: Path, tmp_path: Path) -> None:
        """Without a base, in the file's own names."""
        self.convert(root, "even", tmp_path / "a")
        report = lora_tools.inspect(tmp_path / "a")
        facts = report.totals
        assert (facts["kind"], facts["format"]) == ("adapter", FORMATS[self.name].title)
        assert facts["ranks"] == [4]
        assert facts["alphas"] == [4 if FORMATS[self.name].alpha == "folded" else 6]
        assert len(facts["targets"]) == 3
        assert {len(str(t)) < 20 for t in facts["targets"]} == {True}
        assert sorted(s.norm for s in report.spectra) == pytest.approx(
            sorted(float(d.norm()) for d in deltas(root / "base", root / "even").values()), rel=1e-5
        )

    def test_it_is_no_checkpoint(self, root: Path, tmp_path: Path) -> None:
        self.convert(root, "even", tmp_path / "a")
        given, base, title = tmp_path / "a", root / "base", FORMATS[self.name].title
        for use in (
            lambda: lora_tools.extract(given, base, tmp_path / "o"),
            lambda: lora_tools.extract(base, given, tmp_path / "o"),
            lambda: lora_tools.merge(given, [root / "even"], tmp_path / "o"),
            lambda: lora_tools.quantize(given, tmp_path / "o"),
            lambda: lora_tools.export(given, tmp_path / "o"),
            lambda: lora_tools.diff(base, given),
            lambda: lora_tools.convert(root / "even", tmp_path / "o", to="kohya", base=given),
        ):
            with pytest.raises(CheckpointError, match=re.escape(title)) as caught:
                use()
            assert "loratools merge" in str(caught.value) or title == "GGUF"
            assert not (tmp_path / "o").exists()


def deltas(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """What PEFT says that an adapter adds to the weight of each module."""
    model = models.attach(base, adapter)
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().double()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def assert_deltas(
    root: Path, kind: str, found: dict[str, torch.Tensor], names: Callable[[str], str] = str
) -> None:
    wanted = {names(k): v for k, v in deltas(root / "base", root / kind).items()}
    models.assert_same({k: v.double() for k, v in found.items()}, wanted, 1e-6)


class TestPeft(FormatContract):
    name = "peft"
    unknown = "base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight"

    def read(self, root: Path, kind: str, out: Path) -> None:
        models.attach_strictly(models.load(root / "base"), out)


class TestLoralib(FormatContract):
    name = "loralib"

    def read(self, root: Path, kind: str, out: Path) -> None:
        """Layers with r and lora_alpha as the metadata has them; eval() folds the branch in."""
        state = load_file(out)
        alphas = open_adapter(out).modules
        found = {}
        for name, module in alphas.items():
            A, B = state[f"{name}.lora_A"], state[f"{name}.lora_B"]
            options = {"r": module.r, "lora_alpha": module.alpha}
            if module.form == "embedding":
                layer = loralib.Embedding(A.shape[1], B.shape[0], **options)
            else:
                layer = loralib.Linear(A.shape[1], B.shape[0], bias=False, **options)
            layer.load_state_dict({"lora_A": A, "lora_B": B}, strict=False)
            before = layer.weight.detach().clone()
            layer.eval()
            found[name] = layer.weight.detach() - before
        for name, delta in deltas(root / "base", root / kind).items():
            torch.testing.assert_close(found.pop(name).double(), delta, rtol=1e-4, atol=1e-5)
        assert not found

    def test_a_file_without_alpha(self, root: Path, tmp_path: Path) -> None:
        """As loralib's own lora_state_dict leaves it."""
        self.convert(root, "even", tmp_path / "a")
        state = load_file(tmp_path / "a")
        save_file(state, tmp_path / "b.safetensors")
        torch.save(state, tmp_path / "b.pt")
        for name, more in (("b.safetensors", {}), ("b.pt", {"allow_pickle": True})):
            with pytest.raises(AdapterError, match="--alpha"):
                lora_tools.merge(root / "base", [tmp_path / name], tmp_path / "m", **more)
            lora_tools.convert(tmp_path / name, tmp_path / f"{name}-c", to="peft", alpha=6, **more)
            found = merged(root, tmp_path / f"{name}-c", tmp_path / f"{name}-m")
            models.assert_same(found, models.tensors(root / "even-merged"), 3e-7)

    @pytest.mark.parametrize("blocks", ["1,0,1", "1,1,1", "0,1,0"])
    def test_merged_linear(self, blocks: str, tmp_path: Path) -> None:
        """loralib's own layer says what its factors add to the weight."""
        on = [b == "1" for b in blocks.split(",")]
        torch.manual_seed(1)
        layer = loralib.MergedLinear(8, 18, r=2, lora_alpha=6, enable_lora=on, bias=False)
        state = {f"net.qkv.{x}": torch.randn_like(getattr(layer, x)) for x in ("lora_A", "lora_B")}
        layer.load_state_dict({k.rpartition(".")[2]: v for k, v in state.items()}, strict=False)
        before = layer.weight.detach().clone()
        base = iotools.checkpoint(tmp_path / "base", {"net.qkv.weight": before})
        save_file(state, tmp_path / "a.safetensors")
        if blocks != "0,1,0":
            with pytest.raises(AdapterError, match="--enable-lora"):
                lora_tools.convert(tmp_path / "a.safetensors", tmp_path / "p", to="peft", alpha=6)
        lora_tools.convert(
            tmp_path / "a.safetensors",
            tmp_path / "p",
            to="peft",
            alpha=6,
            enable_lora=blocks,
            base=base,
        )
        lora_tools.merge(base, [tmp_path / "p"], tmp_path / "m")
        layer.eval()
        found = models.tensors(tmp_path / "m")["net.qkv.weight"]
        torch.testing.assert_close(found, layer.weight.detach(), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(found, before)

    def test_a_convolution(self, tmp_path: Path) -> None:
        torch.manual_seed(1)
        layer = loralib.Conv2d(4, 6, 3, r=2, lora_alpha=6, bias=False)
        state = {f"net.conv.{x}": torch.randn_like(getattr(layer, x)) for x in ("lora_A", "lora_B")}
        layer.load_state_dict({k.rpartition(".")[2]: v for k, v in state.items()}, strict=False)
        before = layer.conv.weight.detach().clone()
        base = iotools.checkpoint(tmp_path / "base", {"net.conv.weight": before})
        save_file(state, tmp_path / "a.safetensors")
        given = tmp_path / "a.safetensors"
        lora_tools.convert(given, tmp_path / "p", to="peft", alpha=6, base=base)
        lora_tools.merge(base, [tmp_path / "p"], tmp_path / "m")
        layer.eval()
        found = models.tensors(tmp_path / "m")["net.conv.weight"]
        torch.testing.assert_close(found, layer.conv.weight.detach(), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(found, before)


class TestKohya(FormatContract):
    name = "kohya"
    unknown = "lora_unet_model_layers_0_self_attn_q_proj.lora_C"

    def read(self, root: Path, kind: str, out: Path) -> None:
        """sd-scripts' formula: up @ down · alpha / rank. (diffusers reads it below.)"""
        if kind == "dora":
            return
        state, found = load_file(out), {}
        for key in state:
            if key.endswith(".lora_down.weight"):
                name = key.removesuffix(".lora_down.weight")
                down, up = state[key], state[f"{name}.lora_up.weight"]
                found[name] = up @ down * (state[f"{name}.alpha"] / down.shape[0])
        assert_deltas(root, kind, found, lambda m: "lora_unet_" + m.replace(".", "_"))

    def test_two_modules_of_one_name(self, root: Path, tmp_path: Path) -> None:
        noise = torch.Generator().manual_seed(0)
        tensors = {
            f"{name}.weight": torch.randn(6, 6, generator=noise)
            for name in ("x.to_q", "x_to.q", "y.lin", "z.a.lin")
        }
        base = iotools.checkpoint(tmp_path / "base", tensors)
        made = {
            "lora_unet_x_to_q.lora_down.weight": torch.ones(2, 6),
            "lora_unet_x_to_q.lora_up.weight": torch.ones(6, 2),
        }
        save_file(made, tmp_path / "a.safetensors")
        with pytest.raises(AdapterError, match=r"x\.to_q or x_to\.q"):
            lora_tools.merge(base, [tmp_path / "a.safetensors"], tmp_path / "m")
        # The end of a name will do, if it is that of one module.
        save_file(
            {k.replace("x_to_q", "a_lin"): v for k, v in made.items()}, tmp_path / "b.safetensors"
        )
        report = lora_tools.merge(base, [tmp_path / "b.safetensors"], tmp_path / "m")
        assert [f.tensor for f in report.plan if f.action == "merge"] == ["z.a.lin.weight"]
        save_file(
            {k.replace("x_to_q", "lin"): v for k, v in made.items()}, tmp_path / "c.safetensors"
        )
        with pytest.raises(AdapterError, match=r"y\.lin or z\.a\.lin"):
            lora_tools.merge(base, [tmp_path / "c.safetensors"], tmp_path / "m2")
        save_file(
            {k.replace("x_to_q", "nix"): v for k, v in made.items()}, tmp_path / "d.safetensors"
        )
        with pytest.raises(AdapterError, match="lora_unet_nix"):
            lora_tools.merge(base, [tmp_path / "d.safetensors"], tmp_path / "m3")

    def test_two_modules_written_to_one_name(self, tmp_path: Path) -> None:
        shapes = {"x.to_q": (6, 6), "x_to.q": (6, 6)}
        given = iotools.adapter(tmp_path / "a", shapes)
        with pytest.raises(AdapterError, match=r"x_to\.q and x\.to_q both become|x\.to_q and x_to"):
            lora_tools.convert(given, tmp_path / "b", to="kohya")


class TestLycoris(FormatContract):
    name = "lycoris"
    unknown = "lycoris_model_layers_0_self_attn_q_proj.lora_C"

    def read(self, root: Path, kind: str, out: Path) -> None:
        """lycoris' own loader builds its modules on the model, and each gives its delta."""
        from lycoris import create_lycoris_from_weights

        model = models.load(root / "base")
        file = out.with_name(f"{out.name}.safetensors")  # it goes by the name
        shutil.copy(out, file)
        network, _ = models.quietly(lambda: create_lycoris_from_weights(1.0, str(file), model))
        if kind == "dora":
            wanted = models.tensors(root / "dora-merged")
            for m in network.loras:
                whole, _ = m.get_merged_weight(1.0, m.shape)
                [name] = [n for n in wanted if n.replace(".", "_") == m.lora_name[8:] + "_weight"]
                torch.testing.assert_close(whole.detach(), wanted[name], rtol=1e-5, atol=1e-6)
            assert len(network.loras) == 4
            return
        found = {m.lora_name: m.get_diff_weight(shape=m.shape)[0].detach() for m in network.loras}
        assert_deltas(root, kind, found, lambda m: "lycoris_" + m.replace(".", "_"))


class TestDiffusers(FormatContract):
    name = "diffusers"
    unknown = "unet.model.layers.0.self_attn.q_proj.lora_C.weight"

    def read(self, root: Path, kind: str, out: Path) -> None:
        """As diffusers infers it: lora_alpha is the rank. (A UNet reads one below.)"""
        if kind in ("dora", "bias"):
            return
        state = load_file(out / "pytorch_lora_weights.safetensors")
        found = {
            key.removesuffix(".lora_A.weight"): state[key.replace("lora_A", "lora_B")] @ A
            for key, A in state.items()
            if "lora_A" in key
        }
        assert_deltas(root, kind, found, lambda m: "unet." + m)


class TestComfyui(FormatContract):
    name = "comfyui"
    unknown = "diffusion_model.model.layers.0.self_attn.q_proj.lora_C.weight"

    def read(self, root: Path, kind: str, out: Path) -> None:
        """Its formulas (comfy/lora.py and comfy/weight_adapter/lora.py): no alpha is the rank."""
        if kind == "dora":
            return
        state, found = load_file(out), {}
        for key in [key for key in state if key.endswith(".lora_A.weight")]:
            name, A = key.removesuffix(".lora_A.weight"), state.pop(key)
            alpha = state.pop(f"{name}.alpha", torch.tensor(float(len(A))))
            found[name] = state.pop(f"{name}.lora_B.weight") @ A * (alpha / len(A))
        assert_deltas(root, kind, found, lambda m: "diffusion_model." + m)
        base, wanted = (models.tensors(root / f) for f in ("base", f"{kind}-merged"))
        for key, tensor in state.items():
            module, _, part = key.removeprefix("diffusion_model.").rpartition(".")
            name = f"{module}.{'bias' if part == 'diff_b' else 'weight'}"
            made = tensor if part == "set_weight" else base[name] + tensor
            torch.testing.assert_close(made, wanted[name], msg=key)
        assert bool(state) == (kind in ("bias", "saved"))


class TestTorchtune(FormatContract):
    name = "torchtune"
    unknown = "layers.0.attn.q_proj.lora_c.weight"

    def read(self, root: Path, kind: str, out: Path) -> None:
        """Its formula on its order of rows: see also the law of rotary heads below."""
        if kind == "dora":
            return
        state = load_file(out)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from safetensors import safe_open

            with safe_open(out, "pt") as file:
                alphas = json.loads(file.metadata()["lora_alpha"])
        assert len(set(alphas.values())) == 1
        ranks, found = set(), {}
        for key, A in state.items():
            if not key.endswith(".lora_a.weight"):
                continue
            name = key.removesuffix(".lora_a.weight")
            delta = state[f"{name}.lora_b.weight"] @ A * (alphas[name] / A.shape[0])
            ranks.add(A.shape[0])
            heads = {"q_proj": 4, "k_proj": 2}.get(name.rpartition(".")[2])
            found[name] = uninterleave(delta, heads) if heads else delta
        assert len(ranks) == 1
        short = {"self_attn": "attn", "o_proj": "output_proj", "down_proj": "w2", "up_proj": "w3"}
        assert_deltas(
            root,
            kind,
            found,
            lambda m: ".".join(short.get(p, p) for p in m.removeprefix("model.").split(".")),
        )


class TestMlx(FormatContract):
    name = "mlx"
    unknown = "model.layers.0.self_attn.q_proj.lora_c"

    def read(self, root: Path, kind: str, out: Path) -> None:
        """mlx-lm's formula, y + scale · (x a) b, and what it asks of the config."""
        config = json.loads((out / "adapter_config.json").read_text())
        numbers = config["lora_parameters"]
        assert config["num_layers"] == -1
        assert config["fine_tune_type"] == ("dora" if kind == "dora" else "lora")
        state = load_file(out / "adapters.safetensors")
        found = {}
        for key, a in state.items():
            if key.endswith(".lora_a"):
                name = key.removesuffix(".lora_a")
                short = re.sub(r"^model\.layers\.\d+\.", "", name)
                assert short in numbers["keys"]
                assert a.shape[1] == numbers["rank"]
                found[name] = numbers["scale"] * (a @ state[f"{name}.lora_b"]).T
        if kind == "dora":
            return
        found = {k: v.T if "embed" in k else v for k, v in found.items()}
        assert_deltas(root, kind, found)


def uninterleave(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of pairs (0, d/2, 1, d/2 + 1, …) → first halves, then second halves, head by head."""
    per = x.shape[0] // heads
    order = [h * per + 2 * i + s for h in range(heads) for s in (0, 1) for i in range(per // 2)]
    return x[order]


class TestGguf(FormatContract):
    name = "gguf"
    unknown = "blk.0.attn_q.weight.lora_c"

    def add_key(self, out: Path, key: str) -> None:
        reader = gguf.GGUFReader(out)
        tensors = {t.name: np.array(t.data) for t in reader.tensors} | {key: np.ones(2, "f4")}
        writer = gguf.GGUFWriter(out.with_suffix(".new"), "llama")
        writer.add_string("general.type", "adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 6.0)
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        out.with_suffix(".new").rename(out)

    def read(self, root: Path, kind: str, out: Path) -> None:
        """The gguf package opens it; llama.cpp's formula is b @ a · alpha / rank."""
        reader = gguf.GGUFReader(out)
        assert reader.fields["general.architecture"].contents() == "llama"
        assert reader.fields["general.type"].contents() == "adapter"
        assert reader.fields["adapter.type"].contents() == "lora"
        alpha = reader.fields["adapter.lora.alpha"].contents()
        tensors = {t.name: torch.from_numpy(np.array(t.data)) for t in reader.tensors}
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
        for module, delta in deltas(root / "base", root / kind).items():
            name = names.get_name(module)
            a, b = (tensors.pop(f"{name}.weight.lora_{x}") for x in "ab")
            if name == "token_embd":  # llama.cpp takes rows of a by token, then b of them
                found = a @ b.T * (alpha / a.shape[1])
            else:
                found = b @ a * (alpha / a.shape[0])
            if "attn_q" in name or "attn_k" in name:
                found = uninterleave(found, 4 if "attn_q" in name else 2)
            torch.testing.assert_close(found.double(), delta, rtol=1e-4, atol=1e-5)
        assert not tensors

    def test_a_model_and_no_adapter(self, root: Path, tmp_path: Path) -> None:
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
        writer.add_tensor("token_embd.weight", np.ones((2, 2), "f4"))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(UnsupportedAdapter, match="a GGUF model"):
            lora_tools.merge(root / "base", [tmp_path / "m.gguf"], tmp_path / "m")

    @pytest.mark.parametrize("size", [3, 10, 40, 200, 3000])
    def test_a_truncated_file(self, size: int, root: Path, tmp_path: Path) -> None:
        self.convert(root, "even", tmp_path / "a.gguf")
        data = (tmp_path / "a.gguf").read_bytes()
        (tmp_path / "a.gguf").write_bytes(data[:size])
        with pytest.raises(lora_tools.LoraToolsError, match=r"a\.gguf"):
            lora_tools.merge(root / "base", [tmp_path / "a.gguf"], tmp_path / "m")

    def test_another_architecture(self, root: Path, tmp_path: Path) -> None:
        self.convert(root, "even", tmp_path / "a.gguf")
        shutil.copytree(root / "base", tmp_path / "base")
        config = json.loads((tmp_path / "base/config.json").read_text())
        for kind, says in (("qwen2", "made for a llama model"), ("marian", "a marian model")):
            text = json.dumps({**config, "model_type": kind})
            (tmp_path / "base/config.json").write_text(text)
            with pytest.raises(AdapterError, match=says):
                lora_tools.merge(tmp_path / "base", [tmp_path / "a.gguf"], tmp_path / "m")


def test_a_tied_head(tmp_path: Path) -> None:
    """The checkpoint does not store it; llama.cpp, MLX and torchtune have one module for both."""
    base = models.save(models.make("llama-tied"), tmp_path / "base")
    config = {"target_modules": ["v_proj", "lm_head"], "r": 2, "lora_alpha": 3}
    models.train(base, tmp_path / "a", config, save_embedding_layers=False)
    lora_tools.merge(base, [tmp_path / "a"], tmp_path / "wanted")
    for name, form in FORMATS.items():
        given = tmp_path / name
        if "head" not in form.keeps:
            with pytest.raises(UnsupportedAdapter, match=r"drop=.head"):
                lora_tools.convert(tmp_path / "a", given, to=name, base=base)
            lora_tools.convert(tmp_path / "a", given, to=name, base=base, drop=["head"])
            assert list(open_adapter(given, base=base).modules) == [
                f"model.layers.{i}.self_attn.v_proj" for i in range(2)
            ]
            continue
        lora_tools.convert(tmp_path / "a", given, to=name, base=base)
        lora_tools.merge(base, [given], tmp_path / f"{name}-merged")
        found = models.tensors(tmp_path / f"{name}-merged")
        models.assert_same(found, models.tensors(tmp_path / "wanted"), 3e-7)


def test_an_embedding_that_is_the_head(tmp_path: Path) -> None:
    """llama.cpp (seen with llama-cpp-python 0.3.36) aborts the process on such a file."""
    base = models.save(models.make("llama-tied"), tmp_path / "base")
    config = {"target_modules": ["v_proj", "embed_tokens"], "r": 2, "lora_alpha": 3}
    models.train(base, tmp_path / "a", config, save_embedding_layers=False)
    for dry in (True, False):
        with pytest.raises(UnsupportedAdapter, match=r"drop=.embedding"):
            lora_tools.convert(tmp_path / "a", tmp_path / "g", to="gguf", base=base, dry_run=dry)
    with pytest.raises(UnsupportedAdapter, match="the output head, too"):
        lora_tools.rescale(tmp_path / "a", tmp_path / "g", consumer="llama.cpp", base=base)
    lora_tools.convert(tmp_path / "a", tmp_path / "g", to="gguf", base=base, drop=["embedding"])
    assert len(open_adapter(tmp_path / "g", base=base).modules) == 2


class TestOnnxRuntime(FormatContract):
    name = "onnxruntime"

    def add_key(self, out: Path, key: str) -> None:
        adapter = onnxruntime.AdapterFormat.read_adapter(str(out))
        values = dict(adapter.get_parameters())
        values[key] = onnxruntime.OrtValue.ortvalue_from_numpy(np.ones(2, "f4"))
        new = onnxruntime.AdapterFormat()
        new.set_adapter_version(1)
        new.set_model_version(1)
        new.set_parameters(values)
        new.export_adapter(str(out))

    def read(self, root: Path, kind: str, out: Path) -> None:
        """onnxruntime loads it for a session, and reads it: x A B is what is added."""
        onnxruntime.LoraAdapter().Load(str(out))
        adapter = onnxruntime.AdapterFormat.read_adapter(str(out))
        values = {
            k: torch.from_numpy(v.numpy().copy()) for k, v in adapter.get_parameters().items()
        }
        found = {}
        for name, A in values.items():
            module, _, part = name.partition(".lora_")
            if part == "A.weight":
                found[module] = (A @ values[f"{module}.lora_B.weight"]).T
            elif part == "embedding_A":
                found[module] = A @ values[f"{module}.lora_embedding_B"]
            elif not part:
                saved = models.tensors(root / kind)[
                    "base_model.model." + name.replace(".modules_to_save.", ".")
                ]
                assert torch.equal(A, saved)
        assert_deltas(root, kind, found)


@pytest.mark.parametrize("name", ["gguf", "onnxruntime"])
def test_a_library_that_is_not_installed(
    name: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = tmp_path / "a"
    lora_tools.convert(root / "even", given, to=name, base=root / "base")
    monkeypatch.setitem(sys.modules, name, None)
    for use in (
        lambda: lora_tools.convert(root / "even", tmp_path / "b", to=name, base=root / "base"),
        lambda: lora_tools.merge(root / "base", [given], tmp_path / "m"),
    ):
        with pytest.raises(UsageError, match=rf"needs {name}; pip install 'loratools\[{name}\]'"):
            use()


def test_a_format_is_known_by_its_own_keys_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever those are called: no other list of names is asked."""
    named = {"name": "toy", "title": "Toy", "marks": ("toy.",)}
    row = dataclasses.replace(FORMATS["mlx"], knows=_is_toy, **named)  # type: ignore[arg-type]
    monkeypatch.setitem(FORMATS, "toy", row)
    assert title_of(["toy.a.down", "toy.a.up"]) == "Toy"
    assert title_of(["toy.a.down", "model.norm.weight"]) == ""
    save_file({"toy.a.down": torch.zeros(1, 1)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"this is an adapter \(Toy\)"):
        open_checkpoint(tmp_path / "a.safetensors")


def _is_toy(key: str) -> bool:
    return key.startswith("toy.")


def test_every_format_has_its_contract() -> None:
    tested = {cls.name for cls in FormatContract.__subclasses__()}
    assert tested == set(FORMATS)


def test_interleaved_rows_rotate_as_halves_do() -> None:
    """The order that llama.cpp and torchtune keep q and k in: attention scores are the same."""
    from lora_tools.linalg.recipes import compute

    heads, size, noise = 2, 8, torch.Generator().manual_seed(0)
    q, k = (torch.randn(heads * size, generator=noise, dtype=torch.float64) for _ in "qk")
    angle = torch.randn(size // 2, generator=noise, dtype=torch.float64)

    def halves(x: torch.Tensor, t: int) -> torch.Tensor:  # transformers
        one, two = x.reshape(heads, 2, size // 2).unbind(1)
        c, s = (angle * t).cos(), (angle * t).sin()
        return torch.cat((one * c - two * s, two * c + one * s), 1)

    def pairs(x: torch.Tensor, t: int) -> torch.Tensor:  # Meta's code
        z = torch.view_as_complex(x.reshape(heads, size // 2, 2).contiguous())
        return torch.view_as_real(z * torch.polar(torch.ones_like(angle), angle * t)).flatten(1)

    turned = [compute("half_to_interleaved", [x], (heads,)) for x in (q, k)]
    scores = (halves(q, 5) * halves(k, 2)).sum(1)
    torch.testing.assert_close((pairs(turned[0], 5) * pairs(turned[1], 2)).sum(1), scores)
    assert torch.equal(compute("interleaved_to_half", [turned[0]], (heads,)), q)
    assert torch.equal(uninterleave(turned[0][:, None], heads)[:, 0], q)
