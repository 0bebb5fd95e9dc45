"""Folders of sentence-transformers: every module counts, is kept, and goes into the graph."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import lora_tools
from lora_tools.errors import CheckpointError, MismatchError, QualityGateError, UnsafeInput
from lora_tools.onnx import sentence, sentence_modules
from lora_tools.onnx.tasks import Step

from . import models
from .traced import session as one_thread

pytestmark = pytest.mark.filterwarnings("ignore")
WIDTH = 32
MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
PACKAGE = "sentence_transformers.models."
DENSE = {"in_features": WIDTH, "out_features": 16, "bias": True}
IDS = torch.tensor([[2, 7, 8, 9, 3], [2, 10, 3, 0, 0], [2, 11, 12, 3, 0]])
MASK = (IDS > 0).long()
QUERY = "encoder.layer.0.attention.self.query.weight"


def module(
    root: Path, path: str, config: dict[str, Any], **tensors: torch.Tensor
) -> dict[str, str]:
    """A module's folder, and its entry of modules.json; names of tensors have _ for dots."""
    (root / path).mkdir(parents=True)
    (root / path / "config.json").write_text(json.dumps(config))
    if tensors:
        named = {name.replace("_", "."): tensor for name, tensor in tensors.items()}
        save_file(named, root / path / "model.safetensors", {"format": "pt"})
    return {"name": path, "path": path, "type": PACKAGE + path.partition("_")[2]}


def dense(seed: int, out: int = 16, inside: int = WIDTH) -> dict[str, torch.Tensor]:
    noise = torch.Generator().manual_seed(seed)
    return {
        "linear_weight": torch.randn(out, inside, generator=noise),
        "linear_bias": torch.randn(out, generator=noise),
    }


def folder(root: Path, inner: str = "", kind: str = "bert") -> Path:
    """BERT, mean pooling, a dense layer, the norm; the transformer in a folder or in the root."""
    model = models.make(kind)
    model.save_pretrained(root / inner)
    entries = [{"name": "0", "path": inner, "type": PACKAGE + "Transformer"}]
    entries += [
        module(root, "1_Pooling", {"pooling_mode_mean_tokens": True}),
        module(root, "2_Dense", DENSE, **dense(1)),
        module(root, "3_Normalize", {}),
    ]
    (root / "modules.json").write_text(json.dumps(entries))
    return root


def files(root: Path) -> dict[str, bytes]:
    found = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in found}


def tuned(base: Path, to: Path, inner: str = "", with_dense: bool = True) -> Path:
    """A copy whose query weight moved by rank 2, and perhaps its dense layer."""
    shutil.copytree(base, to)
    weights = to / inner / "model.safetensors"
    tensors = load_file(weights)
    tensors[QUERY] += 0.1 * torch.randn(WIDTH, 2) @ torch.randn(2, WIDTH)
    save_file(tensors, weights, {"format": "pt"})
    if with_dense:
        save_file(
            {k.replace("_", "."): v for k, v in dense(2).items()},
            to / "2_Dense" / "model.safetensors",
        )
    return to


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base``, ``deep`` with its transformer in a folder, ``ad`` for both."""
    root = tmp_path_factory.mktemp("sentence")
    folder(root / "base")
    folder(root / "deep", "0_Transformer")
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=4,
        target_modules=["query", "value"],
        init_lora_weights=False,
        task_type="FEATURE_EXTRACTION",
    )
    peft.get_peft_model(models.make("bert"), config).save_pretrained(root / "ad")
    return root


def adapted(made: Path) -> Any:
    model = peft.PeftModel.from_pretrained(models.make("bert"), made / "ad")
    return model.merge_and_unload().eval()


def wanted(model: Any, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the pipeline of ``folder`` gives, by hand."""
    with torch.no_grad():
        hidden = model(input_ids=IDS, attention_mask=MASK).last_hidden_state
    pooled = (hidden * MASK[..., None]).sum(1) / MASK.sum(1, keepdim=True)
    x = torch.tanh(pooled @ weights["linear.weight"].T + weights["linear.bias"])
    return x / x.norm(dim=1, keepdim=True)


