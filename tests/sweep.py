"""Every architecture of ``sweep_models`` with every kind of adapter: merged and held against PEFT,
extracted and loaded in PEFT, put into four bits and run.

    python -m tests.sweep [NAME...]     writes the rows of docs/architectures.md anew
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import torch
import transformers
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

import lora_tools
from lora_tools.errors import LoraToolsError
from tests import plain_bitsandbytes  # noqa: F401 - on every machine the same

from . import models, page_table
from .sweep_models import ALL

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
NEW_ROWS = 8
# Models that read the weights of these layers without calling them, which PEFT does not stand.
_STATE_SPACE = ("falcon_h1", "falcon_mamba", "jamba", "mamba", "mamba2", "nemotron_h")
PASSED_BY = dict.fromkeys(_STATE_SPACE, ("out_proj", "dt_proj")) | {
    "wavlm": ("q_proj", "k_proj", "v_proj", "out_proj")
}
CONV1D = transformers.pytorch_utils.Conv1D


class Impossible(Exception):
    """What a cell tries is not there: no such layer, or a library that does not do it."""


class Wrong(Exception):
    """Not what the library gives."""


@contextlib.contextmanager
def theirs() -> Iterator[None]:
    """What the library does for itself; where it fails, there is nothing to compare with."""
    try:
        yield
    except Exception as error:
        raise Impossible(f"{type(error).__name__}: {error}") from error


# --- models ---------------------------------------------------------------------------------------


def base_of(name: str, folder: Path) -> Path:
    """The folder of that architecture's model, made on the first call."""
    if not folder.exists():
        torch.manual_seed(0)
        model = models.quietly(ALL[name][1]).float().eval()
        models.perturb(model, 0.1, 0)
        models.quietly(lambda: models.save(model, folder))
    return folder


def outputs(model: Any, vocabulary: int = 0) -> torch.Tensor:
    """What the model gives first for some tokens, pixels or sound; tokens from both ends of the
    vocabulary."""
    model = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    last = vocabulary or 96
    tokens = torch.cat([torch.arange(3, 10), torch.arange(last - 5, last)])[None]
    asked = inspect.signature(model.forward).parameters
    noise = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    given: dict[str, torch.Tensor] = {}
    config = model.config
    if "input_ids" in asked:
        given["input_ids"] = tokens
    if "decoder_input_ids" in asked and config.is_encoder_decoder:
        given["decoder_input_ids"] = tokens
    both = config.model_type in ("clip", "siglip")
    if "input_ids" not in asked or both:
        size = getattr(config.vision_config if both else config, "image_size", 32)
        sounds = {"features": (1, getattr(config, "num_mel_bins", 8), 40), "values": (1, 2000)}
        sounds["input_features"] = (
            (1, 40, 8) if config.model_type == "speech_to_text" else sounds["features"]
        )
        if config.model_type == "audio-spectrogram-transformer":
            sounds["values"] = (1, 24, 16)
        name = "pixel_values" if both else model.main_input_name
        shape = {"pixel_values": (1, 3, size, size), "input_features": sounds["input_features"]}
        given[name] = noise(shape.get(name, sounds["values"]))
    if config.model_type == "vit_mae":
        given["noise"] = torch.rand(1, 16, generator=torch.Generator().manual_seed(0))
    if config.model_type == "blip-2":
        given["pixel_values"] = noise((1, 3, 16, 16))
        given["input_ids"] = torch.cat([torch.full((1, 4), 90), tokens], 1)
    with torch.no_grad():
        return models.quietly(lambda: model(**given))[0]


def layers(model: Any) -> dict[str, torch.nn.Module]:
    """Modules by all the names they have."""
    return dict(model.named_modules(remove_duplicate=False))


def head_of(model: Any) -> str:
    """The output layer over a vocabulary, or over labels; "" where there is none."""
    output = model.get_output_embeddings()
    for name, module in layers(model).items():
        if module is output and isinstance(module, torch.nn.Linear):
            return name
    own = [n for n, m in model.named_children() if isinstance(m, torch.nn.Linear)]
    return own[-1] if own and output is None else ""


def embeddings_of(model: Any) -> list[str]:
    """The input embedding, by every name that a call goes through."""
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:
        return []
    if not isinstance(table, torch.nn.Embedding):
        return []
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) and module.weight is table.weight
    ]


