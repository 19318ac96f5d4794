"""Makes the artefact of one stage of compression or export, aside, and gives it its name once it is whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from kdctl import registry, runs
from kdctl.artefacts.measure import gates, measure
from kdctl.artefacts.yardstick import TORCH, Yardstick, open_file
from kdctl.compress.base import Compressor, Reshape
from kdctl.compress.quantize import Quantize
from kdctl.config.schema import OutputStage, TrainStage
from kdctl.data.tokenizer import FILE as TOKENIZER
from kdctl.errors import KdctlError
from kdctl.export import files, manifest
from kdctl.export.onnx import record_metadata
from kdctl.models.record import Model, load_model, released, save_model
from kdctl.quant import fake
from kdctl.runs import Run

MODEL = "model"
"""The stem of a model's files in the folder of its stage and of its artefact."""


def make(yardstick: Yardstick, stage: OutputStage | TrainStage) -> dict[str, Any]:
    """Runs one stage that leaves an artefact and returns its document, which is also the artefact's result.json.

    Three columns: `before` (the student in fp32 in PyTorch), `same_runtime` (in fp32 in the artefact's runtime) and
    `after`, all from disk. Of a training stage the model is there already. An artefact of the same name is replaced
    once the new one is whole; where anything fails, the run is as it was.
    """
    run = yardstick.run
    home = run / "artefacts"
    made_home = not home.exists()
    home.mkdir(exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=home, prefix=f".{stage.name}-"))
    try:
        os.chmod(aside, 0o755)
        source = run.stage_dir(stage.start if isinstance(stage, OutputStage) else stage.name) / MODEL
        target, file, details = _produce(yardstick, stage, load_model(source), aside)
        document = measure(yardstick, stage, source, target, aside / file, details)
        document |= {"artefact": str(Run(home / stage.name)), "variant": stage.name}
        document["gates"] = gates(document, stage, yardstick.task.primary)
        runs.write_json(aside / "result.json", document)
        if (run / TOKENIZER).is_file():
            shutil.copyfile(run / TOKENIZER, aside / TOKENIZER)
        described = manifest.describe(
            open_file(target, aside / file), target=target, variant=stage.name, model=file, source=source.parent.name,
            folder=aside,
        )  # fmt: skip
        runs.write_json(aside / manifest.NAME, described)
        if isinstance(stage, OutputStage) and target == TORCH:
            _ship_to_stage(run, stage.name, aside)
        _replace(aside, home / stage.name)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        if made_home and not any(home.iterdir()):
            home.rmdir()
        raise
    return document


def _produce(
    yardstick: Yardstick, stage: OutputStage | TrainStage, model: Model, folder: Path
) -> tuple[str, str, dict[str, Any]]:
    """Writes the stage's product into a folder: its target, the name of its file, and what the stage tells of it."""
    bench = yardstick.workbench(stage)
    if isinstance(stage, TrainStage):
        save_model(model, folder / MODEL)
        return TORCH, MODEL, {"training": runs.read_json(yardstick.run.stage_dir(stage.name) / "result.json")}
    plain = released(model)[0] if fake.is_quantized(model.net) else model  # whose record is that of the file's net
    metadata, shape = record_metadata(plain.record.to_dict()), model.record.input_shape
    arguments = stage.arguments
    if stage.kind == "export":
        target, own = arguments["target"], {name: value for name, value in arguments.items() if name != "target"}
        exporter = registry.load(registry.find("exporters", target))
        if not fake.is_quantized(model.net) or not exporter.quantizations:  # type: ignore[attr-defined]
            return _write_fp32(model, target, own, folder)
        tool: Any = Quantize(target=target)  # what learnt to be quantised is shipped so
        tool.exporter_arguments = own
    else:
        tool = registry.create("compressors", stage.kind, arguments)
    if isinstance(tool, Reshape):
        _refuse_fake_quant(model, stage)
        reshaped = tool.reshape(model, bench)
        save_model(reshaped.model, folder / MODEL)
        return TORCH, MODEL, reshaped.details
    assert isinstance(tool, Compressor)
    details = tool.convert(model, bench, shape, folder / tool.file_name, metadata, stage.max_drop)
    return tool.target, tool.file_name, details


def _write_fp32(model: Model, target: str, own: dict[str, Any], folder: Path) -> tuple[str, str, dict[str, Any]]:
    """own: the arguments of the target's exporter."""
    how = "fp32"
    if fake.is_quantized(model.net):
        model, how = released(model)[0], "fp32 of learnt weights"
    name = registry.load(registry.find("exporters", target)).file_name  # type: ignore[attr-defined]
    files.write(target, model, folder / name, record_metadata(model.record.to_dict()), arguments=own)
    return target, name, {"quantization": how}


def _refuse_fake_quant(model: Model, stage: OutputStage) -> None:
    if fake.is_quantized(model.net):
        message = f"stage {stage.name} would change the widths of a model that learnt to be quantised"
        raise KdctlError(message, hint=f"put {stage.kind} before the stage with method: qat")


def _ship_to_stage(run: Run, name: str, folder: Path) -> None:
    """The model of the artefact as that of its stage, from which later stages start."""
    home = run.stage_dir(name)
    aside = Path(tempfile.mkdtemp(dir=run.path, prefix=".stage-"))
    try:
        for file in folder.iterdir():
            if file.is_file() and (file.stem == MODEL or file.name == "result.json"):
                shutil.copyfile(file, aside / file.name)
            elif file.name == "code":
                shutil.copytree(file, aside / "code")
        os.chmod(aside, 0o755)
        home.parent.mkdir(exist_ok=True)
        _replace(aside, home)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _replace(aside: Path, final: Path) -> None:
    """Puts a finished directory in place of an older one. No half of either is ever seen under its name."""
    old = None
    if final.exists():
        old = Path(tempfile.mkdtemp(dir=final.parent, prefix=".old-")) / final.name
        os.replace(final, old)
    os.replace(aside, final)
    if old is not None:
        shutil.rmtree(old.parent, ignore_errors=True)