def graph_gives(path: Path) -> dict[str, np.ndarray]:
    session = one_thread(path / "model.onnx")
    given = {
        "input_ids": IDS.numpy(),
        "attention_mask": MASK.numpy(),
        "token_type_ids": np.zeros_like(IDS.numpy()),
    }
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(None, given), strict=True))


# ---------------------------------------------------------------------------- comparing folders


@pytest.mark.parametrize("inner", ["", "0_Transformer"])
def test_what_changed_outside_the_transformer_counts(
    made: Path, inner: str, tmp_path: Path
) -> None:
    base = made / ("deep" if inner else "base")
    new = tuned(base, tmp_path / "tuned", inner)
    found = lora_tools.diff(base, new)
    fates = {fate.tensor: fate.action for fate in found.plan}
    assert fates["2_Dense.linear.weight"] == fates["2_Dense.linear.bias"] == "changed"
    assert fates[QUERY] == "changed"
    assert found.totals["changed"] == 3
    assert "2_Dense.linear" in {each.module for each in found.spectra}
    with pytest.raises(MismatchError, match=r"2_Dense\.linear.*outside the transformer"):
        lora_tools.extract(base, new, tmp_path / "no", rank=4)
    assert not (tmp_path / "no").exists()
    report = lora_tools.extract(base, new, tmp_path / "ad", rank=4, rest="skip")
    assert report.totals["left_out"] == 2
    keys = load_file(tmp_path / "ad" / "adapter_model.safetensors")
    assert len(keys) == 2
    assert not any("2_Dense" in key for key in keys)
    checked = lora_tools.verify(tmp_path / "ad", base=base, tuned=new)
    assert checked.totals["left_out"] == 2
    assert checked.totals["relative_error_acted_on"] < 1e-5 < checked.totals["relative_error"]


def test_a_dense_layer_that_only_the_tuned_side_has_is_not_saved(
    made: Path, tmp_path: Path
) -> None:
    new = tuned(made / "base", tmp_path / "tuned")
    plain = tmp_path / "plain"
    models.make("bert").save_pretrained(plain)
    with pytest.raises(MismatchError, match="outside the transformer"):
        lora_tools.extract(plain, new, tmp_path / "no", rank=4)
    lora_tools.extract(plain, new, tmp_path / "ad", rank=4, rest="skip")
    assert len(load_file(tmp_path / "ad" / "adapter_model.safetensors")) == 2


def test_an_unchanged_dense_layer_is_no_hindrance(made: Path, tmp_path: Path) -> None:
    new = tuned(made / "base", tmp_path / "tuned", with_dense=False)
    lora_tools.extract(made / "base", new, tmp_path / "ad", rank=4)
    lora_tools.merge(made / "base", [tmp_path / "ad"], tmp_path / "m")
    found = load_file(tmp_path / "m" / "model.safetensors")[QUERY]
    torch.testing.assert_close(found, load_file(new / "model.safetensors")[QUERY])