def linears_of(model: Any) -> list[str]:
    """Linear layers but the head. (What is within ``MultiheadAttention`` is not called.)"""
    head = layers(model).get(head_of(model))
    passed_by = PASSED_BY.get(model.config.model_type, ())
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, CONV1D))
        and not isinstance(module, NonDynamicallyQuantizableLinear)
        and module is not head
        and name.rpartition(".")[2] not in passed_by
        and not type(module).__name__.endswith("Router")
    ]


# --- cells ----------------------------------------------------------------------------------------


def _targets(what: str, model: Any) -> dict[str, Any]:
    """What the config of that adapter says.

    Raises:
        Impossible: the model has no such layer.
    """
    linears, head, tables = linears_of(model), head_of(model), embeddings_of(model)
    if what == "linears":
        found: list[str] = linears
    elif what == "embedding":
        found = tables
    elif what in ("head", "head saved"):
        found = [head] if head else []
    else:
        found = linears[:2] if tables else []
    if not found:
        raise Impossible("no such layer")
    if what == "head saved":
        return {"target_modules": linears[:2], "modules_to_save": found}
    return {"target_modules": found}


def _load(folder: Path, rows: int = 0) -> Any:
    model = models.load(folder)
    if rows:
        torch.manual_seed(4)  # rows that no adapter brings are the same whenever they are made
        models.quietly(lambda: model.resize_token_embeddings(rows))
    return model


def _in_peft(base: Path, adapter: Path, what: str) -> tuple[Any, int]:
    """An adapter of PEFT's, saved, and the base with it, loaded anew; with the vocabulary's size.

    Raises:
        Impossible: the model has no such layer, or PEFT cannot do it.
    """
    rows = 0
    with theirs():
        model = _load(base)
        if what == "resized":
            rows = model.get_input_embeddings().weight.shape[0] + NEW_ROWS
            model = _load(base, rows)
    config = _targets(what, model)
    with theirs():
        torch.manual_seed(5)
        lora = peft.LoraConfig(r=2, init_lora_weights=False, **config)
        live = models.quietly(lambda: peft.get_peft_model(model, lora)).eval()
        models.perturb(live, 0.2, 3, only="modules_to_save")
        saving = {"save_embedding_layers": True} if rows else {}
        models.quietly(lambda: live.save_pretrained(adapter, **saving))
        trained = outputs(live, rows)
        fresh = models.quietly(lambda: peft.PeftModel.from_pretrained(_load(base, rows), adapter))
        if not distance(outputs(fresh.eval(), rows), trained) <= 1e-5:
            raise Impossible("PEFT reads back another model than it saved")
    return fresh, rows


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative."""
    if found.shape != wanted.shape:
        return float("inf")
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))


def _loaded(folder: Path) -> Any:
    """The model of a folder that we wrote.

    Raises:
        Wrong: it does not load, or not all of it.
    """
    config = json.loads((folder / "config.json").read_text())
    kind = getattr(transformers, config["architectures"][0])
    try:
        model, said = models.quietly(lambda: kind.from_pretrained(folder, output_loading_info=True))
    except Exception as error:
        raise Wrong(f"does not load: {type(error).__name__}: {error}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if said[what]:
            raise Wrong(f"{what} {sorted(said[what])[:2]}")
    return model.eval()


def _near(found: float, bound: float) -> None:
    if not found <= bound:
        raise Wrong(f"{found:.0e}")


def _merge(base: Path, top: Path, what: str) -> None:
    wanted, rows = _in_peft(base, top / "a", what)
    before = outputs(_load(base, rows), rows)
    expected = outputs(wanted, rows)
    lora_tools.merge(base, [top / "a"], top / "m")
    found = _loaded(top / "m")
    _near(distance(outputs(found, rows), expected), 1e-5)
    if what != "resized" and distance(before, expected) < 1e-4:
        raise Impossible("the model does not use that layer")
    if what == "linears":  # layers, too, that no output above depends on
        with theirs():
            state = models.quietly(wanted.merge_and_unload).state_dict()
        for name, tensor in found.state_dict().items():
            _near(distance(tensor, state[name]), 1e-5)


def _extract(base: Path, top: Path) -> None:
    tuned = _load(base)
    models.perturb(tuned, 0.02, 1)
    models.quietly(lambda: models.save(tuned, top / "tuned"))
    wanted = outputs(_load(top / "tuned"))
    lora_tools.extract(base, top / "tuned", top / "a", rank=512)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model = peft.PeftModel.from_pretrained(_load(base), top / "a").eval()
        except Exception as error:
            raise Wrong(f"PEFT does not load it: {type(error).__name__}: {error}") from error
    if said := [str(w.message) for w in caught if "adapter keys" in str(w.message)]:
        raise Wrong(said[0])
    _near(distance(outputs(model), wanted), 1e-4)


def _quantize(base: Path, top: Path) -> None:
    if not linears_of(_load(base)):
        raise Impossible("no such layer")
    found = torch.empty(0)
    try:
        lora_tools.quantize(base, top / "q")
        lora_tools.dequantize(top / "q", top / "d")
        found = _four_bit_outputs(_loaded(top / "q"))
        _near(distance(found, outputs(_loaded(top / "d"))), 1e-4)
    except Exception:
        # Neither can transformers; or its model is not that of the numbers: RWKV's puts its weights
        # into four bits a second time.
        if distance(found, _transformers_own(base, top / "own")) > 1e-4:
            raise


def _transformers_own(base: Path, out: Path) -> torch.Tensor:
    """Outputs of the folder that transformers makes itself.

    Raises:
        Impossible: it cannot, or puts no layer into four bits.
    """
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    with theirs():
        own = models.load(base, quantization_config=settings)
        if not any(isinstance(m, bitsandbytes.nn.Linear4bit) for m in own.modules()):
            raise Impossible("transformers puts no layer of it into four bits")
        models.quietly(lambda: own.save_pretrained(out))
        return _four_bit_outputs(models.load(out))


def _four_bit_outputs(model: Any) -> torch.Tensor:
    """In float32, so that they can be compared."""
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.compute_dtype = torch.float32
    return outputs(model)


CELLS: dict[str, Callable[[Path, Path], None]] = {
    what: functools.partial(_merge, what=what)
    for what in ("linears", "embedding", "head", "head saved", "resized")
} | {"extract": _extract, "quantize": _quantize}


def cell(name: str, what: str, base: Path, top: Path) -> str:
    """A cell of the table: of the model in ``base``, or to be made there, in an empty folder."""
    try:
        CELLS[what](base_of(name, base), top)
    except Impossible as error:
        logging.info("%s, %s: %s", name, what, error)
        return "-"
    except LoraToolsError as error:
        return f"refused: {_in_short(error, top)}"
    except Exception as error:
        return f"wrong: {_in_short(error, top)}"
    return "equal"


def _in_short(error: Exception, top: Path) -> str:
    """The first sentence, without paths."""
    said = " ".join(str(error).split())
    said = re.sub(rf"^{re.escape(str(top))}[^:]*: ", "", said)
    said = re.sub(rf"{re.escape(str(top))}[^\s,:]*", "the adapter", said)
    return said.partition(". ")[0].partition("; ")[0].replace("|", "/")


# --- the page -------------------------------------------------------------------------------------


def counted(rows: dict[str, list[str]]) -> str:
    """The sentences above the table."""
    cells = [cell.partition(":")[0] for row in rows.values() for cell in row[1:]]
    count = {verdict: cells.count(verdict) for verdict in ("equal", "refused", "wrong", "-")}
    tried = len(cells) - count["-"]
    versions = ", ".join(
        f"{lib.__name__} {lib.__version__}" for lib in (transformers, peft, bitsandbytes, torch)
    )
    return (
        f"{len(rows)} architectures, {tried} cells: {count['equal']} equal, {count['refused']} "
        f"refused, {count['wrong']} wrong; {count['-']} more do not apply. With {versions}."
    )


def main(names: list[str]) -> None:
    """Make the rows of these architectures anew, or of all."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    known = page_table.read(PAGE)
    for name in names or ALL:
        with tempfile.TemporaryDirectory() as folder:
            tops = {what: Path(folder, what) for what in CELLS}
            for top in tops.values():
                top.mkdir()
            base = Path(folder, "base")
            known[name] = [ALL[name][0], *(cell(name, what, base, tops[what]) for what in CELLS)]
        print(name, *known[name], sep=" | ", flush=True)
        rows = {name: known[name] for name in ALL if name in known}
        page_table.write(PAGE, ["architecture", "kind", *CELLS], rows, counted(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