# --------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("inner", ["", "0_Transformer"])
def test_the_layout_stays(made: Path, inner: str, tmp_path: Path) -> None:
    base = made / ("deep" if inner else "base")
    before = files(base)
    merged = lora_tools.merge(base, [made / "ad"], tmp_path / "m", reversible=True)
    fates = {fate.tensor: str(fate.action) for fate in merged.plan}
    assert fates["2_Dense/model.safetensors"] == "copy"
    assert not any("trained on" in note for note in merged.notes)
    sidecar = f"{inner}/" * bool(inner) + "loratools-unmerge.sidecar"
    after = files(tmp_path / "m")
    assert after.keys() == before.keys() | {sidecar, "README.md"}
    same = {name for name in before if after[name] == before[name]}
    assert before.keys() - same <= {f"{inner}/" * bool(inner) + "model.safetensors"}
    model = transformers.AutoModel.from_pretrained(tmp_path / "m" / inner)
    state = adapted(made).state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[name])

    assert lora_tools.verify(tmp_path / "m", base=base, adapters=[made / "ad"]).totals["verdict"]
    lora_tools.unmerge(tmp_path / "m", [made / "ad"], tmp_path / "u")
    assert files(tmp_path / "u") == before
    lora_tools.quantize(base, tmp_path / "q")
    assert files(tmp_path / "q").keys() == before.keys() | {"README.md"}
    assert files(tmp_path / "q")["2_Dense/model.safetensors"] == before["2_Dense/model.safetensors"]
    lora_tools.verify(tmp_path / "q", against=base)
    lora_tools.dequantize(tmp_path / "q", tmp_path / "d")
    assert files(tmp_path / "d").keys() == before.keys() | {"README.md"}
    lora_tools.merge(base, [made / "ad"], tmp_path / "s", shard_size="20kB")
    assert files(tmp_path / "s")["2_Dense/model.safetensors"] == before["2_Dense/model.safetensors"]
    weights = [name for name in files(tmp_path / "s") if name.startswith(f"{inner or 'model'}")]
    assert len([name for name in weights if "-of-" in name]) > 2


@pytest.mark.parametrize("form", ["merged", "four bits"])
@pytest.mark.parametrize("fault", ["changed", "missing", "extra"])
def test_verify_sees_a_stale_module(made: Path, form: str, fault: str, tmp_path: Path) -> None:
    base, out = made / "base", tmp_path / "out"
    if form == "merged":
        lora_tools.merge(base, [made / "ad"], out)
    else:
        lora_tools.quantize(base, out)
    dense_file = out / "2_Dense" / "model.safetensors"
    tensors = load_file(dense_file)
    if fault == "changed":
        tensors["linear.bias"] += 1
    elif fault == "missing":
        del tensors["linear.bias"]
    else:
        tensors["more"] = torch.ones(2)
    save_file(tensors, dense_file)
    merged = {"base": base, "adapters": [made / "ad"]}
    with pytest.raises(QualityGateError, match=r"2_Dense\.(linear\.bias|more)"):
        lora_tools.verify(out, **(merged if form == "merged" else {"against": base}))


def test_pickles_are_copied_unread_and_compared_where_they_may_be(
    made: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(made / "base", base)
    weights = base / "2_Dense" / "model.safetensors"
    torch.save(load_file(weights), base / "2_Dense" / "pytorch_model.bin")
    weights.unlink()
    new = tuned(base, tmp_path / "tuned")
    lora_tools.merge(base, [made / "ad"], tmp_path / "m")
    name = "2_Dense/pytorch_model.bin"
    assert files(tmp_path / "m")[name] == files(base)[name]
    with pytest.raises(UnsafeInput, match=r"2_Dense/pytorch_model\.bin"):
        lora_tools.diff(base, new)
    found = lora_tools.diff(base, new, allow_pickle=True)
    assert found.totals["changed"] == 3
    with pytest.raises(UnsafeInput, match=r"2_Dense/pytorch_model\.bin"):
        lora_tools.export(base, tmp_path / "o", no_verify=True)


def test_modules_of_an_adapter_are_named(made: Path, tmp_path: Path) -> None:
    """As sentence-transformers saves it: the modules that were trained lie by the adapter."""
    ad = tmp_path / "ad"
    shutil.copytree(made / "ad", ad)
    for name in ("modules.json", "1_Pooling", "2_Dense", "3_Normalize"):
        copy = shutil.copytree if (made / "base" / name).is_dir() else shutil.copy
        copy(made / "base" / name, ad / name)
    assert not lora_tools.merge(made / "base", [ad], tmp_path / "same").notes
    save_file(dense(5), ad / "2_Dense" / "model.safetensors")
    [note] = lora_tools.merge(made / "base", [ad], tmp_path / "other").notes
    assert "(2_Dense)" in note
    models.make("bert").save_pretrained(tmp_path / "plain")
    [note] = lora_tools.merge(tmp_path / "plain", [ad], tmp_path / "bare").notes
    assert "(1_Pooling, 2_Dense, 3_Normalize)" in note


def test_a_router_is_refused_by_name(made: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(made / "deep", base)
    (base / "0_Transformer").rename(base / "moved")
    (base / "0_Transformer").mkdir()
    (base / "moved").rename(base / "0_Transformer" / "query_0_Transformer")
    with pytest.raises(CheckpointError, match=r"0_Transformer.*no weights itself"):
        lora_tools.merge(base, [made / "ad"], tmp_path / "m")


# --------------------------------------------------------------------------------------- the graph


@pytest.fixture(scope="module")
def exported(made: Path) -> Path:
    lora_tools.export(made / "base", made / "onnx")
    return made / "onnx"


def test_the_graph_is_the_whole_pipeline(made: Path, exported: Path) -> None:
    found = graph_gives(exported)
    weights = load_file(made / "base" / "2_Dense" / "model.safetensors")
    assert list(found) == ["token_embeddings", "sentence_embedding"]
    reference = wanted(models.make("bert"), weights).numpy()
    np.testing.assert_allclose(found["sentence_embedding"], reference, rtol=1e-5, atol=1e-6)
    made_here = {"model.onnx", "model.onnx_data", "README.md"}
    assert files(exported).keys() == files(made / "base").keys() | made_here
    verdict = lora_tools.verify(exported, against=made / "base").totals["verdict"]
    assert "its outputs are torch's" in verdict


def test_it_is_used_again_with_an_adapter_and_in_whole_numbers(
    made: Path, exported: Path, tmp_path: Path
) -> None:
    graph = exported / "model.onnx"
    lora_tools.export(made / "base", tmp_path / "o", adapters=[made / "ad"], graph=graph)
    weights = load_file(made / "base" / "2_Dense" / "model.safetensors")
    found = graph_gives(tmp_path / "o")["sentence_embedding"]
    np.testing.assert_allclose(found, wanted(adapted(made), weights).numpy(), rtol=1e-4, atol=1e-6)
    report = lora_tools.export(made / "base", tmp_path / "i", int8=True, graph=graph)
    fates = {fate.tensor: str(fate.action) for fate in report.plan}
    assert fates["2_Dense/model.safetensors"] == "copy"
    assert not any(name.startswith("2_Dense.") for name in fates)
    deep = lora_tools.export(made / "deep", tmp_path / "deep", graph=graph)
    assert deep.totals["verified"]
    found = graph_gives(tmp_path / "deep" / "0_Transformer")["sentence_embedding"]
    assert np.array_equal(found, graph_gives(exported)["sentence_embedding"])
    assert (tmp_path / "deep" / "modules.json").is_file()


def test_a_graph_of_half_precision_keeps_its_dense_layer(
    made: Path, exported: Path, tmp_path: Path
) -> None:
    out = tmp_path / "half"
    lora_tools.export(made / "base", out, dtype="bfloat16", graph=exported / "model.onnx")
    verdict = lora_tools.verify(out, against=made / "base").totals["verdict"]
    assert "F32 stored as BF16" in verdict
    assert "its outputs are torch's" in verdict


def test_a_graph_with_other_pooling_is_not_used_again(
    made: Path, exported: Path, tmp_path: Path
) -> None:
    other = tmp_path / "base"
    shutil.copytree(made / "base", other)
    (other / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    with pytest.raises(MismatchError, match="other modules"):
        lora_tools.export(other, tmp_path / "o", graph=exported / "model.onnx", no_verify=True)
    models.make("bert").save_pretrained(tmp_path / "plain")
    with pytest.raises(MismatchError, match="other modules"):
        lora_tools.export(
            tmp_path / "plain", tmp_path / "p", graph=exported / "model.onnx", no_verify=True
        )


def test_a_stale_dense_layer_in_a_graph_is_found(
    made: Path, exported: Path, tmp_path: Path
) -> None:
    other = tuned(made / "base", tmp_path / "other")
    shutil.copy(made / "base" / "model.safetensors", other / "model.safetensors")
    with pytest.raises(QualityGateError, match=r"2_Dense\.linear"):
        lora_tools.verify(exported, against=other, weights_only=True)


@pytest.mark.parametrize(
    ("type_", "asked", "said"),
    [
        ("custom_st.Spread", "auto", "2_Dense is custom_st.Spread"),
        ("pylate.models.Dense.Dense", "auto", "2_Dense is pylate.models.Dense.Dense"),
        (PACKAGE + "LSTM", "auto", "2_Dense is sentence_transformers.models.LSTM"),
        (PACKAGE + "Dense", "masked-lm", "its task is masked-lm"),
    ],
)
def test_what_is_not_in_the_graph_is_said(
    made: Path, type_: str, asked: str, said: str, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(made / "base", base)
    entries = json.loads((base / "modules.json").read_text())
    entries[2]["type"] = type_
    (base / "modules.json").write_text(json.dumps(entries))
    report = lora_tools.export(base, tmp_path / "o", task=asked, dry_run=True)
    [note] = report.notes
    assert note.startswith("not in the graph: 1_Pooling (Pooling), 2_Dense")
    assert said in note


def test_an_activation_that_is_none_is_refused(made: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(made / "base", base)
    config = {**DENSE, "activation_function": "torch.hub.load"}
    (base / "2_Dense" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"2_Dense: its activation function 'torch\.hub\.load'"
    ):
        lora_tools.export(base, tmp_path / "o")


# ------------------------------------------------------------------- the library's own computations


def test_modules_are_computed_as_the_library_does(tmp_path: Path) -> None:
    from sentence_transformers.sentence_transformer import modules as theirs

    torch.manual_seed(0)
    hidden = torch.randn(4, 5, WIDTH)
    mask = torch.cat([MASK, torch.tensor([[0, 0, 1, 1, 1]])])  # one padded on the left
    whole = theirs.Pooling(WIDTH, pooling_mode=list(MODES))
    modules = {
        "Pooling": [whole, *(theirs.Pooling(WIDTH, pooling_mode=mode) for mode in MODES)],
        "Dense": [
            theirs.Dense(WIDTH, 8),
            theirs.Dense(WIDTH, 8, bias=False, activation_function=nn.Identity()),
            theirs.Dense(WIDTH, WIDTH, activation_function=nn.GELU(), use_residual=True),
            theirs.Dense(WIDTH, 8, use_residual=True),
            theirs.Dense(WIDTH, 8, module_input_name="token_embeddings"),
        ],
        "LayerNorm": [theirs.LayerNorm(WIDTH)],
        "Normalize": [theirs.Normalize(), theirs.Normalize("token_embeddings")],
        "Dropout": [theirs.Dropout(0.3)],
    }
    assert set(modules) == set(sentence._KINDS) == set(sentence_modules._MADE)
    number = 0
    for kind, each in modules.items():
        for theirs_one in each:
            path, number = tmp_path / f"{number}_{kind}", number + 1
            path.mkdir()
            theirs_one.eval().save(str(path))
            start = {"token_embeddings": hidden, "sentence_embedding": hidden[:, 0]}
            step = Step(path, path.name, kind, json.loads((path / "config.json").read_text()))
            task = sentence.TASKS["features"].__class__(
                "features", "AutoModel", (), "text", steps=(step,)
            )
            model = nn.Module()
            sentence_modules.attach(model, task, weights=True)
            takes, gives = sentence.reads_and_writes(step)
            mine = model.get_submodule(step.name)
            with torch.no_grad():
                reference = theirs_one({**start, "attention_mask": mask})[gives]
                found = mine(start[takes], mask) if kind == "Pooling" else mine(start[takes])
            torch.testing.assert_close(found, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_switches_of_older_releases_name_the_modes(mode: str) -> None:
    key = next(key for key, value in sentence_modules._SWITCHES.items() if value == mode)
    assert sentence_modules.pooling_modes({key: True, "word_embedding_dimension": 3}) == (mode,)
    assert sentence_modules.pooling_modes({key: False}) == ("mean",)
    assert sentence_modules.pooling_modes({"pooling_mode": mode, key: False}) == (mode,)
